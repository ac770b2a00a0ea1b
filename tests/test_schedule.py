"""Which block of threads takes which tiles: all once, evenly, the heavy ones first."""

import jax.numpy as jnp
import numpy as np
import pytest

from ulysses_jax.attention import schedule


@pytest.mark.parametrize("cluster", [1, 2])
def test_tiles_are_dealt_once_each_and_evenly(cluster):
    """Tiles of heads one after the other, without `swapaxes`, leave the last blocks with 3 % more."""
    heads, tiles = 64, 64
    dealt = schedule.dealt(heads, tiles, 4 << 20, tuple(range(1, tiles + 1)), cluster=cluster).items
    assert len(dealt) == schedule.multiprocessors() // cluster
    assert sorted(dealt[dealt >= 0].tolist()) == list(range(heads * tiles))
    work = np.where(dealt >= 0, dealt % tiles + 2, 0).sum(1)
    assert work.max() <= 1.01 * work.mean()


def test_uneven_tiles_are_dealt_evenly_each_head_by_its_own_weights():
    """Weights taken by the tile alone, not by head and tile, leave some block with a fifth more."""
    heads, tiles = 4, 512
    weights = tuple(np.random.default_rng(0).integers(1, 200, heads * tiles).tolist())
    dealt = schedule.dealt(heads, tiles, 4 << 20, weights).items
    work = np.where(dealt >= 0, np.asarray(weights)[dealt] + 1, 0).sum(1)
    assert work.max() <= 1.02 * work.mean()


@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize(
    "lengths", [[32768], [4096] * 8, [16384] + [256] * 64, [512] * 64], ids=["one", "equal", "one long", "short"]
)
def test_tiles_of_documents_are_dealt_evenly_whatever_their_lengths(lengths, heads):
    """Dealing as if all took equally long leaves a block of 16 heads 7 % more than the mean where one document is long."""
    tiles = 256
    dealt = schedule.spread(heads, tiles, 4 << 20)
    assert not dealt.known
    assert sorted(dealt.items[dealt.items >= 0].tolist()) == list(range(heads * tiles))
    steps = np.sort(np.concatenate([np.arange(1, n // 128 + 1) for n in lengths]))  # of the n-th lightest
    steps = np.where(dealt.items >= 0, steps[dealt.items % tiles], -1)
    work = (steps + 1).sum(1)
    assert work.max() <= 1.06 * work.mean()
    slots = np.asarray(schedule.evened(jnp.asarray(steps)))
    assert sorted(slots.ravel().tolist()) == list(range(steps.size))
    evened = steps.ravel()[slots]
    np.testing.assert_array_equal(evened < 0, steps < 0)
    work = (evened + 1).sum(1)
    assert work.max() <= 1.015 * work.mean()


@pytest.mark.parametrize(
    ("steps", "evened"),
    [
        ([[5, 9], [2, 1], [1, 1], [6, 6]], [[1, 9], [6, 1], [5, 1], [2, 6]]),
        ([[7, -1], [1, -1], [3, 3], [4, 1]], [[7, -1], [3, -1], [1, 3], [4, 1]]),
        ([[7], [2], [3]], [[7], [2], [3]]),
    ],
    ids=["two pairs", "an exchange that would be for the worse, and no items", "an odd one"],
)
def test_the_fullest_block_and_the_emptiest_exchange_what_leaves_them_least_apart(steps, evened):
    slots = np.asarray(schedule.evened(jnp.asarray(steps)))
    assert np.asarray(steps).ravel()[slots].tolist() == evened


@pytest.mark.parametrize(("heads", "tiles", "megabytes"), [(64, 64, 4), (16, 256, 16), (8, 64, 33), (4, 256, 64)])
def test_the_order_of_tiles_keeps_the_multiprocessors_busy(heads, tiles, megabytes):
    """One head at a time leaves a fifth of the time idle for 8 heads of 64 tiles."""
    order = schedule.in_order(heads, tiles, megabytes << 20, heaviest_last=True).ravel()
    assert sorted(order.tolist()) == list(range(heads * tiles))
    assert schedule.busy(order, tuple(range(1, tiles + 1))) > 0.96


@pytest.mark.parametrize(("group", "tiles", "parts"), [(8, 64, 4), (4, 256, 1), (8, 1024, 1), (1, 64, 1), (6, 32, 6)])
def test_heads_that_read_one_kv_head_are_dealt_where_few_tiles_leave_many_kv_heads_at_work_at_once(group, tiles, parts):
    assert schedule.parts_of_group(group, tiles) == parts


@pytest.mark.parametrize(
    ("items", "tiles", "steps", "left"),
    [
        (4096, 64, 64, (4, 32)),
        (4096, 256, 256, (4, 32)),
        (8192, 1024, 1024, (8, 16)),
        (4092, 64, 64, (0, 1)),
        (100, 64, 64, (0, 1)),
    ],
)
def test_what_is_left_after_whole_rounds_is_cut_so_that_all_share_it(items, tiles, steps, left):
    """Parts that do not divide the steps, or more than there are multiprocessors, break it."""
    assert schedule.last_round(items, tiles, steps) == left


def test_tiles_that_are_left_are_nobodys():
    items = schedule.dealt(2, 70, 1 << 20, (5,) * 70, 3).items
    assert sorted(items[items >= 0].tolist()) == list(range(2 * 70 - 3))
