"""Flash attention for Hopper GPUs (sm90) in Pallas Mosaic GPU, forward and backward.

Each block of threads is three warpgroups. Two compute; the third only starts copies (TMA) into a ring of shared-memory
buffers and waits until they may be filled again. What a tile may see comes from `walk`, as ranges or, with a block mask, as
lists of tiles: tiles outside a row's live range are never visited, tiles inside the full range never masked, and in those
between each row hides what lies outside its own range [first, end).

    forward   a block works off tiles of 2 × 64 queries of a head and walks each one's key tiles from right to left, so that
              of a causal mask only the first is masked. The product with V of one tile runs under the softmax of the next, and
              the queries of the next tile come while this one's are in use. The two computing warpgroups take turns: one's
              softmax runs under the other's products. Under causal and full masks two blocks, a cluster, walk the keys of two
              neighbouring tiles together: each fetches half of them, for both.
    backward  a block owns 2 × 64 keys of one KV head and walks the query tiles of the heads that read it, all or, where tiles
              are few, a part of them, whose shares are added up afterwards. S and dP are computed transposed, dK and dV stay
              in registers, and dQ is added up by TMA: five products a tile. Its sums are in float32 or, for bfloat16 under
              windows, documents and blocks, in float16. The order of those additions varies; `deterministic` computes dQ in
              a pass of its own instead (seven products), as do heads of 256, whose accumulators do not fit.

Overlap of the two products and the softmax follows FlashAttention-3 (arXiv 2407.08608), the backward's shape FlashAttention-2
(arXiv 2307.08691). Indices are int32 throughout, so that the kernels trace the same under jax_enable_x64. The kernels are in
`hopper_forward` and `hopper_backward`, what both are built of in `mosaic`.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from ulysses_jax.attention.blocked import pad
from ulysses_jax.attention.hopper_backward import backward
from ulysses_jax.attention.hopper_forward import forward
from ulysses_jax.attention.masks import Mask
from ulysses_jax.attention.mosaic import HEAD_DIMS, WARPGROUP_ROWS, KernelOptions

__all__ = ["HEAD_DIMS", "hopper_attention", "hopper_attention_backward", "hopper_lacks"]


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
    options, T = KernelOptions(scale, logits_soft_cap, deterministic, interpret), q.shape[1]
    q, k, v = (pad(x, 1, 8) for x in (q, k, v))  # TMA wants lengths in eights
    out, lse = cast(tuple[Array, Array], _attention(options, q, k, v, mask))
    return out[:, :T], lse[:, :, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: KernelOptions, q: Array, k: Array, v: Array, mask: Mask) -> tuple[Array, Array]:
    return forward(options, q, k, v, mask)


def _attention_fwd(options: KernelOptions, q: Array, k: Array, v: Array, mask: Mask):
    # All at once: where they go to the host, a copy that begins with q has XLA wait for q's crossing before k is projected.
    q, k, v = (checkpoint_name(x, "attention_in") for x in lax.optimization_barrier((q, k, v)))
    # Without the barrier XLA fuses the kernel into the write that saves its output, and runs it again for who uses that output.
    out, lse = lax.optimization_barrier(forward(options, q, k, v, mask))
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
    options, T, S = KernelOptions(scale, logits_soft_cap, deterministic, interpret), q.shape[1], k.shape[1]
    q, k, v, out, d_out = (pad(x, 1, 8) for x in (q, k, v, out, d_out))
    lse = pad(lse, 2, 8, -jnp.inf)
    dq, dk, dv = backward(options, q, k, v, mask, out, lse, d_out, jnp.zeros_like(lse))
    return dq[:, :T], dk[:, :S], dv[:, :S]


def _attention_bwd(options: KernelOptions, saved, cotangents):
    q, k, v, mask, out, lse = saved
    d_out, d_lse = cotangents
    return *backward(options, q, k, v, mask, out, lse, d_out, d_lse), None


_attention.defvjp(_attention_fwd, _attention_bwd)
