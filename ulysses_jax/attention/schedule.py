"""Which block of threads of a GPU works off which tiles of attention, and in which order.

What counts is that no multiprocessor idles at the end, that what many tiles read stays in the L2 cache, and that a tile's
beginning passes under the end of the one before. Plain numpy: all of this is decided before compiling, but for `evened`, by
which the GPU mends what could not be known.
"""

import functools
import heapq
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

__all__ = ["Order", "busy", "dealt", "evened", "in_order", "last_round", "multiprocessors", "parts_of_group", "spread"]

WORTH = 40  # steps of 1.7 µs
RISES = (0.0, 0.7, 1.5, 3.0, 8.0)  # powers: how many items, and how heavy tiles may grow towards a head's heaviest
SHARED_L2 = 8 << 20  # bytes that the heads walked at one time may read over and over: fastest of 4 to 32 MB, of an H100's 50
PARTS_OF_DOCUMENTS = 4  # of a head's keys, of which a tile reads about one
EVENED = 256  # items of a block: with more what is dealt is even, and an exchange looks at the square of them


@functools.cache
def multiprocessors() -> int:
    """How many blocks of threads run at one time: this GPU's multiprocessors, or 132 without one, as an H100 SXM or H200 has.

    With more blocks than that the last would come in a round of their own: an H100 PCIe has 114, an H20 78.
    """
    return getattr(jax.local_devices()[0], "core_count", 132) if jax.default_backend() == "gpu" else 132


class Order(NamedTuple):
    """Which block of threads takes which tiles: `items` [blocks, most items of a block], −1 where a block has no more.

    An item is (batch index · heads + head) · tiles + n, where n is a tile, or, if it is not `known` beforehand how many steps
    each takes, stands for the head's n-th lightest; blocks may then exchange some (`evened`).
    """

    items: np.ndarray
    known: bool


