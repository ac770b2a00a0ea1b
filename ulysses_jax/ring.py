"""Attention around a ring, for degrees beyond the head count: keys and values travel, queries stay.

Each of R devices on the ring holds T/R tokens; in R turns every device sees the keys and values of all, one neighbour's at a
time, and merges what each turn gives by its log-sum-exp (Ring Attention, arXiv 2310.01889). Inside a turn attention is that of
one device, so a turn whose keys a device cannot see costs it no tile.

Of a causal mask the device with the last tokens would do almost all the work. In the balanced order (`mesh.token_order`) each
device holds 2·m chunks spread over the sequence, so that causality, windows and documents fall on all alike. What a query sees
of another's keys is a range all the same, as both lie in the order of their positions: a turn is one call of a kernel, however
many the chunks.

A layer whose window is no longer than a chunk needs no ring: only the keys just before a chunk travel, once (`_halo`).
"""

import dataclasses
import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from ulysses_jax.attention import (
    Mask,
    Options,
    Window,
    attend,
    attend_backward,
    make_mask,
    normalize_window,
    resolve,
    sinks_gradient,
    with_sinks,
)
from ulysses_jax.attention.blocked import varying_like
from ulysses_jax.mesh import TILE, early_chunks, token_order

__all__ = ["halo_reach", "live_tiles", "ring_attention_shard"]


def ring_attention_shard(
    q: Array,
    k: Array,
    v: Array,
    *,
    axis_name: str,
    balanced: bool,
    is_causal: bool = False,
    scale: float | None = None,
    local_window_size: Window = None,
    segment_ids: Array | None = None,
    logits_soft_cap: float | None = None,
    sinks: Array | None = None,
    implementation: str | None = None,
    deterministic: bool = False,
) -> Array:
    """Attention over a sequence of which this device holds T/R tokens; call it inside `shard_map`.

    Args:
      q: [B, T/R, N, H], this device's chunks of the sequence in rising order.
      k: [B, T/R, K, H].
      v: [B, T/R, K, H].
      axis_name: the ring's mesh axis, of size R.
      balanced: tokens lie in the order of `mesh.token_order`; else each device holds one piece of the sequence.
      segment_ids: of the whole sequence in its own order, [B, T], the same on every device.
      is_causal, scale, local_window_size, logits_soft_cap, sinks, implementation, deterministic: as in
        `dot_product_attention`.

    Returns:
      [B, T/R, N, H].
    """
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    attention = Options(scale, logits_soft_cap, implementation, deterministic, residual=True)
    options = _Options(axis_name, balanced, is_causal, local_window_size, attention)
    chunk = _turns_here(options, q.shape[1], None).chunk
    if (reach := halo_reach(chunk, is_causal=is_causal, window=local_window_size)) is not None:
        return _halo(options, reach, q, k, v, segment_ids, sinks)
    return _ring(options, q, k, v, segment_ids, None if sinks is None else varying_like(sinks, q))


def halo_reach(chunk: int, *, is_causal: bool, window: Window) -> int | None:
    """How many keys before a chunk its queries see, where one neighbour holds them all; None where keys must go around.

    Args:
      chunk: tokens of a chunk: all that a device holds, or in the balanced order a part of it (`mesh.early_chunks`).
      is_causal, window: as in `ring_attention_shard`.
    """
    both = normalize_window(window)
    if both is None or not (is_causal or both[1] == 0):
        return None
    return both[0] if 1 <= both[0] <= chunk else None


