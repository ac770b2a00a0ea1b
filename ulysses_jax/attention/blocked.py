"""Flash attention in plain XLA: memory linear in T, forward and backward, on any device.

Queries are walked in tiles; each visits only the key tiles in its live range (`masks.tile_range`), or those that a block mask
leaves (`Mask.tile_tables`), and keeps a running maximum and sum (online softmax, arXiv 1805.02867; FlashAttention, arXiv
2205.14135). The backward recomputes the probabilities from the saved log-sum-exp, one key tile at a time, and adds into dQ
as it goes: five products a tile.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from ulysses_jax.attention.masks import BlockMask, Mask, listed, tile_range

__all__ = ["blocked_attention", "blocked_attention_backward", "pad", "varying_like"]

BLOCK, SMALLEST = 512, 128  # rows of a tile, and fewest worth a visit; fit for matrix units, and for a cache


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
    block_q: int | None = None,
    block_k: int | None = None,
) -> tuple[Array, Array]:
    """softmax(cap(q kᵀ · scale)) v, and the log-sum-exp of the logits; both differentiable.

    q [B, T, N, H], k and v [B, S, K, H] → out [B, T, N, H] in q's dtype, lse [B, N, T] in float32 (float64 for float64
    inputs), natural log. A row that sees no key is zero, its lse −inf.
    """
    options = _Options(scale, logits_soft_cap, _tile(q, mask, block_q), _tile(k, mask, block_k))
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
    options = _Options(scale, logits_soft_cap, _tile(q, mask), _tile(k, mask))
    return _backward(options, q, k, v, mask, out, lse, d_out, jnp.zeros_like(lse))


def _tile(x: Array, mask: Mask, rows: int | None = None) -> int:
    """Rows of a tile of x [B, n, …]; with a block mask a multiple or divisor of its block, and the smaller the sparser."""
    if mask.blocks is None:
        return min(rows or BLOCK, x.shape[1])
    block = mask.blocks.block
    if rows is None and block <= BLOCK:
        rows = block * max(1, SMALLEST // block)
    elif rows is None:
        rows = next((n for n in range(BLOCK, SMALLEST - 1, -1) if block % n == 0), block)
    return min(rows, -(-x.shape[1] // block) * block)


def varying_like(x: Array, *like: Array) -> Array:
    """`x` typed as varying over every manual mesh axis that any of `like` varies over (needed for loop carries)."""
    axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in like))
    missing = axes - jax.typeof(x).manual_axis_type.varying
    return lax.pcast(x, tuple(missing), to="varying") if missing else x


def pad(x: Array, axis: int, multiple: int, value: float = 0) -> Array:
    """`x` with `value` after its end along an axis, up to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value)


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

    def logits(self, i: Array, j: Array, full: Array | None) -> tuple[Array, Array]:
        """Capped logits [B, K, G, bq, bk] of query tile i against key tile j, and which of them count: all if `full`."""
        bq, bk = self.options.block_q, self.options.block_k
        x = self.options.scale * self.einsum("bqkgh,bskh->bkgqs", self.q[i], self.k[j])
        if self.options.soft_cap is not None:
            x = self.options.soft_cap * jnp.tanh(x / self.options.soft_cap)

        def visible() -> Array:
            t, s = i * bq + jnp.arange(bq)[:, None], j * bk + jnp.arange(bk)[None, :]
            return self.mask.visible(t, s)[:, :, None]

        if full is None:
            return x, visible()
        shape = 1 if self.mask.query_ids is None else self.batch, 1, 1, bq, bk
        whole = varying_like(jnp.ones(shape, bool), *self.like)
        return x, lax.cond(full, lambda: whole, lambda: varying_like(visible(), *self.like))


