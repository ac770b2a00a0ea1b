"""The ranges that stand for a mask, against the mask written out: nothing visible is skipped, no tile is visited in vain."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracles import dense_blocks, dense_mask, quick_jit
from ulysses_jax.attention.masks import BlockMask, Mask, TileLists, make_mask, normalize_window, tile_range

SHAPES = ((24, 24), (17, 30), (33, 9))  # few, so that each operation compiles for few shapes
TILES = ((8, 8), (5, 3), (4, 16))


def random_options(seed: int, T: int, S: int) -> dict:
    """Causality, window and ids by chance; ids in any order, sorted, or with queries that no key answers."""
    rng = np.random.default_rng(seed)
    options: dict = {"is_causal": bool(rng.integers(2))}
    if rng.integers(2):
        options["local_window_size"] = (int(rng.integers(0, 12)), int(rng.integers(0, 12)))
    if kind := rng.integers(4):
        ids = rng.integers(0, 5, (2, max(T, S))).astype(np.int32)
        if kind == 1:
            ids.sort(axis=1)
        queries = ids[:, :T].copy()
        if kind == 3:
            queries[:, rng.random(T) < 0.3] = 7
        options["segment_ids"] = (queries, ids[:, :S])
    return options


def mask_of(T: int, S: int, options: dict[str, Any]) -> Mask:
    ids = options.get("segment_ids")
    segments: Any = ids and tuple(map(jnp.asarray, ids))
    return make_mask(T, S, **(options | {"segment_ids": segments}))


def covered(first, end, size: int) -> np.ndarray:
    """[…, size], true inside the half-open ranges."""
    at = np.arange(size)
    return (at >= np.asarray(first)[..., None]) & (at < np.asarray(end)[..., None])


def any_of_tiles(sees: np.ndarray, tile: int, step: int) -> np.ndarray:
    """[B, T, S] → [tiles of T, tiles of S], true where some element of the tile is."""
    T, S = sees.shape[1:]
    padded = np.pad(sees.any(0), ((0, -T % tile), (0, -S % step)))
    return padded.reshape(padded.shape[0] // tile, tile, -1, step).any((1, 3))


@pytest.mark.parametrize("seed", range(24))
def test_ranges_cover_what_is_visible_and_tiles_no_more_than_the_ranges(seed):
    T, S = SHAPES[seed % 3]
    options = random_options(seed, T, S)
    mask, sees = mask_of(T, S, options), dense_mask(T, S, **options)
    for rows, seen in ((mask.live_keys(), sees), (mask.live_queries(), sees.swapaxes(1, 2))):
        size = seen.shape[2]
        ranges = covered(*rows, size)
        assert not (seen & ~ranges).any()
        for tile, step in TILES:
            visited = covered(*tile_range(*rows, tile, step), -(-size // step))
            needed = any_of_tiles(ranges, tile, step)
            assert not (needed & ~visited).any()
            # The union of the rows' ranges may have a gap; one range from the first to the last tile needed bridges it.
            spans = np.logical_or.accumulate(needed, 1) & np.logical_or.accumulate(needed[:, ::-1], 1)[:, ::-1]
            np.testing.assert_array_equal(visited, spans)


@pytest.mark.parametrize("options", [{}, {"segment_ids": "packed"}], ids=["whole", "packed"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [None, (3, 0), (5, 2)])
def test_ranges_are_exact_where_documents_are_contiguous(options, is_causal, window):
    T = 24
    if options:
        options = {"segment_ids": (ids := np.sort(np.random.default_rng(0).integers(0, 5, (2, T)), 1).astype(np.int32), ids)}
    asked: dict[str, Any] = options | {"is_causal": is_causal, "local_window_size": window}
    mask, sees = mask_of(T, T, asked), dense_mask(T, T, **asked)
    np.testing.assert_array_equal(np.broadcast_to(covered(*mask.live_keys(), T), sees.shape), sees)
    np.testing.assert_array_equal(np.broadcast_to(covered(*mask.live_queries(), T), sees.shape), sees.swapaxes(1, 2))


@pytest.mark.parametrize("seed", range(12))
def test_visible_equals_the_dense_mask_and_hides_indices_past_the_end(seed):
    T, S = SHAPES[seed % 3]
    options = random_options(100 + seed, T, S)
    sees = np.pad(dense_mask(T, S, **options), ((0, 0), (0, 3), (0, 5)))
    got = mask_of(T, S, options).visible(jnp.arange(T + 3)[:, None], jnp.arange(S + 5)[None])[:, 0]
    np.testing.assert_array_equal(np.broadcast_to(got, sees.shape), sees)


def test_rows_that_see_nothing_visit_nothing():
    queries, keys = jnp.asarray([[7, 7, 7, 7, 1, 1, 2, 2]]), jnp.asarray([[1, 1, 2, 2, 2, 3, 3, 3]])
    mask = make_mask(8, 8, segment_ids=(queries, keys))
    first, end = tile_range(*mask.live_keys(), 4, 2)
    np.testing.assert_array_equal((first, end), ([0, 0], [0, 3]))
    past_the_window = make_mask(32, 8, local_window_size=(4, 0))
    first, end = tile_range(*past_the_window.live_keys(), 8, 4)
    np.testing.assert_array_equal(end - first, [2, 1, 0, 0])


@pytest.mark.parametrize(
    "mutation",
    [
        {"is_causal": True},
        {"window": (2, 4)},
        {"window": (4, 1)},
        {"key_range": "one key short"},
        {"query_range": "one query late"},
    ],
    ids=str,
)
def test_a_range_that_is_too_short_is_caught(mutation):
    """The check above can fail: each mutation hides something visible."""
    T = 24
    ids = np.sort(np.random.default_rng(1).integers(0, 3, (2, T)), 1).astype(np.int32)
    options = {"local_window_size": (4, 4), "segment_ids": (ids, ids)}
    mask, sees = mask_of(T, T, options), dense_mask(T, T, **options)
    assert mask.key_range is not None
    assert mask.query_range is not None
    match next(iter(mutation)):
        case "key_range":
            mutation = {"key_range": (mask.key_range[0], mask.key_range[1] - 1)}
        case "query_range":
            mutation = {"query_range": (mask.query_range[0] + 1, mask.query_range[1])}
    mask = dataclasses.replace(mask, **mutation)
    keys, queries = covered(*mask.live_keys(), T), covered(*mask.live_queries(), T)
    assert (sees & ~keys).any() or (sees.swapaxes(1, 2) & ~queries).any()


def random_blocks(seed: int, T: int, S: int, block: int) -> BlockMask:
    """One layout or three, of any density, none and all among them."""
    rng = np.random.default_rng(1000 + seed)
    shape = (int(rng.choice([1, 3])), -(-T // block), -(-S // block))
    return BlockMask(rng.random(shape) < rng.choice([0, 0.5, 0.9, 1]), block)


def tables(sees: np.ndarray, tile: int, step: int, *, rows_past_the_end: str) -> tuple[np.ndarray, np.ndarray]:
    """(live, full) tiles of a dense mask [B, N, T, S]; columns past the end are hidden."""
    pad = lambda axis, by: [(0, by if i == axis else 0) for i in range(4)]  # noqa: E731
    sees = np.pad(sees, pad(2, -sees.shape[2] % tile), mode="edge" if rows_past_the_end == "as the last" else "constant")
    sees = np.pad(sees, pad(3, -sees.shape[3] % step))
    cut = sees.reshape(*sees.shape[:2], sees.shape[2] // tile, tile, -1, step)
    return cut.any((3, 5)), cut.all((3, 5))


def assert_lists(lists: TileLists, live: np.ndarray, full: np.ndarray, order: int) -> None:
    """`live`, `full` [B, N, runs, width] against the lists, which may say the same for all heads or sequences at once."""
    B, N, runs, width = live.shape
    tiles, counts, whole = (np.asarray(x) for x in lists)
    assert (tiles.dtype, counts.dtype, whole.dtype) == (np.int32, np.int32, bool)
    assert tiles.shape[2:] == whole.shape[2:] == (runs, width)
    assert counts.shape == tiles.shape[:3]
    assert tiles.shape[0] in (1, N)
    assert tiles.shape[1] in (1, B)
    tiles, counts, whole = (np.broadcast_to(x, (N, B, *x.shape[2:])) for x in (tiles, counts, whole))
    for b, n, i in np.ndindex(B, N, runs):
        walked = tiles[n, b, i, : counts[n, b, i]]
        np.testing.assert_array_equal(walked, np.flatnonzero(live[b, n, i])[::order])
        np.testing.assert_array_equal(whole[n, b, i, : len(walked)], full[b, n, i, walked])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tiles", [(8, 8), (16, 4), (4, 16)], ids=str)
@pytest.mark.parametrize("block", [4, 8, 16])
def test_lists_visit_just_the_live_tiles_and_mask_just_the_partial(block, tiles, packed):
    """Both directions. Looking for life in ranges and layout a tile at a time and not a block at a time breaks it; so does
    `full` without the layout, and so do pads of rows that count as hidden, or of keys that count as seen.
    """
    for seed, (T, S) in enumerate(((37, 29), (37, 29), (33, 64), (33, 64))):
        # Without causality and window, whole tiles reach the ends.
        options = random_options(200 + seed, T, S) if seed % 2 else {}
        options.pop("segment_ids", None)
        if packed:
            ids = np.sort(np.random.default_rng(seed).integers(0, 4, (2, max(T, S))), 1).astype(np.int32)
            options["segment_ids"] = ids[:, :T], ids[:, :S]
        blocks = random_blocks(seed, T, S, block)
        sees = dense_mask(T, S, **options)[:, None] & dense_blocks(blocks.layout, block, T, S)
        mask = mask_of(T, S, options | {"block_mask": blocks})
        of_queries, of_keys = quick_jit(lambda mask: (mask.block_lists(*tiles), mask.block_lists_of_keys(*tiles)))(mask)
        assert_lists(of_queries, *tables(sees, *tiles, rows_past_the_end="as the last"), order=-1)
        assert_lists(of_keys, *tables(sees.swapaxes(2, 3), *tiles, rows_past_the_end="hidden"), order=-1)


def test_lists_without_a_layout_are_the_ranges():
    mask, sees = make_mask(40, is_causal=True), dense_mask(40, 40, is_causal=True)[:, None]
    assert_lists(mask.block_lists(8, 16), *tables(sees, 8, 16, rows_past_the_end="as the last"), order=-1)


def test_no_tile_is_full_where_ids_come_back():
    """Queries of id 1 see keys 0 … 23 but for those of id 2: a range hides them not. Broken by ignoring `contiguous`."""
    ids = jnp.asarray(np.repeat([1, 2, 1], 8)[None], jnp.int32)
    mask = make_mask(24, segment_ids=ids, block_mask=BlockMask(np.ones((1, 3, 3), bool), 8))
    live, full = mask.tile_tables(8, 8)
    assert np.asarray(live)[0, 0, 0].all()
    assert not np.asarray(full).any()


def test_tiles_that_do_not_fit_the_blocks_are_refused():
    mask = make_mask(24, block_mask=BlockMask(np.ones((1, 4, 4), bool), 6))
    with pytest.raises(ValueError, match="tiles of 8 do not fit blocks of 6; one must divide the other"):
        mask.block_lists(8, 6)


def test_block_masks_are_equal_by_value_if_numpy():
    """A hash of the object's identity, or equality of dataclasses, breaks it."""
    ones = np.ones((1, 2, 2), bool)
    assert BlockMask(ones, 8) == BlockMask(ones.copy(), 8)
    assert len({BlockMask(ones, 8), BlockMask(ones.copy(), 8), BlockMask(ones, 4), BlockMask(~ones, 8)}) == 3
    traced = BlockMask(jnp.asarray(ones), 8)
    assert traced == traced
    assert traced != BlockMask(jnp.asarray(ones), 8)


