"""Attention around a ring, for degrees beyond the head count: keys and values travel, queries stay.

Each of R devices on the ring holds T/R tokens; in R turns every device sees the keys and values of all, one neighbour's at a
time, and merges what each turn gives by its log-sum-exp (Ring Attention, arXiv 2310.01889). Inside a turn attention is that of
one device, so a turn whose keys a device cannot see costs it no tile.

Of a causal mask the device with the last tokens would do almost all the work. In the balanced order ("zigzag") the sequence
is cut into 2·R chunks, and device r holds chunks r and 2·R − 1 − r: an early one, which sees little, and a late one.

A layer whose window is no longer than a chunk needs no ring: only the keys just before a chunk travel, once (`_halo`).
"""

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ulysses_jax.attention import (
    Mask,
    Options,
    Window,
    attend,
    attend_backward,
    make_mask,
    normalize_window,
    sinks_gradient,
    with_sinks,
)
from ulysses_jax.attention.blocked import varying_like
from ulysses_jax.mesh import token_order

__all__ = ["halo_reach", "live_pairs", "ring_attention_shard"]


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
) -> Array:
    """Attention over a sequence of which this device holds T/R tokens; call it inside `shard_map`.

    Args:
      q: [B, T/R, N, H], this device's chunks of the sequence one after the other.
      k: [B, T/R, K, H].
      v: [B, T/R, K, H].
      axis_name: the ring's mesh axis, of size R.
      balanced: tokens lie in the order of `mesh.token_order`; else each device holds one piece of the sequence.
      segment_ids: of the whole sequence in its own order, [B, T], the same on every device.
      is_causal, scale, local_window_size, logits_soft_cap, sinks, implementation: as in `dot_product_attention`.

    Returns:
      [B, T/R, N, H].
    """
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    attention = Options(scale, logits_soft_cap, implementation, residual=True)
    options = _Options(axis_name, balanced, is_causal, local_window_size, attention)
    if (reach := halo_reach(q.shape[1], balanced=balanced, is_causal=is_causal, window=local_window_size)) is not None:
        return _halo(options, reach, q, k, v, segment_ids, sinks)
    return _ring(options, q, k, v, segment_ids, None if sinks is None else varying_like(sinks, q))


def halo_reach(held: int, *, balanced: bool, is_causal: bool, window: Window) -> int | None:
    """How many keys before a piece its queries see, where a neighbour holds them all; None where keys must go around the ring.

    Args:
      held: tokens of a device, in one piece or, balanced, in two.
      balanced, is_causal, window: as in `ring_attention_shard`.
    """
    both = normalize_window(window)
    if both is None or not (is_causal or both[1] == 0):
        return None
    return both[0] if 1 <= both[0] <= held // (2 if balanced else 1) else None


def live_pairs(length: int, size: int, *, balanced: bool, is_causal: bool, window: int | None = None) -> list[int]:
    """For each device of a ring, the (query, key) pairs that it computes: how even the load is."""
    held = token_order(length, size) if balanced else np.arange(length)
    first = np.zeros_like(held) if window is None else np.maximum(held - window, 0)
    last = held if is_causal else np.full_like(held, length - 1) if window is None else np.minimum(held + window, length - 1)
    return (last - first + 1).reshape(size, -1).sum(1).tolist()


class _Options(NamedTuple):
    axis: str
    balanced: bool
    is_causal: bool
    window: Window
    attention: Options