class _Walk(NamedTuple):
    """Which tiles a tile visits: those from `first` to `end`, or those at these places of a list."""

    first: Array
    end: Array
    tiles: Array | None = None
    full: Array | None = None

    @classmethod
    def of_queries(cls, options: _Options, mask: Mask) -> "_Walk":
        if mask.blocks is None:
            return cls(*tile_range(*mask.live_keys(), options.block_q, options.block_k))
        return cls._listed(*_of_all_sequences(mask, options))

    @classmethod
    def of_keys(cls, options: _Options, mask: Mask) -> "_Walk":
        if mask.blocks is None:
            return cls(*tile_range(*mask.live_queries(), options.block_k, options.block_q))
        live, full = _of_all_sequences(mask, options)
        return cls._listed(live.T, full.T)

    @classmethod
    def _listed(cls, live: Array, full: Array) -> "_Walk":
        lists = listed(live, full)
        return cls(jnp.zeros_like(lists.counts), lists.counts, lists.tiles, lists.full)

    def run(self, i: Array, visit: Callable, start):
        """Fold `visit(j, full, carry)` over the tiles j that tile i visits."""

        def step(n: Array, carry):
            if self.tiles is None or self.full is None:
                return visit(n, None, carry)
            return visit(self.tiles[i, n], self.full[i, n], carry)

        return lax.fori_loop(self.first[i], self.end[i], step, start)


def _of_all_sequences(mask: Mask, options: _Options) -> tuple[Array, Array]:
    """(live, full) tiles [of T, of S] of a layout for all heads, over the batch."""
    live, full = mask.tile_tables(options.block_q, options.block_k)
    return live[0].any(0), full[0].all(0)


def _forward(options: _Options, q: Array, k: Array, v: Array, mask: Mask) -> tuple[Array, Array]:
    if _per_head(mask):
        return _forward_per_head(options, q, k, v, mask)
    tiles, walk = _Tiles(options, q, k, v, mask), _Walk.of_queries(options, mask)
    rows = (tiles.batch, tiles.kv_heads, tiles.group, options.block_q)

    def one_query_tile(i: Array) -> tuple[Array, Array]:
        def visit(j, full, carry):
            acc, top, total = carry
            x, visible = tiles.logits(i, j, full)
            new_top = jnp.maximum(top, jnp.where(visible, x, -jnp.inf).max(-1))
            safe_top = jnp.where(new_top == -jnp.inf, 0, new_top)
            p = jnp.where(visible, jnp.exp(x - safe_top[..., None]), 0)
            fade = jnp.exp(top - safe_top)
            acc = acc * fade[..., None] + tiles.einsum("bkgqs,bskh->bkgqh", p.astype(q.dtype), tiles.v[j])
            return acc, new_top, total * fade + p.sum(-1)

        start = tiles.full((*rows, tiles.head_dim), 0), tiles.full(rows, -jnp.inf), tiles.full(rows, 0)
        acc, top, total = walk.run(i, visit, start)
        seen = total > 0
        safe = jnp.where(seen, total, 1)
        out = jnp.where(seen, 1 / safe, 0)[..., None] * acc
        return out.astype(q.dtype).transpose(0, 3, 1, 2, 4), jnp.where(seen, top + jnp.log(safe), -jnp.inf)

    out, lse = lax.map(one_query_tile, jnp.arange(tiles.num_q))
    lse = lse.transpose(1, 2, 3, 0, 4).reshape(tiles.batch, tiles.heads, -1)
    return tiles.join_queries(out), lse[:, :, : tiles.length]


def _backward(options: _Options, q, k, v, mask: Mask, out, lse, d_out, d_lse) -> tuple[Array, Array, Array]:
    if _per_head(mask):
        return _backward_per_head(options, q, k, v, mask, out, lse, d_out, d_lse)
    tiles, walk = _Tiles(options, q, k, v, mask), _Walk.of_keys(options, mask)
    dtype = tiles.dtype
    d_out_tiles = tiles.queries(d_out)
    # dS = P ∘ (dP − delta), where delta = Σ_h dO ∘ O; a cotangent of the log-sum-exp enters as −dLSE.
    delta = jnp.einsum("btnh,btnh->bnt", d_out.astype(dtype), out.astype(dtype)) - d_lse.astype(dtype)
    lse_rows, delta_rows = tiles.rows(jnp.where(lse == -jnp.inf, 0, lse)), tiles.rows(delta)

    def one_key_tile(dq: Array, j: Array) -> tuple[Array, tuple[Array, Array]]:
        def visit(i, full, carry):
            dq, dk, dv = carry
            x, visible = tiles.logits(i, j, full)
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
        dq, dk, dv = walk.run(j, visit, (dq, zeros, zeros))
        return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

    dq, (dk, dv) = lax.scan(one_key_tile, tiles.full(tiles.q.shape, 0), jnp.arange(tiles.num_k))
    return tiles.join_queries(dq).astype(q.dtype), tiles.join_keys(dk), tiles.join_keys(dv)


