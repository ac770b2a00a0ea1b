"""Which tiles blocks of threads are told to walk and to mask, against the dense mask and its tables."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracles import Case, dense_mask
from ulysses_jax.attention import schedule, walk
from ulysses_jax.attention.masks import BlockMask, make_mask, tile_ranges
from ulysses_jax.attention.walk import Walk, key_lists, most_tiles, steps_known


def walked(ranges: np.ndarray, tiles: int) -> tuple[np.ndarray, np.ndarray]:
    """([B, rows' tiles, columns' tiles] visited, and visited but masked) from `tile_ranges`."""
    at = np.arange(tiles)
    first, end, full_first, full_end = (ranges[..., i, None] for i in range(4))
    visited = (at >= first) & (at < end)
    return visited, visited & ~((at >= full_first) & (at < full_end))


@pytest.mark.parametrize("tile", [(128, 128), (128, 64)])
@pytest.mark.parametrize(
    ("T", "S", "options"),
    [
        (512, 512, {"is_causal": True}),
        (500, 700, {}),
        (700, 500, {"is_causal": True}),
        (640, 640, {"is_causal": True, "local_window_size": (150, 0)}),
        (640, 640, {"local_window_size": (100, 250)}),
        (640, 640, {"is_causal": True, "packed": [(5, 130, 200, 305), (640,)]}),
        (640, 640, {"is_causal": True, "local_window_size": (90, 0), "packed": [(320, 320), (1, 639)]}),
    ],
)
def test_the_walk_visits_just_the_live_tiles_and_masks_just_the_partial(T, S, options: dict[str, Any], tile):
    """Both directions. With `full` taken from `.min(2)` of first in place of `.max(2)`, a partial tile goes unmasked."""
    options = dict(options)
    if lengths := options.pop("packed", None):
        ids = np.stack([np.repeat(np.arange(len(row)), row) for row in lengths]).astype(np.int32)
        options["segment_ids"] = (ids, ids)
    sees = dense_mask(T, S, **options)
    if lengths:
        options["segment_ids"] = tuple(map(jnp.asarray, options["segment_ids"]))
    mask = make_mask(T, S, **options)
    for rows, seen in ((mask.live_keys(), sees), (mask.live_queries(), sees.swapaxes(1, 2))):
        height, width = tile
        padded = np.pad(seen, ((0, 0), (0, -seen.shape[1] % height), (0, 0)), mode="edge")
        padded = np.pad(padded, ((0, 0), (0, 0), (0, -seen.shape[2] % width)))
        blocks = padded.reshape(seen.shape[0], -1, height, padded.shape[2] // width, width)
        live, full = blocks.any((2, 4)), blocks.all((2, 4))
        visited, masked = walked(np.asarray(tile_ranges(*rows, height, width)), live.shape[2])
        np.testing.assert_array_equal(visited, live)
        np.testing.assert_array_equal(masked, live & ~full)


WALKED = {
    "packed": Case(B=2, T=1000, N=3, is_causal=True, segments="packed"),
    "blocks": Case(B=2, T=1000, N=3, block=128, is_causal=True),
    "blocks_a_head": Case(B=2, T=1000, N=3, block=128, layouts=3),
    "packed_blocks_a_head": Case(B=2, T=1000, N=3, block=128, layouts=3, segments="packed"),
}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", WALKED)
def test_items_are_the_tiles_of_each_head_of_each_sequence_with_their_steps(name, known, monkeypatch):
    """The steps of the first head or sequence for all, or tiles in their own order where steps are not `known`, break it."""
    monkeypatch.setattr(walk, "evened", lambda steps: np.arange(steps.size).reshape(steps.shape))  # tested by itself
    case, tile, step = WALKED[name], 128, 64
    documents = [np.repeat([1, 2, 3], lengths) for lengths in ([90, 710, 200], [500, 150, 350])]
    ids = None if case.segments is None else jnp.asarray(documents)
    options: dict[str, Any] = case.mask_options() | {"segment_ids": ids}
    mask, tiles = make_mask(case.T, **options), -(-case.T // tile)
    sizes = case.B * case.N, tiles, 1 << 20
    order = schedule.dealt(*sizes, tuple(range(tiles))) if known else schedule.spread(*sizes)
    lists = key_lists(mask, tile, step)
    of_mask = Walk.of(mask.live_keys(), tile, step, order, case.N, lists)
    items, codes = np.asarray(of_mask.items), np.asarray(of_mask.lists)
    live, full = (np.broadcast_to(np.asarray(x), (case.N, case.B, tiles, x.shape[3])) for x in mask.tile_tables(tile, step))
    met = {}
    for row, named in zip(items, order.items, strict=True):
        assert (row[:, 7] == (named >= 0).sum()).all()
        for (batch, head, index, first, end, *more), nth in zip(row[:, :7].tolist(), named.tolist(), strict=True):
            if nth < 0:
                continue
            here = live[head, batch, index], full[head, batch, index]
            if lists is None:
                at = np.arange(len(here[0]))
                shown = (at >= first) & (at < end), (at >= more[0]) & (at < more[1])
            else:
                listed = codes[more[0], : end - first]
                assert more[1] == codes[more[0], 0]
                shown = tuple(
                    np.isin(np.arange(len(here[0])), listed[chosen] // 2) for chosen in (listed >= 0, listed % 2 == 1)
                )
            np.testing.assert_array_equal(shown[0], here[0])
            np.testing.assert_array_equal(shown[1] & here[0], here[1] & here[0])
            met[batch, head, nth % tiles] = index, end - first
    assert len(met) == len({(*key[:2], index) for key, (index, _) in met.items()}) == case.B * case.N * tiles
    for batch, head in np.ndindex(case.B, case.N):
        found = [met[batch, head, n] for n in range(tiles)]
        assert [index for index, _ in found] == list(range(tiles)) if known else sorted(found, key=lambda x: x[1]) == found


@pytest.mark.parametrize("name", [name for name in WALKED if "packed" in name])
def test_blocks_exchange_items_whole_and_keep_their_number(name, monkeypatch, multiprocessors):
    """Counts that move with the items break it, as does an exchange that gives one item to two."""
    case = WALKED[name]
    mask, sizes = make_mask(case.T, **case.mask_options()), (case.B * case.N, 8, 1 << 20)
    multiprocessors(5)
    order, lists = schedule.spread(*sizes), key_lists(mask, 128, 64)
    found = [np.asarray(Walk.of(mask.live_keys(), 128, 64, order, case.N, lists).items)]
    monkeypatch.setattr(walk, "evened", lambda steps: np.arange(steps.size).reshape(steps.shape))
    found.append(np.asarray(Walk.of(mask.live_keys(), 128, 64, order, case.N, lists).items))
    evened, dealt = found
    np.testing.assert_array_equal(evened[:, :, 7], dealt[:, :, 7])
    assert (evened != dealt).any()
    evened, dealt = (sorted(map(tuple, items[order.items >= 0][:, :7].tolist())) for items in found)
    assert evened == dealt


@pytest.mark.parametrize(
    ("lengths", "keys", "later"),
    [([168, 150, 122, 100, 100], [0, 1, 2, 3, 4], 1), ([212, 126, 132, 130, 40], [4, 3, 2, 1, 0], -1)],
    ids=["in_order", "backwards"],
)
def test_halves_of_a_tile_are_told_by_how_much_one_begins_to_see_later(lengths, keys, later):
    """Of documents that end within a tile, whose last rows see nothing of what its first do, or the other way round."""
    lengths, T = np.array(lengths), 640
    ids = np.repeat(np.arange(5), lengths)[None], np.repeat(keys, lengths[keys])[None]
    mask = make_mask(T, segment_ids=(jnp.asarray(ids[0]), jnp.asarray(ids[1])))
    order = schedule.Order(np.arange(5).reshape(-1, 1), known=True)
    items = np.asarray(Walk.of(mask.live_keys(), 128, 64, order, 1, halves=True).items)[:, 0]
    seen = dense_mask(T, T, segment_ids=ids)[0].reshape(10, 64, 10, 64).any((1, 3))
    first = seen.argmax(1).reshape(5, 2)
    np.testing.assert_array_equal(items[:, 8], first[:, 1] - first[:, 0])
    assert (later * items[:, 8] > 0).any()
    np.testing.assert_array_equal(items[:, 9:], 0)


def test_a_half_that_sees_nothing_begins_with_the_other():
    """Rows past the end, which would begin at the first tile."""
    mask = make_mask(192, segment_ids=jnp.repeat(jnp.arange(2), 96)[None])
    order = schedule.Order(np.arange(2).reshape(-1, 1), known=True)
    items = np.asarray(Walk.of(mask.live_keys(), 128, 64, order, 1, halves=True).items)[:, 0]
    np.testing.assert_array_equal(items[:, 3], [0, 1])
    np.testing.assert_array_equal(items[:, 8], [0, 0])


@pytest.mark.parametrize(
    ("T", "S", "options"),
    [
        (600, 600, {"is_causal": True}),
        (300, 700, {}),
        (600, 600, {"is_causal": True, "local_window_size": (128, 300)}),
        (600, 600, {"is_causal": True, "local_window_size": (129, 0)}),
        (600, 600, {"local_window_size": (0, 0)}),
        (600, 500, {"local_window_size": (127, 128)}),
        (400, 300, {"local_window_size": (2**31, 0)}),
    ],
)
def test_no_query_sees_more_tiles_than_are_said_to_be_most(T, S, options: dict[str, Any]):
    """One less breaks it: one query at least sees so many, where queries reach so far."""
    mask = make_mask(T, S, **options)
    seen = np.pad(dense_mask(T, S, **options)[0], ((0, 0), (0, -S % 128))).reshape(T, -1, 128).any(2)
    assert seen.sum(1).max() == most_tiles(mask, 128)


@pytest.mark.parametrize("step", [64, 128])
@pytest.mark.parametrize(
    ("T", "S", "options"),
    [
        (1000, 1000, {"is_causal": True}),
        (1000, 700, {}),
        (1000, 300, {"is_causal": True, "local_window_size": (200, 9)}),
        (700, 1000, {"local_window_size": (70, 250)}),
        (1000, 1000, {"is_causal": True, "block_mask": BlockMask(np.random.default_rng(1).random((3, 8, 8)) < 0.5, 128)}),
    ],
)
def test_steps_known_before_compiling_are_those_that_are_walked(T, S, options: dict[str, Any], step):
    """A right side of the window that counts in a causal mask, or the first head's lists for all, breaks it."""
    mask = make_mask(T, S, **options)
    live, _ = mask.tile_tables(128, step)
    steps = steps_known(mask, 128, step, key_lists(mask, 128, step))
    np.testing.assert_array_equal(np.asarray(steps), np.maximum(np.asarray(live).sum(3), 1).ravel())