class _Turns:
    """Who holds what: chunk starts of a device, and the masks between two devices' chunks."""

    def __init__(self, options: _Options, length: int, segment_ids: Array | None):
        self.options, self.ids = options, segment_ids
        self.size = lax.axis_size(options.axis)
        self.mine = lax.axis_index(options.axis)
        self.pieces = 2 if options.balanced else 1
        if length % self.pieces:
            raise ValueError(
                f"T = {length * self.size} gives each of {self.size} devices of the ring {length} tokens; the balanced order "
                f"needs an even number. Pad T to a multiple of {2 * self.size}, or leave balanced out."
            )
        self.chunk = length // self.pieces

    def starts(self, rank: Array) -> list[Array]:
        """Where the chunks of a device begin in the sequence."""
        chunks = (rank, 2 * self.size - 1 - rank) if self.options.balanced else (rank,)
        return [chunk.astype(jnp.int32) * self.chunk for chunk in chunks]

    def cut(self, x: Array, axis: int = 1) -> list[Array]:
        """A device's array as its chunks."""
        return jnp.split(x, self.pieces, axis)

    def pairs(self, turn: Array | int) -> list[tuple[int, int, Mask]]:
        """(query chunk, key chunk, mask) of a turn: keys come from the device `turn` places before this one."""
        sources = self.starts((self.mine - turn) % self.size)
        return [
            (a, b, self._mask(q_start, k_start))
            for a, q_start in enumerate(self.starts(self.mine))
            for b, k_start in enumerate(sources)
        ]

    def _mask(self, q_start: Array, k_start: Array) -> Mask:
        def ids_from(start: Array) -> Array:
            return lax.dynamic_slice_in_dim(cast(Array, self.ids), start, self.chunk, 1)

        return make_mask(
            self.chunk,
            is_causal=self.options.is_causal,
            local_window_size=self.options.window,
            segment_ids=None if self.ids is None else (ids_from(q_start), ids_from(k_start)),
            shift=q_start - k_start,
        )

    def pass_on(self, tree):
        """Everything to the next device of the ring."""
        around = [(r, (r + 1) % self.size) for r in range(self.size)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.options.axis, around), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(options: _Options, q: Array, k: Array, v: Array, segment_ids: Array | None, sinks: Array | None) -> Array:
    return _ring_fwd(options, q, k, v, segment_ids, sinks)[0]


def _ring_fwd(options: _Options, q: Array, k: Array, v: Array, segment_ids: Array | None, sinks: Array | None):
    turns = _Turns(options, q.shape[1], segment_ids)
    queries = turns.cut(q)

    def add(turn, sums, keys, values):
        keys, values = turns.cut(keys), turns.cut(values)
        for a, b, mask in turns.pairs(turn):
            out, lse = attend(queries[a], keys[b], values[b], mask, options.attention)
            sums[a] = _merge(sums[a], (out, cast(Array, lse)))
        return sums

    def one_turn(carry, turn):
        sums, kv = carry
        following = turns.pass_on(kv)  # travels while this turn computes
        return (add(turn, sums, *kv), following), None

    B, _, N, H = q.shape
    out = varying_like(jnp.zeros((B, turns.chunk, N, H), jnp.promote_types(q.dtype, jnp.float32)), q, k, v, turns.mine)
    lse = varying_like(jnp.full((B, N, turns.chunk), -jnp.inf, out.dtype), q, k, v, turns.mine)
    start = ([(out, lse)] * turns.pieces, (k, v))
    (sums, kv), _ = lax.scan(one_turn, start, jnp.arange(turns.size - 1))
    sums = add(turns.size - 1, sums, *kv)  # the last keys go no further
    out = jnp.concatenate([out for out, _ in sums], axis=1).astype(q.dtype)
    lse = jnp.concatenate([lse for _, lse in sums], axis=2)
    if sinks is not None:  # after the merge, and once; to the backward it is keys that came from elsewhere
        out, lse = with_sinks(out, lse, sinks)
    return out, (q, k, v, segment_ids, sinks, out, lse)