def _per_head(mask: Mask) -> bool:
    return mask.blocks is not None and mask.blocks.layout.shape[0] > 1


class _Heads:
    """One head after the other, where each has its own list of tiles."""

    def __init__(self, q: Array, k: Array, mask: Mask):
        self.mask, self.group = mask, q.shape[2] // k.shape[2]
        self.numbers = jnp.arange(q.shape[2])

    def query(self, x: Array, n: Array) -> Array:
        """[B, T, N, H] → [B, T, 1, H]."""
        return lax.dynamic_slice_in_dim(x, n, 1, 2)

    def key(self, x: Array, n: Array) -> Array:
        """[B, S, K, H] → [B, S, 1, H], of the KV head that query head n reads."""
        return lax.dynamic_slice_in_dim(x, n // self.group, 1, 2)

    def row(self, x: Array, n: Array) -> Array:
        """[B, N, T] → [B, 1, T]."""
        return lax.dynamic_slice_in_dim(x, n, 1, 1)

    def mask_of(self, n: Array) -> Mask:
        blocks = cast(BlockMask, self.mask.blocks)
        layout = lax.dynamic_slice_in_dim(jnp.asarray(blocks.layout), n, 1, 0)
        return dataclasses.replace(self.mask, blocks=BlockMask(layout, blocks.block))

    def join(self, x: Array) -> Array:
        """[N, B, T, 1, H] → [B, T, N, H]."""
        return x[:, :, :, 0].transpose(1, 2, 0, 3)

    def gather(self, x: Array) -> Array:
        """[N, B, S, 1, H] → [B, S, K, H], summed over the query heads that read a KV head."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        summed = wide.reshape(-1, self.group, *x.shape[1:]).sum(1)
        return self.join(summed).astype(x.dtype)


def _forward_per_head(options: _Options, q: Array, k: Array, v: Array, mask: Mask) -> tuple[Array, Array]:
    heads = _Heads(q, k, mask)

    def one_head(n: Array) -> tuple[Array, Array]:
        return _forward(options, heads.query(q, n), heads.key(k, n), heads.key(v, n), heads.mask_of(n))

    out, lse = lax.map(one_head, heads.numbers)
    return heads.join(out), lse[:, :, 0].swapaxes(0, 1)


def _backward_per_head(options: _Options, q, k, v, mask: Mask, out, lse, d_out, d_lse) -> tuple[Array, Array, Array]:
    heads = _Heads(q, k, mask)

    def one_head(n: Array) -> tuple[Array, Array, Array]:
        (q_n, out_n, d_out_n), (k_n, v_n) = (heads.query(x, n) for x in (q, out, d_out)), (heads.key(x, n) for x in (k, v))
        rows = heads.row(lse, n), d_out_n, heads.row(d_lse, n)
        return _backward(options, q_n, k_n, v_n, heads.mask_of(n), out_n, *rows)

    dq, dk, dv = lax.map(one_head, heads.numbers)
    return heads.join(dq), heads.gather(dk), heads.gather(dv)


def _tiles(x: Array, tile: int) -> Array:
    """[B, n, …] → [ceil(n / tile), B, tile, …], zeros past the end."""
    x = pad(x, 1, tile)
    return x.reshape(x.shape[0], -1, tile, *x.shape[2:]).swapaxes(0, 1)