@pytest.mark.parametrize(("given", "expected"), [(None, None), (3, (3, 3)), ((2, 0), (2, 0))])
def test_a_window_is_a_pair(given, expected):
    assert normalize_window(given) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"local_window_size": -1}, r"local_window_size is -1; .* both sides ≥ 0"),
        ({"local_window_size": (3, -2)}, r"local_window_size is \(3, -2\); .* both sides ≥ 0"),
        ({"segment_ids": jnp.zeros((2, 8), jnp.int32)}, r"integers \[B, S\] with S = 12. Where T and S differ, pass a pair"),
        (
            {"segment_ids": jnp.zeros((2, 9), jnp.int32)},
            r"segment_ids is int32\[2, 9\]; it must be integers \[B, T\] with T = 8",
        ),
        ({"segment_ids": jnp.zeros((2, 8))}, r"segment_ids is float32\[2, 8\]; it must be integers"),
        ({"segment_ids": jnp.zeros(8, jnp.int32)}, r"segment_ids is int32\[8\]; it must be integers"),
        ({"block_mask": np.ones((2, 3), bool)}, r"block_mask is an array bool\[2, 3\]; it must be a BlockMask"),
        ({"block_mask": BlockMask(np.ones((1, 2, 3)), 4)}, r"layout is an array float64\[1, 2, 3\]; it must be a bool array"),
        (
            {"block_mask": BlockMask(np.ones((1, 2, 3), bool), 0)},
            r"block is 0; it must be an int ≥ 1, on GPUs a multiple of 128",
        ),
        (
            {"block_mask": BlockMask(np.ones((1, 3, 2), bool), 4)},
            r"shape \[1, 3, 2\]; for T = 8, S = 12, block = 4 it must be \[1 or N, 2, 3\]",
        ),
        ({"block_mask": BlockMask(np.ones((2, 3), bool), 4)}, r"Give one layout for all heads as layout\[None\]"),
    ],
)
def test_refuses_masks_that_mean_nothing(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_mask(8, 12, **arguments)
