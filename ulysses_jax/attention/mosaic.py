"""What the Hopper kernels are built of: sizes, options, and pieces of Pallas Mosaic GPU that more than one of them uses."""

# Mosaic's accumulators, transforms and exports are not what their annotations say.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ulysses_jax.attention.blocked import pad

__all__ = [
    "COLUMNS",
    "HEAD_DIMS",
    "LOG2E",
    "ROWS",
    "WARPGROUP_ROWS",
    "WGMMA",
    "KernelOptions",
    "added",
    "drain",
    "i32",
    "launch",
    "only_visible",
    "per_row",
    "product",
    "ptx",
    "rows_at",
    "swizzled",
    "with_heads_padded",
]

WGMMA = plgpu.Layout.WGMMA
ROWS = WGMMA.reduce(1)  # one value a row of a product
COLUMNS = WGMMA.reduce(0)  # one value a column
LOG2E = math.log2(math.e)
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
    persistent: bool  # blocks of the forward work off many tiles each, which takes a second buffer of queries
    lags: bool  # the forward's running maximum does, so that most steps need not rescale what is added up


HEAD_DIMS = {
    64: Tilings(Tiling(128, 2), Tiling(64, 2), Tiling(128, 2), fused=True, persistent=True, lags=False),
    128: Tilings(Tiling(128, 2), Tiling(64, 2), Tiling(64, 2), fused=True, persistent=True, lags=True),
    256: Tilings(Tiling(64, 2), Tiling(64, 1), Tiling(64, 1), fused=False, persistent=False, lags=False),
}


class KernelOptions(NamedTuple):
    """What both directions are asked for."""

    scale: float
    soft_cap: float | None
    deterministic: bool
    interpret: Any

    @property
    def exponent(self) -> float:
        """What turns a (capped) logit into an exponent of 2."""
        return LOG2E * (self.scale if self.soft_cap is None else 1.0)


def with_heads_padded(*arrays: Array) -> Iterator[Array]:
    """[B, T, N, H] with H padded to a size that the kernels have. What a step saves is not."""
    size = next(size for size in HEAD_DIMS if size >= arrays[0].shape[3])
    return (pad(x, 3, size) for x in arrays)


def rows_at(ref, batch, base, count: int):
    """Rows base … base + count − 1 of a [B or 1, rows] ref."""
    return ref.at[batch if ref.shape[0] > 1 else 0, pl.ds(base, count)]


def per_row(ref) -> Array:
    """Of [rows] values, those of the rows that a thread holds of a product."""
    return plgpu.load(ref, layout=ROWS, optimized=False)


def only_visible(x: Array, ranges: tuple[Array, ...], column) -> Array:
    """−inf where a row's range, of `ranges` (first, end), leaves out the column (`column` + index)."""
    first, end = ranges
    columns = plgpu.broadcasted_iota(i32, x.shape, 1, layout=WGMMA) + column
    across = lambda row: lax.broadcast_in_dim(row, x.shape, [0])  # noqa: E731
    # Unsigned, what lies before `first` is far beyond the range's length: one comparison for two.
    length = jnp.maximum(end - first, 0).astype(jnp.uint32)
    return jnp.where((columns - across(first)).astype(jnp.uint32) < across(length), x, -jnp.inf)


def product(acc, a, b_ref):
    """acc + a b, for the interpreter, which has no product with an operand in registers."""
    acc = acc + lax.dot_general(a, b_ref[...], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    plgpu.commit_smem()  # the read above went around the asynchronous proxy: order it before the next copy
    return acc


def added(acc, a, b_ref, interpret: bool):
    """acc + a b, both values, once it is done."""
    if interpret:
        return product(acc, a, b_ref)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b_ref))(plgpu.ACC.init(acc))


def drain(steps, stages: int, *barriers) -> None:
    """Wait for the last round's buffers to be freed: every completion of a barrier must be observed."""

    def wait(i, _):
        for barrier in barriers:
            plgpu.barrier_wait(barrier.at[lax.rem(i, i32(stages))])

    lax.fori_loop(jnp.maximum(steps - stages, 0), steps, wait, None)


def ptx(text: str) -> None:
    """One instruction or more, without operands, in PTX."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    @plgpu.inline_mgpu()
    def inlined(context) -> None:
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [], text, "", has_side_effects=True)

    inlined()  # pyright: ignore[reportCallIssue] — the context is Mosaic's to give


def swizzled(shape: tuple[int, ...], dtype):
    """Shared memory in the swizzled tiles that TMA writes and wgmma reads: 128 bytes a row."""
    lanes = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(128)))


def launch(
    kernel: Callable, name: str, options: KernelOptions, *, blocks: int, out: tuple, scratch: list, cluster: int = 1
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