def live_tiles(
    length: int,
    size: int,
    *,
    balanced: bool,
    is_causal: bool,
    window: Window = None,
    segment_ids: Array | None = None,
    tile: int = TILE,
) -> np.ndarray:
    """[R, turns], the tiles of `tile` queries and keys that each device of a ring walks in each turn: how even the load is.

    Counted in the masks that `ring_attention_shard` attends with, over a batch's rows; arguments as there.
    """
    options = _Options("", balanced, is_causal, window, Options(1.0))
    return np.asarray(_count_tiles(options, length // size, size, tile, segment_ids)).reshape(size, size)


class _Options(NamedTuple):
    axis: str
    balanced: bool
    is_causal: bool
    window: Window
    attention: Options


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sight(Mask):
    """What one device's queries see of another's keys: `key_range` and `query_range` hold causality and window too.

    Both lie in the order of their positions, so that a range of positions is a range of them. `shift` says that neither
    starts where the sequence does.
    """

    def visible(self, t: Array, s: Array) -> Array:
        first, end = (x.at[:, t].get(mode="fill", fill_value=0) for x in cast(tuple[Array, Array], self.key_range))
        return super().visible(t, s) & ((s >= first) & (s < end))[:, None]


class _Turns:
    """Who holds what: the chunks of each device, and what each sees of another's. `mine` is this device's place of `size`."""

    def __init__(self, options: _Options, held: int, size: int, mine: Array | int, segment_ids: Array | None):
        self.options, self.size, self.mine = options, size, mine
        if options.balanced and held % 2:
            raise ValueError(
                f"T = {held * size} gives each of {size} devices of the ring {held} tokens; the balanced order "
                f"needs an even number. Pad T to a multiple of {2 * size}, or leave balanced out."
            )
        length = held * size
        self.early = early_chunks(length, size) if options.balanced else 1
        self.pieces = 2 * self.early if options.balanced else 1
        self.chunk = held // self.pieces
        order = token_order(length, size) if options.balanced else np.arange(length)
        self.starts = order.reshape(size, self.pieces, -1)[:, :, 0].astype(np.int32)
        self.ids = None if segment_ids is None else segment_ids.astype(jnp.int32)

    def whole(self) -> Mask:
        """The mask of the sequence in its own order."""
        options = self.options
        return make_mask(
            self.size * self.pieces * self.chunk,
            is_causal=options.is_causal,
            local_window_size=options.window,
            segment_ids=self.ids,
        )

    def sight(self, whole: Mask, turn: Array | int) -> _Sight:
        """The mask of a turn, whose keys come from the device `turn` places before this one, by that of the sequence."""
        source = (self.mine - turn) % self.size
        of_queries = [self._counted(self._held(x, self.mine), source) for x in whole.live_keys()]
        of_keys = [self._counted(self._held(x, source), self.mine) for x in whole.live_queries()]
        return _Sight(
            query_length=self.pieces * self.chunk,
            key_length=self.pieces * self.chunk,
            is_causal=False,
            window=None,
            query_ids=None if self.ids is None else self._held(self.ids, self.mine),
            key_ids=None if self.ids is None else self._held(self.ids, source),
            key_range=(of_queries[0], of_queries[1]),
            query_range=(of_keys[0], of_keys[1]),
            contiguous=whole.contiguous,
            shift=jnp.int32(0),
        )

    def my_starts(self) -> Array:
        """[pieces], where the chunks of this device begin in the sequence."""
        return jnp.asarray(self.starts)[self.mine]

    def _held(self, x: Array, rank: Array | int) -> Array:
        """[B, T] in the sequence's order → [B, T/R], what a device holds of it."""
        chunks = jnp.asarray(self.starts // self.chunk)[rank]
        return x.reshape(x.shape[0], -1, self.chunk)[:, chunks].reshape(x.shape[0], -1)

    def _counted(self, position: Array, rank: Array | int) -> Array:
        """How many of a device's tokens stand before each position of 0 … T."""
        holds = np.zeros((self.size, self.size * self.pieces + 2), np.int32)  # one past the end, and a difference
        np.put_along_axis(holds, self.starts // self.chunk + 1, 1, axis=1)
        below = jnp.asarray(holds.cumsum(1, dtype=np.int32))[rank]
        chunk, into = position // self.chunk, position % self.chunk
        return self.chunk * below[chunk] + into * (below[chunk + 1] - below[chunk])

    def pass_on(self, tree):
        """Everything to the next device of the ring."""
        around = [(r, (r + 1) % self.size) for r in range(self.size)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.options.axis, around), tree)

    def before(self, pieces: Array, reach: int) -> Array:
        """[B, pieces, chunk, …] → [B, pieces, reach, …], the end of the chunk before each in the sequence.

        Before an early chunk stands an early one of the device before, and before the first device's one of the last's, a
        stride earlier; late chunks mirror that, and the last device's first late one follows its own last early one. Before
        the sequence's first chunk comes what no query may see.
        """
        ends, axis, R = pieces[:, :, -reach:], self.options.axis, self.size
        early = lax.ppermute(ends[:, : self.early], axis, [(r, (r + 1) % R) for r in range(R)])
        early = jnp.where(self.mine == 0, jnp.roll(early, 1, axis=1), early)
        if not self.options.balanced:
            return early
        late = lax.ppermute(ends[:, self.early :], axis, [(r, (r - 1) % R) for r in range(R)])
        joint = jnp.concatenate([ends[:, self.early - 1 : self.early], late[:, :-1]], axis=1)
        return jnp.concatenate([early, jnp.where(self.mine == R - 1, joint, late)], axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _count_tiles(options: _Options, held: int, size: int, tile: int, segment_ids: Array | None) -> Array:
    whole = _Turns(options, held, size, 0, segment_ids).whole()

    def of(place: Array) -> Array:
        turns = _Turns(options, held, size, place // size, segment_ids)
        return turns.sight(whole, place % size).tile_tables(tile, tile)[0].sum()

    return lax.map(of, jnp.arange(size * size, dtype=jnp.int32))


def _turns_here(options: _Options, held: int, segment_ids: Array | None) -> _Turns:
    return _Turns(options, held, lax.axis_size(options.axis), lax.axis_index(options.axis), segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(options: _Options, q: Array, k: Array, v: Array, segment_ids: Array | None, sinks: Array | None) -> Array:
    return _ring_fwd(options, q, k, v, segment_ids, sinks)[0]


def _ring_fwd(options: _Options, q: Array, k: Array, v: Array, segment_ids: Array | None, sinks: Array | None):
    turns = _turns_here(options, q.shape[1], segment_ids)
    whole = turns.whole()
    q, k, v = (checkpoint_name(x, "attention_in") for x in lax.optimization_barrier((q, k, v)))  # as in `attention/hopper.py`

    def add(turn, sums, keys, values):
        out, lse = attend(q, keys, values, turns.sight(whole, turn), options.attention)
        return _merge(sums, (out, cast(Array, lse)))

    def one_turn(carry, turn):
        sums, kv = carry
        following = turns.pass_on(kv)  # travels while this turn computes
        return (add(turn, sums, *kv), following), None

    (B, held, N, _), here = q.shape, lax.axis_index(options.axis)
    out = varying_like(jnp.zeros(q.shape, jnp.promote_types(q.dtype, jnp.float32)), q, k, v, here)
    lse = varying_like(jnp.full((B, N, held), -jnp.inf, out.dtype), q, k, v, here)
    (sums, kv), _ = lax.scan(one_turn, ((out, lse), (k, v)), jnp.arange(turns.size - 1))
    out, lse = add(turns.size - 1, sums, *kv)  # the last keys go no further
    out = out.astype(q.dtype)
    if sinks is not None:  # after the merge, and once; to the backward it is keys that came from elsewhere
        out, lse = with_sinks(out, lse, sinks)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, segment_ids, sinks, out, lse)


def _ring_bwd(options: _Options, saved, d_out: Array):
    q, k, v, segment_ids, sinks, out, lse = saved
    d_sinks = None if sinks is None else sinks_gradient(out, lse, d_out, sinks)
    turns = _turns_here(options, q.shape[1], segment_ids)
    whole = turns.whole()
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def one_turn(carry, turn):
        """A turn's keys gather their gradient from this device's queries, and take it with them on their way home."""
        d_queries, kv, d_kv = carry
        dq, *found = attend_backward(q, kv[0], kv[1], turns.sight(whole, turn), out, lse, d_out, options.attention)
        d_kv = jax.tree.map(lambda total, x: total + x.astype(wide), d_kv, tuple(found))
        return (d_queries + dq.astype(wide), *turns.pass_on((kv, d_kv))), None

    here = lax.axis_index(options.axis)
    zeros = lambda x: varying_like(jnp.zeros(x.shape, wide), q, k, v, d_out, here)  # noqa: E731
    (dq, _, (dk, dv)), _ = lax.scan(one_turn, (zeros(q), (k, v), (zeros(k), zeros(v))), jnp.arange(turns.size))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, d_sinks


_ring.defvjp(_ring_fwd, _ring_bwd)


def _halo(options: _Options, reach: int, q: Array, k: Array, v: Array, segment_ids: Array | None, sinks: Array | None) -> Array:
    """Attention with a window to the left: to each chunk come only the `reach` keys before it, from the device that holds them.

    The chunks are sequences of a batch. Without documents, where cuDNN is what runs, so that it can: `_square_halo`.
    """
    turns = _turns_here(options, q.shape[1], segment_ids)
    B, chunk, starts = q.shape[0], turns.chunk, turns.my_starts()
    q, k, v = (x.reshape(B, turns.pieces, chunk, *x.shape[2:]) for x in (q, k, v))
    k, v = (jnp.concatenate([turns.before(x, reach), x], axis=2) for x in (k, v))
    if segment_ids is None and sinks is None and _halo_by_cudnn(options, reach, q):
        return _square_halo(options, reach, starts == 0, q, k, v).reshape(B, -1, *q.shape[3:])
    ids = jnp.zeros((B, turns.size * turns.pieces * chunk), jnp.int32) if turns.ids is None else turns.ids
    nothing = jnp.iinfo(jnp.int32).min  # before the sequence's first token stands what no query sees
    behind = jnp.pad(ids, ((0, 0), (reach, 0)), constant_values=nothing)[:, starts[:, None] + jnp.arange(reach + chunk)]
    mask = make_mask(
        chunk,
        reach + chunk,
        is_causal=options.is_causal,
        local_window_size=options.window,
        segment_ids=(_joined(behind[:, :, reach:]), _joined(behind)),
        shift=jnp.int32(reach),
    )
    out, _ = attend(_joined(q), _joined(k), _joined(v), mask, options.attention._replace(residual=False), sinks)
    return out.reshape(B, -1, *out.shape[2:])


def _halo_by_cudnn(options: _Options, reach: int, q: Array) -> bool:
    chosen = resolve(q, _square_mask(options, reach, q.shape[2]), options.attention._replace(residual=False))
    return chosen == "cudnn"


def _square_mask(options: _Options, reach: int, chunk: int) -> Mask:
    """Of as many queries as keys, an even number."""
    window = cast(tuple[int, int], normalize_window(options.window))
    return make_mask(reach + chunk + (reach + chunk) % 2, is_causal=True, local_window_size=(window[0], 0))


def _square_halo(options: _Options, reach: int, is_first: Array, q: Array, k: Array, v: Array) -> Array:
    """The halo by a mask that is causal and a window and no more: `reach` queries stand before a chunk's, and are cut off.

    Of the sequence's first chunk, `is_first` of [pieces], what would stand before it goes behind it, out of causal sight. q
    is [B, pieces, chunk, N, H], as is the result; k and v have `reach` more.
    """
    chunk, mask = q.shape[2], _square_mask(options, reach, q.shape[2])
    behind, first = mask.query_length - reach - chunk, is_first[:, None, None, None]

    def square(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (reach + chunk - x.shape[2], behind), (0, 0), (0, 0)))
        return _joined(jnp.where(first, jnp.roll(x, -reach, axis=2), x))

    out, _ = attend(square(q), square(k), square(v), mask, options.attention._replace(residual=False))
    out = out.reshape(*q.shape[:2], *out.shape[1:])
    return jnp.where(first, out[:, :, :chunk], out[:, :, reach : reach + chunk])


def _joined(x: Array) -> Array:
    """[B, pieces, …] → [B · pieces, …]."""
    return x.reshape(-1, *x.shape[2:])


def _merge(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """Attention over the union of two sets of keys, from (out, lse) over each: weights exp(lse − log-sum-exp of both)."""
    lse = jnp.logaddexp(a[1], b[1])
    safe = jnp.where(lse == -jnp.inf, 0, lse)
    weighted = [out.astype(lse.dtype) * jnp.exp(part - safe).swapaxes(1, 2)[..., None] for out, part in (a, b)]
    return weighted[0] + weighted[1], lse
