"""Attention on TPUs: jax's own splash attention, under this room's masks. Tested in Pallas's interpreter alone, on no TPU.

Splash attention (`jax.experimental.pallas.ops.tpu.splash_attention`) walks the tiles that a mask known before compiling leaves,
and in those asks a function of positions what is hidden, so that no [T, S] array exists on the device. Documents, whose ids it
learns at run time, are hidden element by element: they save it no tile. Its tables of tiles lie in scalar memory, up to three
bytes for each 512 × 512 elements: 0.2 MB for 131,072 tokens, 3 MB for 524,288, which may be too much.

Three things are made up for here. It wants lengths in multiples of its tiles: arrays are padded, and padded keys hidden by the
mask. A query that sees no key would get the mean of what is hidden: a sink below all logits takes its weight, so that it gets
zeros. And its results say nothing of the mesh axes over which they vary: see `_unchecked`.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from ulysses_jax.attention.blocked import pad, varying_like
from ulysses_jax.attention.masks import FAR, Mask

__all__ = ["splash_attention", "splash_lacks"]

LANES, BLOCK = 128, 512  # tiles are multiples of the first, and of the second where a sequence has as many tokens
NOTHING = -1e30  # a sink that takes no weight from a logit, yet all from what is hidden, which is at −2.4e38


def splash_lacks(q: Array, mask: Mask, *, residual: bool) -> str | None:
    """What this kernel cannot do here, in words, or None."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtype {q.dtype} (only bfloat16 and float32)"
    if mask.blocks is not None:
        return "block_mask (a layout may be traced, and of such a one it wants all T × S elements)"
    if mask.shift is not None:
        return "pieces of a sequence"
    if residual:
        return "return_residual (its log-sum-exp has no gradient)"
    return None


def splash_attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    *,
    scale: float,
    logits_soft_cap: float | None = None,
    sinks: Array | None = None,
    interpret: bool = False,
) -> Array:
    """softmax(cap(q kᵀ · scale)) v, differentiable in q, k, v and `sinks`.

    q [B, T, N, H], k and v [B, S, K, H] in bfloat16 or float32, any lengths, sinks [N] float32 → out [B, T, N, H]. A row that
    sees no key is zero. q is scaled in float32 and rounded to its dtype, which splash has no other way to take a scale.

    Args:
      interpret: run on the CPU by Pallas's interpreter; for tests.
    """
    (T, N), S = q.shape[1:3], k.shape[1]
    tiles = _tile(T), _tile(S)
    options = _Options((T, S), tiles, mask.reach(), N, logits_soft_cap, interpret)
    q = (scale * q.astype(jnp.float32)).astype(q.dtype)
    padded = [pad(x, 1, tile) for x, tile in zip((q, k, v), (*tiles, tiles[1]), strict=True)]
    ids = None
    if mask.query_ids is not None and mask.key_ids is not None:
        ids = pad(mask.query_ids, 1, tiles[0]), pad(mask.key_ids, 1, tiles[1])
    sinks = jnp.full(N, NOTHING, jnp.float32) if sinks is None else sinks
    arrays = [varying_like(x, q, k, v, sinks, *jax.tree.leaves(ids)) for x in (*padded, sinks[None])]
    return cast(Array, _attention(options, *arrays, ids))[:, :T]


class _Options(NamedTuple):
    """What is known before compiling; a length, and all else of two, is of queries, of keys."""

    lengths: tuple[int, int]
    tiles: tuple[int, int]
    reach: tuple[int, int]
    heads: int
    soft_cap: float | None
    interpret: bool


class _Band(masks.LocalMask):
    """t − left ≤ s ≤ t + right, of the keys that are not padding; what a tile holds is seen from its corners."""

    def __init__(self, options: _Options, padded: tuple[int, int]):
        super().__init__(padded, (None, None), offset=0)
        (T, S), (left, right) = options.lengths, options.reach
        self.options = options  # splash keeps the tables of a mask for those that equal it
        hides_padding = padded[1] == S or T - 1 + right < S

        def sees(t: Any, s: Any) -> Any:
            ok = t >= 0 if hides_padding else s < S
            ok = ok if left == FAR else ok & (s >= t - left)
            return (ok if right == FAR else ok & (s <= t + right)) & (s >= 0)

        self.mask_function = sees

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        (first, last), (start, end) = ((part.start, part.stop - 1) for part in index)
        (left, right), S = self.options.reach, self.options.lengths[1]
        if start > min(last + right, S - 1) or end < first - left:
            return np.zeros((1, 1), bool)
        if end <= min(first + right, S - 1) and start >= last - left:
            return np.ones((1, 1), bool)
        return super().__getitem__(index)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Band) and self.options == other.options

    def __hash__(self) -> int:
        return hash(self.options)


