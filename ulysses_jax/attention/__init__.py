"""Attention on one device: one signature over several implementations.

This room knows no mesh. `ulysses_jax.ulysses` puts it between two all-to-alls.
"""

import functools
import logging

import jax
import jax.numpy as jnp
from jax import Array

from ulysses_jax.attention.blocked import blocked_attention
from ulysses_jax.attention.masks import Mask, Segments, Window, make_mask, normalize_window
from ulysses_jax.attention.reference import reference_attention

__all__ = [
    "IMPLEMENTATIONS",
    "Mask",
    "Segments",
    "Window",
    "check_heads",
    "dot_product_attention",
    "make_mask",
    "normalize_window",
]

IMPLEMENTATIONS = ("cudnn", "xla", "reference")
_log = logging.getLogger(__name__)


def dot_product_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    local_window_size: Window = None,
    segment_ids: Segments = None,
    logits_soft_cap: float | None = None,
    mask: Mask | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Array | tuple[Array, Array]:
    """Multi-head attention of whole sequences on one device.

        out[b,t,n] = Σ_s softmax_s(cap(scale · q[b,t,n] · k[b,s,n·K/N])) v[b,s,n·K/N]     over the keys s that t may see

    Args:
      q: queries [B, T, N, H].
      k: keys [B, S, K, H]; K divides N, and query head n reads KV head n·K // N (grouped-query attention).
      v: values [B, S, K, H].
      is_causal: query t sees keys s ≤ t.
      scale: factor on the logits; 1/√H by default.
      local_window_size: `(left, right)` or one number for both; query t sees t − left ≤ s ≤ t + right.
      segment_ids: [B, T], or ([B, T], [B, S]); a query sees only keys of its own id (packed documents).
      logits_soft_cap: c in c · tanh(logits / c), applied before masking (Gemma 2).
      mask: a `make_mask` result, in place of `is_causal`, `local_window_size` and `segment_ids`.
      implementation: "xla" (any device, memory linear in T), "cudnn" (NVIDIA, 16-bit), "reference" (the float32 oracle),
        or None to choose by the hardware.
      return_residual: also return the log-sum-exp of the logits, [B, N, T], natural log, float32, differentiable.

    Returns:
      [B, T, N, H] in q's dtype. A query that sees no key gives zeros.

    Raises:
      ValueError: shapes, dtypes or options that do not fit together.
      NotImplementedError: the implementation named lacks an option asked for.
    """
    check_heads(q, k, v)
    if mask is None:
        mask = make_mask(
            q.shape[1], k.shape[1], is_causal=is_causal, local_window_size=local_window_size, segment_ids=segment_ids
        )
    elif not isinstance(mask, Mask):
        raise ValueError(
            f"mask is a {type(mask).__name__}; it must come from make_mask. A dense [T, S] mask cannot scale to long "
            "sequences: say the same with is_causal, local_window_size or segment_ids."
        )
    elif is_causal or local_window_size is not None or segment_ids is not None:
        raise ValueError("mask was given together with is_causal, local_window_size or segment_ids; put them into make_mask.")
    if (mask.query_length, mask.key_length) != (q.shape[1], k.shape[1]):
        raise ValueError(
            f"mask was made for T = {mask.query_length}, S = {mask.key_length}, but q has T = {q.shape[1]} and k has "
            f"S = {k.shape[1]}; make it with make_mask({q.shape[1]}, {k.shape[1]})."
        )
    if logits_soft_cap is not None and logits_soft_cap <= 0:
        raise ValueError(f"logits_soft_cap is {logits_soft_cap}; it must be > 0. Leave it out for no cap.")
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if implementation is None:
        implementation = _choose(q, mask, logits_soft_cap, return_residual)
    match implementation:
        case "xla":
            out, lse = blocked_attention(q, k, v, mask, scale=scale, logits_soft_cap=logits_soft_cap)
        case "reference":
            out, lse = reference_attention(q, k, v, mask, scale=scale, logits_soft_cap=logits_soft_cap)
        case "cudnn":
            if lacking := _cudnn_lacks(q, mask, logits_soft_cap, return_residual):
                raise NotImplementedError(f"implementation='cudnn' cannot do {lacking}; use implementation='xla'.")
            return _cudnn(q, k, v, mask, scale)
        case _:
            known = ", ".join(IMPLEMENTATIONS)
            raise ValueError(f"implementation is {implementation!r}; it must be None or one of {known}.")
    return (out, lse) if return_residual else out


def check_heads(q: Array, k: Array, v: Array) -> None:
    """Refuse q, k, v whose shapes or dtypes do not fit together, by name and value.

    Raises:
      ValueError: naming the argument, its shape and the relation it breaks.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {list(x.shape)}; it must be [batch, length, heads, head size].")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {x.dtype}; it must be a float. Cast it, e.g. {name}.astype(jnp.bfloat16).")
    if k.shape != v.shape:
        raise ValueError(f"k has shape {list(k.shape)} and v {list(v.shape)}; they must be equal [B, S, K, H].")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q has shape {list(q.shape)} and k {list(k.shape)}; batch and head size must be equal.")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q has N = {q.shape[2]} heads and k has K = {k.shape[2]}; K must divide N: each KV head serves N/K queries."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; they must be equal. Cast them to one.")


def _choose(q: Array, mask: Mask, soft_cap: float | None, residual: bool) -> str:
    """The fastest implementation that this backend has for these options."""
    backend = jax.default_backend()
    chosen = "cudnn" if backend == "gpu" and not _cudnn_lacks(q, mask, soft_cap, residual) else "xla"
    _say_once(chosen, backend)
    return chosen


@functools.cache
def _say_once(chosen: str, backend: str) -> None:
    _log.info("attention on %s uses implementation=%r", backend, chosen)


def _cudnn_lacks(q: Array, mask: Mask, soft_cap: float | None, residual: bool) -> str | None:
    """What cuDNN's fused attention (through jax.nn) cannot do here, in words, or None."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {q.dtype} (only bfloat16 and float16)"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"head size {q.shape[-1]} (only multiples of 8 up to 256)"
    if mask.query_ids is not None:
        return "segment_ids"
    if soft_cap is not None:
        return "logits_soft_cap"
    if mask.window is not None and not (mask.is_causal or mask.window[1] == 0):
        return f"local_window_size {mask.window} (its right side must be 0, or is_causal set)"
    if residual:
        return "return_residual (its log-sum-exp is 16-bit and has no gradient)"
    return None


def _cudnn(q: Array, k: Array, v: Array, mask: Mask, scale: float) -> Array:
    # A window that looks left only is causal by itself; cuDNN wants both said.
    causal = mask.is_causal or (mask.window is not None and mask.window[1] == 0)
    window = None if mask.window is None else (mask.window[0], 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, local_window_size=window, implementation="cudnn"
    )
