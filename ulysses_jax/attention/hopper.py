"""Flash attention for Hopper GPUs (sm90) in Pallas Mosaic GPU, forward and backward.

Each block of threads is three warpgroups. Two compute; the third only starts copies (TMA) into a ring of shared-memory
buffers and waits until they may be filled again. What a tile may see comes from `masks.tile_ranges`: tiles outside a row's
live range are never visited, tiles inside the full range never masked, and in those between each row hides what lies outside
its own range [first, end).

    forward   a block owns 2 × 64 queries of one head and walks its key tiles from right to left, so that of a causal mask only
              the first tile is masked. The product with V of one tile runs under the softmax of the next.
    backward  a block owns 2 × 64 keys of one KV head and walks the query tiles of all heads that read it. S and dP are
              computed transposed, dK and dV stay in registers, and dQ is added up in float32 by TMA: five products a tile.
              The order of those additions varies; `deterministic` computes dQ in a pass of its own instead (seven products),
              as do heads of 256, whose accumulators do not fit.

Overlap of the two products and the softmax follows FlashAttention-3 (arXiv 2407.08608), the backward's shape FlashAttention-2
(arXiv 2307.08691). Indices are int32 throughout, so that the kernels trace the same under jax_enable_x64.
"""

# Mosaic's accumulators, transforms and exports are not what their annotations say.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportOperatorIssue=false, reportAbstractUsage=false
# pyright: reportReturnType=false

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ulysses_jax.attention.blocked import varying_like
from ulysses_jax.attention.masks import Mask, tile_ranges

__all__ = ["HEAD_DIMS", "Tiling", "hopper_attention", "hopper_attention_backward", "hopper_lacks"]

WGMMA = plgpu.Layout.WGMMA
ROWS = WGMMA.reduce(1)  # one value a row of a product
COLUMNS = WGMMA.reduce(0)  # one value a column
LOG2E = math.log2(math.e)
LOWEST = -1e30  # the running maximum's start: finite, so that a row that saw nothing yet subtracts no infinities
WARPGROUP_ROWS = 64  # rows of a product that one warpgroup holds

i32 = jnp.int32


class Tiling(NamedTuple):
    """Sizes of a kernel: `block` rows a walked tile, `stages` of the ring, registers of a computing and a copying thread."""

    block: int
    stages: int
    registers: tuple[int, int] = (240, 24)


class Tilings(NamedTuple):
    """How each kernel of a head size is cut."""

    forward: Tiling
    queries: Tiling
    keys: Tiling
    fused: bool  # dQ together with dK and dV


HEAD_DIMS = {
    64: Tilings(Tiling(128, 2), Tiling(64, 2), Tiling(64, 2), fused=True),
    128: Tilings(Tiling(128, 2), Tiling(64, 2), Tiling(64, 2), fused=True),
    256: Tilings(Tiling(64, 2), Tiling(64, 1), Tiling(64, 1), fused=False),
}


class _Options(NamedTuple):
    scale: float
    soft_cap: float | None
    deterministic: bool
    interpret: Any

    @property
    def exponent(self) -> float:
        """What turns a (capped) logit into an exponent of 2."""
        return LOG2E * (self.scale if self.soft_cap is None else 1.0)


