"""The Hopper kernels of the backward; `hopper` says how they work."""

# Mosaic's accumulators, transforms and exports are not what their annotations say.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportReturnType=false

import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ulysses_jax.attention.blocked import pad, varying_like
from ulysses_jax.attention.masks import Mask, make_mask
from ulysses_jax.attention.mosaic import (
    COLUMNS,
    HEAD_DIMS,
    LOG2E,
    WARPGROUP_ROWS,
    WGMMA,
    KernelOptions,
    added,
    drain,
    i32,
    launch,
    only_visible,
    per_row,
    product,
    ptx,
    rows_at,
    swizzled,
    with_heads_padded,
)
from ulysses_jax.attention.schedule import Order, in_order, last_round, parts_of_group
from ulysses_jax.attention.walk import Tile, Walk, hides_nothing, is_known, key_lists, most_tiles, query_lists

__all__ = ["backward"]

# All of a block's computing threads have written what the tensor cores read next: one barrier for what would take three, one of
# each warpgroup for the copies before, another for what it wrote, and one in shared memory for both.
MEET = f"fence.proxy.async.shared::cta; bar.sync 8, {2 * 128};"
ADDITIONS = 128  # to a row of dQ in float16: they raise its error from 2.5e-3, of what else is bfloat16, to 3.1e-3 (simulated)
SAMPLE = 64  # tokens, or up to twice as many, that show how large a head's keys and values are


