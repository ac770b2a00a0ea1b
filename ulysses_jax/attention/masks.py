"""What each query may see, as ranges: O(T) integers in place of a [T, S] array.

Every mask here is an intersection of up to four conditions on query t and key s:

    causal      s ≤ t
    window      t − left ≤ s ≤ t + right
    segments    query_ids[t] == key_ids[s]
    blocks      layout[n, t // block, s // block]     of head n, or of all heads

The first two are affine in t, so they cost nothing to keep. The third is looked up once: for each query the first and the
last key that carries its id. A kernel reduces these rows to the tiles it walks; whatever lies inside a live tile and is
still forbidden, it hides element by element with `visible`. Blocks leave gaps in a range, so that with them a kernel walks
lists of tiles: the ranges of tiles, less those that the layout leaves out.
"""

import dataclasses
import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

__all__ = ["BlockMask", "Mask", "TileLists", "Window", "check_block_mask", "make_mask", "normalize_window"]

FAR = 2**30  # beyond every sequence, and added to a position still an int32

type Window = int | tuple[int, int] | None
type Segments = Array | tuple[Array, Array] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockMask:
    """Block-sparse attention: query t of head n may see key s where `layout[n, t // block, s // block]`.

    `layout` is bool [1 or N, ⌈T/block⌉, ⌈S/block⌉], a numpy constant or an array, traced or not; one layout serves all heads.
    `block` is in tokens. Plain XLA takes any; on GPUs make it a multiple of 128, the tile of the kernels. Ready-made layouts
    are in `sparse.py`. Two with equal numpy layouts are equal, so a model that holds one is not recompiled.
    """

    layout: Array | np.ndarray
    block: int = dataclasses.field(default=128, metadata={"static": True})

    @property
    def density(self) -> float:
        """The share of blocks that are seen, causality and other conditions aside."""
        return float(np.mean(self.layout))

    @functools.cached_property
    def _identity(self) -> tuple:
        constant = isinstance(self.layout, np.ndarray)
        return self.block, *((self.layout.shape, self.layout.tobytes()) if constant else (id(self.layout),))

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._identity)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockMask) and (self is other or self._identity == other._identity)

    def __hash__(self) -> int:
        return self._hash


