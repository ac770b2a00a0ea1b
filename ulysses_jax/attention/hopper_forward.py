"""The Hopper kernel of the forward; `hopper` says how it works."""

# Mosaic's accumulators, transforms and exports are not what their annotations say.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false

import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ulysses_jax.attention.blocked import varying_like
from ulysses_jax.attention.masks import Mask
from ulysses_jax.attention.mosaic import (
    HEAD_DIMS,
    LOG2E,
    ROWS,
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
from ulysses_jax.attention.schedule import Order, in_order, last_round
from ulysses_jax.attention.walk import (
    Tile,
    Walk,
    hides_nothing,
    in_clusters,
    is_known,
    items_of_parts,
    key_lists,
    order_of_queries,
    steps_known,
)

__all__ = ["forward"]

LAG = 8.0  # by how much, in base 2, logits may pass a running maximum that lags: P then reaches 2⁸, exact enough in 16 bits
FEW = 10  # steps of a window's tile that is begun early: 9 gain 2 to 9 %, 17 and more nothing for sure
LOWEST = -1e30  # the running maximum's start: finite, so that a row that saw nothing yet subtracts no infinities

# A computing warpgroup waits for its turn before it issues a step's products, and then gives the other one its own: each waits
# at a barrier of its own, 9 or 10, until the other arrives there. The last arrival of a block is waited for by none.
TAKE_TURN, GIVE_TURN = (
    f"{{ .reg .b32 of; mov.u32 of, %tid.x; shr.u32 of, of, 7; {other} add.u32 of, of, 9; bar.{does} of, {2 * 128}; }}"
    for other, does in (("", "sync"), ("xor.b32 of, of, 1;", "arrive"))
)


def forward(options: KernelOptions, q: Array, k: Array, v: Array, mask: Mask) -> tuple[Array, Array]:
    """(out, lse); where all tiles take equally long, the last few are cut along their keys and shared by all (`last_round`)."""
    size = q.shape[3]
    q, k, v = with_heads_padded(q, k, v)
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
    options: KernelOptions, q: Array, k: Array, v: Array, mask: Mask, left: int = 0, parts: int = 0
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
    weights = steps_known(mask, cluster * rows, block, lists) if tilings.persistent else None
    if parts:
        order = Order(np.arange(parts * left).reshape(-1, 1), known=True)
    elif tilings.persistent:
        order = order_of_queries(weights, B * N, tiles // cluster, key_bytes, left // cluster, cluster, lists is not None)
    else:
        order = Order(in_order(B * N, tiles, key_bytes, heaviest_last=True).reshape(-1, 1), is_known(mask))
    halves = tilings.persistent and mask.query_ids is not None and lists is None
    walk = Walk.of(mask.live_keys(), cluster * rows, block, order, N, lists, halves)
    if parts:  # a part stands where a batch index would
        walk = walk._replace(items=jnp.asarray(items_of_parts(left, parts, tiles - left, S // block // parts)))
    out_at = (tiles - left) * rows if parts else 0
    q_slots = min(2, order.items.shape[1])  # the next item's queries come while this one's are in use
    # Where tiles have few steps, one begins beside the last product of the one before; it costs others up to 5 %.
    few = H == 128 and mask.window is not None and weights is not None and max(weights) <= FEW
    beside = q_slots > 1 and (lists is not None or few)
    # Held in registers through a tile, its queries spare shared memory a fifth of what is read of it: faster in clusters alone.
    held = cluster > 1 and not options.interpret
    lags = tilings.lags
    # Blocks gain nothing by it. Heads of other sizes have not been measured, with this nor with tiles begun beside others.
    by_bits = H == 128 and partial_loop and lists is None and not options.interpret
    hide_rest = _only_visible_by_bits if by_bits else only_visible
    uneven = cluster > 1 and mask.is_causal
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
                ptx(text)

        def own_steps(tile: Tile):
            """(steps of this block's queries, how many of a cluster's first steps, 0 or 1, only its other block takes, as these
            queries see nothing there).
            """
            if not uneven:
                return steps_of(tile), i32(0)
            base, first, end = base_of(tile), tile.first, tile.first + steps_of(tile)
            own_end = jnp.clip(lax.div(base + rows + block - 1, i32(block)), first + 1, end)
            return jnp.maximum(own_end - first, masked_steps), end - own_end  # at least so many, as in `steps_of`

        def let_go(step):
            """The keys and values of a step that this warpgroup does not take."""
            slot = lax.rem(step, i32(stages))
            for here, free in ((k_here, k_free), (v_here, v_free)):
                plgpu.barrier_wait(here.at[slot])
                plgpu.barrier_arrive(free.at[slot])

        def pass_by(passed, done):
            """Let go of so many steps, 0 or 1, before an item begins."""
            pl.when(passed > 0)(lambda: let_go(done))
            return done + passed

        def steps_taken(tile: Tile, steps):
            """How many steps this warpgroup takes: not the last, of whose keys only the other one's queries see some."""
            if not halves:
                return steps
            return steps - jnp.clip(jnp.where(warpgroup == 1, tile.skew, -tile.skew), 0, steps - 1)

        def pass_turn(step):
            """Let go of a step, and of its turn, as the other warpgroup takes one."""
            let_go(step)
            turn_is(TAKE_TURN)
            turn_is(GIVE_TURN)

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
                return product(acc, p, v_smem.at[before]), *softened(x)

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
            tile = told(n)
            return tile, own_steps(tile)[0], q_smem.at[q_slot, warpgroup], ranges

        top_of_none = plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), LOWEST, jnp.float32), ROWS)
        total_of_none = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS,), jnp.float32), ROWS)

        def hiding(tile, steps, ranges, i, code, hide: bool | None) -> Callable[[Array], Array]:
            """What hides, of the logits of step i, those that their rows do not see; None: where the tile hides something."""
            if hide is False:
                return lambda x: x
            _, j, full = tile.visit(i, code, end=tile.first + steps)
            hidden = lambda x: hide_rest(x, tuple(map(per_row, ranges)), j * block)  # noqa: E731
            return hidden if hide else lambda x: lax.cond(full(), lambda x: x, hidden, x)

        def opening(n):
            """What hides, of item n's first logits, those that their rows do not see."""
            tile, steps, _, ranges = item(n)
            return hiding(tile, steps, ranges, i32(0), tile.peek(0), True)

        def begin(n, done):
            """Steps done, the queries of item n, and the softmax of its first logits by itself."""
            plgpu.barrier_wait(q_here.at[lax.rem(n, i32(q_slots))])
            if uneven:
                done = pass_by(own_steps(told(n))[1], done)
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
            taken = steps_taken(tile, steps)
            acc, p, top, total, _ = lax.fori_loop(i32(1 if partial_loop else masked_steps), taken, step, carry)

            before = lax.rem(done + taken - 1, i32(stages))
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
                acc = added(acc, p, v_smem.at[before], options.interpret)
                plgpu.barrier_arrive(v_free.at[before])
            finish(tile, mine, acc, top, total, spoilt)
            if halves:
                lax.fori_loop(taken, steps, lambda i, _: pass_turn(done + i), None)
            done += steps
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
                plgpu.copy_gmem_to_smem(item, item_smem.at[q_slot, pl.ds(0, items.shape[2])], q_here.at[q_slot])
                for ref, smem in ((first, first_smem), (end, end_smem)):
                    source = rows_at(ref, tile.batch, base_of(tile), rows)
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
                drain(count, q_slots, q_free)
            drain(done + again, stages, k_free)
            drain(done, stages, v_free)

    freed = functools.partial(plgpu.ClusterBarrier, collective_axes=("member",)) if cluster > 1 else plgpu.Barrier
    batches, length, heads = (parts, left * rows, 1) if parts else (B, tiles * rows, N)
    out, lse = launch(
        kernel,
        "ulysses_attention_forward",
        options,
        blocks=len(order.items),
        out=(
            jax.ShapeDtypeStruct((batches, length, heads, H), q.dtype),
            jax.ShapeDtypeStruct((batches, heads, length), jnp.float32),
        ),
        scratch=[
            swizzled((q_slots, 2, WARPGROUP_ROWS, H), q.dtype),
            swizzled((stages, block, H), q.dtype),
            swizzled((stages, block, H), q.dtype),
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


def _each_item(items, body: Callable, carry):
    """`body(n, carry)` for the items of this block or cluster; with one a block, without a loop."""
    if items.shape[1] == 1:
        return body(lax.rem(lax.axis_index("block"), i32(1)), carry)  # a zero that is traced: Pallas closes over no literal
    return lax.fori_loop(i32(0), _count(items), body, carry)


def _count(items):
    """How many items this block or cluster has."""
    return i32(1) if items.shape[1] == 1 else jnp.maximum(items.at[lax.axis_index("block"), 0][7], 0)


def _only_visible_by_bits(x, ranges: tuple[Array, ...], column):
    """`only_visible` in 0.56 of its instructions: each element asks a bit of a word that its row and thread share.

    Of a row a thread holds columns 8 i + 2 l and 8 i + 2 l + 1, l its number modulo 4; their bits are 2 i and 2 i + 1.
    """
    assert x.shape[1] <= 128  # four threads' words of 32 bits
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    @plgpu.inline_mgpu(arg_types=(WGMMA, ROWS, ROWS), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=WGMMA))
    def hide(context, x, first, end):
        word = ir.IntegerType.get_signless(32)
        number = lambda value: mgpu.c(value, word)  # noqa: E731
        own = arith.shli(arith.andi(mgpu.thread_idx(), number(3)), number(1))

        def before(bound):
            """How many of the thread's columns come before it."""
            past = arith.maxsi(arith.subi(vector.extract(bound, [], [0]), own), number(0))
            pairs = arith.shli(arith.shrui(past, number(3)), number(1))
            return arith.addi(pairs, arith.minsi(arith.andi(past, number(7)), number(2)))

        def bits(first, end):
            start = before(first)
            length = arith.maxsi(arith.subi(before(end), start), number(0))
            return llvm.inline_asm(word, [start, length], "bmsk.clamp.b32 $0, $1, $2;", "=r,r,r")

        rows = [bits(*bounds) for bounds in zip(first.registers.flat, end.registers.flat, strict=True)]
        minus_infinity = mgpu.c(-np.inf, ir.F32Type.get())
        registers = x.registers.copy()
        for at, pair in np.ndenumerate(x.registers):
            for k in range(2):
                bit = np.int32(1) << np.int32(2 * at[1] + k)
                seen = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(rows[at[4]], number(int(bit))), number(0))
                shown = arith.select(seen, vector.extract(pair, [], [k]), minus_infinity)
                registers[at] = vector.insert(shown, registers[at], [], [k])
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return cast(Array, hide(x, *(bound - column for bound in ranges)))  # pyright: ignore[reportCallIssue] — the context is Mosaic's to give


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
