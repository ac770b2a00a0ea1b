"""Attention on one device: one signature over several implementations.

This room knows no mesh. `ulysses_jax.ulysses` puts it between two all-to-alls.
"""

import functools
import logging
import math
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ulysses_jax.attention.blocked import blocked_attention, blocked_attention_backward, varying_like
from ulysses_jax.attention.hopper import hopper_attention, hopper_attention_backward, hopper_lacks
from ulysses_jax.attention.masks import (
    BlockMask,
    Mask,
    Segments,
    Window,
    check_block_mask,
    in_words,
    make_mask,
    normalize_window,
    pair_of_ids,
)
from ulysses_jax.attention.reference import reference_attention
from ulysses_jax.attention.sparse import bigbird_blocks, fixed_blocks, longformer_blocks
from ulysses_jax.attention.splash import splash_attention, splash_lacks

__all__ = [
    "IMPLEMENTATIONS",
    "BlockMask",
    "Mask",
    "Options",
    "Segments",
    "Window",
    "attend",
    "attend_backward",
    "bigbird_blocks",
    "check_block_mask",
    "check_heads",
    "check_mask",
    "check_options",
    "check_platform",
    "check_sinks",
    "dot_product_attention",
    "fixed_blocks",
    "in_words",
    "longformer_blocks",
    "make_mask",
    "normalize_window",
    "pair_of_ids",
    "resolve",
    "sinks_gradient",
    "take_heads",
    "with_sinks",
]