def hopper_lacks(q: Array, mask: Mask, scale: float) -> str | None:
    """What these kernels cannot do here, in words, or None."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {q.dtype} (only bfloat16 and float16)"
    if q.shape[-1] not in HEAD_DIMS:
        return f"head size {q.shape[-1]} (only {', '.join(map(str, HEAD_DIMS))})"
    if scale <= 0:
        return f"scale {scale} (it must be > 0)"
    return None


def hopper_attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    *,
    scale: float,
    logits_soft_cap: float | None = None,
    deterministic: bool = False,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """softmax(cap(q kᵀ · scale)) v, and the log-sum-exp of the logits; both differentiable.

    q [B, T, N, H], k and v [B, S, K, H] in bfloat16 or float16, H of `HEAD_DIMS`, any lengths → out [B, T, N, H], lse
    [B, N, T] in float32, natural log. A row that sees no key is zero, its lse −inf. Segment ids must be contiguous: every
    id one run of tokens; if they are not, out is NaN.

    Args:
      deterministic: add up dQ in a fixed order, so that the backward is bit-equal every time.
      interpret: run on the CPU by Mosaic's interpreter (`plgpu.InterpretGPUParams`); for tests.
    """
    return _attention(_Options(scale, logits_soft_cap, deterministic, interpret), q, k, v, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: _Options, q: Array, k: Array, v: Array, mask: Mask) -> tuple[Array, Array]:
    return _forward(options, q, k, v, mask)


def _attention_fwd(options: _Options, q: Array, k: Array, v: Array, mask: Mask):
    q, k, v = (checkpoint_name(x, "attention_in") for x in (q, k, v))
    out, lse = _forward(options, q, k, v, mask)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (q, k, v, mask, out, lse)


def hopper_attention_backward(
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
    deterministic: bool = False,
    interpret: Any = False,
) -> tuple[Array, Array, Array]:
    """The share of these keys in (dQ, dK, dV), where `out` and `lse` may come from more keys than these."""
    options = _Options(scale, logits_soft_cap, deterministic, interpret)
    return _backward(options, q, k, v, mask, out, lse, d_out, jnp.zeros_like(lse))


def _attention_bwd(options: _Options, saved, cotangents):
    q, k, v, mask, out, lse = saved
    d_out, d_lse = cotangents
    return *_backward(options, q, k, v, mask, out, lse, d_out, d_lse), None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _backward(options: _Options, q, k, v, mask: Mask, out, lse, d_out, d_lse) -> tuple[Array, Array, Array]:
    # dS = P ∘ (dP − delta), where delta = Σ_h dO ∘ O; a cotangent of the log-sum-exp enters as −dLSE.
    delta = jnp.einsum("btnh,btnh->bnt", d_out, out, preferred_element_type=jnp.float32) - d_lse
    # In base 2, and +inf where nothing was seen: exp2(x − inf) = 0.
    lse2 = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E)
    gradients = functools.partial(_keys_kernel, options, q, k, v, d_out.astype(q.dtype), lse2, delta, mask)
    tilings = HEAD_DIMS[q.shape[-1]]
    if tilings.fused and not options.deterministic:
        dq, dk, dv = gradients({"dq", "dk", "dv"})
    else:
        dq = _queries_kernel(options, q, k, v, d_out.astype(q.dtype), lse2, delta, mask)
        if tilings.fused:
            _, dk, dv = gradients({"dk", "dv"})
        else:
            dk, dv = gradients({"dk"})[1], gradients({"dv"})[2]
    return varying_like(dq, q), varying_like(dk, k), varying_like(dv, v)


class _Walk(NamedTuple):
    """What the kernels read of a mask: per tile the ranges of tiles to walk, per row the range it sees."""

    ranges: Array  # [B or 1, tiles, 4] int32: first and end to visit, first and end of those that hide nothing
    first: Array  # [B or 1, padded rows] int32
    end: Array

    @classmethod
    def of(cls, rows: tuple[Array, Array], tile: int, step: int) -> "_Walk":
        first, end = (_pad(x.astype(i32), 1, tile) for x in rows)
        return cls(tile_ranges(*rows, tile, step), first, end)


class _Tile:
    """The scalars of one block: which tiles it walks, and whether one of them hides nothing."""

    def __init__(self, ranges, batch, tile):
        at = ranges.at[batch if ranges.shape[0] > 1 else 0, tile]
        # Under shard_map a value read is typed as varying while arithmetic on it is not, and a loop wants one type: compute.
        self.first, self.end, self.full_first, self.full_end = (jnp.maximum(at[i], 0) for i in range(4))

    def is_full(self, j) -> Array:
        return (j >= self.full_first) & (j < self.full_end)


def _hide(x: Array, first_ref, end_ref, batch, base, column) -> Array:
    """−inf where a row's range, in rows base … base + 63 of the refs, leaves out the column (`column` + index)."""
    rows = (batch if first_ref.shape[0] > 1 else 0, pl.ds(base, x.shape[0]))
    first, end = (plgpu.load(ref.at[rows], layout=ROWS, optimized=False) for ref in (first_ref, end_ref))
    columns = plgpu.broadcasted_iota(i32, x.shape, 1, layout=WGMMA) + column
    across = lambda row: lax.broadcast_in_dim(row, x.shape, [0])  # noqa: E731
    return jnp.where((columns >= across(first)) & (columns < across(end)), x, -jnp.inf)


