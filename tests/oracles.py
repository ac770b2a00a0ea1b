"""Attention as it is defined, in float64 numpy with a dense mask and gradients by hand: what every implementation must equal.

Nothing here is shared with the library but `BlockMask`, two fields: not the mask, not the grouping of heads, not autodiff.
"""

import dataclasses
import functools
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ulysses_jax.attention import BlockMask

# Largest relative error against float64.
TOLERANCE = {
    # Unit roundoff 2⁻²⁴ = 6e-8 in sums of tens to a thousand terms; about 5e-7 is seen, the rest is for other hardware.
    "float32": 1e-5,
    # The inputs are bfloat16 on both sides; the probabilities, dS and the results are rounded to 2⁻⁹ = 2e-3 each.
    "bfloat16": 1e-2,
    # Unit roundoff 2⁻⁵³ = 1e-16: what is left is the algorithm, which is exact.
    "float64": 1e-13,
    # The same float32 arithmetic, head by head, on other devices: only XLA's order of summation may differ.
    "placement": 1e-6,
}

# Compiling dominates these tests, and LLVM's own optimisation is not what they test: XLA's passes run in full.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def relative_error(x: Any, ref: Any) -> float:
    """‖x − ref‖ / ‖ref‖ in float64."""
    x, ref = np.asarray(x, np.float64), np.asarray(ref, np.float64)
    assert x.shape == ref.shape, (x.shape, ref.shape)
    return float(np.linalg.norm(x - ref) / np.linalg.norm(ref))


def errors_beyond(tolerance: float, got: Mapping[str, Any], want: Mapping[str, Any]) -> dict[str, float]:
    """Relative errors, by name, of what is further than `tolerance` from `want`; −inf must stand where it should."""
    assert set(got) == set(want)
    beyond = {}
    for name, ref in want.items():
        x = np.asarray(got[name], np.float64)
        dead = np.isneginf(ref)
        same_dead = np.array_equal(dead, np.isneginf(x))
        error = relative_error(np.where(dead, 0, x), np.where(dead, 0, ref)) if same_dead else np.inf
        if not error <= tolerance:  # a NaN is beyond too
            beyond[name] = error
    return beyond


def dense_mask(length: int, key_length: int, *, is_causal=False, local_window_size=None, segment_ids=None) -> np.ndarray:
    """[B or 1, T, S], true where query t may see key s."""
    t, s = np.arange(length)[:, None], np.arange(key_length)[None, :]
    sees = np.ones((1, length, key_length), bool)
    if is_causal:
        sees = sees & (s <= t)
    if local_window_size is not None:
        pair = isinstance(local_window_size, tuple)
        left, right = local_window_size if pair else (local_window_size, local_window_size)
        sees = sees & (t - s <= left) & (s - t <= right)
    if segment_ids is not None:
        query_ids, key_ids = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        sees = sees & (np.asarray(query_ids)[:, :, None] == np.asarray(key_ids)[:, None, :])
    return sees


def dense_blocks(layout, block: int, length: int, key_length: int) -> np.ndarray:
    """[1 or N, T, S], a layout written out."""
    return np.kron(np.asarray(layout), np.ones((1, block, block), bool))[:, :length, :key_length]


def attention(q, k, v, *, scale=None, logits_soft_cap=None, sinks=None, **mask) -> dict[str, np.ndarray]:
    """`out` [B, T, N, H], and `lse` [B, N, T], the log-sum-exp of the logits; 0 and −inf for a query that sees no key."""
    p, lse, _ = _softmax(q, k, scale, logits_soft_cap, sinks, mask)
    return {"out": np.einsum("bnts,bsnh->btnh", p, _spread(v, q.shape[2])), "lse": lse}


def attention_gradients(
    q, k, v, d_out, d_lse, *, scale=None, logits_soft_cap=None, sinks=None, **mask
) -> dict[str, np.ndarray]:
    """Gradients of ⟨out, d_out⟩ + ⟨lse, d_lse⟩, `dsinks` among them where there are sinks.

    With L the logits after the cap, P their softmax: ∂lse/∂L = P and ∂out/∂L = P ∘ (dP − Σ_s P dP), where dP = d_out vᵀ. A
    sink is one of them, of dP = 0.
    """
    q, k, v, d_out, d_lse = (np.asarray(x, np.float64) for x in (q, k, v, d_out, d_lse))
    p, lse, slope = _softmax(q, k, scale, logits_soft_cap, sinks, mask)
    dp = np.einsum("btnh,bsnh->bnts", d_out, _spread(v, q.shape[2]))
    pull = d_lse - (p * dp).sum(-1)
    d_logits = p * (dp + pull[..., None]) * slope
    d_sinks = {} if sinks is None else {"dsinks": (np.exp(np.asarray(sinks, np.float64)[:, None] - lse) * pull).sum((0, 2))}
    return d_sinks | {
        "dq": np.einsum("bnts,bsnh->btnh", d_logits, _spread(k, q.shape[2])),
        "dk": _gather(np.einsum("bnts,btnh->bsnh", d_logits, q), k.shape[2]),
        "dv": _gather(np.einsum("bnts,btnh->bsnh", p, d_out), k.shape[2]),
    }


