"""Flash attention for Hopper GPUs (sm90) in Pallas Mosaic GPU, forward and backward.

Each block of threads is three warpgroups. Two compute; the third only starts copies (TMA) into a ring of shared-memory
buffers and waits until they may be filled again. What a tile may see comes from `walk`, as ranges or, with a block mask, as
lists of tiles: tiles outside a row's live range are never visited, tiles inside the full range never masked, and in those
between each row hides what lies outside its own range [first, end).

    forward   a block works off tiles of 2 × 64 queries of a head and walks each one's key tiles from right to left, so that
              of a causal mask only the first is masked. The product with V of one tile runs under the softmax of the next, and
              the queries of the next tile come while this one's are in use. The two computing warpgroups take turns: one's
              softmax runs under the other's products. Under causal masks, full ones and windows two blocks, a cluster, walk the
              keys of two neighbouring tiles together: each fetches half of them, for both.
    backward  a block owns 2 × 64 keys of one KV head and walks the query tiles of the heads that read it, all or, where tiles
              are few, a part of them, whose shares are added up afterwards. S and dP are computed transposed, dK and dV stay
              in registers, and dQ is added up in float32 by TMA: five products a tile. The order of those additions varies;
              `deterministic` computes dQ in a pass of its own instead (seven products), as do heads of 256, whose accumulators
              do not fit.

Overlap of the two products and the softmax follows FlashAttention-3 (arXiv 2407.08608), the backward's shape FlashAttention-2
(arXiv 2307.08691). Indices are int32 throughout, so that the kernels trace the same under jax_enable_x64.
"""

# Mosaic's accumulators, transforms and exports are not what their annotations say.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportOperatorIssue=false, reportAbstractUsage=false
# pyright: reportReturnType=false

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ulysses_jax.attention.blocked import pad, varying_like
from ulysses_jax.attention.masks import Mask, make_mask
from ulysses_jax.attention.schedule import Order, in_order, last_round, parts_of_group
from ulysses_jax.attention.walk import (
    Tile,
    Walk,
    hides_nothing,
    in_clusters,
    is_known,
    items_of_parts,
    key_lists,
    order_of_queries,
    query_lists,
)

__all__ = ["HEAD_DIMS", "Tiling", "hopper_attention", "hopper_attention_backward", "hopper_lacks"]

WGMMA = plgpu.Layout.WGMMA
ROWS = WGMMA.reduce(1)  # one value a row of a product
COLUMNS = WGMMA.reduce(0)  # one value a column
LOG2E = math.log2(math.e)
LAG = 8.0  # by how much, in base 2, logits may pass a running maximum that lags: P then reaches 2⁸, exact enough in 16 bits
LOWEST = -1e30  # the running maximum's start: finite, so that a row that saw nothing yet subtracts no infinities
WARPGROUP_ROWS = 64  # rows of a product that one warpgroup holds

# A computing warpgroup waits for its turn before it issues a step's products, and then gives the other one its own: each waits
# at a barrier of its own, 9 or 10, until the other arrives there. The last arrival of a block is waited for by none.
TAKE_TURN, GIVE_TURN = (
    f"{{ .reg .b32 of; mov.u32 of, %tid.x; shr.u32 of, of, 7; {other} add.u32 of, of, 9; bar.{does} of, {2 * 128}; }}"
    for other, does in (("", "sync"), ("xor.b32 of, of, 1;", "arrive"))
)

# All of a block's computing threads have written what the tensor cores read next: one barrier for what would take three, one of
# each warpgroup for the copies before, another for what it wrote, and one in shared memory for both.
MEET = f"fence.proxy.async.shared::cta; bar.sync 8, {2 * 128};"

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
    persistent: bool  # blocks of the forward work off many tiles each, which takes a second buffer of queries
    lags: bool  # the forward's running maximum does, so that most steps need not rescale what is added up


