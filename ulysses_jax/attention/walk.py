"""What the Hopper kernels read of a mask: which tiles each block of threads walks, and which keys a row of them sees.

`schedule` deals the tiles of all heads to blocks, by numbers alone; here those numbers come from a `Mask`, and what was dealt
becomes the arrays of a `Walk`. Where the mask is known they are constants of the program, else the GPU makes them.
"""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

from ulysses_jax.attention import schedule
from ulysses_jax.attention.blocked import pad
from ulysses_jax.attention.masks import Mask, tile_ranges
from ulysses_jax.attention.schedule import Order, dealt, evened, in_order, spread

__all__ = [
    "Tile",
    "Walk",
    "hides_nothing",
    "in_clusters",
    "is_known",
    "items_of_parts",
    "key_lists",
    "most_tiles",
    "order_of_queries",
    "query_lists",
    "steps_known",
]

i32 = jnp.int32


class Walk(NamedTuple):
    """What the kernels read of a mask: for each tile the tiles to walk, and for each row the range it sees.

    A block of threads works off one row of `items`, [blocks, items of a block, 8 or 12] int32, each the batch index, the head,
    the tile, the first and end of its steps, two more, and the number of items. A cluster's two blocks share a row, of pairs of
    tiles; where the last tiles are cut (`last_round`), the part stands for the batch index. Step i visits tile i, and the two
    more are the first and end of those tiles that hide nothing; or, with a block mask, a row of `lists`, whose entry i is
    (2 · tile + whether it hides nothing) · heads + head, of `heads` that walk one list, and the first entry of that row.
    Told with `halves` an item has a ninth, by how many tiles the second half of its rows begins to see later than the first,
    and three zeros, as TMA reads 16 bytes at a time.
    """

    items: Array
    lists: Array  # [rows, width] int32; [1, 1] without a block mask
    first: Array  # [B or 1, padded rows] int32
    end: Array

    @classmethod
    def of(
        cls, rows: tuple[Array, Array], tile: int, step: int, order: Order, heads: int, lists=None, halves: bool = False
    ) -> "Walk":
        """The walk of tiles of `tile` rows, each of which sees (first, end) [B or 1, rows], by steps of `step`, in this order.

        `lists`: codes [1 or heads, 1 or B, tiles, width], and how many count [1 or heads, 1 or B, tiles]. `halves`: tell by
        how many tiles a tile's second half begins to see later than its first.
        """
        first, end = (pad(x.astype(i32), 1, tile) for x in rows)
        tiles = -(-rows[0].shape[1] // tile)
        items, taken = (order.items >= 0).sum(1, keepdims=True), np.maximum(order.items, 0)
        head, index = np.divmod(taken, tiles)
        batch, head = np.divmod(head, heads)
        pick = lambda x: x[head if x.shape[0] > 1 else 0, batch if x.shape[1] > 1 else 0, index]  # noqa: E731
        if lists is None:
            ranges, codes = tile_ranges(*rows, tile, step)[None], jnp.zeros((1, 1), i32)
        else:
            codes, steps = lists
            row = jnp.arange(steps.size, dtype=i32).reshape(steps.shape)
            ranges = jnp.stack([jnp.zeros_like(steps), steps, row, codes[..., 0]], axis=-1)
            codes = codes.reshape(-1, codes.shape[3])
        if not order.known:  # the n-th of a head's tiles is the n-th lightest
            index = pick(jnp.argsort(ranges[..., 1] - ranges[..., 0], axis=-1))
        told = [jnp.asarray(x, i32)[..., None] for x in (batch, head, index)] + [pick(ranges)]
        if halves:
            half = tile_ranges(first, end, tile // 2, step)[..., :2].reshape(-1, tiles, 2, 2)
            begins = jnp.where(half[..., 1] > half[..., 0], half[..., 0], ranges[0, :, :, :1])
            told.append(pick((begins[..., 1:] - begins[..., :1])[None]))
        told = jnp.concatenate(told, axis=2)
        if not order.known and 1 < taken.shape[1] <= schedule.EVENED:
            steps = jnp.maximum(told[..., 4] - told[..., 3], 0)
            told = told.reshape(-1, told.shape[2])[evened(jnp.where(order.items >= 0, steps, -1))]
        items = jnp.asarray(np.broadcast_to(items, taken.shape)[..., None], i32)
        told = jnp.concatenate([told[..., :7], items, told[..., 7:]], axis=2)
        return cls(jnp.pad(told, ((0, 0), (0, 0), (0, -told.shape[2] % 4))), codes, first, end)


class Tile:
    """The scalars of one item: where it lies, which tiles it walks, and whether one of them hides nothing."""

    def __init__(self, item, lists):
        # Under shard_map a value read is typed as varying while arithmetic on it is not, and a loop wants one type: compute.
        self.batch, self.head, self.index, self.first, self.end, self.full_first, self.full_end = (
            jnp.maximum(item[i], 0) for i in range(7)
        )
        self.lists = lists if lists.shape[1] > 1 else None
        self._item = item

    @property
    def skew(self):
        """By how many tiles the second half of the rows begins to see later than the first, told with `halves`."""
        return self._item[8]

    def peek(self, i):
        """The listed code of step i: to be read a step ahead, as the memory is far away; 0 without lists."""
        if self.lists is None:
            return i32(0)
        return self.full_end if isinstance(i, int) and i == 0 else jnp.maximum(self.lists.at[self.full_first][i], 0)

    def visit(self, i, code, heads: int = 1, end=None) -> tuple[Array, Array, Callable[[], Array]]:
        """(head, tile, whether it hides nothing) of step i, from right to left, starting before `end` or the last live tile."""
        if self.lists is not None:
            tile = lax.div(code, i32(2 * heads))
            return lax.rem(code, i32(heads)), tile, lambda: lax.rem(lax.div(code, i32(heads)), i32(2)) == 1
        nth = lax.div(i, i32(heads))  # heads innermost, so that i is all there is to keep in registers
        j = (self.end if end is None else end) - 1 - nth
        return lax.rem(i, i32(heads)), j, lambda: (j >= self.full_first) & (j < self.full_end)


def items_of_parts(left: int, parts: int, first_tile: int, steps: int) -> np.ndarray:
    """Items [left · parts, 1, 8], one a block, of `left` tiles from `first_tile` on, each in parts of so many steps; nothing is
    hidden.
    """
    tile, part = np.divmod(np.arange(left * parts), parts)
    first, end, zero = part * steps, (part + 1) * steps, np.zeros_like(part)
    return np.stack([part, zero, first_tile + tile, first, end, first, end, zero + 1], axis=1)[:, None].astype(np.int32)


def key_lists(mask: Mask, rows: int, step: int, least: int = 1):
    """The codes and counts by which tiles of queries walk a block mask; None without one."""
    if mask.blocks is None:
        return None
    with _evaluated_if_known(mask):
        tiles, counts, full = mask.block_lists(rows, step)
        codes = jnp.where(jnp.arange(tiles.shape[3]) < counts[..., None], 2 * tiles + full, 2 * tiles.shape[3])
        # Past its count a list names a tile past the end, all of which is hidden: `least` may be walked, one more is read.
        return jnp.pad(codes, ((0, 0), (0, 0), (0, 0), (0, least + 1)), constant_values=2 * tiles.shape[3]), counts


def query_lists(mask: Mask, rows: int, step: int, heads: int, kv_heads: int):
    """The codes and counts by which tiles of keys walk a block mask, over the queries of all heads that read them."""
    if mask.blocks is None:
        return None
    with _evaluated_if_known(mask):
        tiles, counts, full = mask.block_lists_of_keys(rows, step)
        group = heads // kv_heads
        codes = 2 * tiles + full
        if codes.shape[0] > 1:
            codes, counts = (x.reshape(kv_heads, group, *x.shape[1:]) for x in (codes, counts))
        else:  # one list for all heads
            codes, counts = (jnp.broadcast_to(x[:, None], (1, group, *x.shape[1:])) for x in (codes, counts))
        width = codes.shape[4]
        listed = jnp.arange(width) < counts[..., None]
        codes = codes * group + jnp.arange(group)[:, None, None, None]
        joined, listed = (x.transpose(0, 2, 3, 4, 1).reshape(*x.shape[:1], *x.shape[2:4], -1) for x in (codes, listed))
        packed = jnp.argsort(~listed, axis=-1, stable=True)
        codes = jnp.take_along_axis(joined, packed, axis=-1).astype(i32)
        return jnp.pad(codes, ((0, 0), (0, 0), (0, 0), (0, 1))), counts.sum(1, dtype=i32)


def _evaluated_if_known(mask: Mask):
    """Lists of a mask that is known are made once, before compiling. Where any of it is traced, all is: under `shard_map` a
    layout may vary from device to device, and only the trace can type so what it meets.
    """
    traced = any(isinstance(x, Tracer) for x in jax.tree.leaves(mask))
    return contextlib.nullcontext() if traced else jax.ensure_compile_time_eval()


def order_of_queries(
    weights: tuple[int, ...] | None, heads: int, tiles: int, key_bytes: int, left: int, cluster: int, listed: bool
) -> Order:
    """How clusters of blocks share out the forward's tiles of queries but the last `left`; `weights` are their `steps_known`,
    `key_bytes` of a head, which a tile reads anywhere if its tiles are `listed`.
    """
    if weights is None:
        if heads * tiles >= 4 * schedule.multiprocessors():
            return spread(heads, tiles, key_bytes if listed else key_bytes // schedule.PARTS_OF_DOCUMENTS)
        return Order(in_order(heads, tiles, key_bytes, heaviest_last=True).reshape(-1, 1), known=False)
    return dealt(heads, tiles, key_bytes, weights, left, cluster)


def in_clusters(mask: Mask, heads: int, T: int, rows: int) -> bool:
    """Do the tiles come in pairs that walk the same keys but for one tile at the diagonal, enough of them to be dealt?"""
    pairs, short = divmod(T, 2 * rows)
    clusters, odd = divmod(schedule.multiprocessors(), 2)
    return is_known(mask) and mask.window is None and not short and not odd and heads * pairs >= 4 * clusters


def steps_known(mask: Mask, tile: int, step: int, lists) -> tuple[int, ...] | None:
    """For each tile of queries the tiles of keys it walks (of all heads, or of each), where that is known beforehand."""
    if mask.query_ids is not None or mask.shift is not None:
        return None
    if lists is not None:
        counts = lists[1]
        return None if isinstance(counts, Tracer) else tuple(np.maximum(np.asarray(counts), 1).ravel().tolist())
    left, right = mask.reach()
    start = np.arange(0, mask.query_length, tile)
    last = np.minimum(start + tile, mask.query_length) - 1 + right
    steps = np.minimum(last, mask.key_length - 1) // step - np.maximum(start - left, 0) // step + 1
    return tuple(np.maximum(steps, 1).tolist())


def most_tiles(mask: Mask, step: int) -> int:
    """The most tiles of `step` keys of which a query can see some."""
    return min(-(-mask.key_length // step), 1 + -(-sum(mask.reach()) // step))


def hides_nothing(mask: Mask, T: int, S: int) -> bool:
    """Does every one of T queries see every one of S keys, none of them padding?"""
    whole = (mask.query_length, mask.key_length) == (T, S)
    return is_known(mask) and whole and not mask.is_causal and mask.window is None


def is_known(mask: Mask) -> bool:
    """Are a tile's steps known beforehand, and the heaviest the last of causal queries, the first of causal keys?"""
    return mask.query_ids is None and mask.shift is None and mask.blocks is None