def _ring_bwd(options: _Options, saved, d_out: Array):
    q, k, v, segment_ids, sinks, out, lse = saved
    d_sinks = None if sinks is None else sinks_gradient(out, lse, d_out, sinks)
    turns = _Turns(options, q.shape[1], segment_ids)
    queries, outs, d_outs, lses = turns.cut(q), turns.cut(out), turns.cut(d_out), turns.cut(lse, 2)
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def one_turn(carry, turn):
        """A turn's keys gather their gradient from this device's queries, and take it with them on their way home."""
        d_queries, kv, d_kv = carry
        keys, values = map(turns.cut, kv)
        d_keys, d_values = map(turns.cut, d_kv)
        for a, b, mask in turns.pairs(turn):
            dq, dk, dv = attend_backward(
                queries[a],
                keys[b],
                values[b],
                mask,
                outs[a],
                lses[a],
                d_outs[a],
                options.attention,
            )
            d_queries[a] += dq.astype(wide)
            d_keys[b] += dk.astype(wide)
            d_values[b] += dv.astype(wide)
        d_kv = jnp.concatenate(d_keys, 1), jnp.concatenate(d_values, 1)
        return (d_queries, *turns.pass_on((kv, d_kv))), None

    zeros = lambda x: varying_like(jnp.zeros(x.shape, wide), q, k, v, d_out, turns.mine)  # noqa: E731
    start = ([zeros(x) for x in queries], (k, v), (zeros(k), zeros(v)))
    (d_queries, _, (dk, dv)), _ = lax.scan(one_turn, start, jnp.arange(turns.size))
    return jnp.concatenate(d_queries, 1).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, d_sinks


_ring.defvjp(_ring_fwd, _ring_bwd)


def _halo(options: _Options, reach: int, q: Array, k: Array, v: Array, segment_ids: Array | None, sinks: Array | None) -> Array:
    """Attention with a window to the left: to each piece come only the `reach` keys before it, from the device that holds them.

    What stands before an early piece is the end of the early piece of the device before; before a late piece, the end of the
    late piece of the device after, and on the last device the end of its own early one.
    """
    turns = _Turns(options._replace(attention=options.attention._replace(residual=False)), q.shape[1], segment_ids)
    R, B = turns.size, q.shape[0]
    ids = jnp.zeros((B, R * q.shape[1]), jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)
    nothing = jnp.iinfo(jnp.int32).min  # before the sequence's first token stands what no query sees
    behind = jnp.pad(ids, ((0, 0), (reach, 0)), constant_values=nothing)

    def before(x: Array) -> list[Array]:
        ends = [piece[:, -reach:] for piece in turns.cut(x)]
        arriving = [lax.ppermute(ends[0], options.axis, [(r, r + 1) for r in range(R - 1)])]
        if options.balanced:
            late = lax.ppermute(ends[1], options.axis, [(r + 1, r) for r in range(R - 1)])
            arriving.append(jnp.where(turns.mine == R - 1, ends[0], late))
        return arriving

    outs = []
    pieces = zip(turns.starts(turns.mine), turns.cut(q), turns.cut(k), before(k), turns.cut(v), before(v), strict=True)
    for start, queries, keys, keys_before, values, values_before in pieces:
        mask = make_mask(
            turns.chunk,
            reach + turns.chunk,
            is_causal=options.is_causal,
            local_window_size=options.window,
            segment_ids=(
                lax.dynamic_slice_in_dim(ids, start, turns.chunk, 1),
                lax.dynamic_slice_in_dim(behind, start, reach + turns.chunk, 1),
            ),
            shift=jnp.int32(reach),
        )
        keys, values = jnp.concatenate([keys_before, keys], 1), jnp.concatenate([values_before, values], 1)
        outs.append(attend(queries, keys, values, mask, turns.options.attention, sinks)[0])
    return jnp.concatenate(outs, axis=1)


def _merge(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """Attention over the union of two sets of keys, from (out, lse) over each: weights exp(lse − log-sum-exp of both)."""
    lse = jnp.logaddexp(a[1], b[1])
    safe = jnp.where(lse == -jnp.inf, 0, lse)
    weighted = [out.astype(lse.dtype) * jnp.exp(part - safe).swapaxes(1, 2)[..., None] for out, part in (a, b)]
    return weighted[0] + weighted[1], lse
