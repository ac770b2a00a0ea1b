"""The oracle: attention as it is defined, in float32 (float64 where the inputs are), with autodiff for its gradient.

It holds all B·N·T·S logits, so it is for checking, not for long sequences.
"""

import jax.numpy as jnp
from jax import Array, lax

from ulysses_jax.attention.masks import Mask

__all__ = ["reference_attention"]


def reference_attention(
    q: Array, k: Array, v: Array, mask: Mask, *, scale: float, logits_soft_cap: float | None, sinks: Array | None = None
) -> tuple[Array, Array]:
    """softmax(cap(q kᵀ · scale)) v, and the log-sum-exp of the logits.

    q [B, T, N, H], k and v [B, S, K, H] → out [B, T, N, H] in q's dtype, lse [B, N, T] in natural log. A row that sees no
    key is zero, its lse −inf. `sinks` [N] are one more logit a head, of a value of zero.
    """
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    grouped = q.astype(dtype).reshape(B, T, K, N // K, H)
    logits = scale * jnp.einsum("btkgh,bskh->bkgts", grouped, k.astype(dtype), precision=lax.Precision.HIGHEST)
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    visible = mask.visible(jnp.arange(T)[:, None], jnp.arange(S)[None, :])
    visible = visible.reshape(visible.shape[0], *((1, 1) if visible.shape[1] == 1 else (K, N // K)), T, S)
    lowest = jnp.finfo(dtype).min
    top = jnp.where(visible, logits, lowest).max(-1, keepdims=True)
    # The mask goes inside: an exp of hidden logits may overflow, and 0 · inf in the backward is NaN.
    sink = None if sinks is None else sinks.astype(dtype).reshape(K, N // K, 1, 1)
    top = top if sink is None else jnp.maximum(top, sink)
    weights = jnp.exp(jnp.where(visible, logits - lax.stop_gradient(top), -jnp.inf))
    total = weights.sum(-1, keepdims=True)
    total = total if sink is None else total + jnp.exp(sink - lax.stop_gradient(top))
    seen = total > 0
    out = jnp.einsum("bkgts,bskh->btkgh", weights / jnp.where(seen, total, 1), v.astype(dtype), precision=lax.Precision.HIGHEST)
    lse = jnp.where(seen, jnp.log(jnp.where(seen, total, 1)) + lax.stop_gradient(top), -jnp.inf)
    return out.reshape(B, T, N, H).astype(q.dtype), lse.reshape(B, N, T)
