"""The ranges that stand for a mask, against the mask written out: nothing visible is skipped, no tile is visited in vain."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracles import dense_mask
from ulysses_jax.attention.masks import Mask, make_mask, normalize_window, tile_range

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
    got = mask_of(T, S, options).visible(jnp.arange(T + 3)[:, None], jnp.arange(S + 5)[None])
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
    ],
)
def test_refuses_masks_that_mean_nothing(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_mask(8, 12, **arguments)