@functools.cache
def in_order(heads: int, tiles: int, bytes_a_head: int, *, heaviest_last: bool = False, cluster: int = 1) -> np.ndarray:
    """Items in the order in which the multiprocessors take them, some heads at a time: [groups of heads, items of a group].

    The tiles of a group side by side, heaviest first. With one head at a time the heavy tiles of the last come late and the
    GPU runs half empty at the end; with too many at a time, what they read does not stay in the L2 cache. As many are taken as
    fit in there, or, if that is less, the fewest that keep the multiprocessors busy under a causal mask.
    """
    fitting = min(heads, max(1, SHARED_L2 // bytes_a_head))
    choices = [n for n in range(1, heads + 1) if heads % n == 0]
    members = max(n for n in choices if n <= fitting)
    causal = tuple(range(1, tiles + 1))
    if heads * tiles <= 64 * (multiprocessors() // cluster):  # with more, the end of the last head is short beside the whole
        shares = {n: busy(side_by_side(heads, tiles, n, True).ravel(), causal, cluster) for n in choices if n >= members}
        members = min(n for n, share in shares.items() if share > 0.99 * max(shares.values()))
    return side_by_side(heads, tiles, members, heaviest_last)


def side_by_side(heads: int, tiles: int, members: int, heaviest_last: bool) -> np.ndarray:
    order = np.arange(heads * tiles, dtype=np.int32).reshape(-1, members, tiles)
    order = (order[:, :, ::-1] if heaviest_last else order).swapaxes(1, 2)
    return order.reshape(len(order), -1)


def busy(order: np.ndarray, weights: tuple[int, ...], cluster: int = 1) -> float:
    """Which share of the time the multiprocessors work, where each takes the next item when it is done with one."""
    done = [0] * (multiprocessors() // cluster)
    for item in order.tolist():
        heapq.heapreplace(done, done[0] + weights[item % len(weights)] + 1)
    return (sum(weights) + len(weights)) * len(order) / len(weights) / len(done) / max(done)


@functools.cache
def dealt(heads: int, tiles: int, bytes_a_head: int, weights: tuple[int, ...], left: int = 0, cluster: int = 1) -> Order:
    """`in_order` dealt to as many blocks, or clusters of them, as run at one time, by the steps that items take, `weights`
    (repeated as need be).

    Each item goes to the block that is done first, where it takes as long as it has steps, and a little more. The last `left`
    tiles of the last head are nobody's.
    """
    free = [(0, block) for block in range(multiprocessors() // cluster)]
    shares = [[] for _ in free]
    for group in in_order(heads, tiles, bytes_a_head, heaviest_last=True, cluster=cluster).tolist():
        for item in sorted(group, key=lambda item: -weights[item % len(weights)]):
            if item >= heads * tiles - left:
                continue
            done, block = free[0]
            heapq.heapreplace(free, (done + weights[item % len(weights)] + 1, block))
            shares[block].append(item)
    return Order(_rows_of([items for items in shares if items]), known=True)


@functools.cache
def spread(heads: int, tiles: int, bytes_a_head: int) -> Order:
    """`in_order` dealt to as many blocks as run at one time where only the GPU will know how many steps each item takes.

    Whatever they are, from a head's lightest tile to its heaviest they rise, and a block that has no more than others of x^p,
    x = n/tiles, for each p of `RISES`, has no more of their steps either. Each item goes where the squares of blocks' shares of
    these grow least. Simulated with documents of equal lengths, of lognormal ones and of one long among many short, 30 items a
    block: the one that is done last has 3 % more than the mean, at most 6 %; with 8 items a block up to 14 %.
    """
    rises = ((np.arange(tiles) + 0.5) / tiles) ** np.array(RISES)[:, None]
    rises /= rises.sum(1, keepdims=True)
    shares = [[] for _ in range(multiprocessors())]
    had = np.zeros((multiprocessors(), len(RISES)))
    for item in in_order(heads, tiles, bytes_a_head, heaviest_last=True).ravel().tolist():
        more = rises[:, item % tiles]
        block = int((had @ more).argmin())
        had[block] += more
        shares[block].append(item)
    return Order(_rows_of([items for items in shares if items]), known=False)


def evened(steps: Array) -> Array:
    """What `spread` dealt, `steps` [blocks, items of a block], −1 where there is none, evened out by one exchange a block: for
    each slot which slot's item comes there, as an index into all slots.

    The fullest block and the emptiest, the next fullest and the next emptiest, and so on, exchange those two items that leave
    them least apart. Simulated as above, at 30 items a block the one that is done last has 0.5 % more than the mean, for 3 %.
    """
    blocks, most = steps.shape
    slots = jnp.arange(steps.size, dtype=jnp.int32).reshape(steps.shape)
    weights = jnp.where(steps >= 0, steps + 1, 0)
    sums = weights.sum(1)
    by_sum = jnp.argsort(sums)
    empty, full = by_sum[: blocks // 2], by_sum[::-1][: blocks // 2]
    gap, a, b = (sums[full] - sums[empty])[:, None, None], weights[full][:, :, None], weights[empty][:, None, :]
    apart = jnp.where((a > 0) & (b > 0), jnp.abs(gap - 2 * (a - b)), gap)  # who has no item has none to give
    best = apart.reshape(blocks // 2, -1)
    nth = best.argmin(1)
    better = best.min(1) < gap[:, 0, 0]
    i, j = nth // most, nth % most
    ours, theirs = slots[full, i], slots[empty, j]
    return slots.at[full, i].set(jnp.where(better, theirs, ours)).at[empty, j].set(jnp.where(better, ours, theirs))


def last_round(items: int, tiles: int, steps: int) -> tuple[int, int]:
    """(tiles, parts): of items that all take `steps`, how many tiles of the last head are left over when every multiprocessor
    has had as many as any other, and into how many parts of their steps they can be cut to be shared by all.

    4096 equal items are 31 rounds of 132, and 4 that would take a round of their own. (0, 1) where nothing is left, or where
    cutting it does not save the time of `WORTH` steps, which a second launch and putting the parts together take.
    """
    left = items % multiprocessors()
    if items < multiprocessors() or not 0 < left <= min(tiles, multiprocessors() // 2):
        return 0, 1
    parts = max(n for n in range(1, multiprocessors() // left + 1) if steps % n == 0)
    return (left, parts) if steps - steps // parts >= WORTH else (0, 1)


def _rows_of(blocks: list[list[int]]) -> np.ndarray:
    most = max(map(len, blocks))
    return np.array([items + [-1] * (most - len(items)) for items in blocks], np.int32)


def parts_of_group(group: int, tiles: int) -> int:
    """Into how many parts the queries' heads of a KV head are dealt, whose shares of dK and dV are added up afterwards.

    A tile of keys of few takes long where many heads read it, and while some KV heads are walked at once, what they share does
    not stay in the L2 cache. Measured on an H100 with 64 heads of 8192 tokens, a KV head for 2, 4 and 8 of them: 537, 515 and
    446 TFLOP/s; with 16 heads of 32768, for 1 and 4: 578 and 579.
    """
    most = max(1, 10 // -(-2 * multiprocessors() // tiles))
    return min(parts for parts in range(1, group + 1) if group % parts == 0 and group // parts <= most)