@functools.lru_cache(maxsize=64)
def _kernel(options: _Options) -> Any:
    """The kernel for these sizes, its tables of tiles as numpy arrays: made once, whatever is being traced."""
    block_q, block_k = options.tiles
    padded = _multiple(options.lengths[0], block_q), _multiple(options.lengths[1], block_k)
    sizes = dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), block_q)
    sizes |= dict.fromkeys(("block_kv", "block_kv_compute", "block_kv_dkv", "block_kv_dkv_compute", "block_kv_dq"), block_k)
    whole = options.reach == (FAR, FAR) and padded[1] == options.lengths[1]
    mask = masks.FullMask(padded) if whole else _Band(options, padded)
    with jax.ensure_compile_time_eval():
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * options.heads),
            block_sizes=kernels.BlockSizes(**sizes),
            attn_logits_soft_cap=options.soft_cap,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name="attention_out",
            interpret=options.interpret,
        )
        return jax.tree.map(np.asarray, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: _Options, q: Array, k: Array, v: Array, sinks: Array, ids: tuple[Array, Array] | None) -> Array:
    """[B, T, N, H] from q and k, v [B, S, K, H], padded, scaled, and sinks [1, N], all varying over the same mesh axes.

    What is turned inside `_unchecked` is the kernel's type of array too: one that varies over no axis.
    """

    def run(q: Array, k: Array, v: Array, sinks: Array, ids: tuple[Array, Array] | None) -> Array:
        return _run(options, (*_turned(q, k, v), sinks[0]), ids).swapaxes(1, 2)

    return varying_like(_unchecked(run)(q, k, v, sinks, ids), q)


def _attention_fwd(options: _Options, q: Array, k: Array, v: Array, sinks: Array, ids: tuple[Array, Array] | None):
    def run(q: Array, k: Array, v: Array, sinks: Array, ids: tuple[Array, Array] | None):
        out, back = jax.vjp(lambda *x: _run(options, x, ids), *_turned(q, k, v), sinks[0])
        return out.swapaxes(1, 2), back

    out, back = _unchecked(run)(q, k, v, sinks, ids)
    return varying_like(out, q), back


def _attention_bwd(options: _Options, back: Any, d_out: Array):
    def run(back: Any, d_out: Array) -> tuple[Array, ...]:
        *gradients, d_sinks = back(d_out.swapaxes(1, 2))
        return *_turned(*gradients), d_sinks[None]

    return *(varying_like(x, d_out) for x in _unchecked(run)(back, d_out)), None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _run(options: _Options, arrays: tuple[Array, ...], ids: tuple[Array, Array] | None) -> Array:
    """[B, N, T, H] from q, from k and v [B, K, S, H], and from sinks [N]."""
    kernel, (queries, keys, values, sinks) = _kernel(options), arrays

    def of_one_sequence(q: Array, k: Array, v: Array, ids: tuple[Array, Array] | None) -> Array:
        return kernel(q, k, v, None if ids is None else kernels.SegmentIds(*ids), sinks=sinks)

    return jax.vmap(of_one_sequence)(queries, keys, values, ids)


def _turned(*arrays: Array) -> list[Array]:
    """[B, T, N, H] → [B, N, T, H], and back."""
    return [x.swapaxes(1, 2) for x in arrays]


def _unchecked(f: Any) -> Any:
    """`f`, in which jax does not ask over which mesh axes values vary: splash does not tell, and is refused for it."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return f
    whole = PartitionSpec()
    return jax.shard_map(f, in_specs=whole, out_specs=whole, axis_names=set(), check_vma=False)


def _tile(length: int) -> int:
    return min(BLOCK, _multiple(length, LANES))


def _multiple(length: int, of: int) -> int:
    return -(-length // of) * of