HEAD_DIMS = {
    64: Tilings(Tiling(128, 2), Tiling(64, 2), Tiling(128, 2), fused=True, persistent=True, lags=False),
    128: Tilings(Tiling(128, 2), Tiling(64, 2), Tiling(64, 2), fused=True, persistent=True, lags=True),
    256: Tilings(Tiling(64, 2), Tiling(64, 1), Tiling(64, 1), fused=False, persistent=False, lags=False),
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
    if q.shape[-1] > max(HEAD_DIMS):
        return f"head size {q.shape[-1]} (only up to {max(HEAD_DIMS)})"
    if scale <= 0:
        return f"scale {scale} (it must be > 0)"
    if mask.blocks is not None and mask.blocks.block % (2 * WARPGROUP_ROWS):
        return f"blocks of {mask.blocks.block} (only multiples of {2 * WARPGROUP_ROWS})"
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

    q [B, T, N, H], k and v [B, S, K, H] in bfloat16 or float16, any lengths → out [B, T, N, H], lse [B, N, T] in float32,
    natural log. Heads between the sizes of `HEAD_DIMS` are padded with zeros to the next. A row that sees no key is zero, its
    lse −inf. Segment ids must be contiguous: every id one run of tokens; if they are not, out is NaN.

    Args:
      deterministic: add up dQ in a fixed order, so that the backward is bit-equal every time.
      interpret: run on the CPU by Mosaic's interpreter (`plgpu.InterpretGPUParams`); for tests.
    """
    options, T = _Options(scale, logits_soft_cap, deterministic, interpret), q.shape[1]
    q, k, v = (pad(x, 1, 8) for x in (q, k, v))  # TMA wants lengths in eights
    out, lse = cast(tuple[Array, Array], _attention(options, q, k, v, mask))
    return out[:, :T], lse[:, :, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: _Options, q: Array, k: Array, v: Array, mask: Mask) -> tuple[Array, Array]:
    return _forward(options, q, k, v, mask)


def _attention_fwd(options: _Options, q: Array, k: Array, v: Array, mask: Mask):
    # All at once: where they go to the host, a copy that begins with q has XLA wait for q's crossing before k is projected.
    q, k, v = (checkpoint_name(x, "attention_in") for x in lax.optimization_barrier((q, k, v)))
    # Without the barrier XLA fuses the kernel into the write that saves its output, and runs it again for who uses that output.
    out, lse = lax.optimization_barrier(_forward(options, q, k, v, mask))
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
    options, T, S = _Options(scale, logits_soft_cap, deterministic, interpret), q.shape[1], k.shape[1]
    q, k, v, out, d_out = (pad(x, 1, 8) for x in (q, k, v, out, d_out))
    lse = pad(lse, 2, 8, -jnp.inf)
    dq, dk, dv = _backward(options, q, k, v, mask, out, lse, d_out, jnp.zeros_like(lse))
    return dq[:, :T], dk[:, :S], dv[:, :S]


def _with_heads_padded(*arrays: Array) -> Iterator[Array]:
    """[B, T, N, H] with H padded to a size that the kernels have. What a step saves is not."""
    size = next(size for size in HEAD_DIMS if size >= arrays[0].shape[3])
    return (pad(x, 3, size) for x in arrays)


def _attention_bwd(options: _Options, saved, cotangents):
    q, k, v, mask, out, lse = saved
    d_out, d_lse = cotangents
    return *_backward(options, q, k, v, mask, out, lse, d_out, d_lse), None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _backward(options: _Options, q, k, v, mask: Mask, out, lse, d_out, d_lse) -> tuple[Array, Array, Array]:
    # dS = P ∘ (dP − delta), where delta = Σ_h dO ∘ O; a cotangent of the log-sum-exp enters as −dLSE.
    # Not an einsum: XLA would lay the stack of all layers' outputs out for it, heads outermost, and keep it twice.
    delta = (d_out.astype(jnp.float32) * out).sum(-1).swapaxes(1, 2) - d_lse
    # In base 2, and +inf where nothing was seen: exp2(x − inf) = 0.
    lse2 = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E)
    H = q.shape[3]
    q, k, v, d_out = _with_heads_padded(q, k, v, d_out.astype(q.dtype))
    gradients = functools.partial(_by_keys, options, q, k, v, d_out, lse2, delta, mask)
    tilings = HEAD_DIMS[q.shape[-1]]
    if tilings.fused and not options.deterministic:
        dq, dk, dv = gradients({"dq", "dk", "dv"})
    else:
        dq = _queries_kernel(options, q, k, v, d_out, lse2, delta, mask)
        if tilings.fused:
            _, dk, dv = gradients({"dk", "dv"})
        else:
            dk, dv = gradients({"dk"})[1], gradients({"dv"})[2]
    dq, dk, dv = (varying_like(cast(Array, gradient)[..., :H], x) for gradient, x in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv


def _each_item(items, body: Callable, carry):
    """`body(n, carry)` for the items of this block or cluster; with one a block, without a loop."""
    if items.shape[1] == 1:
        return body(lax.rem(lax.axis_index("block"), i32(1)), carry)  # a zero that is traced: Pallas closes over no literal
    return lax.fori_loop(i32(0), _count(items), body, carry)


def _rows_at(ref, batch, base, count: int):
    """Rows base … base + count − 1 of a [B or 1, rows] ref."""
    return ref.at[batch if ref.shape[0] > 1 else 0, pl.ds(base, count)]


def _per_row(ref) -> Array:
    return plgpu.load(ref, layout=ROWS, optimized=False)


def _hide(x: Array, ranges: tuple[Array, ...], column) -> Array:
    """−inf where a row's range, of `ranges` (first, end), leaves out the column (`column` + index)."""
    first, end = ranges
    columns = plgpu.broadcasted_iota(i32, x.shape, 1, layout=WGMMA) + column
    across = lambda row: lax.broadcast_in_dim(row, x.shape, [0])  # noqa: E731
    # Unsigned, what lies before `first` is far beyond the range's length: one comparison for two.
    length = jnp.maximum(end - first, 0).astype(jnp.uint32)
    return jnp.where((columns - across(first)).astype(jnp.uint32) < across(length), x, -jnp.inf)


def _forward(options: _Options, q: Array, k: Array, v: Array, mask: Mask) -> tuple[Array, Array]:
    """(out, lse); where all tiles take equally long, the last few are cut along their keys and shared by all (`last_round`)."""
    size = q.shape[3]
    q, k, v = _with_heads_padded(q, k, v)
    (B, T, N, H), S = q.shape, k.shape[1]
    rows, block, left, parts = 2 * WARPGROUP_ROWS, HEAD_DIMS[H].forward.block, 0, 1
    if HEAD_DIMS[H].persistent and hides_nothing(mask, T, S) and T % rows == 0 and S % block == 0:
        left, parts = last_round(B * N * (T // rows), T // rows, S // block)
    out, lse = _forward_tiles(options, q, k, v, mask, left)
    if left:
        last = slice(T - left * rows, T)
        some, lses = _forward_tiles(options, q, k, v, mask, left, parts)
        some, lses, highest = some[:, :, 0], lses[:, 0], lses[:, 0].max(0)
        weights = jnp.exp(lses - highest)
        merged = (some * weights[..., None]).sum(0) / weights.sum(0)[:, None]
        whole = highest + jnp.log(weights.sum(0))
        out, lse = out.at[-1, last, -1].set(merged.astype(out.dtype)), lse.at[-1, -1, last].set(whole)
    return out[..., :size], lse


def _forward_tiles(
    options: _Options, q: Array, k: Array, v: Array, mask: Mask, left: int = 0, parts: int = 0
) -> tuple[Array, Array]:
    """(out, lse), without the last `left` tiles of the last head; or, with `parts`, of these alone, for each such part of the
    keys: [parts, left · 128, 1, H], [parts, 1, left · 128].
    """
    (B, T, N, H), S = q.shape, k.shape[1]
    group = N // k.shape[2]
    tilings = HEAD_DIMS[H]
    block, stages, registers = tilings.forward
    rows = 2 * WARPGROUP_ROWS
    # Where only the first tiles walked can be partial, the loop needs no mask at all; a shift moves the diagonal off the tiles.
    partial_loop = any(x is not None for x in (mask.window, mask.query_ids, mask.shift))
    masked_steps = pl.cdiv(rows, block) + (rows % block > 0) if mask.is_causal else 1
    tiles = pl.cdiv(T, rows)
    lists = key_lists(mask, rows, block, masked_steps)
    key_bytes = 2 * k.nbytes // (B * N)
    cluster = 2 if tilings.persistent and not parts and in_clusters(mask, B * N, T, rows) else 1
    if parts:
        order = Order(np.arange(parts * left).reshape(-1, 1), known=True)
    elif tilings.persistent:
        order = order_of_queries(
            mask, B * N, tiles // cluster, key_bytes, cluster * rows, block, lists, left // cluster, cluster
        )
    else:
        order = Order(in_order(B * N, tiles, key_bytes, heaviest_last=True).reshape(-1, 1), is_known(mask))
    walk = Walk.of(mask.live_keys(), cluster * rows, block, order, N, lists)
    if parts:  # a part stands where a batch index would
        walk = walk._replace(items=jnp.asarray(items_of_parts(left, parts, tiles - left, S // block // parts)))
    out_at = (tiles - left) * rows if parts else 0
    q_slots = min(2, order.items.shape[1])  # the next item's queries come while this one's are in use
    # Where tiles have few steps, one begins beside the last product of the one before; it costs long ones 1 %.
    beside = lists is not None and q_slots > 1
    # Held in registers through a tile, its queries spare shared memory a fifth of what is read of it: faster in clusters alone.
    held = cluster > 1 and not options.interpret
    lags = tilings.lags
    uneven = cluster > 1 and (mask.is_causal or mask.window is not None)
    back, ahead = (min(x, T + S) for x in mask.window or (T, S))  # so many keys behind and ahead of itself a query sees
    ahead = 0 if mask.is_causal else ahead
    broken = (
        jnp.zeros(1, jnp.float32) if mask.contiguous is None else jnp.where(mask.contiguous, 0.0, jnp.nan).astype(jnp.float32)
    )

    def kernel(q_ref, k_ref, v_ref, items, lists, first, end, broken_ref, out_ref, lse_ref, scratch):
        q_smem, k_smem, v_smem, item_smem, first_smem, end_smem, q_here, q_free, k_here, v_here, k_free, v_free = scratch
        warpgroup = lax.axis_index("warpgroup")
        member = lax.axis_index("member") if cluster > 1 else 0
        for_both = {"collective_axes": "member"} if cluster > 1 else {}

        def base_of(tile: Tile):
            """The first of this block's queries."""
            return (tile.index * cluster + member) * rows

        def steps_of(tile: Tile):
            """How many tiles are walked, from right to left; those past the end, where little is seen, are hidden."""
            return jnp.maximum(tile.end - tile.first, masked_steps)

        def turn_is(text: str):
            """Taken or given; interpreted warpgroups need none."""
            if not options.interpret:
                _ptx(text)

        def own_part(tile: Tile):
            """(the tile with the steps of this block's queries, how many of a cluster's first and last steps, 0 or 1, only its
            other block takes, as these queries see nothing there).
            """
            if not uneven:
                return tile, i32(0), i32(0)
            base, first, end = base_of(tile), tile.first, tile.first + steps_of(tile)
            own_end = jnp.clip(lax.div(base + rows + ahead + block - 1, i32(block)), first + 1, end)
            if mask.window is None:
                return tile.walking(first, own_end, tile.full_first, tile.full_end), end - own_end, i32(0)
            own_first = jnp.clip(lax.div(jnp.maximum(base - back, 0), i32(block)), first, own_end - 1)
            full_first = lax.div(jnp.maximum(base + rows - 1 - back, 0) + block - 1, i32(block))
            full_end = lax.div(jnp.minimum(base + ahead + 1, mask.key_length), i32(block))
            return tile.walking(own_first, own_end, full_first, full_end), end - own_end, own_first - first

        def pass_by(passed, done):
            """Let go of the keys and values of so many steps, 0 or 1."""
            slot = lax.rem(done, i32(stages))

            def let_go():
                for here, free in ((k_here, k_free), (v_here, v_free)):
                    plgpu.barrier_wait(here.at[slot])
                    plgpu.barrier_arrive(free.at[slot])

            pl.when(passed > 0)(let_go)
            return done + passed

        def heads_of(tile: Tile):
            """(batch index, head) of the queries."""
            return (i32(B - 1), i32(N - 1)) if parts else (tile.batch, tile.head)

        def store_and_free(n):
            """The output that left through the buffer of item n's queries is out of it: they may be overwritten."""
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(q_free.at[lax.rem(n, i32(q_slots))])

        def soften(x, top, total, hidden: Callable[[Array], Array]):
            """Probabilities of one tile in 16 bits, the new running maximum and sum, and the old ones' factor."""
            if options.soft_cap is not None:
                x = options.soft_cap * jnp.tanh(x * (options.scale / options.soft_cap))
            x = hidden(x)
            highest = x.max(axis=1)
            new_top = jnp.where(highest > top + LAG / options.exponent, highest, top) if lags else jnp.maximum(top, highest)
            fade = jnp.exp2((top - new_top) * options.exponent)
            p = jnp.exp2(x * options.exponent - lax.broadcast_in_dim(new_top * options.exponent, x.shape, [0]))
            return p.astype(q.dtype), new_top, total * fade + p.sum(axis=1), fade

        def turn(queries, slot, before, acc, p, top, total, softened: Callable):
            """Q Kᵀ of a tile, beside P V of the tile before, under whose product the softmax of this one runs.

            (acc + P V, and what `softened` makes of the logits); the queries may be another item's.
            """
            plgpu.barrier_wait(k_here.at[slot])

            def both(refs):
                acc_ref, *softened_refs = refs

                def logits(x_ref):
                    turn_is(TAKE_TURN)
                    plgpu.wgmma(x_ref, queries, k_smem.at[slot].transpose((1, 0)))
                    plgpu.barrier_wait(v_here.at[before])
                    plgpu.wgmma(acc_ref, p, v_smem.at[before])
                    turn_is(GIVE_TURN)
                    return plgpu.wgmma_accumulator_load(x_ref, wait_n=1)

                x = pl.run_scoped(logits, plgpu.ACC((WARPGROUP_ROWS, block), jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])
                values = softened(x)
                if lags:
                    _computed(values[2])
                for ref, value in zip(softened_refs, values, strict=True):
                    ref[...] = value

            def both_interpreted():
                def logits(x_ref):
                    plgpu.wgmma(x_ref, queries, k_smem.at[slot].transpose((1, 0)))
                    return plgpu.wgmma_accumulator_load(x_ref, wait_n=0)

                x = pl.run_scoped(logits, plgpu.ACC((WARPGROUP_ROWS, block), jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])
                plgpu.barrier_wait(v_here.at[before])
                return _product(acc, p, v_smem.at[before]), *softened(x)

            if options.interpret:
                results = both_interpreted()
            else:
                results = pl.run_state(both)((plgpu.ACC.init(acc), p, top, total, total))
            plgpu.barrier_arrive(v_free.at[before])
            return results

        def told(n):
            """The scalars of item n, once they are here."""
            return Tile(item_smem.at[lax.rem(n, i32(q_slots))], lists)

        def item(n):
            """(scalars, steps, queries, ranges) of this block's part of item n."""
            q_slot = lax.rem(n, i32(q_slots))
            own = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
            ranges = first_smem.at[q_slot, own], end_smem.at[q_slot, own]
            tile = own_part(told(n))[0]
            return tile, steps_of(tile), q_smem.at[q_slot, warpgroup], ranges

        top_of_none = plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), LOWEST, jnp.float32), ROWS)
        total_of_none = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS,), jnp.float32), ROWS)

        def hiding(tile, steps, ranges, i, code, hide: bool | None) -> Callable[[Array], Array]:
            """What hides, of the logits of step i, those that their rows do not see; None: where the tile hides something."""
            if hide is False:
                return lambda x: x
            _, j, full = tile.visit(i, code, end=tile.first + steps)
            hidden = lambda x: _hide(x, tuple(map(_per_row, ranges)), j * block)  # noqa: E731
            return hidden if hide else lambda x: lax.cond(full(), lambda x: x, hidden, x)

        def opening(n):
            """What hides, of item n's first logits, those that their rows do not see."""
            tile, steps, _, ranges = item(n)
            return hiding(tile, steps, ranges, i32(0), tile.peek(0), True)

        def begin(n, done):
            """Steps done, the queries of item n, and the softmax of its first logits by itself."""
            plgpu.barrier_wait(q_here.at[lax.rem(n, i32(q_slots))])
            if uneven:
                done = pass_by(own_part(told(n))[1], done)
            queries = plgpu.load(item(n)[2], layout=WGMMA) if held else item(n)[2]
            slot = lax.rem(done, i32(stages))
            plgpu.barrier_wait(k_here.at[slot])

            def first_logits(acc):
                turn_is(TAKE_TURN)
                plgpu.wgmma(acc, queries, k_smem.at[slot].transpose((1, 0)))
                turn_is(GIVE_TURN)
                return acc[...]

            x = pl.run_scoped(first_logits, plgpu.ACC((WARPGROUP_ROWS, block), jnp.float32))
            plgpu.barrier_arrive(k_free.at[slot])
            p, top, total, _ = soften(x, top_of_none, total_of_none, opening(n))
            if q_slots > 1 and not beside:  # by now the output before is on its way
                pl.when(n > 0)(lambda: store_and_free(n - 1))
            return done, queries, p, top, total

        def attend(n, carry, count):
            """Item n to its output, from its beginning or, where the item before has begun it, from after its first softmax.

            Beside the last product of the last item its own first tile is begun once more, for nothing: the way around it would
            be a second loop over steps, and with two of them ptxas runs every product to its end before the next.
            """
            done, queries, p, top, total = (carry[0], item(n)[2], *carry[1:]) if beside else begin(n, carry)
            tile, steps, mine, ranges = item(n)

            def step(i, carry, hide=None if partial_loop else False):
                acc, p, top, total, code = carry
                following = tile.peek(i + 1)
                slot, before = lax.rem(done + i, i32(stages)), lax.rem(done + i - 1, i32(stages))
                if beside:
                    pl.when((i == 2) & (n > 0))(lambda: store_and_free(n - 1))
                softened = lambda x: soften(x, top, total, hiding(tile, steps, ranges, i, code, hide))  # noqa: E731
                acc, p, top, total, fade = turn(queries, slot, before, acc, p, top, total, softened)
                return _rescaled(acc, fade, around=lags and not options.interpret), p, top, total, following

            acc = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, H), jnp.float32), WGMMA)
            carry = acc, p, top, total, tile.peek(1)
            for i in range(1, 1 if partial_loop else masked_steps):
                carry = step(jnp.minimum(steps, i), carry, hide=True)
            acc, p, top, total, _ = lax.fori_loop(i32(1 if partial_loop else masked_steps), steps, step, carry)

            before = lax.rem(done + steps - 1, i32(stages))
            # Read before the last product, as it is far away.
            spoilt = 0.0 if mask.contiguous is None else broken_ref[tile.batch if broken_ref.shape[0] > 1 else 0]
            following = ()
            if beside:
                pl.when((steps <= 2) & (n > 0))(lambda: store_and_free(n - 1))
                pl.when(n + 1 < count)(lambda: plgpu.barrier_wait(q_here.at[lax.rem(n + 1, i32(q_slots))]))
                after = jnp.minimum(n + 1, count - 1)
                softened = lambda x: soften(x, top_of_none, total_of_none, opening(after))  # noqa: E731
                slot = lax.rem(done + steps, i32(stages))
                acc, *following, _ = turn(item(after)[2], slot, before, acc, p, top, total, softened)
            else:
                plgpu.barrier_wait(v_here.at[before])
                acc = _added(acc, p, v_smem.at[before], options.interpret)
                plgpu.barrier_arrive(v_free.at[before])
            finish(tile, mine, acc, top, total, spoilt)
            done += steps
            if uneven and mask.window is not None:
                done = pass_by(own_part(told(n))[2], done)
            return (done, *following) if beside else done

        def finish(tile, mine, acc, top, total, spoilt):
            """The output of an item leaves through the buffer of its queries."""
            seen = total > 0
            total = jnp.where(seen, total, 1.0)
            weight = jnp.where(seen, 1.0 / total, 0.0) + spoilt
            mine[...] = (acc * lax.broadcast_in_dim(weight, acc.shape, [0])).astype(q.dtype)
            plgpu.commit_smem()
            own = pl.ds(base_of(tile) + warpgroup * WARPGROUP_ROWS - out_at, WARPGROUP_ROWS)
            plgpu.copy_smem_to_gmem(mine, out_ref.at[tile.batch, own, tile.head])
            lse = jnp.where(seen, top * (options.exponent / LOG2E) + jnp.log(total), -jnp.inf)
            lse_ref.at[tile.batch, tile.head, own][...] = lse  # after the fence above, which would wait for it

        @pl.when(warpgroup < 2)
        def compute():
            plgpu.set_max_registers(registers[0], action="increase")
            pl.when(warpgroup == 1)(lambda: turn_is(GIVE_TURN))  # the first begins
            count, zero = _count(items), i32(0)
            _each_item(items, functools.partial(attend, count=count), (zero, *begin(zero, zero)[2:]) if beside else zero)
            if q_slots > 1:
                store_and_free(count - 1)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 2)
        def copy():
            plgpu.set_max_registers(registers[1], action="decrease")

            count = _count(items)

            def fill_queries(n):
                item = items.at[lax.axis_index("block"), n]
                tile = Tile(item, lists)
                q_slot = lax.rem(n, i32(q_slots))
                if q_slots > 1:
                    pl.when(n >= q_slots)(lambda: plgpu.barrier_wait(q_free.at[q_slot]))
                batch, head = heads_of(tile)
                for half in range(2):
                    source = (batch, pl.ds(base_of(tile) + half * WARPGROUP_ROWS, WARPGROUP_ROWS), head)
                    plgpu.copy_gmem_to_smem(q_ref.at[source], q_smem.at[q_slot, half], q_here.at[q_slot])
                plgpu.copy_gmem_to_smem(item, item_smem.at[q_slot, pl.ds(0, 8)], q_here.at[q_slot])
                for ref, smem in ((first, first_smem), (end, end_smem)):
                    source = _rows_at(ref, tile.batch, base_of(tile), rows)
                    plgpu.copy_gmem_to_smem(source, smem.at[q_slot], q_here.at[q_slot])

            def fill_next(n, due):
                """Fetch the next item's queries, which are far away, a few steps into this one, when their buffer is free."""
                if q_slots > 1:
                    pl.when(due & (n + 1 < count))(lambda: fill_queries(n + 1))

            def fill_item(n, done):
                tile = Tile(items.at[lax.axis_index("block"), n], lists)
                steps = steps_of(tile)
                batch, head = heads_of(tile)
                kv_head = lax.div(head, i32(group))

                def fill(i, code):
                    fill_next(n, i == stages + 1)
                    following = tile.peek(i + 1)
                    slot = lax.rem(done + i, i32(stages))
                    source = (batch, pl.ds(tile.visit(i, code, end=tile.first + steps)[1] * block, block), kv_head)
                    for ref, smem, here, free in ((k_ref, k_smem, k_here, k_free), (v_ref, v_smem, v_here, v_free)):
                        pl.when(done + i >= stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
                        plgpu.copy_gmem_to_smem(ref.at[source], smem.at[slot], here.at[slot], **for_both)
                    return following

                lax.fori_loop(i32(0), steps, fill, tile.peek(0))
                fill_next(n, steps <= stages + 1)
                return done + steps

            fill_queries(i32(0))
            done, again = _each_item(items, fill_item, i32(0)), int(beside)
            if beside:  # what the last item's end begins: its keys count for nothing
                tile, slot = Tile(items.at[lax.axis_index("block"), count - 1], lists), lax.rem(done, i32(stages))
                pl.when(done >= stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                source = (tile.batch, pl.ds(0, block), lax.div(tile.head, i32(group)))
                plgpu.copy_gmem_to_smem(k_ref.at[source], k_smem.at[slot], k_here.at[slot])
            if q_slots > 1:
                _drain(count, q_slots, q_free)
            _drain(done + again, stages, k_free)
            _drain(done, stages, v_free)

    freed = functools.partial(plgpu.ClusterBarrier, collective_axes=("member",)) if cluster > 1 else plgpu.Barrier
    batches, length, heads = (parts, left * rows, 1) if parts else (B, tiles * rows, N)
    out, lse = _launch(
        kernel,
        "ulysses_attention_forward",
        options,
        blocks=len(order.items),
        out=(
            jax.ShapeDtypeStruct((batches, length, heads, H), q.dtype),
            jax.ShapeDtypeStruct((batches, heads, length), jnp.float32),
        ),
        scratch=[
            _smem((q_slots, 2, WARPGROUP_ROWS, H), q.dtype),
            _smem((stages, block, H), q.dtype),
            _smem((stages, block, H), q.dtype),
            plgpu.SMEM((q_slots, 32), i32),  # TMA writes at multiples of 128 bytes
            *(plgpu.SMEM((q_slots, rows), i32),) * 2,
            plgpu.Barrier(num_barriers=q_slots, num_arrivals=5),
            plgpu.Barrier(num_barriers=q_slots, num_arrivals=2),
            *(plgpu.Barrier(num_barriers=stages),) * 2,
            *(freed(num_barriers=stages, num_arrivals=2),) * 2,
        ],
        cluster=cluster,
    )(q, k, v, *walk, broken)
    return varying_like(out[:, :T], q, k, v), varying_like(lse[:, :, :T], q, k, v)


def _queries_kernel(options: _Options, q, k, v, d_out, lse2, delta, mask: Mask) -> Array:
    """dQ [B, T, N, H], each block adding up its own queries' in a fixed order."""
    B, T, N, H = q.shape
    group = N // k.shape[2]
    block, stages, registers = HEAD_DIMS[H].queries
    rows = 2 * WARPGROUP_ROWS
    tiles = pl.cdiv(T, rows)
    order = in_order(B * N, tiles, 2 * k.nbytes // (B * N), heaviest_last=True).reshape(-1, 1)
    order = Order(order, is_known(mask))
    walk = Walk.of(mask.live_keys(), rows, block, order, N, key_lists(mask, rows, block))
    lse2, delta = pad(lse2, 2, rows, jnp.inf), pad(delta, 2, rows)

    def kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, items, lists, first, end, dq_ref, scratch):
        q_smem, do_smem, k_smem, v_smem, here, k_here, v_here, k_free, v_free = scratch
        warpgroup = lax.axis_index("warpgroup")
        tile = Tile(items.at[lax.axis_index("block"), 0], lists)
        batch, head = tile.batch, tile.head
        steps = jnp.maximum(tile.end - tile.first, 0)

        @pl.when(warpgroup < 2)
        def compute():
            plgpu.set_max_registers(registers[0], action="increase")
            base = tile.index * rows + warpgroup * WARPGROUP_ROWS
            mine = (batch, pl.ds(base, WARPGROUP_ROWS), head)
            for ref, smem in ((q_ref, q_smem), (do_ref, do_smem)):
                plgpu.copy_gmem_to_smem(ref.at[mine], smem.at[warpgroup], here.at[warpgroup])
            statistics = (batch, head, pl.ds(base, WARPGROUP_ROWS))
            lse, delta = (_per_row(ref.at[statistics]) for ref in (lse_ref, delta_ref))
            ranges = tuple(_per_row(_rows_at(ref, batch, base, WARPGROUP_ROWS)) for ref in (first, end))
            plgpu.barrier_wait(here.at[warpgroup])

            def step(i, carry):
                dq, code = carry
                following = tile.peek(i + 1)
                slot, (_, j, full) = lax.rem(i, i32(stages)), tile.visit(i, code)
                plgpu.barrier_wait(k_here.at[slot])
                plgpu.barrier_wait(v_here.at[slot])

                def products(x_ref, dp_ref):
                    this = warpgroup + _zero_of(i)
                    plgpu.wgmma(x_ref, q_smem.at[this], k_smem.at[slot].transpose((1, 0)))
                    plgpu.wgmma(dp_ref, do_smem.at[this], v_smem.at[slot].transpose((1, 0)))
                    x = plgpu.wgmma_accumulator_load(x_ref, wait_n=1)
                    hidden = lambda x: _hide(x, ranges, j * block)  # noqa: E731
                    spread = lambda row: lax.broadcast_in_dim(row, x.shape, [0])  # noqa: E731
                    hide = lambda x: lax.cond(full(), lambda x: x, hidden, x)  # noqa: E731
                    p, slope = _probabilities(options, x, lambda: spread(lse), hide)
                    ds = p * (plgpu.wgmma_accumulator_load(dp_ref, wait_n=0) - spread(delta))
                    return (ds if slope is None else ds * slope).astype(q.dtype)

                ds = pl.run_scoped(products, *(plgpu.ACC((WARPGROUP_ROWS, block), jnp.float32),) * 2)
                plgpu.barrier_arrive(v_free.at[slot])
                dq = _added(dq, ds, k_smem.at[slot], options.interpret)
                plgpu.barrier_arrive(k_free.at[slot])
                return dq, following

            dq = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, H), jnp.float32), WGMMA)
            dq, _ = lax.fori_loop(i32(0), steps, step, (dq, tile.peek(0)))
            q_smem.at[warpgroup][...] = (dq * options.scale).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[warpgroup], dq_ref.at[mine])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 2)
        def copy():
            plgpu.set_max_registers(registers[1], action="decrease")
            kv_head = lax.div(head, i32(group))

            def fill(i, code):
                following = tile.peek(i + 1)
                slot = lax.rem(i, i32(stages))
                source = (batch, pl.ds(tile.visit(i, code)[1] * block, block), kv_head)
                for ref, smem, here, free in ((k_ref, k_smem, k_here, k_free), (v_ref, v_smem, v_here, v_free)):
                    pl.when(i >= stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
                    plgpu.copy_gmem_to_smem(ref.at[source], smem.at[slot], here.at[slot])
                return following

            lax.fori_loop(i32(0), steps, fill, tile.peek(0))
            _drain(steps, stages, k_free, v_free)

    (dq,) = _launch(
        kernel,
        "ulysses_attention_backward_queries",
        options,
        blocks=len(order.items),
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


def _queries_a_step(options: _Options, H: int) -> int:
    """Of the kernels by keys; under a soft cap at most 64, as its slope takes as many registers as a product."""
    block = HEAD_DIMS[H].keys.block
    return block if options.soft_cap is None else min(block, 64)


def _by_keys(
    options: _Options, q, k, v, d_out, lse2, delta, mask: Mask, wanted: set[str]
) -> tuple[Array | None, Array | None, Array | None]:
    """(dQ, dK, dV), those of `wanted`; where all tiles take equally long, the last few are cut along their queries."""
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    rows, block, left, parts = 2 * WARPGROUP_ROWS, _queries_a_step(options, H), 0, 1
    if hides_nothing(mask, T, S) and T % block == 0 and S % rows == 0 and parts_of_group(N // K, S // rows) == 1:
        left, parts = last_round(B * K * (S // rows), S // rows, T // block)
    found = _keys_kernel(options, q, k, v, d_out, lse2, delta, mask, wanted, left)
    if not left:
        return found
    last, heads, length = slice(S - left * rows, S), slice(N - N // K, N), T // parts
    queries = (x[-1, :, heads].reshape(parts, length, -1, H) for x in (q, d_out))
    keys = (jnp.broadcast_to(x[-1:, last, -1:], (parts, left * rows, 1, H)) for x in (k, v))
    statistics = (x[-1, heads].reshape(-1, parts, length).swapaxes(0, 1) for x in (lse2, delta))
    (q, d_out), (k, v), (lse2, delta) = queries, keys, statistics
    dq, *more = _keys_kernel(options, q, k, v, d_out, lse2, delta, make_mask(length, left * rows), wanted)
    whole = None if dq is None else cast(Array, found[0]).at[-1, :, heads].add(dq.reshape(T, -1, H))
    sums = (None if x is None else x.sum(0, dtype=jnp.float32)[:, 0].astype(x.dtype) for x in more)
    return whole, *(None if x is None else cast(Array, y).at[-1, last, -1].set(x) for x, y in zip(sums, found[1:], strict=True))


def _keys_kernel(
    options: _Options, q, k, v, d_out, lse2, delta, mask: Mask, wanted: set[str], left: int = 0
) -> tuple[Array | None, Array | None, Array | None]:
    """(dQ, dK, dV), those of `wanted`, without the last `left` tiles of keys of the last head's share; products are transposed:
    rows are keys, columns queries.

    Where dQ is wanted, each warpgroup computes the dS of its own keys. With heads of 128 both meet in shared memory and each
    computes half of dQ's columns from the dS of both; with heads of 64 each computes all columns from its own, which needs no
    meeting and costs twice the additions.
    """
    B, T, N, H = q.shape
    S = k.shape[1]
    _, stages, registers = HEAD_DIMS[H].keys
    block = _queries_a_step(options, H)
    rows = 2 * WARPGROUP_ROWS
    tiles = pl.cdiv(S, rows)
    parts = parts_of_group(N // k.shape[2], tiles)  # a KV head counts for so many
    K = k.shape[2] * parts
    group = N // K
    known = is_known(mask)  # then, if causal, the first tile is the heaviest
    # A head's queries and cotangents in 16 bits, and dQ in 32, are what all its tiles of keys share.
    order = in_order(B * K, tiles, 4 * q.nbytes // (B * K), heaviest_last=not known).reshape(-1, 1)
    order = Order(order[order[:, 0] < B * K * tiles - left], known)
    # Keys past S are rows that see nothing: a tile that has some is never taken for full, as exp2(0 − lse2) may be infinite.
    seen = tuple(pad(x, 1, rows) for x in mask.live_queries())
    walk = Walk.of(seen, rows, block, order, K, query_lists(mask, rows, block, N, K))
    lse2, delta = pad(lse2, 2, block, jnp.inf), pad(delta, 2, block)
    want_dq, want_dk, want_dv = ("dq" in wanted), ("dk" in wanted), ("dv" in wanted)
    share = want_dq and H > 64
    columns = H // 2 if share else H  # of dQ, a warpgroup's
    ds_slots = 2 if share else 1  # one is written while the other warpgroup still reads the one before
    interpret = bool(options.interpret)
    overlaps = share and not interpret  # dK runs on while dQ is sent
    # Steps that pass before a step's queries are let go: its last product, dK, runs on beside the first one of the next. Where
    # nothing is shared, dK is done before dQ is.
    lag = int(share and stages > 1)

    def kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, items, lists, first, end, *rest):
        refs, scratch = rest[:-1], rest[-1]
        outs = dict(zip([name for name in ("dq", "dk", "dv") if name in wanted], refs, strict=True))
        k_smem, v_smem, k_halves, q_smem, do_smem, lse_smem, delta_smem, ds_smem, dq_smem = scratch[:9]
        kv_here, q_here, do_here, q_free, do_free, met = scratch[9:]
        warpgroup = lax.axis_index("warpgroup")
        tile = Tile(items.at[lax.axis_index("block"), 0], lists)
        batch, kv_head = tile.batch, tile.head
        steps = jnp.maximum(tile.end - tile.first, 0) * (group if tile.lists is None else 1)

        def each_step(step, carry):
            """`step(n, code, carry)` for the tiles of all heads that read this KV head."""

            def body(n, carry):
                carry, code = carry
                following = tile.peek(n + 1)
                return step(n, code, carry), following

            return lax.fori_loop(i32(0), steps, body, (carry, tile.peek(0)))[0]

        @pl.when(warpgroup < 2)
        def compute():
            plgpu.set_max_registers(registers[0], action="increase")
            own = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
            base = tile.index * rows + warpgroup * WARPGROUP_ROWS
            ranges = tuple(_per_row(_rows_at(ref, batch, base, WARPGROUP_ROWS)) for ref in (first, end))
            plgpu.barrier_wait(kv_here)

            def free(n):
                """All products of step n − `lag` are done."""
                plgpu.barrier_arrive(q_free.at[lax.rem(n, i32(stages))])

            def step(n, code, sums):
                _, i, full = tile.visit(n, code, group)
                slot = lax.rem(n, i32(stages))
                this = warpgroup + _zero_of(n)
                keys = pl.ds(this * WARPGROUP_ROWS, WARPGROUP_ROWS)
                plgpu.barrier_wait(q_here.at[slot])
                plgpu.barrier_wait(do_here.at[slot])

                def products(x_ref, dp_ref):
                    plgpu.wgmma(x_ref, k_smem.at[keys], q_smem.at[slot].transpose((1, 0)))
                    if want_dq or want_dk:
                        plgpu.wgmma(dp_ref, v_smem.at[keys], do_smem.at[slot].transpose((1, 0)))
                    x = plgpu.wgmma_accumulator_load(x_ref, wait_n=1 if want_dq or want_dk else 0)
                    if lag:  # by now the products of the step before are done
                        free(n)
                    hidden = lambda x: _hide(x, ranges, i * block)  # noqa: E731
                    spread = lambda column: lax.broadcast_in_dim(column, x.shape, [1])  # noqa: E731
                    hide = lambda x: lax.cond(full(), lambda x: x, hidden, x)  # noqa: E731
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
                    if not (share or interpret):  # from registers, so it runs while dS is written
                        plgpu.wgmma(dk, ds, q_smem.at[slot])
                    mine = ds_smem.at[lax.rem(n, i32(ds_slots))]
                    if overlaps:
                        _ptx("cp.async.bulk.wait_group.read 0;")  # dQ of the last step has left its buffer
                        mine.at[own][...] = ds
                        _ptx(MEET)
                    else:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        mine.at[own][...] = ds
                        plgpu.commit_smem()
                        if share:
                            plgpu.barrier_arrive(met)
                            plgpu.barrier_wait(met)

                    def dq_and_dk(dq_ref):
                        if share:
                            plgpu.wgmma(dq_ref, mine.transpose((1, 0)), k_halves.at[this])
                        else:
                            plgpu.wgmma(dq_ref, mine.at[own].transpose((1, 0)), k_smem.at[keys])
                        if overlaps:
                            plgpu.wgmma(dk, mine.at[own], q_smem.at[slot])
                        return plgpu.wgmma_accumulator_load(dq_ref, wait_n=int(overlaps))

                    dq = pl.run_scoped(dq_and_dk, plgpu.ACC((block, columns), jnp.float32))
                    if interpret:
                        dk = _product(dk, ds, q_smem.at[slot])
                    plgpu.barrier_arrive(do_free.at[slot])
                    dq_smem.at[warpgroup][...] = dq * options.scale
                    plgpu.commit_smem()
                    head, i, _ = tile.visit(n, code, group)  # again: to keep them over the products would spill registers
                    target = (batch, pl.ds(i * block, block), kv_head * group + head)
                    target = (*target, pl.ds(warpgroup * columns, columns)) if share else target
                    if interpret:  # the interpreter cannot add up by TMA: every tile of keys writes a copy of its own
                        target = (tile.index, 0 if share else warpgroup, *target)
                    add = {} if interpret else {"reduction_op": "add"}
                    plgpu.copy_smem_to_gmem(dq_smem.at[warpgroup], outs["dq"].at[target], **add)
                elif want_dk:
                    dk = _accumulate(dk, ds, q_smem.at[slot], interpret)
                if not lag:
                    if not interpret:
                        plgpu.wgmma_wait(0)
                    if not want_dq:
                        plgpu.barrier_arrive(do_free.at[slot])
                    free(n)
                return (dk, dv) if interpret else sums

            if interpret:
                zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, H), jnp.float32), WGMMA)
                sums = each_step(step, (zeros, zeros))
            else:

                def accumulated(dk_ref, dv_ref):
                    each_step(lambda n, code, _: step(n, code, (dk_ref, dv_ref)) and None, None)
                    return dk_ref[...] if want_dk else None, dv_ref[...] if want_dv else None

                sums = pl.run_scoped(accumulated, *(plgpu.ACC((WARPGROUP_ROWS, H), jnp.float32),) * 2)
            if lag:
                free(steps)
            for name, total, smem, factor in zip(("dk", "dv"), sums, (k_smem, v_smem), (options.scale, 1.0), strict=True):
                if name in wanted:
                    smem.at[own][...] = (total * factor).astype(q.dtype)
            plgpu.commit_smem()
            for name, smem in (("dk", k_smem), ("dv", v_smem)):
                if name in wanted:
                    plgpu.copy_smem_to_gmem(smem.at[own], outs[name].at[batch, pl.ds(base, WARPGROUP_ROWS), kv_head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(warpgroup == 2)
        def copy():
            plgpu.set_max_registers(registers[1], action="decrease")
            keys = (batch, pl.ds(tile.index * rows, rows), lax.div(kv_head, i32(parts)))
            plgpu.copy_gmem_to_smem(k_ref.at[keys], k_smem, kv_here)
            plgpu.copy_gmem_to_smem(v_ref.at[keys], v_smem, kv_here)
            for half in range(2 if share else 0):
                plgpu.copy_gmem_to_smem(k_ref.at[(*keys, pl.ds(half * columns, columns))], k_halves.at[half], kv_here)

            def fill(n, code, _):
                head, i, _ = tile.visit(n, code, group)
                head = kv_head * group + head
                slot, at = lax.rem(n, i32(stages)), pl.ds(i * block, block)
                pl.when(n >= stages)(lambda: plgpu.barrier_wait(q_free.at[lax.rem(n + lag, i32(stages))]))
                plgpu.copy_gmem_to_smem(q_ref.at[batch, at, head], q_smem.at[slot], q_here.at[slot])
                plgpu.copy_gmem_to_smem(lse_ref.at[batch, head, at], lse_smem.at[slot], q_here.at[slot])
                plgpu.copy_gmem_to_smem(delta_ref.at[batch, head, at], delta_smem.at[slot], q_here.at[slot])
                pl.when(n >= stages)(lambda: plgpu.barrier_wait(do_free.at[slot]))
                plgpu.copy_gmem_to_smem(do_ref.at[batch, at, head], do_smem.at[slot], do_here.at[slot])
                if lag:  # the first to be let go was never filled
                    pl.when(n == stages - 1)(lambda: plgpu.barrier_wait(q_free.at[0]))

            each_step(fill, None)
            _drain(steps + lag, stages, q_free)
            _drain(steps, stages, do_free)

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
        blocks=len(order.items),
        out=tuple(outs.values()),
        scratch=[
            *(_smem((rows, H), q.dtype),) * 2,
            _smem((2, rows, columns) if share else (1, 8, 64), q.dtype),
            *(_smem((stages, block, H), q.dtype),) * 2,
            *(plgpu.SMEM((stages, block), jnp.float32),) * 2,
            _smem((ds_slots, rows, block) if want_dq else (1, 8, 64), q.dtype),
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

    def whole(x):
        return x.reshape(B, -1, K // parts, parts, H).sum(3, dtype=jnp.float32).astype(x.dtype) if parts > 1 else x

    return dq, *(whole(found[name])[:, :S] if name in found else None for name in ("dk", "dv"))


def _probabilities(options: _Options, x, lse2: Callable, hide: Callable) -> tuple[Array, Array | None]:
    """P = exp2(x − lse2) from the bare product x, and the slope of the cap (None without one)."""
    slope = None
    if options.soft_cap is not None:
        tanh = jnp.tanh(x * (options.scale / options.soft_cap))
        x, slope = options.soft_cap * tanh, 1.0 - tanh * tanh
    x = hide(x)
    return jnp.exp2(x * options.exponent - lse2()), slope


def _zero_of(n):
    """0 for any step n < 2³⁰, but not to the compiler. Where operands lie in shared memory is the same in every step and would
    be kept in registers through all loops around, which spills; what hangs on the step is computed anew.
    """
    return lax.div(n, i32(2**30))


def _rescaled(acc, fade, around: bool):
    """acc · fade, a factor a row; `around`: a warp all of whose factors are 1 goes around it."""
    if not around:
        return acc * lax.broadcast_in_dim(fade, acc.shape, [0])
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, nvvm, scf, vector

    @plgpu.inline_mgpu(arg_types=(WGMMA, ROWS), return_type=plgpu.ShapeDtypeStruct(acc.shape, acc.dtype, layout=WGMMA))
    def rescale(context, acc, fade):
        one = arith.constant(ir.F32Type.get(), 1.0)
        factors = (vector.extract(x, [], [0]) for x in fade.registers.flat)
        fades = functools.reduce(arith.ori, (arith.cmpf(arith.CmpFPredicate.UNE, x, one) for x in factors))
        some = nvvm.vote_sync(mgpu.c(0xFFFFFFFF, ir.IntegerType.get_signless(32)), fades, "any")
        branch = scf.IfOp(some, [x.type for x in acc.registers.flat], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            scf.yield_(list((acc * fade.broadcast_in_dim(acc.shape, (0,), acc.layout)).registers.flat))
        with ir.InsertionPoint(branch.else_block):  # pyright: ignore[reportCallIssue]
            scf.yield_(list(acc.registers.flat))
        registers = np.array(branch.results, dtype=object).reshape(acc.registers.shape)
        return mgpu.FragmentedArray(_registers=registers, _layout=acc.layout, _is_signed=None)

    return rescale(acc, fade)  # pyright: ignore[reportCallIssue] — the context is Mosaic's to give


def _computed(sums) -> None:
    """These, which are never negative, are computed before what follows: the compiler would wait first for a product that runs
    beside. An instruction reads them that does nothing here, and is not reached.
    """
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    read = "{ .reg .pred p; setp.eq.f32 p, $0, 0fBF800000; @p griddepcontrol.launch_dependents; }"

    @plgpu.inline_mgpu(arg_types=(ROWS,))
    def computed(context, sums) -> None:
        for x in sums.registers.flat:
            llvm.inline_asm(ir.Type.parse("!llvm.void"), [x], read, "f", has_side_effects=True)

    computed(sums)  # pyright: ignore[reportCallIssue]


def _ptx(text: str) -> None:
    """One instruction or more, without operands, in PTX."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    @plgpu.inline_mgpu()
    def inlined(context) -> None:
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [], text, "", has_side_effects=True)

    inlined()  # pyright: ignore[reportCallIssue] — the context is Mosaic's to give


def _product(acc, a, b_ref):
    """acc + a b, for the interpreter, which has no product with an operand in registers."""
    acc = acc + lax.dot_general(a, b_ref[...], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    plgpu.commit_smem()  # the read above went around the asynchronous proxy: order it before the next copy
    return acc


def _added(acc, a, b_ref, interpret: bool):
    """acc + a b, both values, once it is done."""
    if interpret:
        return _product(acc, a, b_ref)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b_ref))(plgpu.ACC.init(acc))


def _accumulate(acc, a, b_ref, interpret: bool):
    """acc += a b: into the accumulator `acc` names, or, interpreted, as a value."""
    return _product(acc, a, b_ref) if interpret else plgpu.wgmma(acc, a, b_ref)


def _count(items):
    """How many items this block or cluster has."""
    return i32(1) if items.shape[1] == 1 else jnp.maximum(items.at[lax.axis_index("block"), 0][7], 0)


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


def _launch(
    kernel: Callable, name: str, options: _Options, *, blocks: int, out: tuple, scratch: list, cluster: int = 1
) -> Callable:
    """`blocks`, or as many clusters of blocks, each a "member" of its own."""

    def body(*refs):
        cut = len(refs) - len(scratch)
        kernel(*refs[:cut], refs[cut:])

    return plgpu.kernel(
        body,
        out_type=out,
        grid=(blocks,),
        grid_names=("block",),
        **({"cluster": (cluster,), "cluster_names": ("member",)} if cluster > 1 else {}),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=scratch,
        # No product is reduced across warps, so none needs the scratch that Pallas would set aside.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        kernel_name=name,
        interpret=options.interpret,
    )