def backward(options: KernelOptions, q, k, v, mask: Mask, out, lse, d_out, d_lse) -> tuple[Array, Array, Array]:
    """(dQ, dK, dV) of cotangents of the output and of the log-sum-exp, shaped as in `hopper_attention`."""
    # dS = P ∘ (dP − delta), where delta = Σ_h dO ∘ O; a cotangent of the log-sum-exp enters as −dLSE.
    # Not an einsum: XLA would lay the stack of all layers' outputs out for it, heads outermost, and keep it twice.
    wide = d_out.astype(jnp.float32)
    delta = (wide * out).sum(-1).swapaxes(1, 2) - d_lse
    # In base 2, and +inf where nothing was seen: exp2(x − inf) = 0.
    lse2 = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E)
    H = q.shape[3]
    q, k, v, d_out = with_heads_padded(q, k, v, d_out.astype(q.dtype))
    tilings = HEAD_DIMS[q.shape[-1]]
    in_one = tilings.fused and not options.deterministic
    unit = _unit(wide, delta, k[..., :H], v[..., :H]) * options.scale if in_one and _in_16_bits(q, mask) else None
    gradients = functools.partial(_by_keys, options, q, k, v, d_out, (lse2, delta, unit), mask)
    if in_one:
        dq, dk, dv = gradients({"dq", "dk", "dv"})
    else:
        dq = _queries_kernel(options, q, k, v, d_out, lse2, delta, mask)
        if tilings.fused:
            _, dk, dv = gradients({"dk", "dv"})
        else:
            dk, dv = gradients({"dk"})[1], gradients({"dv"})[2]
    dq, dk, dv = (varying_like(cast(Array, gradient)[..., :H], x) for gradient, x in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv


def _queries_kernel(options: KernelOptions, q, k, v, d_out, lse2, delta, mask: Mask) -> Array:
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
            lse, delta = (per_row(ref.at[statistics]) for ref in (lse_ref, delta_ref))
            ranges = tuple(per_row(rows_at(ref, batch, base, WARPGROUP_ROWS)) for ref in (first, end))
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
                    hidden = lambda x: only_visible(x, ranges, j * block)  # noqa: E731
                    spread = lambda row: lax.broadcast_in_dim(row, x.shape, [0])  # noqa: E731
                    hide = lambda x: lax.cond(full(), lambda x: x, hidden, x)  # noqa: E731
                    p, slope = _probabilities(options, x, lambda: spread(lse), hide)
                    ds = p * (plgpu.wgmma_accumulator_load(dp_ref, wait_n=0) - spread(delta))
                    return (ds if slope is None else ds * slope).astype(q.dtype)

                ds = pl.run_scoped(products, *(plgpu.ACC((WARPGROUP_ROWS, block), jnp.float32),) * 2)
                plgpu.barrier_arrive(v_free.at[slot])
                dq = added(dq, ds, k_smem.at[slot], options.interpret)
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
            drain(steps, stages, k_free, v_free)

    (dq,) = launch(
        kernel,
        "ulysses_attention_backward_queries",
        options,
        blocks=len(order.items),
        out=(jax.ShapeDtypeStruct((B, tiles * rows, N, H), q.dtype),),
        scratch=[
            *(swizzled((2, WARPGROUP_ROWS, H), q.dtype),) * 2,
            *(swizzled((stages, block, H), q.dtype),) * 2,
            plgpu.Barrier(num_barriers=2, num_arrivals=2),
            *(plgpu.Barrier(num_barriers=stages),) * 2,
            *(plgpu.Barrier(num_barriers=stages, num_arrivals=2),) * 2,
        ],
    )(q, k, v, d_out, lse2, delta, *walk)
    return dq[:, :T]


def _in_16_bits(q: Array, mask: Mask) -> bool:
    """Is dQ added up in float16, each row in its `_unit`?

    It goes through memory as zeros, as sums, and to be rounded, which is half of what a step takes longer than its products
    where few tiles are walked. Where many may be, float32 keeps the sum exact.
    """
    each = 1 if q.shape[3] > 64 else 2  # additions a tile of keys: see `_keys_kernel`
    additions = each * most_tiles(mask, 2 * WARPGROUP_ROWS)
    if mask.query_ids is not None or mask.blocks is not None:
        additions //= 2  # how many these leave is not known; hardly all
    elif mask.window is None:
        return False
    return q.dtype == jnp.bfloat16 and additions <= ADDITIONS


def _unit(d_out, delta, k, v) -> Array:
    """What float16 counts each row of dQ / scale in, [B, N, T]: 8 (√H max |dO| · rms(v) + |delta|) · rms(k).

    As |dP − delta| ≤ ‖dO‖ ‖v‖ + |delta|, and P adds up to 1 at most, sums are at most max(1, ‖v‖ / rms(v)) · max |k| / rms(k)
    / 8, where float16 ends at 65504; of n keys alike they are about 0.05 / √n, and bits are lost below 6e-5. The root mean
    squares are a head's, over some of its tokens: they set the scale, which may be wrong by orders of magnitude.
    """
    (S, K, H), N = k.shape[1:], d_out.shape[2]
    some = jnp.stack([x[:, :: max(1, S // SAMPLE)] for x in (k, v)]).astype(jnp.float32)
    rms = jnp.sqrt((some * some).mean((2, 4)))
    of_k, of_v = jnp.repeat(jnp.where(rms > 0, rms, 1.0), N // K, axis=2)[..., None]
    largest = jnp.abs(d_out).max(-1).swapaxes(1, 2)
    return 8 * (H**0.5 * largest * of_v + jnp.abs(delta)) * of_k


def _queries_a_step(options: KernelOptions, H: int) -> int:
    """Of the kernels by keys; under a soft cap at most 64, as its slope takes as many registers as a product."""
    block = HEAD_DIMS[H].keys.block
    return block if options.soft_cap is None else min(block, 64)


def _by_keys(
    options: KernelOptions, q, k, v, d_out, statistics: tuple[Array, Array, Array | None], mask: Mask, wanted: set[str]
) -> tuple[Array | None, Array | None, Array | None]:
    """(dQ, dK, dV), those of `wanted`; where all tiles take equally long, the last few are cut along their queries."""
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    rows, block, left, parts = 2 * WARPGROUP_ROWS, _queries_a_step(options, H), 0, 1
    if hides_nothing(mask, T, S) and T % block == 0 and S % rows == 0 and parts_of_group(N // K, S // rows) == 1:
        left, parts = last_round(B * K * (S // rows), S // rows, T // block)
    found = _keys_kernel(options, q, k, v, d_out, statistics, mask, wanted, left)
    if not left:
        return found
    last, heads, length = slice(S - left * rows, S), slice(N - N // K, N), T // parts
    queries = (x[-1, :, heads].reshape(parts, length, -1, H) for x in (q, d_out))
    keys = (jnp.broadcast_to(x[-1:, last, -1:], (parts, left * rows, 1, H)) for x in (k, v))
    lse2, delta = (x[-1, heads].reshape(-1, parts, length).swapaxes(0, 1) for x in statistics[:2])
    (q, d_out), (k, v), statistics = queries, keys, (lse2, delta, None)
    dq, *more = _keys_kernel(options, q, k, v, d_out, statistics, make_mask(length, left * rows), wanted)
    whole = None if dq is None else cast(Array, found[0]).at[-1, :, heads].add(dq.reshape(T, -1, H))
    sums = (None if x is None else x.sum(0, dtype=jnp.float32)[:, 0].astype(x.dtype) for x in more)
    return whole, *(None if x is None else cast(Array, y).at[-1, last, -1].set(x) for x, y in zip(sums, found[1:], strict=True))


def _keys_kernel(
    options: KernelOptions,
    q,
    k,
    v,
    d_out,
    statistics: tuple[Array, Array, Array | None],
    mask: Mask,
    wanted: set[str],
    left: int = 0,
) -> tuple[Array | None, Array | None, Array | None]:
    """(dQ, dK, dV), those of `wanted`, without the last `left` tiles of keys of the last head's share; products are transposed:
    rows are keys, columns queries.

    Where dQ is wanted, each warpgroup computes the dS of its own keys. With heads of 128 both meet in shared memory and each
    computes half of dQ's columns from the dS of both; with heads of 64 each computes all columns from its own, which needs no
    meeting and costs twice the additions.

    The statistics of a row are its log-sum-exp in base 2, its delta and, if its dQ is added up in float16, its unit.
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
    lse2, delta, unit = statistics
    sums_dtype = jnp.float32 if unit is None else jnp.float16
    known = is_known(mask)  # then, if causal, the first tile is the heaviest
    # A head's queries, cotangents and dQ are what all its tiles of keys share.
    shared = q.size * (2 * q.dtype.itemsize + jnp.dtype(sums_dtype).itemsize)
    order = in_order(B * K, tiles, shared // (B * K), heaviest_last=not known).reshape(-1, 1)
    order = Order(order[order[:, 0] < B * K * tiles - left], known)
    # Keys past S are rows that see nothing: a tile that has some is never taken for full, as exp2(0 − lse2) may be infinite.
    seen = tuple(pad(x, 1, rows) for x in mask.live_queries())
    walk = Walk.of(seen, rows, block, order, K, query_lists(mask, rows, block, N, K))
    rows_of_q = [pad(lse2, 2, block, jnp.inf), pad(delta, 2, block)]
    if unit is not None:  # a row without one, whose cotangents are zero or next to it, is zero
        rows_of_q.append(pad(jnp.where(unit > jnp.finfo(unit.dtype).tiny, options.scale / unit, 0.0), 2, block))
    want_dq, want_dk, want_dv = ("dq" in wanted), ("dk" in wanted), ("dv" in wanted)
    share = want_dq and H > 64
    columns = H // 2 if share else H  # of dQ, a warpgroup's
    parts_of_k = H // columns  # lie one by one, as each warpgroup multiplies dS with its own
    ds_slots = 2 if share else 1  # one is written while the other warpgroup still reads the one before
    interpret = bool(options.interpret)
    overlaps = share and not interpret  # dK runs on while dQ is sent
    # Steps that pass before a step's queries are let go: its last product, dK, runs on beside the first one of the next. Where
    # nothing is shared, dK is done before dQ is.
    lag = int(share and stages > 1)

    def kernel(q_ref, k_ref, v_ref, do_ref, *refs):
        row_refs, (items, lists, first, end, *out_refs, scratch) = refs[: len(rows_of_q)], refs[len(rows_of_q) :]
        outs = dict(zip([name for name in ("dq", "dk", "dv") if name in wanted], out_refs, strict=True))
        k_smem, v_smem, q_smem, do_smem, *row_smem, ds_smem, dq_smem = scratch[:-6]
        kv_here, q_here, do_here, q_free, do_free, met = scratch[-6:]
        lse_smem, delta_smem, *factor_smem = row_smem
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
            ranges = tuple(per_row(rows_at(ref, batch, base, WARPGROUP_ROWS)) for ref in (first, end))
            plgpu.barrier_wait(kv_here)

            def meet():
                """What this warpgroup, and where dQ is shared the other, wrote is there for the tensor cores."""
                if overlaps:
                    ptx(MEET)
                    return
                plgpu.commit_smem()
                if share:
                    plgpu.barrier_arrive(met)
                    plgpu.barrier_wait(met)

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
                    for part in range(parts_of_k):
                        its = pl.ds(part * columns, columns)
                        plgpu.wgmma(x_ref, k_smem.at[part, keys], q_smem.at[slot, :, its].transpose((1, 0)))
                    if want_dq or want_dk:
                        plgpu.wgmma(dp_ref, v_smem.at[keys], do_smem.at[slot].transpose((1, 0)))
                    x = plgpu.wgmma_accumulator_load(x_ref, wait_n=1 if want_dq or want_dk else 0)
                    if lag:  # by now the products of the step before are done
                        free(n)
                    hidden = lambda x: only_visible(x, ranges, i * block)  # noqa: E731
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
                        ptx("cp.async.bulk.wait_group.read 0;")  # dQ of the last step has left its buffer
                    else:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    mine.at[own][...] = ds
                    meet()

                    def dq_and_dk(dq_ref):
                        if share:
                            plgpu.wgmma(dq_ref, mine.transpose((1, 0)), k_smem.at[this])
                        else:
                            plgpu.wgmma(dq_ref, mine.at[own].transpose((1, 0)), k_smem.at[0, keys])
                        if overlaps:
                            plgpu.wgmma(dk, mine.at[own], q_smem.at[slot])
                        return plgpu.wgmma_accumulator_load(dq_ref, wait_n=int(overlaps))

                    dq = pl.run_scoped(dq_and_dk, plgpu.ACC((block, columns), jnp.float32))
                    if interpret:
                        dk = product(dk, ds, q_smem.at[slot])
                    plgpu.barrier_arrive(do_free.at[slot])
                    factor = options.scale
                    if unit is not None:
                        factor = lax.broadcast_in_dim(per_row(factor_smem[0].at[slot]), dq.shape, [0])
                    dq_smem.at[warpgroup][...] = (dq * factor).astype(sums_dtype)
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
            if share:  # dK leaves through the queries' buffers, once the other warpgroup's products, too, have read them
                assert stages > 1
                assert block == WARPGROUP_ROWS
                meet()
            out_smem = {"dk": q_smem.at[warpgroup] if share else k_smem.at[0, own], "dv": v_smem.at[own]}
            for name, total, factor in zip(("dk", "dv"), sums, (options.scale, 1.0), strict=True):
                if name in wanted:
                    out_smem[name][...] = (total * factor).astype(q.dtype)
            plgpu.commit_smem()
            for name, smem in out_smem.items():
                if name in wanted:
                    plgpu.copy_smem_to_gmem(smem, outs[name].at[batch, pl.ds(base, WARPGROUP_ROWS), kv_head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(warpgroup == 2)
        def copy():
            plgpu.set_max_registers(registers[1], action="decrease")
            keys = (batch, pl.ds(tile.index * rows, rows), lax.div(kv_head, i32(parts)))
            for part in range(parts_of_k):
                plgpu.copy_gmem_to_smem(k_ref.at[(*keys, pl.ds(part * columns, columns))], k_smem.at[part], kv_here)
            plgpu.copy_gmem_to_smem(v_ref.at[keys], v_smem, kv_here)

            def fill(n, code, _):
                head, i, _ = tile.visit(n, code, group)
                head = kv_head * group + head
                slot, at = lax.rem(n, i32(stages)), pl.ds(i * block, block)
                pl.when(n >= stages)(lambda: plgpu.barrier_wait(q_free.at[lax.rem(n + lag, i32(stages))]))
                plgpu.copy_gmem_to_smem(q_ref.at[batch, at, head], q_smem.at[slot], q_here.at[slot])
                for ref, smem in zip(row_refs, row_smem, strict=True):
                    plgpu.copy_gmem_to_smem(ref.at[batch, head, at], smem.at[slot], q_here.at[slot])
                pl.when(n >= stages)(lambda: plgpu.barrier_wait(do_free.at[slot]))
                plgpu.copy_gmem_to_smem(do_ref.at[batch, at, head], do_smem.at[slot], do_here.at[slot])
                if lag:  # the first to be let go was never filled
                    pl.when(n == stages - 1)(lambda: plgpu.barrier_wait(q_free.at[0]))

            each_step(fill, None)
            drain(steps + lag, stages, q_free)
            drain(steps, stages, do_free)

    padded = pl.cdiv(T, block) * block
    outs = {name: jax.ShapeDtypeStruct((B, tiles * rows, K, H), k.dtype) for name in ("dk", "dv") if name in wanted}
    inputs, dq = (q, k, v, d_out, *rows_of_q, *walk), None
    if want_dq and interpret:
        outs = {"dq": jax.ShapeDtypeStruct((tiles, 1 if share else 2, B, padded, N, H), sums_dtype), **outs}
    elif want_dq:
        # Zeros that hang on delta: XLA would write those of all layers in one go, and keep them.
        zero, _ = lax.optimization_barrier((jnp.zeros((), sums_dtype), delta))
        dq = jax.new_ref(jnp.full((B, padded, N, H), zero))  # Pallas takes no ref typed as varying
        inputs = (*inputs, dq)
    results = launch(
        kernel,
        "ulysses_attention_backward_" + "_".join(sorted(wanted)),
        options,
        blocks=len(order.items),
        out=tuple(outs.values()),
        scratch=[
            swizzled((parts_of_k, rows, columns), q.dtype),
            swizzled((rows, H), q.dtype),
            *(swizzled((stages, block, H), q.dtype),) * 2,
            *(plgpu.SMEM((stages, block), jnp.float32),) * len(rows_of_q),
            swizzled((ds_slots, rows, block) if want_dq else (1, 8, 64), q.dtype),
            swizzled((2, block, columns) if want_dq else (1, 8, 32), sums_dtype),
            plgpu.Barrier(num_arrivals=parts_of_k + 1),
            plgpu.Barrier(num_barriers=stages, num_arrivals=1 + len(rows_of_q)),
            plgpu.Barrier(num_barriers=stages),
            *(plgpu.Barrier(num_barriers=stages, num_arrivals=2),) * 2,
            plgpu.Barrier(num_arrivals=2),
        ],
    )(*inputs)
    found = dict(zip(outs, results, strict=True))
    if want_dq:
        # Tiles of keys that a query tile never meets leave their copies unwritten.
        dq = jnp.nansum(found["dq"], axis=(0, 1), dtype=jnp.float32) if interpret else jax.freeze(dq)
        dq = dq[:, :T] if unit is None else dq[:, :T] * unit.swapaxes(1, 2)[..., None]
        dq = dq.astype(q.dtype)

    def whole(x):
        return x.reshape(B, -1, K // parts, parts, H).sum(3, dtype=jnp.float32).astype(x.dtype) if parts > 1 else x

    return dq, *(whole(found[name])[:, :S] if name in found else None for name in ("dk", "dv"))


def _probabilities(options: KernelOptions, x, lse2: Callable, hide: Callable) -> tuple[Array, Array | None]:
    """P = exp2(x − lse2) from the bare product x, and the slope of the cap (None without one)."""
    slope = None
    if options.soft_cap is not None:
        tanh = jnp.tanh(x * (options.scale / options.soft_cap))
        x, slope = options.soft_cap * tanh, 1.0 - tanh * tanh
    x = hide(x)
    return jnp.exp2(x * options.exponent - lse2()), slope


def _accumulate(acc, a, b_ref, interpret: bool):
    """acc += a b: into the accumulator `acc` names, or, interpreted, as a value."""
    return product(acc, a, b_ref) if interpret else plgpu.wgmma(acc, a, b_ref)


def _zero_of(n):
    """0 for any step n < 2³⁰, but not to the compiler. Where operands lie in shared memory is the same in every step and would
    be kept in registers through all loops around, which spills; what hangs on the step is computed anew.
    """
    return lax.div(n, i32(2**30))