def _forward(options: _Options, q: Array, k: Array, v: Array, mask: Mask) -> tuple[Array, Array]:
    B, T, N, H = q.shape
    group = N // k.shape[2]
    block, stages, registers = HEAD_DIMS[H].forward
    rows = 2 * WARPGROUP_ROWS
    walk = _Walk.of(mask.live_keys(), rows, block)
    tiles = pl.cdiv(T, rows)
    # Where only the first tile walked can be partial, the loop needs no mask at all.
    partial_loop = mask.window is not None or mask.query_ids is not None or (mask.is_causal and block < rows)
    broken = (
        jnp.zeros(1, jnp.float32) if mask.contiguous is None else jnp.where(mask.contiguous, 0.0, jnp.nan).astype(jnp.float32)
    )

    def kernel(q_ref, k_ref, v_ref, ranges, first, end, broken_ref, out_ref, lse_ref, scratch):
        q_smem, k_smem, v_smem, lse_smem, q_here, k_here, v_here, k_free, v_free = scratch
        warpgroup = lax.axis_index("warpgroup")
        batch, head = _divide(lax.axis_index("head"), N)
        tile_index = tiles - 1 - lax.axis_index("tile")  # heaviest first, if causal
        tile = _Tile(ranges, batch, tile_index)
        steps = jnp.maximum(tile.end - tile.first, 1)  # a tile that sees nothing walks one, all of it hidden
        last = tile.first + steps - 1

        @pl.when(warpgroup < 2)
        def compute():
            plgpu.set_max_registers(registers[0], action="increase")
            base = tile_index * rows + warpgroup * WARPGROUP_ROWS
            mine = q_smem.at[warpgroup]
            plgpu.copy_gmem_to_smem(q_ref.at[batch, pl.ds(base, WARPGROUP_ROWS), head], mine, q_here.at[warpgroup])
            plgpu.barrier_wait(q_here.at[warpgroup])

            def softmax(x, top, total, j, hide: bool | None):
                """Probabilities of one tile in 16 bits, the new running maximum and sum, and the old ones' factor."""
                if options.soft_cap is not None:
                    x = options.soft_cap * jnp.tanh(x * (options.scale / options.soft_cap))
                hidden = functools.partial(_hide, first_ref=first, end_ref=end, batch=batch, base=base, column=j * block)
                if hide:
                    x = hidden(x)
                elif hide is None:
                    x = lax.cond(tile.is_full(j), lambda x: x, hidden, x)
                new_top = jnp.maximum(top, x.max(axis=1))
                fade = jnp.exp2((top - new_top) * options.exponent)
                p = jnp.exp2(x * options.exponent - lax.broadcast_in_dim(new_top * options.exponent, x.shape, [0]))
                return p.astype(q.dtype), new_top, total * fade + p.sum(axis=1), fade

            def first_logits(acc):
                plgpu.wgmma(acc, mine, k_smem.at[0].transpose((1, 0)))
                return acc[...]

            def step(i, carry):
                """Q Kᵀ of tile i, beside P V of the tile before, under whose product the softmax of tile i runs."""
                acc, p, top, total = carry
                slot, before = lax.rem(i, i32(stages)), lax.rem(i - 1, i32(stages))
                plgpu.barrier_wait(k_here.at[slot])
                hide = None if partial_loop else False

                def both(refs):
                    acc_ref, p_ref, top_ref, total_ref, fade_ref = refs

                    def logits(x_ref):
                        plgpu.wgmma(x_ref, mine, k_smem.at[slot].transpose((1, 0)))
                        plgpu.barrier_wait(v_here.at[before])
                        plgpu.wgmma(acc_ref, p, v_smem.at[before])
                        return plgpu.wgmma_accumulator_load(x_ref, wait_n=1)

                    x = pl.run_scoped(logits, plgpu.ACC((WARPGROUP_ROWS, block), jnp.float32))
                    plgpu.barrier_arrive(k_free.at[slot])
                    p_ref[...], top_ref[...], total_ref[...], fade_ref[...] = softmax(x, top, total, last - i, hide)

                def both_interpreted():
                    def logits(x_ref):
                        plgpu.wgmma(x_ref, mine, k_smem.at[slot].transpose((1, 0)))
                        return plgpu.wgmma_accumulator_load(x_ref, wait_n=0)

                    x = pl.run_scoped(logits, plgpu.ACC((WARPGROUP_ROWS, block), jnp.float32))
                    plgpu.barrier_arrive(k_free.at[slot])
                    plgpu.barrier_wait(v_here.at[before])
                    return _product(acc, p, v_smem.at[before]), *softmax(x, top, total, last - i, hide)

                if options.interpret:
                    acc, p, top, total, fade = both_interpreted()
                else:
                    acc, p, top, total, fade = pl.run_state(both)((plgpu.ACC.init(acc), p, top, total, total))
                plgpu.barrier_arrive(v_free.at[before])
                return acc * lax.broadcast_in_dim(fade, acc.shape, [0]), p, top, total

            top = plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), LOWEST, jnp.float32), ROWS)
            total = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS,), jnp.float32), ROWS)
            acc = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, H), jnp.float32), WGMMA)
            plgpu.barrier_wait(k_here.at[0])
            x = pl.run_scoped(first_logits, plgpu.ACC((WARPGROUP_ROWS, block), jnp.float32))
            plgpu.barrier_arrive(k_free.at[0])
            p, top, total, _ = softmax(x, top, total, last, True)
            acc, p, top, total = lax.fori_loop(i32(1), steps, step, (acc, p, top, total))
            slot = lax.rem(steps - 1, i32(stages))
            plgpu.barrier_wait(v_here.at[slot])
            if options.interpret:
                acc = _product(acc, p, v_smem.at[slot])
            else:
                acc = pl.run_state(lambda ref: plgpu.wgmma(ref, p, v_smem.at[slot]))(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(v_free.at[slot])

            seen = total > 0
            total = jnp.where(seen, total, 1.0)
            weight = jnp.where(seen, 1.0 / total, 0.0) + broken_ref[batch if broken_ref.shape[0] > 1 else 0]
            mine[...] = (acc * lax.broadcast_in_dim(weight, acc.shape, [0])).astype(q.dtype)
            lse_smem.at[warpgroup][...] = jnp.where(seen, top * (options.exponent / LOG2E) + jnp.log(total), -jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, out_ref.at[batch, pl.ds(base, WARPGROUP_ROWS), head])
            plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_ref.at[batch, head, pl.ds(base, WARPGROUP_ROWS)])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 2)
        def copy():
            plgpu.set_max_registers(registers[1], action="decrease")
            kv_head = lax.div(head, i32(group))

            def fill(i, _):
                slot = lax.rem(i, i32(stages))
                source = (batch, pl.ds((last - i) * block, block), kv_head)
                for ref, smem, here, free in ((k_ref, k_smem, k_here, k_free), (v_ref, v_smem, v_here, v_free)):
                    pl.when(i >= stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
                    plgpu.copy_gmem_to_smem(ref.at[source], smem.at[slot], here.at[slot])

            lax.fori_loop(i32(0), steps, fill, None)
            _drain(steps, stages, k_free, v_free)

    lengths = (tiles * rows,)
    out, lse = _launch(
        kernel,
        "ulysses_attention_forward",
        options,
        grid={"head": B * N, "tile": tiles},
        out=(jax.ShapeDtypeStruct((B, *lengths, N, H), q.dtype), jax.ShapeDtypeStruct((B, N, *lengths), jnp.float32)),
        scratch=[
            _smem((2, WARPGROUP_ROWS, H), q.dtype),
            _smem((stages, block, H), q.dtype),
            _smem((stages, block, H), q.dtype),
            plgpu.SMEM((2, WARPGROUP_ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=2),
            *(plgpu.Barrier(num_barriers=stages),) * 2,
            *(plgpu.Barrier(num_barriers=stages, num_arrivals=2),) * 2,
        ],
    )(q, k, v, *walk, broken)
    return varying_like(out[:, :T], q, k, v), varying_like(lse[:, :, :T], q, k, v)


def _queries_kernel(options: _Options, q, k, v, d_out, lse2, delta, mask: Mask) -> Array:
    """dQ [B, T, N, H], each block adding up its own queries' in a fixed order."""
    B, T, N, H = q.shape
    group = N // k.shape[2]
    block, stages, registers = HEAD_DIMS[H].queries
    rows = 2 * WARPGROUP_ROWS
    tiles = pl.cdiv(T, rows)
    walk = _Walk.of(mask.live_keys(), rows, block)
    lse2, delta = _pad(lse2, 2, rows, jnp.inf), _pad(delta, 2, rows)

    def kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, ranges, first, end, dq_ref, scratch):
        q_smem, do_smem, k_smem, v_smem, here, k_here, v_here, k_free, v_free = scratch
        warpgroup = lax.axis_index("warpgroup")
        batch, head = _divide(lax.axis_index("head"), N)
        tile_index = tiles - 1 - lax.axis_index("tile")
        tile = _Tile(ranges, batch, tile_index)
        steps = jnp.maximum(tile.end - tile.first, 0)

        @pl.when(warpgroup < 2)
        def compute():
            plgpu.set_max_registers(registers[0], action="increase")
            base = tile_index * rows + warpgroup * WARPGROUP_ROWS
            mine = (batch, pl.ds(base, WARPGROUP_ROWS), head)
            for ref, smem in ((q_ref, q_smem), (do_ref, do_smem)):
                plgpu.copy_gmem_to_smem(ref.at[mine], smem.at[warpgroup], here.at[warpgroup])
            statistics = (batch, head, pl.ds(base, WARPGROUP_ROWS))
            lse, delta = (plgpu.load(ref.at[statistics], layout=ROWS, optimized=False) for ref in (lse_ref, delta_ref))
            plgpu.barrier_wait(here.at[warpgroup])

            def step(i, dq):
                slot, j = lax.rem(i, i32(stages)), tile.first + i
                plgpu.barrier_wait(k_here.at[slot])
                plgpu.barrier_wait(v_here.at[slot])

                def products(x_ref, dp_ref):
                    plgpu.wgmma(x_ref, q_smem.at[warpgroup], k_smem.at[slot].transpose((1, 0)))
                    plgpu.wgmma(dp_ref, do_smem.at[warpgroup], v_smem.at[slot].transpose((1, 0)))
                    x = plgpu.wgmma_accumulator_load(x_ref, wait_n=1)
                    hidden = functools.partial(_hide, first_ref=first, end_ref=end, batch=batch, base=base, column=j * block)
                    spread = lambda row: lax.broadcast_in_dim(row, x.shape, [0])  # noqa: E731
                    hide = lambda x: lax.cond(tile.is_full(j), lambda x: x, hidden, x)  # noqa: E731
                    p, slope = _probabilities(options, x, lambda: spread(lse), hide)
                    ds = p * (plgpu.wgmma_accumulator_load(dp_ref, wait_n=0) - spread(delta))
                    return (ds if slope is None else ds * slope).astype(q.dtype)

                ds = pl.run_scoped(products, *(plgpu.ACC((WARPGROUP_ROWS, block), jnp.float32),) * 2)
                plgpu.barrier_arrive(v_free.at[slot])
                if options.interpret:
                    dq = _product(dq, ds, k_smem.at[slot])
                else:
                    dq = pl.run_state(lambda ref: plgpu.wgmma(ref, ds, k_smem.at[slot]))(plgpu.ACC.init(dq))
                plgpu.barrier_arrive(k_free.at[slot])
                return dq

            dq = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, H), jnp.float32), WGMMA)
            dq = lax.fori_loop(i32(0), steps, step, dq)
            q_smem.at[warpgroup][...] = (dq * options.scale).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[warpgroup], dq_ref.at[mine])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 2)
        def copy():
            plgpu.set_max_registers(registers[1], action="decrease")
            kv_head = lax.div(head, i32(group))

            def fill(i, _):
                slot = lax.rem(i, i32(stages))
                source = (batch, pl.ds((tile.first + i) * block, block), kv_head)
                for ref, smem, here, free in ((k_ref, k_smem, k_here, k_free), (v_ref, v_smem, v_here, v_free)):
                    pl.when(i >= stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
                    plgpu.copy_gmem_to_smem(ref.at[source], smem.at[slot], here.at[slot])

            lax.fori_loop(i32(0), steps, fill, None)
            _drain(steps, stages, k_free, v_free)

    (dq,) = _launch(
        kernel,
        "ulysses_attention_backward_queries",
        options,
        grid={"head": B * N, "tile": tiles},
        out=(jax.ShapeDtypeStruct((B, tiles * rows, N, H), q.dtype),),
        scratch=[
            *(_smem((2, WARPGROUP_ROWS, H), q.dtype),) * 2,
            *(_smem((stages, block, H), q.dtype),) * 2,
            plgpu.Barrier(num_barriers=2, num_arrivals=2),
            *(plgpu.Barrier(num_barriers=stages),) * 2,
            *(plgpu.Barrier(num_barriers=stages, num_arrivals=2),) * 2,
        ],
    )(q, k, v, d_out, lse2, delta, *walk)
    return dq[:, :T]


def _keys_kernel(
    options: _Options, q, k, v, d_out, lse2, delta, mask: Mask, wanted: set[str]
) -> tuple[Array | None, Array | None, Array | None]:
    """(dQ, dK, dV), those of `wanted`; products are transposed: rows are keys, columns queries.

    Where dQ is wanted, each warpgroup computes the dS of its own keys and they meet in shared memory. With heads of 128 each
    then computes half of dQ's columns from the dS of both; with heads of 64 all columns from its own dS, which needs no
    meeting and costs twice the additions.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    group = N // K
    block, stages, registers = HEAD_DIMS[H].keys
    rows = 2 * WARPGROUP_ROWS
    tiles = pl.cdiv(S, rows)
    walk = _Walk.of(mask.live_queries(), rows, block)
    lse2, delta = _pad(lse2, 2, block, jnp.inf), _pad(delta, 2, block)
    want_dq, want_dk, want_dv = ("dq" in wanted), ("dk" in wanted), ("dv" in wanted)
    share = want_dq and H > 64
    columns = H // 2 if share else H  # of dQ, a warpgroup's
    interpret = bool(options.interpret)

    def kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, ranges, first, end, *rest):
        refs, scratch = rest[:-1], rest[-1]
        outs = dict(zip([name for name in ("dq", "dk", "dv") if name in wanted], refs, strict=True))
        k_smem, v_smem, k_halves, q_smem, do_smem, lse_smem, delta_smem, ds_smem, dq_smem = scratch[:9]
        kv_here, q_here, do_here, q_free, do_free, met = scratch[9:]
        warpgroup = lax.axis_index("warpgroup")
        batch, kv_head = _divide(lax.axis_index("head"), K)
        tile_index = lax.axis_index("tile")  # causal: the first is the heaviest
        tile = _Tile(ranges, batch, tile_index)
        live = jnp.maximum(tile.end - tile.first, 0)

        def each_step(step, carry):
            """`step(n, head, query tile, carry)` for the tiles of all heads that read this KV head, n counting them."""

            def of_head(g, carry):
                return lax.fori_loop(
                    tile.first,
                    tile.first + live,
                    lambda i, carry: step(g * live + i - tile.first, kv_head * group + g, i, carry),
                    carry,
                )

            return of_head(0, carry) if group == 1 else lax.fori_loop(i32(0), i32(group), of_head, carry)

        @pl.when(warpgroup < 2)
        def compute():
            plgpu.set_max_registers(registers[0], action="increase")
            own = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
            base = tile_index * rows + warpgroup * WARPGROUP_ROWS
            plgpu.barrier_wait(kv_here)

            def step(n, head, i, sums):
                slot = lax.rem(n, i32(stages))
                plgpu.barrier_wait(q_here.at[slot])
                plgpu.barrier_wait(do_here.at[slot])

                def products(x_ref, dp_ref):
                    plgpu.wgmma(x_ref, k_smem.at[own], q_smem.at[slot].transpose((1, 0)))
                    if want_dq or want_dk:
                        plgpu.wgmma(dp_ref, v_smem.at[own], do_smem.at[slot].transpose((1, 0)))
                    x = plgpu.wgmma_accumulator_load(x_ref, wait_n=1 if want_dq or want_dk else 0)
                    hidden = functools.partial(_hide, first_ref=first, end_ref=end, batch=batch, base=base, column=i * block)
                    spread = lambda column: lax.broadcast_in_dim(column, x.shape, [1])  # noqa: E731
                    hide = lambda x: lax.cond(tile.is_full(i), lambda x: x, hidden, x)  # noqa: E731
                    # Each statistic is loaded just before its use: registers are what this kernel is short of.
                    late = lambda: spread(plgpu.load(lse_smem.at[slot], layout=COLUMNS))  # noqa: E731
                    p, slope = _probabilities(options, x, late, hide)
                    if not (want_dq or want_dk):
                        return p.astype(q.dtype), p.astype(q.dtype)
                    dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=0)
                    ds = p * (dp - spread(plgpu.load(delta_smem.at[slot], layout=COLUMNS)))
                    return p.astype(q.dtype), (ds if slope is None else ds * slope).astype(q.dtype)

                p, ds = pl.run_scoped(products, *(plgpu.ACC((WARPGROUP_ROWS, block), jnp.float32),) * 2)
                dk, dv = sums
                if want_dv:
                    dv = _accumulate(dv, p, do_smem.at[slot], interpret)
                if want_dq:
                    mine = ds_smem.at[lax.rem(n, i32(2))]
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    mine.at[own][...] = ds
                    plgpu.commit_smem()
                    if share:
                        plgpu.barrier_arrive(met)
                        plgpu.barrier_wait(met)

                    def dq_and_dk(dq_ref):
                        if share:
                            plgpu.wgmma(dq_ref, mine.transpose((1, 0)), k_halves.at[warpgroup])
                        else:
                            plgpu.wgmma(dq_ref, mine.at[own].transpose((1, 0)), k_smem.at[own])
                        if not interpret:
                            plgpu.wgmma(dk, mine.at[own], q_smem.at[slot])
                        return plgpu.wgmma_accumulator_load(dq_ref, wait_n=0 if interpret else 1)

                    dq = pl.run_scoped(dq_and_dk, plgpu.ACC((block, columns), jnp.float32))
                    if interpret:
                        dk = _product(dk, ds, q_smem.at[slot])
                    plgpu.barrier_arrive(do_free.at[slot])
                    dq_smem.at[warpgroup][...] = dq * options.scale
                    plgpu.commit_smem()
                    target = (batch, pl.ds(i * block, block), head)
                    target = (*target, pl.ds(warpgroup * columns, columns)) if share else target
                    if interpret:  # the interpreter cannot add up by TMA: every tile of keys writes a copy of its own
                        target = (tile_index, 0 if share else warpgroup, *target)
                    add = {} if interpret else {"reduction_op": "add"}
                    plgpu.copy_smem_to_gmem(dq_smem.at[warpgroup], outs["dq"].at[target], **add)
                elif want_dk:
                    dk = _accumulate(dk, ds, q_smem.at[slot], interpret)
                if not interpret:
                    plgpu.wgmma_wait(0)
                if not want_dq:
                    plgpu.barrier_arrive(do_free.at[slot])
                plgpu.barrier_arrive(q_free.at[slot])
                return (dk, dv) if interpret else sums

            if interpret:
                zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, H), jnp.float32), WGMMA)
                sums = each_step(step, (zeros, zeros))
            else:

                def accumulated(dk_ref, dv_ref):
                    each_step(lambda n, head, i, _: step(n, head, i, (dk_ref, dv_ref)) and None, None)
                    return dk_ref[...] if want_dk else None, dv_ref[...] if want_dv else None

                sums = pl.run_scoped(accumulated, *(plgpu.ACC((WARPGROUP_ROWS, H), jnp.float32),) * 2)
            for name, total, smem, factor in zip(("dk", "dv"), sums, (k_smem, v_smem), (options.scale, 1.0), strict=True):
                if name in wanted:
                    smem.at[own][...] = (total * factor).astype(q.dtype)
            plgpu.commit_smem()
            for name, smem in (("dk", k_smem), ("dv", v_smem)):
                if name in wanted:
                    plgpu.copy_smem_to_gmem(smem.at[own], outs[name].at[batch, pl.ds(base, WARPGROUP_ROWS), kv_head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 2)
        def copy():
            plgpu.set_max_registers(registers[1], action="decrease")
            keys = (batch, pl.ds(tile_index * rows, rows), kv_head)
            plgpu.copy_gmem_to_smem(k_ref.at[keys], k_smem, kv_here)
            plgpu.copy_gmem_to_smem(v_ref.at[keys], v_smem, kv_here)
            for half in range(2 if share else 0):
                plgpu.copy_gmem_to_smem(k_ref.at[(*keys, pl.ds(half * columns, columns))], k_halves.at[half], kv_here)

            def fill(n, head, i, _):
                slot, at = lax.rem(n, i32(stages)), pl.ds(i * block, block)
                pl.when(n >= stages)(functools.partial(plgpu.barrier_wait, q_free.at[slot]))
                plgpu.copy_gmem_to_smem(q_ref.at[batch, at, head], q_smem.at[slot], q_here.at[slot])
                plgpu.copy_gmem_to_smem(lse_ref.at[batch, head, at], lse_smem.at[slot], q_here.at[slot])
                plgpu.copy_gmem_to_smem(delta_ref.at[batch, head, at], delta_smem.at[slot], q_here.at[slot])
                pl.when(n >= stages)(functools.partial(plgpu.barrier_wait, do_free.at[slot]))
                plgpu.copy_gmem_to_smem(do_ref.at[batch, at, head], do_smem.at[slot], do_here.at[slot])

            each_step(fill, None)
            _drain(live * group, stages, q_free, do_free)

    padded = pl.cdiv(T, block) * block
    outs = {name: jax.ShapeDtypeStruct((B, tiles * rows, K, H), k.dtype) for name in ("dk", "dv") if name in wanted}
    inputs, dq = (q, k, v, d_out, lse2, delta, *walk), None
    if want_dq and interpret:
        outs = {"dq": jax.ShapeDtypeStruct((tiles, 1 if share else 2, B, padded, N, H), jnp.float32), **outs}
    elif want_dq:
        dq = jax.new_ref(jnp.zeros((B, padded, N, H), jnp.float32))  # Pallas takes no ref typed as varying
        inputs = (*inputs, dq)
    results = _launch(
        kernel,
        "ulysses_attention_backward_" + "_".join(sorted(wanted)),
        options,
        grid={"head": B * K, "tile": tiles},
        out=tuple(outs.values()),
        scratch=[
            *(_smem((rows, H), q.dtype),) * 2,
            _smem((2, rows, columns) if share else (1, 8, 64), q.dtype),
            *(_smem((stages, block, H), q.dtype),) * 2,
            *(plgpu.SMEM((stages, block), jnp.float32),) * 2,
            _smem((2, rows, block) if want_dq else (1, 8, 64), q.dtype),
            _smem((2, block, columns) if want_dq else (1, 8, 32), jnp.float32),
            plgpu.Barrier(num_arrivals=4 if share else 2),
            plgpu.Barrier(num_barriers=stages, num_arrivals=3),
            plgpu.Barrier(num_barriers=stages),
            *(plgpu.Barrier(num_barriers=stages, num_arrivals=2),) * 2,
            plgpu.Barrier(num_arrivals=2),
        ],
    )(*inputs)
    found = dict(zip(outs, results, strict=True))
    if want_dq:
        # Tiles of keys that a query tile never meets leave their copies unwritten.
        dq = jnp.nansum(found["dq"], axis=(0, 1)) if interpret else jax.freeze(dq)
        dq = dq[:, :T].astype(q.dtype)
    return dq, *(found[name][:, :S] if name in found else None for name in ("dk", "dv"))


def _probabilities(options: _Options, x, lse2: Callable, hide: Callable) -> tuple[Array, Array | None]:
    """P = exp2(x − lse2) from the bare product x, and the slope of the cap (None without one)."""
    slope = None
    if options.soft_cap is not None:
        tanh = jnp.tanh(x * (options.scale / options.soft_cap))
        x, slope = options.soft_cap * tanh, 1.0 - tanh * tanh
    x = hide(x)
    return jnp.exp2(x * options.exponent - lse2()), slope


def _product(acc, a, b_ref):
    """acc + a b, for the interpreter, which has no product with an operand in registers."""
    acc = acc + lax.dot_general(a, b_ref[...], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    plgpu.commit_smem()  # the read above went around the asynchronous proxy: order it before the next copy
    return acc


def _accumulate(acc, a, b_ref, interpret: bool):
    """acc += a b: into the accumulator `acc` names, or, interpreted, as a value."""
    return _product(acc, a, b_ref) if interpret else plgpu.wgmma(acc, a, b_ref)


def _divide(x, by: int):
    return lax.div(x, i32(by)), lax.rem(x, i32(by))


def _drain(steps, stages: int, *barriers) -> None:
    """Wait for the last round's buffers to be freed: every completion of a barrier must be observed."""

    def wait(i, _):
        for barrier in barriers:
            plgpu.barrier_wait(barrier.at[lax.rem(i, i32(stages))])

    lax.fori_loop(jnp.maximum(steps - stages, 0), steps, wait, None)


def _smem(shape: tuple[int, ...], dtype):
    """Shared memory in the swizzled tiles that TMA writes and wgmma reads: 128 bytes a row."""
    lanes = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(128)))


def _launch(kernel: Callable, name: str, options: _Options, *, grid: dict[str, int], out: tuple, scratch: list) -> Callable:
    def body(*refs):
        cut = len(refs) - len(scratch)
        kernel(*refs[:cut], refs[cut:])

    return plgpu.kernel(
        body,
        out_type=out,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name=name,
        interpret=options.interpret,
    )


def _pad(x: Array, axis: int, multiple: int, value: float = 0) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value)