IMPLEMENTATIONS = ("pallas", "cudnn", "splash", "xla", "reference")
HOPPER = ("H100", "H200", "H800", "H20", "GH200")  # in the device kind of what has sm90
BLACKWELL = ("B100", "B200", "B300", "GB10", "RTX PRO", "RTX 5060", "RTX 5070", "RTX 5080", "RTX 5090")  # … sm100 or more
OTHERS = ("Tesla", "Quadro", "TITAN", "GTX", "RTX 2060", "RTX 2070", "RTX 2080", "T4", "V100", "P100", "AMD")  # … not even sm80
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
    block_mask: BlockMask | None = None,
    sinks: Array | None = None,
    mask: Mask | None = None,
    implementation: str | None = None,
    deterministic: bool = False,
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
      segment_ids: [B, T], or ([B, T], [B, S]); a query sees only keys of its own id (packed documents). For "pallas", which
        Hopper GPUs take by themselves, each id must be one run of tokens, that of padding too; if it is not, out is NaN.
      logits_soft_cap: c in c · tanh(logits / c), applied before masking (Gemma 2).
      block_mask: a `BlockMask`, one layout for all heads or one for each: a query sees only the blocks of keys it names.
      sinks: [N] float32, a learned logit a_n for each query head, as of a key that all queries see and whose value is zero: the
        softmax divides by exp(a_n) + Σ_s exp(logit_s) (gpt-oss; cf. arXiv 2309.17453). It is neither scaled nor capped.
      mask: a `make_mask` result, in place of `is_causal`, `local_window_size`, `segment_ids` and `block_mask`.
      implementation: "xla" (any device, memory linear in T), "pallas" (our kernel for Hopper GPUs; elsewhere the best there
        is), "cudnn" (NVIDIA from sm80 on, 16-bit), "splash" (jax's kernel for TPUs, tested in its interpreter alone),
        "reference" (the float32 oracle), or None to choose by the hardware.
      deterministic: the backward gives the same bits every time. Otherwise the kernel for Hopper adds up dQ in any order; of
        bfloat16 under windows, documents and blocks in float16, if a row is added to about 128 times at most.
      return_residual: also return the log-sum-exp of the logits, the sink's among them, [B, N, T], natural log, float32,
        differentiable.

    Returns:
      [B, T, N, H] in q's dtype. A query that sees no key gives zeros.

    Raises:
      ValueError: shapes, dtypes or options that do not fit together.
      NotImplementedError: the implementation named lacks an option asked for.
    """
    check_heads(q, k, v)
    is_causal, scale, logits_soft_cap = check_options(is_causal, scale, logits_soft_cap, implementation)
    if mask is None:
        mask = make_mask(
            q.shape[1],
            k.shape[1],
            is_causal=is_causal,
            local_window_size=local_window_size,
            segment_ids=segment_ids,
            block_mask=block_mask,
        )
    elif isinstance(mask, Mask) and (is_causal or local_window_size is not None or segment_ids is not None):
        raise ValueError("mask was given together with is_causal, local_window_size or segment_ids; put them into make_mask.")
    elif isinstance(mask, Mask) and block_mask is not None:
        raise ValueError("mask was given together with block_mask; put it into make_mask.")
    check_mask(mask, q.shape[0], q.shape[1], k.shape[1], q.shape[2])
    if sinks is not None:
        check_sinks(sinks, (q.shape[2],))
    options = Options(
        float(q.shape[-1] ** -0.5) if scale is None else scale, logits_soft_cap, implementation, deterministic, return_residual
    )
    out, lse = attend(q, k, v, mask, options, sinks)
    return (out, cast(Array, lse)) if return_residual else out


class Options(NamedTuple):
    """What `attend` needs beside arrays and mask; the fields are `dot_product_attention`'s arguments."""

    scale: float
    logits_soft_cap: float | None = None
    implementation: str | None = None
    deterministic: bool = False
    residual: bool = False


def attend(
    q: Array, k: Array, v: Array, mask: Mask, options: Options, sinks: Array | None = None
) -> tuple[Array, Array | None]:
    """`dot_product_attention` past its checks: (out, log-sum-exp, which is None where not asked for and not to be had)."""
    sizes = {"scale": options.scale, "logits_soft_cap": options.logits_soft_cap}
    match resolve(q, mask, options, sinks is not None):
        case "xla":
            out, lse = blocked_attention(q, k, v, mask, **sizes)
        case "reference":
            return reference_attention(q, k, v, mask, sinks=sinks, **sizes)
        case "pallas":
            out, lse = hopper_attention(q, k, v, mask, deterministic=options.deterministic, **sizes)
        case "splash":
            return splash_attention(q, k, v, mask, sinks=sinks, **sizes), None
        case _:
            return _cudnn(q, k, v, mask, options.scale), None
    return (out, lse) if sinks is None else with_sinks(out, lse, sinks)


def with_sinks(out: Array, lse: Array, sinks: Array) -> tuple[Array, Array]:
    """Attention whose softmax has one more logit a head, a_n, of a value of zero, from (out, lse) without it.

        out · σ(lse − a),     log(exp lse + exp a)

    out [B, T, N, H] and lse [B, N, T], differentiable in all three; sinks [N]. A query that sees no key gives zeros.
    """
    logit = sinks.astype(lse.dtype)[:, None]
    share = jax.nn.sigmoid(jnp.where(lse == -jnp.inf, 0, lse) - logit)  # of what is zero any share will do; of −inf − a none
    return (out * share.swapaxes(1, 2)[..., None]).astype(out.dtype), jnp.logaddexp(lse, logit)


def sinks_gradient(out: Array, lse: Array, d_out: Array, sinks: Array) -> Array:
    """[N], the gradient of the sinks where `out` and `lse` are those of `with_sinks`: −Σ_bt exp(a − lse) Σ_h dO ∘ O."""
    delta = jnp.einsum("btnh,btnh->bnt", d_out.astype(lse.dtype), out.astype(lse.dtype))
    return -(jnp.exp(sinks.astype(lse.dtype)[:, None] - lse) * delta).sum((0, 2)).astype(sinks.dtype)


def attend_backward(
    q: Array, k: Array, v: Array, mask: Mask, out: Array, lse: Array, d_out: Array, options: Options
) -> tuple[Array, Array, Array]:
    """The share of these keys in (dQ, dK, dV), where `out` and `lse` come from more keys than these.

    For attention whose keys arrive piece by piece (`ring.py`); a sink is one more key. "reference" has no backward of its own
    and uses that of "xla".
    """
    sizes = {"scale": options.scale, "logits_soft_cap": options.logits_soft_cap}
    if resolve(q, mask, options) == "pallas":
        return hopper_attention_backward(q, k, v, mask, out, lse, d_out, deterministic=options.deterministic, **sizes)
    return blocked_attention_backward(q, k, v, mask, out, lse, d_out, **sizes)


def take_heads(x: Array, heads: tuple[int, ...], axis: int = 2) -> Array:
    """[B, T, N, H] → [B, T, len(heads), H], the heads named, in that order; copies' gradients add up, in float32.

    Heads lie along `axis`: weights have them elsewhere.
    """
    if heads == tuple(range(x.shape[axis])):
        return x
    return _taken(x, heads, axis) if len(set(heads)) == len(heads) else _copied(x, heads, axis, x.shape[axis])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _copied(x: Array, heads: tuple[int, ...], axis: int, count: int) -> Array:
    """Some of `count` heads more than once: the gradients of many copies would lose bits, added up in 16."""
    return _taken(x, heads, axis)


def _copied_backward(heads: tuple[int, ...], axis: int, count: int, _, gradient: Array) -> tuple[Array]:
    wide = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
    shape = (*wide.shape[:axis], count, *wide.shape[axis + 1 :])
    like = varying_like(jnp.zeros(shape, wide.dtype), wide)
    return (jax.linear_transpose(lambda x: _taken(x, heads, axis), like)(wide)[0].astype(gradient.dtype),)


_copied.defvjp(lambda x, heads, axis, count: (_taken(x, heads, axis), None), _copied_backward)


def _taken(x: Array, heads: tuple[int, ...], axis: int) -> Array:
    runs, start = [], 0
    for i in range(1, len(heads) + 1):  # consecutive heads as one slice each: a gather's gradient would be a scatter
        if i == len(heads) or heads[i] != heads[i - 1] + 1:
            runs.append(jax.lax.slice_in_dim(x, heads[start], heads[i - 1] + 1, axis=axis))
            start = i
    return jnp.concatenate(runs, axis=axis)


def check_heads(q: Array, k: Array, v: Array) -> None:
    """Refuse q, k, v whose shapes or dtypes do not fit together, by name and value.

    Raises:
      ValueError: naming the argument, its shape and the relation it breaks.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Array | np.ndarray):
            raise ValueError(f"{name} is {in_words(x)}; it must be an array [batch, length, heads, head size].")
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {list(x.shape)}; it must be [batch, length, heads, head size].")
        if 0 in x.shape:
            raise ValueError(f"{name} has shape {list(x.shape)}; every dim must be at least 1. Leave empty batches out.")
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 2:
            raise ValueError(
                f"{name} has dtype {x.dtype}; it must be bfloat16, float16, float32 or float64. "
                f"Cast it, e.g. {name}.astype(jnp.bfloat16)."
            )
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


def check_options(
    is_causal: bool, scale: float | None, logits_soft_cap: float | None, implementation: str | None
) -> tuple[bool, float | None, float | None]:
    """(is_causal, scale, logits_soft_cap) as Python values, which a compiled program holds as constants.

    Raises:
      ValueError: a traced or non-finite number, a cap ≤ 0, an unknown implementation.
    """
    if not isinstance(is_causal, bool | np.bool_):
        raise ValueError(f"is_causal is {in_words(is_causal)}; it must be True or False, known before compiling.")
    numbers = []
    for name, value, way_out in (
        ("scale", scale, "To learn or trace a scale, multiply q by it and pass scale=1.0."),
        ("logits_soft_cap", logits_soft_cap, "Leave it out for no cap."),
    ):
        try:
            number = None if value is None else float(value)
        except (TypeError, ValueError):  # jax's own errors for tracers and arrays of several elements among them
            number = math.nan
        if number is not None and not (math.isfinite(number) and (name == "scale" or number > 0)):
            relation = "a finite number" if name == "scale" else "a finite number > 0"
            raise ValueError(f"{name} is {in_words(value)}; it must be {relation}, known before compiling. {way_out}")
        numbers.append(number)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation is {implementation!r}; it must be None or one of {known}.")
    return bool(is_causal), *numbers


def check_mask(mask: Mask, batch: int, query_length: int, key_length: int, heads: int) -> None:
    """Refuse a mask that did not come from `make_mask`, or was made for other sizes.

    Raises:
      ValueError: saying which.
    """
    if not isinstance(mask, Mask):
        raise ValueError(
            f"mask is {in_words(mask)}; it must come from make_mask. A dense [T, S] mask cannot scale to long sequences: "
            "say the same with is_causal, local_window_size or segment_ids."
        )
    if (mask.query_length, mask.key_length) != (query_length, key_length):
        raise ValueError(
            f"mask was made for T = {mask.query_length}, S = {mask.key_length}, but q has T = {query_length} and k has "
            f"S = {key_length}; make it with make_mask({query_length}, {key_length})."
        )
    if mask.query_ids is not None and mask.query_ids.shape[0] != batch:
        raise ValueError(
            f"segment_ids are for a batch of {mask.query_ids.shape[0]}, but q has B = {batch}; give one row for each sequence."
        )
    if mask.blocks is not None:
        check_block_mask(mask.blocks, query_length, key_length, heads)


def check_sinks(sinks: Array, shape: tuple[int, ...], letters: str = "[N]") -> None:
    """Refuse sinks that are not one float32 logit a query head.

    Raises:
      ValueError: naming what they are and what they must be.
    """
    if not isinstance(sinks, Array | np.ndarray) or sinks.shape != shape or sinks.dtype != jnp.float32:
        raise ValueError(
            f"sinks is {in_words(sinks)}; it must be float32{list(shape)}, {letters}: one logit for each query head. Cast it "
            "with jnp.asarray(sinks, jnp.float32), or leave it out for none."
        )


def check_platform(implementation: str | None, platform: str) -> None:
    """Refuse an implementation that the devices of a platform cannot run.

    Raises:
      ValueError: "cudnn" without an NVIDIA GPU, "splash" without a TPU.
    """
    if implementation == "cudnn" and platform not in ("gpu", "cuda"):
        raise ValueError(f"implementation='cudnn' needs an NVIDIA GPU, but the devices are {platform!r}; use 'xla'.")
    if implementation == "splash" and platform != "tpu":
        raise ValueError(f"implementation='splash' needs a TPU, but the devices are {platform!r}; use 'xla'.")


def resolve(q: Array, mask: Mask, options: Options, sinks: bool = False) -> str:
    """The implementation that runs: the one named, where the devices have it, or the best they have.

    Unnamed, on Hopper: "pallas" for heads of 64 and 128, which are faster by it, and for what cuDNN lacks (heads of 256 are
    faster forward, slower with backward). On other GPUs "cudnn", on TPUs "splash", where they can do what is asked, else "xla"
    (`experiments/results/`, kernel_speed and train_1p2b_2gpu). What is chosen, and why it is not what was to be had at best, is
    logged once.
    """
    platform, kind = _device()
    named, hopper = options.implementation, any(name in kind for name in HOPPER)
    if named in ("xla", "reference"):
        return named
    lacks = {
        "cudnn": _cudnn_lacks(q, mask, options, kind, sinks),
        "pallas": hopper_lacks(q, mask, options.scale),
        "splash": splash_lacks(q, mask, residual=options.residual),
    }
    if named is not None and (named != "pallas" or hopper):
        if lacks[named]:
            raise NotImplementedError(f"implementation={named!r} cannot do {lacks[named]}; use implementation='xla'.")
        check_platform(named, platform)
        return named
    if hopper and lacks["pallas"] is None and (lacks["cudnn"] or q.shape[-1] in (64, 128)):
        chosen, why = "pallas", None
    else:
        best = "splash" if platform == "tpu" else "cudnn" if platform in ("gpu", "cuda") else "xla"
        why = lacks.get(best)
        chosen = "xla" if why else best
        why = why and f"{best!r} cannot do {why}"
    _say_once(chosen, kind, why if named is None else ", and ".join(filter(None, (f"it has no {named!r}", why))))
    return chosen


def _device() -> tuple[str, str]:
    """(platform, kind) of the devices that the code being traced is for: the mesh's around it, else the default ones."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is not None:
        return device.platform or "", device.device_kind
    return jax.default_backend(), jax.devices()[0].device_kind


@functools.cache
def _say_once(chosen: str, kind: str, why: str | None) -> None:
    _log.info("attention on %s uses implementation=%r%s", kind, chosen, f", as {why}" if why else "")


def _cudnn_lacks(q: Array, mask: Mask, options: Options, kind: str, sinks: bool) -> str | None:
    """What cuDNN's fused attention (through jax.nn) cannot do here, in words, or None."""
    widest = 256 if any(name in kind for name in HOPPER + BLACKWELL) else 128
    if any(name in kind for name in OTHERS):
        return f"{kind} (only NVIDIA's from sm80 on, such as A100)"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {q.dtype} (only bfloat16 and float16)"
    if q.shape[-1] % 8 or q.shape[-1] > widest:
        return f"head size {q.shape[-1]} (only multiples of 8 up to {widest} on {kind})"
    if mask.query_length % 2 or mask.key_length % 2:
        return f"lengths {mask.query_length} and {mask.key_length} (only even ones, in its backward)"
    if mask.query_ids is not None:
        return "segment_ids"
    if mask.blocks is not None:
        return "block_mask"
    if mask.shift is not None:
        return "pieces of a sequence"
    if options.logits_soft_cap is not None:
        return "logits_soft_cap"
    if mask.window is not None and not (mask.is_causal or mask.window[1] == 0):
        return f"local_window_size {mask.window} (its right side must be 0, or is_causal set)"
    if options.deterministic:
        return "a deterministic backward"
    if options.residual or sinks:
        return f"{'sinks' if sinks else 'return_residual'} (its log-sum-exp is 16-bit and has no gradient)"
    return None


def _cudnn(q: Array, k: Array, v: Array, mask: Mask, scale: float) -> Array:
    # A window that looks left only is causal by itself; cuDNN wants both said.
    causal = mask.is_causal or (mask.window is not None and mask.window[1] == 0)
    window = None if mask.window is None else (mask.window[0], 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, local_window_size=window, implementation="cudnn"
    )