def _softmax(q, k, scale, soft_cap, sinks, mask) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """P [B, N, T, S], the log-sum-exp [B, N, T], and the logits' slope in q kᵀ."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    scale = 1 / np.sqrt(q.shape[-1]) if scale is None else scale
    logits = scale * np.einsum("btnh,bsnh->bnts", q, _spread(k, q.shape[2]))
    slope = np.full_like(logits, scale)
    if soft_cap is not None:
        bounded = np.tanh(logits / soft_cap)
        logits, slope = soft_cap * bounded, scale * (1 - bounded**2)
    blocks = mask.get("block_mask")
    sees = dense_mask(q.shape[1], k.shape[1], **{name: x for name, x in mask.items() if name != "block_mask"})[:, None]
    if blocks is not None:
        sees = sees & dense_blocks(blocks.layout, blocks.block, q.shape[1], k.shape[1])
    weights = np.where(sees, np.exp(logits), 0)  # logits of the tests are small: no shift is needed
    total = weights.sum(-1) + (0 if sinks is None else np.exp(np.asarray(sinks, np.float64))[:, None])
    with np.errstate(divide="ignore"):
        lse = np.log(total)
    return weights / np.where(total > 0, total, 1)[..., None], lse, slope


def _spread(x, heads: int) -> np.ndarray:
    """[B, S, K, H] → [B, S, N, H]: query head n reads KV head n·K // N."""
    return np.asarray(x, np.float64)[:, :, [n * x.shape[2] // heads for n in range(heads)]]


def _gather(x: np.ndarray, kv_heads: int) -> np.ndarray:
    """The transpose of `_spread`."""
    heads = x.shape[2]
    return np.stack([sum(x[:, :, n] for n in range(heads) if n * kv_heads // heads == j) for j in range(kv_heads)], axis=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One row of a battery: shapes and options."""

    B: int = 2
    T: int = 24
    S: int | None = None
    N: int = 4
    K: int | None = None
    H: int = 8
    is_causal: bool = False
    local_window_size: int | tuple[int, int] | None = None
    segments: str | None = None
    """"packed": documents one after the other; "scattered": ids in any order; "dead": queries whose id no key carries"""
    logits_soft_cap: float | None = None
    scale: float | None = None
    block: int | None = dataclasses.field(default=None, repr=False)
    """tokens in a block of a random layout, if there is to be one …"""
    layouts: int = dataclasses.field(default=1, repr=False)
    """… for all heads, or as many as there are heads"""

    def ids(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Segment ids [B, T] and [B, S]."""
        if self.segments is None:
            return None
        S = self.S or self.T
        ids = self._rng().integers(1, 4, (self.B, max(self.T, S))).astype(np.int32)
        if self.segments == "packed":
            ids.sort(axis=1)
        queries = ids[:, : self.T].copy()
        if self.segments == "dead":
            queries[:, 3::5] = 9
        return queries, ids[:, :S]

    def arrays(self, dtype: str = "float32") -> dict[str, np.ndarray]:
        """q, k, v and the cotangents of both results."""
        rng, S, K = self._rng(), self.S or self.T, self.K or self.N
        shapes = {"q": (self.T, self.N, self.H), "k": (S, K, self.H), "v": (S, K, self.H), "d_out": (self.T, self.N, self.H)}
        arrays = {name: rng.standard_normal((self.B, *shape)) for name, shape in shapes.items()}
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
        d_lse = rng.standard_normal((self.B, self.N, self.T)).astype("float64" if dtype == "float64" else "float32")
        return {name: x.astype(kind) for name, x in arrays.items()} | {"d_lse": d_lse}

    def block_mask(self) -> BlockMask | None:
        """Half of the blocks, at random; the last block of queries sees nothing."""
        if self.block is None:
            return None
        blocks = -(-self.T // self.block), -(-(self.S or self.T) // self.block)
        layout = np.random.default_rng(self.block).random((self.layouts, *blocks)) < 0.5
        layout[:, -1] = False
        return BlockMask(layout, self.block)

    def mask_options(self) -> dict[str, Any]:
        """What `make_mask` takes."""
        ids = self.ids()
        blocks = {} if self.block is None else {"block_mask": self.block_mask()}
        return blocks | {
            "is_causal": self.is_causal,
            "local_window_size": self.local_window_size,
            "segment_ids": None if ids is None else (jnp.asarray(ids[0]), jnp.asarray(ids[1])),
        }

    def score_options(self) -> dict[str, Any]:
        """The options that are no mask."""
        return {"logits_soft_cap": self.logits_soft_cap, "scale": self.scale}

    def expected(self, *, dtype: str = "float32", lse_cotangent: bool = True) -> dict[str, np.ndarray]:
        """`out`, `lse`, `dq`, `dk`, `dv` by the oracle."""
        q, k, v, d_out, d_lse = self.arrays(dtype).values()
        options = self.mask_options() | self.score_options() | {"segment_ids": self.ids()}
        d_lse = d_lse if lse_cotangent else np.zeros_like(d_lse)
        return attention(q, k, v, **options) | attention_gradients(q, k, v, d_out, d_lse, **options)

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(repr(self).encode()))
