"""Flash attention in plain XLA: memory linear in T, forward and backward, on any device.

Queries are walked in tiles; each visits only the key tiles in its live range (`masks.tile_range`) and keeps a running
maximum and sum (online softmax, arXiv 1805.02867; FlashAttention, arXiv 2205.14135). The backward recomputes the
probabilities from the saved log-sum-exp, one key tile at a time, and adds into dQ as it goes: five products a tile.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from ulysses_jax.attention.masks import Mask, tile_range

__all__ = ["blocked_attention", "blocked_attention_backward", "varying_like"]

BLOCK = 512  # rows of a tile; large enough for the matrix units, small enough for a cache


class _Options(NamedTuple):
    scale: float
    soft_cap: float | None
    block_q: int
    block_k: int


def blocked_attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    *,
    scale: float,
    logits_soft_cap: float | None = None,
    block_q: int = BLOCK,
    block_k: int = BLOCK,
) -> tuple[Array, Array]:
    """softmax(cap(q kᵀ · scale)) v, and the log-sum-exp of the logits; both differentiable.

    q [B, T, N, H], k and v [B, S, K, H] → out [B, T, N, H] in q's dtype, lse [B, N, T] in float32 (float64 for float64
    inputs), natural log. A row that sees no key is zero, its lse −inf.
    """
    options = _Options(scale, logits_soft_cap, min(block_q, q.shape[1]), min(block_k, k.shape[1]))
    return _attention(options, q, k, v, mask)


def blocked_attention_backward(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    out: Array,
    lse: Array,
    d_out: Array,
    *,
    scale: float,
    logits_soft_cap: float | None = None,
) -> tuple[Array, Array, Array]:
    """The share of these keys in (dQ, dK, dV), where `out` and `lse` may come from more keys than these."""
    options = _Options(scale, logits_soft_cap, min(BLOCK, q.shape[1]), min(BLOCK, k.shape[1]))
    return _backward(options, q, k, v, mask, out, lse, d_out, jnp.zeros_like(lse))


def varying_like(x: Array, *like: Array) -> Array:
    """`x` typed as varying over every manual mesh axis that any of `like` varies over (needed for loop carries)."""
    axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in like))
    missing = axes - jax.typeof(x).manual_axis_type.varying
    return lax.pcast(x, tuple(missing), to="varying") if missing else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: _Options, q: Array, k: Array, v: Array, mask: Mask) -> tuple[Array, Array]:
    return _forward(options, q, k, v, mask)


def _attention_fwd(options: _Options, q: Array, k: Array, v: Array, mask: Mask):
    q, k, v = (checkpoint_name(x, "attention_in") for x in (q, k, v))
    out, lse = _forward(options, q, k, v, mask)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (q, k, v, mask, out, lse)


def _attention_bwd(options: _Options, saved, cotangents):
    q, k, v, mask, out, lse = saved
    d_out, d_lse = cotangents
    return *_backward(options, q, k, v, mask, out, lse, d_out, d_lse), None


_attention.defvjp(_attention_fwd, _attention_bwd)


class _Tiles:
    """The arrays cut into tiles, heads grouped by the KV head they read, and the products between tiles."""

    def __init__(self, options: _Options, q: Array, k: Array, v: Array, mask: Mask):
        self.options, self.mask = options, mask
        self.like = (q, k, v, *jax.tree.leaves(mask))
        self.batch, self.length, self.heads, self.head_dim = q.shape
        self.kv_heads = k.shape[2]
        self.group = self.heads // self.kv_heads
        self.dtype = jnp.promote_types(q.dtype, jnp.float32)
        self.precision = lax.Precision.HIGHEST if q.dtype == self.dtype else lax.Precision.DEFAULT
        self.q, self.k, self.v = self.queries(q), self.keys(k), self.keys(v)
        self.num_q, self.num_k = self.q.shape[0], self.k.shape[0]

    def queries(self, x: Array) -> Array:
        """[B, T, N, H] → [tiles, B, bq, K, G, H]."""
        x = _tiles(x, self.options.block_q)
        return x.reshape(*x.shape[:3], self.kv_heads, self.group, self.head_dim)

    def keys(self, x: Array) -> Array:
        """[B, S, K, H] → [tiles, B, bk, K, H]."""
        return _tiles(x, self.options.block_k)

    def join_queries(self, x: Array) -> Array:
        """[tiles, B, bq, K, G, H] → [B, T, N, H]."""
        return x.swapaxes(0, 1).reshape(self.batch, -1, self.heads, self.head_dim)[:, : self.length]

    def join_keys(self, x: Array) -> Array:
        """[tiles, B, bk, K, H] → [B, S, K, H]."""
        return x.swapaxes(0, 1).reshape(self.batch, -1, self.kv_heads, self.head_dim)[:, : self.mask.key_length]

    def rows(self, x: Array) -> Array:
        """[B, N, T] → [tiles, B, K, G, bq]."""
        x = _tiles(x.transpose(0, 2, 1), self.options.block_q)
        return x.reshape(*x.shape[:3], self.kv_heads, self.group).transpose(0, 1, 3, 4, 2)

    def full(self, shape: tuple[int, ...], value: float) -> Array:
        return varying_like(jnp.full(shape, value, self.dtype), *self.like)

    def einsum(self, equation: str, a: Array, b: Array) -> Array:
        return jnp.einsum(equation, a, b, precision=self.precision, preferred_element_type=self.dtype)

    def logits(self, i: Array, j: Array) -> tuple[Array, Array]:
        """Capped logits [B, K, G, bq, bk] of query tile i against key tile j, and which of them count."""
        bq, bk = self.options.block_q, self.options.block_k
        x = self.options.scale * self.einsum("bqkgh,bskh->bkgqs", self.q[i], self.k[j])
        if self.options.soft_cap is not None:
            x = self.options.soft_cap * jnp.tanh(x / self.options.soft_cap)
        t, s = i * bq + jnp.arange(bq)[:, None], j * bk + jnp.arange(bk)[None, :]
        return x, self.mask.visible(t, s)[:, None, None]


def _forward(options: _Options, q: Array, k: Array, v: Array, mask: Mask) -> tuple[Array, Array]:
    tiles = _Tiles(options, q, k, v, mask)
    first, end = tile_range(*mask.live_keys(), options.block_q, options.block_k)
    rows = (tiles.batch, tiles.kv_heads, tiles.group, options.block_q)

    def one_query_tile(i: Array) -> tuple[Array, Array]:
        def visit(j, carry):
            acc, top, total = carry
            x, visible = tiles.logits(i, j)
            new_top = jnp.maximum(top, jnp.where(visible, x, -jnp.inf).max(-1))
            safe_top = jnp.where(new_top == -jnp.inf, 0, new_top)
            p = jnp.where(visible, jnp.exp(x - safe_top[..., None]), 0)
            fade = jnp.exp(top - safe_top)
            acc = acc * fade[..., None] + tiles.einsum("bkgqs,bskh->bkgqh", p.astype(q.dtype), tiles.v[j])
            return acc, new_top, total * fade + p.sum(-1)

        start = tiles.full((*rows, tiles.head_dim), 0), tiles.full(rows, -jnp.inf), tiles.full(rows, 0)
        acc, top, total = lax.fori_loop(first[i], end[i], visit, start)
        seen = total > 0
        safe = jnp.where(seen, total, 1)
        out = jnp.where(seen, 1 / safe, 0)[..., None] * acc
        return out.astype(q.dtype).transpose(0, 3, 1, 2, 4), jnp.where(seen, top + jnp.log(safe), -jnp.inf)

    out, lse = lax.map(one_query_tile, jnp.arange(tiles.num_q))
    lse = lse.transpose(1, 2, 3, 0, 4).reshape(tiles.batch, tiles.heads, -1)
    return tiles.join_queries(out), lse[:, :, : tiles.length]


def _backward(options: _Options, q, k, v, mask: Mask, out, lse, d_out, d_lse) -> tuple[Array, Array, Array]:
    tiles = _Tiles(options, q, k, v, mask)
    dtype = tiles.dtype
    first, end = tile_range(*mask.live_queries(), options.block_k, options.block_q)
    d_out_tiles = tiles.queries(d_out)
    # dS = P ∘ (dP − delta), where delta = Σ_h dO ∘ O; a cotangent of the log-sum-exp enters as −dLSE.
    delta = jnp.einsum("btnh,btnh->bnt", d_out.astype(dtype), out.astype(dtype)) - d_lse.astype(dtype)
    lse_rows, delta_rows = tiles.rows(jnp.where(lse == -jnp.inf, 0, lse)), tiles.rows(delta)

    def one_key_tile(dq: Array, j: Array) -> tuple[Array, tuple[Array, Array]]:
        def visit(i, carry):
            dq, dk, dv = carry
            x, visible = tiles.logits(i, j)
            p = jnp.where(visible, jnp.exp(x - lse_rows[i][..., None]), 0)
            dv += tiles.einsum("bkgqs,bqkgh->bskh", p.astype(q.dtype), d_out_tiles[i])
            dp = tiles.einsum("bqkgh,bskh->bkgqs", d_out_tiles[i], tiles.v[j])
            ds = p * (dp - delta_rows[i][..., None])
            if options.soft_cap is not None:
                ds *= 1 - jnp.square(x / options.soft_cap)
            ds = (options.scale * ds).astype(q.dtype)
            dk += tiles.einsum("bkgqs,bqkgh->bskh", ds, tiles.q[i])
            dq = dq.at[i].add(tiles.einsum("bkgqs,bskh->bqkgh", ds, tiles.k[j]))
            return dq, dk, dv

        zeros = tiles.full(tiles.k.shape[1:], 0)
        dq, dk, dv = lax.fori_loop(first[j], end[j], visit, (dq, zeros, zeros))
        return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

    dq, (dk, dv) = lax.scan(one_key_tile, tiles.full(tiles.q.shape, 0), jnp.arange(tiles.num_k))
    return tiles.join_queries(dq).astype(q.dtype), tiles.join_keys(dk), tiles.join_keys(dv)


def _tiles(x: Array, tile: int) -> Array:
    """[B, n, …] → [ceil(n / tile), B, tile, …], zeros past the end."""
    pad = -x.shape[1] % tile
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, tile, *x.shape[2:]).swapaxes(0, 1)