class TileLists(NamedTuple):
    """For each run of rows the tiles to walk; the first dims are heads (1: all alike) and batch (1: all alike)."""

    tiles: Array
    """[1 or N, 1 or B, runs, width] int32; of the last dim the first `counts` count"""
    counts: Array
    """[1 or N, 1 or B, runs] int32"""
    full: Array
    """[1 or N, 1 or B, runs, width] bool: the tile hides nothing"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """A prepared mask, handed to attention as `mask=` so that all layers of a step share its lookup.

    Built by `make_mask`. `key_range` holds, for each query, the half-open range of keys that carry its segment id (before
    causality and window), `query_range` the same for each key; both are None without segments.
    """

    query_length: int = dataclasses.field(metadata={"static": True})
    key_length: int = dataclasses.field(metadata={"static": True})
    is_causal: bool = dataclasses.field(metadata={"static": True})
    window: tuple[int, int] | None = dataclasses.field(metadata={"static": True})
    query_ids: Array | None = None  # [B, T] int32
    key_ids: Array | None = None  # [B, S] int32
    key_range: tuple[Array, Array] | None = None  # two of [B, T] int32
    query_range: tuple[Array, Array] | None = None  # two of [B, S] int32
    contiguous: Array | None = None  # [B] bool: every id is one run of tokens
    shift: Array | None = None  # int32: query t stands where key t + shift does; for pieces of a sequence
    blocks: BlockMask | None = None

    def visible(self, t: Array, s: Array) -> Array:
        """May query t see key s? Indices broadcast; answers [B or 1, N or 1, …], out-of-range keys are hidden.

        `t` is [bq, 1] and `s` is [1, bk] in the kernels; indices past the end are allowed.
        """
        ok = (s < self.key_length) & (t < self.query_length)
        stands = t if self.shift is None else t + self.shift
        if self.is_causal:
            ok &= s <= stands
        if self.window is not None:
            left, right = self.window
            ok &= (s >= stands - left) & (s <= stands + right)
        ok = ok[None, None]
        if self.query_ids is not None and self.key_ids is not None:
            query = self.query_ids.at[:, t].get(mode="fill", fill_value=0)
            key = self.key_ids.at[:, s].get(mode="fill", fill_value=0)
            ok = ok & (query == key)[:, None]
        if self.blocks is not None:
            layout, block = jnp.asarray(self.blocks.layout), self.blocks.block
            ok = ok & layout.at[:, t // block, s // block].get(mode="fill", fill_value=False)[None]
        return ok

    def live_keys(self) -> tuple[Array, Array]:
        """For each query the half-open range that holds all keys it sees: two of [B or 1, T] int32."""
        left, right = self.reach()
        t = jnp.arange(self.query_length, dtype=jnp.int32)[None] + (0 if self.shift is None else self.shift)
        first, end = jnp.maximum(t - left, 0), jnp.minimum(t + right + 1, self.key_length)
        return _intersect((first, end), self.key_range)

    def live_queries(self) -> tuple[Array, Array]:
        """For each key the half-open range that holds all queries which see it: two of [B or 1, S] int32."""
        left, right = self.reach()
        s = jnp.arange(self.key_length, dtype=jnp.int32)[None] - (0 if self.shift is None else self.shift)
        first, end = jnp.maximum(s - right, 0), jnp.minimum(s + left + 1, self.query_length)
        return _intersect((first, end), self.query_range)

    def tile_tables(self, rows: int, step: int) -> tuple[Array, Array]:
        """(live, full) of tiles of `rows` queries by `step` keys: two of [1 or N, 1 or B, ⌈T/rows⌉, ⌈S/step⌉] bool.

        A live tile is one in which some query sees some key; exactly so where ids are contiguous and in the same order for
        queries and keys, else some more may count as live. In a full one every query sees all keys; queries past the end
        count as the last one, keys past the end as hidden.

        Raises:
          ValueError: `rows` or `step` is neither a multiple nor a divisor of a layout's block.
        """
        layout = None if self.blocks is None else jnp.asarray(self.blocks.layout)
        return _tables(self.live_keys(), self.key_length, layout, self._block, self.contiguous, (rows, step))

    def block_lists(self, rows: int, step: int) -> TileLists:
        """For each tile of `rows` queries its live tiles of `step` keys, from right to left; see `tile_tables`."""
        return listed(*self.tile_tables(rows, step), descending=True)

    def block_lists_of_keys(self, rows: int, step: int) -> TileLists:
        """For each tile of `rows` keys its live tiles of `step` queries, from right to left.

        Full are those tiles in which every query and every key exists and sees, or is seen by, all others.

        Raises:
          ValueError: as `tile_tables`.
        """
        layout = None if self.blocks is None else jnp.asarray(self.blocks.layout).swapaxes(1, 2)
        tiles = rows, step
        live, full = _tables(self.live_queries(), self.query_length, layout, self._block, self.contiguous, tiles)
        whole = (np.arange(full.shape[2]) + 1) * rows <= self.key_length
        return listed(live, full & whole[:, None], descending=True)

    @property
    def _block(self) -> int:
        return 0 if self.blocks is None else self.blocks.block

    def reach(self) -> tuple[int, int]:
        """How far left and right of where it stands a query sees."""
        left, right = self.window or (FAR, FAR)
        return min(left, FAR), 0 if self.is_causal else min(right, FAR)


def make_mask(
    query_length: int,
    key_length: int | None = None,
    *,
    is_causal: bool = False,
    local_window_size: Window = None,
    segment_ids: Segments = None,
    block_mask: BlockMask | None = None,
    shift: Array | None = None,
) -> Mask:
    """Prepare a mask once, for every layer that uses it.

    Args:
      query_length: T.
      key_length: S; T by default.
      is_causal: query t sees keys s ≤ t, both counted from 0 (as in `jax.nn.dot_product_attention`).
      local_window_size: `(left, right)`, or one number for both: t sees t − left ≤ s ≤ t + right.
      segment_ids: integers [B, T], or a pair ([B, T], [B, S]); a query sees the keys that carry its id.
      block_mask: of blocks of queries and keys, counted from the first query and key at hand, those that see each other.
      shift: an int32 scalar, 0 by default: where queries and keys are pieces of one sequence, the position of the first query
        less that of the first key; causality and window then go by position.

    Raises:
      ValueError: a length below 1, a window that is negative, or ids or a layout whose shapes do not match T and S.
    """
    key_length = query_length if key_length is None else key_length
    for name, length in (("query_length", query_length), ("key_length", key_length)):
        if not isinstance(length, int | np.integer) or length < 1:
            raise ValueError(f"{name} is {in_words(length)}; it must be an int ≥ 1, such as q.shape[1].")
    if not isinstance(is_causal, bool | np.bool_):
        raise ValueError(f"is_causal is {in_words(is_causal)}; it must be True or False, known before compiling.")
    query_length, key_length, is_causal = int(query_length), int(key_length), bool(is_causal)
    window = normalize_window(local_window_size)
    if block_mask is not None:
        check_block_mask(block_mask, query_length, key_length)
        block_mask = BlockMask(jnp.asarray(block_mask.layout), int(block_mask.block))
    mask = Mask(
        query_length=query_length, key_length=key_length, is_causal=is_causal, window=window, shift=shift, blocks=block_mask
    )
    return mask if segment_ids is None else _with_segments(mask, segment_ids)


def _with_segments(mask: Mask, segment_ids: Segments) -> Mask:
    query_ids, key_ids = pair_of_ids(segment_ids)
    for ids, length, letter in ((query_ids, mask.query_length, "T"), (key_ids, mask.key_length, "S")):
        if ids.ndim != 2 or ids.shape[1] != length or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(
                f"segment_ids is {ids.dtype}{list(ids.shape)}; it must be integers [B, {letter}] with {letter} = {length}. "
                "Where T and S differ, pass a pair (query_ids [B, T], key_ids [B, S])."
            )
    if query_ids.shape[0] != key_ids.shape[0]:
        raise ValueError(
            f"segment_ids are for {query_ids.shape[0]} sequences of queries and {key_ids.shape[0]} of keys; both must be B."
        )
    for ids in (query_ids, key_ids):
        if isinstance(ids, np.ndarray) and ids.size and np.abs(ids).max() > np.iinfo(np.int32).max:
            raise ValueError(f"segment_ids holds {np.abs(ids).max()}; ids must fit in int32. Number the segments from 1.")
    query_ids, key_ids = (jnp.asarray(ids, jnp.int32) for ids in (query_ids, key_ids))
    return dataclasses.replace(
        mask,
        query_ids=query_ids,
        key_ids=key_ids,
        key_range=_range_of(query_ids, key_ids),
        query_range=_range_of(key_ids, query_ids),
        contiguous=_is_contiguous(query_ids) & _is_contiguous(key_ids),
    )


def check_block_mask(block_mask: BlockMask, query_length: int, key_length: int, heads: int | None = None) -> None:
    """Refuse a block mask that means nothing for T queries, S keys and, where they are known, N heads.

    Raises:
      ValueError: naming the part, its value and the relation it breaks.
    """
    if not isinstance(block_mask, BlockMask):
        raise ValueError(
            f"block_mask is {in_words(block_mask)}; it must be a BlockMask(layout, block), such as "
            f"longformer_blocks({query_length})."
        )
    layout, block = block_mask.layout, block_mask.block
    if not isinstance(block, int | np.integer) or isinstance(block, bool) or block < 1:
        raise ValueError(f"block_mask.block is {in_words(block)}; it must be an int ≥ 1, on GPUs a multiple of 128.")
    if not isinstance(layout, Array | np.ndarray) or layout.dtype != bool:
        raise ValueError(
            f"block_mask.layout is {in_words(layout)}; it must be a bool array, true where blocks see each other. "
            "Convert it with np.asarray(layout, bool)."
        )
    blocks = [-(-query_length // block), -(-key_length // block)]
    if layout.ndim != 3 or layout.shape[0] < 1 or list(layout.shape[1:]) != blocks:
        raise ValueError(
            f"block_mask.layout has shape {list(layout.shape)}; for T = {query_length}, S = {key_length}, block = {block} it "
            f"must be [1 or N, {blocks[0]}, {blocks[1]}]. Give one layout for all heads as layout[None]."
        )
    if heads is not None and layout.shape[0] not in (1, heads):
        raise ValueError(
            f"block_mask.layout is for {layout.shape[0]} heads, but q has N = {heads}; give one layout for all heads, or one "
            "for each."
        )


def normalize_window(window: Window) -> tuple[int, int] | None:
    """`(left, right)` from an int, a pair or None."""
    if window is None:
        return None
    try:
        left, right = map(operator.index, window if isinstance(window, tuple | list) else (window, window))
    except (TypeError, ValueError):  # not integers, or not two
        left = right = -1
    if left < 0 or right < 0 or isinstance(window, bool):
        raise ValueError(
            f"local_window_size is {in_words(window)}; it must be an int or (left, right), both sides ≥ 0 (0 sees only "
            "itself). Leave it out for no window."
        )
    return left, right


def pair_of_ids(segment_ids: Segments) -> tuple[Array, Array]:
    """(query ids, key ids) from one array for both, or a pair.

    Raises:
      ValueError: anything else than one array or two.
    """
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    if len(pair) != 2 or not all(isinstance(ids, Array | np.ndarray) for ids in pair):
        raise ValueError(
            f"segment_ids is {in_words(segment_ids)}; it must be an integer array [B, T], or a pair (query_ids [B, T], "
            "key_ids [B, S]). Convert lists with jnp.asarray."
        )
    return pair  # pyright: ignore[reportReturnType]


def in_words(x: object) -> str:
    """A value for an error message: type and shape of an array (traced or not), the length of a list, else its repr."""
    if isinstance(x, Array | np.ndarray) or hasattr(x, "aval"):
        return f"an array {x.dtype}{list(x.shape)}"  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(x, tuple | list) and not all(isinstance(item, int | float | str | None) for item in x):
        return f"a {type(x).__name__} of {len(x)}"
    text = repr(x)
    return text if len(text) <= 60 else f"a {type(x).__name__}"


def tile_range(first: Array, end: Array, tile: int, step: int) -> tuple[Array, Array]:
    """Reduce rows to tiles: for each run of `tile` rows the half-open range of `step`-wide tiles that any of them needs.

    `first`, `end` are [B or 1, rows] int32; answers two of [ceil(rows / tile)] int32, the union over the batch. A run in
    which no row sees anything gets an empty range.
    """
    empty = first >= end
    big = jnp.iinfo(jnp.int32).max
    pad = -first.shape[1] % tile
    lo = jnp.pad(jnp.where(empty, big, first).min(0), (0, pad), constant_values=big).reshape(-1, tile).min(1)
    hi = jnp.pad(jnp.where(empty, 0, end).max(0), (0, pad)).reshape(-1, tile).max(1)
    return jnp.where(hi > 0, lo // step, 0), -(-hi // step)


def tile_ranges(first: Array, end: Array, tile: int, step: int) -> Array:
    """For each run of `tile` rows, in tiles of `step`: first and end of those to visit, first and end of those full.

    `first`, `end` are [B or 1, rows] int32; answers [B or 1, ceil(rows / tile), 4] int32. A full tile is seen whole by every
    row of the run. The rows that pad the last run count as its last row.
    """
    empty, pad = first >= end, -first.shape[1] % tile

    def runs(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, pad)), mode="edge").reshape(x.shape[0], -1, tile)

    seen_first = runs(jnp.where(empty, jnp.iinfo(jnp.int32).max, first)).min(2)
    seen_end = runs(jnp.where(empty, 0, end)).max(2)
    visit = jnp.where(seen_end > 0, seen_first // step, 0), -(-seen_end // step)
    full = -(-runs(first).max(2) // step), runs(jnp.where(empty, 0, end)).min(2) // step
    return jnp.stack([*visit, *full], axis=-1).astype(jnp.int32)


def _tables(
    ranges: tuple[Array, Array],
    size: int,
    layout: Array | None,
    block: int,
    contiguous: Array | None,
    tiles: tuple[int, int],
) -> tuple[Array, Array]:
    """(live, full) tiles, [1 or N, 1 or B, runs, ⌈size / step⌉] bool, of rows whose half-open ranges reach up to `size`.

    Blocks smaller than a tile are looked at one by one: whether ranges and layout both leave something of the tile says nothing
    of what they leave together.
    """
    for tile in tiles:
        if layout is not None and tile % block and block % tile:
            raise ValueError(f"tiles of {tile} do not fit blocks of {block}; one must divide the other.")
    row, column = tiles if layout is None else (min(tile, block) for tile in tiles)
    at, bounds = jnp.arange(-(-size // column)), tile_ranges(*ranges, row, column)[..., None]
    live, full = ((at >= bounds[:, :, i]) & (at < bounds[:, :, i + 1]) for i in (0, 2))
    if contiguous is not None:
        full = full & contiguous[:, None, None]
    if layout is None:
        return live[None], full[None]
    allowed = layout[:, jnp.arange(live.shape[1])[:, None] * row // block, at[None] * column // block][:, None]
    live, full = live & allowed, full & allowed
    pads = [(0, 0), (0, 0), (0, -live.shape[2] % (tiles[0] // row)), (0, -live.shape[3] % (tiles[1] // column))]
    live = jnp.pad(live, pads)
    full = jnp.pad(full, [*pads[:2], pads[2], (0, 0)], constant_values=True)  # rows that are not there are no hindrance …
    full = jnp.pad(full, [*pads[:2], (0, 0), pads[3]])  # … and columns that are not there must be hidden
    apart = (*live.shape[:2], -1, tiles[0] // row, live.shape[3] // (tiles[1] // column), tiles[1] // column)
    return live.reshape(apart).any((3, 5)), full.reshape(apart).all((3, 5))


def listed(live: Array, full: Array, *, descending: bool = False) -> TileLists:
    """Tables [..., runs, width] as lists, of the same first dims."""
    width = live.shape[-1]
    at = np.arange(width, dtype=np.int32)
    tiles = jnp.argsort(jnp.where(live, at[::-1] if descending else at, width), axis=-1).astype(jnp.int32)
    return TileLists(tiles, live.sum(-1, dtype=jnp.int32), jnp.take_along_axis(full, tiles, axis=-1))


def _is_contiguous(ids: Array) -> Array:
    """[B, n] → [B]: no id comes back after another one."""
    starts = (ids[:, 1:] != ids[:, :-1]).sum(1)
    ranked = jnp.sort(ids, axis=1)
    return starts == (ranked[:, 1:] != ranked[:, :-1]).sum(1)


def _range_of(ids: Array, among: Array) -> tuple[Array, Array]:
    """For each of `ids` [B, n], the half-open range from its first to its last occurrence in `among` [B, m]."""

    def one(ids: Array, among: Array) -> tuple[Array, Array]:
        order = jnp.argsort(among, stable=True).astype(jnp.int32)
        ranked = among[order]
        left, right = jnp.searchsorted(ranked, ids, side="left"), jnp.searchsorted(ranked, ids, side="right")
        first = order.at[left].get(mode="fill", fill_value=0)
        last = order.at[jnp.maximum(right - 1, 0)].get(mode="fill", fill_value=0)
        return jnp.where(left < right, first, 0), jnp.where(left < right, last + 1, 0)

    return jax.vmap(one)(ids, among)


def _intersect(a: tuple[Array, Array], b: tuple[Array, Array] | None) -> tuple[Array, Array]:
    return a if b is None else (jnp.maximum(a[0], b[0]), jnp.minimum(a[1], b[1]))
