"""A Transformer of today's kind, written for one device: RMSNorm, RoPE, grouped-query attention, SwiGLU.

It knows no mesh. Parallelism is handed to it in two values: `attention`, any callable with the signature of
`dot_product_attention`, and `unshard`, which turns the parameters of one layer as they are stored into the parameters as
they are used (identity by default; `zero.unshard` gathers them). Layers are stacked and scanned, so that compile time does
not grow with depth.

Shapes: B batch, T tokens (of this device, where the sequence is divided), D embed_dim, N and K query and KV heads, H head_dim,
F mlp_dim, V vocab_size, L layers.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer

from ulysses_jax.attention import Mask, dot_product_attention, in_words, take_heads
from ulysses_jax.attention.blocked import varying_like
from ulysses_jax.config import MemoryConfig, ModelConfig, RopeScaling, check_chunks, deal_heads
from ulysses_jax.memory import NAMES, map_tiles, scan_layers

__all__ = ["Transformer", "apply_rope", "rope_wavelengths"]

type Unshard = Callable[[nnx.State], nnx.State]


class RMSNorm(nnx.Module):
    """x / √(mean(x²) + ε) · w over the last dim, in float32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones(size))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y *= lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


class Attention(nnx.Module):
    """Projections around whatever attention the model was handed."""

    def __init__(self, config: ModelConfig, attention: Callable, keep: tuple[str, ...] = NAMES["attention"], *, rngs: nnx.Rngs):
        D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        self.config, self.attention, self.keep = config, attention, keep
        self.query = _weight(rngs, (D, N, H), fan_in=D)
        self.key = _weight(rngs, (D, K, H), fan_in=D)
        self.value = _weight(rngs, (D, K, H), fan_in=D)
        self.out = _weight(rngs, (N, H, D), fan_in=N * H * 2 * config.num_layers)
        if config.projection_bias:
            self.query_bias, self.key_bias, self.value_bias = (nnx.Param(jnp.zeros((n, H))) for n in (N, K, K))
        if config.attention_sinks:
            self.sink_bias = nnx.Param(jnp.zeros(N))
        if config.qk_norm:
            self.query_norm, self.key_norm = RMSNorm(H, config.norm_eps), RMSNorm(H, config.norm_eps)

    def __call__(self, x: Array, angles: Array, segment_ids: Array | None, mask: Mask | None) -> Array:
        """[B, T, D] → [B, T, D], in `head_chunks` parts, each recomputed in the backward, so that one exists at a time."""
        config, groups = self.config, getattr(self.attention, "head_groups", 1)
        check_chunks(config.head_chunks, config.num_heads, config.num_kv_heads, groups)
        weights, y = self._dealt(groups, x), varying_like(jnp.zeros_like(x), x)
        if config.head_chunks == 1:
            return self._add(weights, x, y, angles, segment_ids, mask)[1]
        # Where the layer is recomputed as a whole, its chunks keep what the kernel gave then, rather than run it a third time.
        add = jax.checkpoint(self._add, policy=jax.checkpoint_policies.save_only_these_names(*self.keep))
        heads, before = {"out": -3, "sink_bias": -1}, y
        for i in range(config.head_chunks):
            # One chunk may cross while another is attended to; a third waits. So do their gradients, the other way around. And
            # so do slices of the weights, and their gradients', of which one chunk's are held then and not all.
            x, before, weights = lax.optimization_barrier((x, before, weights))
            own = {name: _part(w, i, config.head_chunks, axis=heads.get(name, -2)) for name, w in weights.items()}
            x, y, before = *add(own, x, y, angles, segment_ids, mask), y
        return y

    def _dealt(self, groups: int, x: Array) -> dict[str, Array]:
        """The weights as `deal_heads` deals them to G groups: [D, G, n, H], out [G, n, H, D], biases [G, 1, 1, n, H], sinks
        [G, n].

        They are dealt rather than what they project, because they are small. A head computed twice has an output weight once.
        """
        config = self.config
        dealing = deal_heads(config.num_heads, config.num_kv_heads, groups)
        heads = {"query": dealing.queries, "key": dealing.keys, "value": dealing.keys}
        dealt = {}
        for name, own in heads.items():
            w = take_heads(getattr(self, name)[...].astype(x.dtype), own, axis=1)
            dealt[name] = w.reshape(w.shape[0], groups, -1, w.shape[-1])
            if config.projection_bias:
                b = take_heads(getattr(self, f"{name}_bias")[...].astype(x.dtype), own, axis=0)
                dealt[f"{name}_bias"] = b.reshape(groups, 1, 1, -1, b.shape[-1])
        if config.attention_sinks:
            dealt["sink_bias"] = take_heads(self.sink_bias[...], dealing.queries, axis=0).reshape(groups, -1)
        out, owner = self.out[...].astype(x.dtype), dict(zip(dealing.slots, range(config.num_heads), strict=True))
        if len(dealing.queries) > len(owner):
            out = jnp.concatenate([out, jnp.zeros_like(out[:1])])
        out = take_heads(out, tuple(owner.get(slot, len(owner)) for slot in range(len(dealing.queries))), axis=0)
        dealt["out"] = out.reshape(groups, -1, *out.shape[1:])
        return {name: varying_like(w, x) for name, w in dealt.items()}

    def _add(
        self, weights: dict[str, Array], x: Array, y: Array, angles: Array, segment_ids: Array | None, mask: Mask | None
    ) -> tuple[Array, Array]:
        """x, and y [B, T, D] with what the heads of `weights` add to it; between the projections all is [G, B, T, n, H]."""
        config = self.config
        projections = tuple(weights[name] for name in ("query", "key", "value"))
        x, (q, k, v) = _project(x, projections, config.head_chunks > 1)
        if config.projection_bias:
            q, k, v = (y + weights[f"{name}_bias"] for y, name in ((q, "query"), (k, "key"), (v, "value")))
        if config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = apply_rope(q, angles), apply_rope(k, angles)
        window = config.local_window_size
        options = (
            {"mask": mask}
            if mask is not None
            else {
                "is_causal": config.is_causal,
                "local_window_size": None if window is None else (window, 0 if config.is_causal else window),
                "segment_ids": segment_ids,
            }
        )
        attend = functools.partial(self.attention, logits_soft_cap=config.logits_soft_cap, **options)
        if config.attention_sinks:
            attend = functools.partial(attend, sinks=weights["sink_bias"] if len(q) > 1 else weights["sink_bias"][0])
        v, out = _both_first(v, weights["out"])  # before v crosses, which is the last to do so
        z = attend(q, k, v) if len(q) > 1 else attend(q[0], k[0], v[0])[None]
        z = checkpoint_name(z, "attention_exchanged")
        return x, _contract(y, z, out, config.head_chunks > 1)


@jax.custom_vjp
def _both_first(x: Array, y: Array) -> tuple[Array, Array]:
    """(x, y), neither of them before both: what is gathered for after attention is gathered before it.

    The kernel's blocks stay on their multiprocessors to the end. A gather that begins with it waits there for one to be free,
    and on the device where it came first it keeps some from the kernel, waiting for the other device: up to twice the time.
    """
    return lax.optimization_barrier((x, y))


_both_first.defvjp(lambda x, y: (_both_first(x, y), None), lambda _, gradients: gradients)


# The output's product contracts groups too, and so does the gradient of the projections. Of two groups it is the sum of two
# products, the second added to the first in place. Of more, one product of a permuted array: the copy costs less beside what
# crosses then, and each partial sum is one more rounding.
SUMMED = 2


def _each_group(equation: str, x: Array, y: Array) -> Array:
    """An einsum of x, whose dims are "td", with y, whose dims have a "g" for groups, and the result's too.

    On GPUs each group is a product of a batch, which writes its part in place, and XLA turns the copies of x into a stride of
    zero. Elsewhere it would make those copies.
    """
    copies = y.shape[equation[3:].index("g")]

    def batch(x: Array, y: Array) -> Array:
        return jnp.einsum(f"g{equation}", jnp.broadcast_to(x, (copies, *x.shape)), y)

    return lax.platform_dependent(x, y, cuda=batch, default=functools.partial(jnp.einsum, equation))


def _part(w: Array, i: int, parts: int, *, axis: int) -> Array:
    size = w.shape[axis] // parts
    return lax.slice_in_dim(w, i * size, (i + 1) * size, axis=axis % w.ndim)


def _flat(y: Array) -> Array:
    """[G, B, T, n, H] → [G, B·T, n·H]."""
    return y.reshape(len(y), -1, y.shape[-2] * y.shape[-1])


def _project(x: Array, weights: tuple[Array, ...], one_by_one: bool = False) -> tuple[Array, tuple[Array, ...]]:
    """[B, T, D] × each [D, G, n, H] → [G, B, T, n, H].

    Also x, for whoever else reads it: its gradient then comes in here and all products are added to it in place. Left to
    autodiff each would be an array [G, B, T, D]. Where a product does not add in place, XLA may keep all of them for one sum;
    `one_by_one` has each added before the next is made.
    """
    projected: Any = _projected(x, weights, one_by_one)
    return projected


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _projected(x: Array, weights: tuple[Array, ...], one_by_one: bool) -> tuple[Array, tuple[Array, ...]]:
    del one_by_one

    def one(w: Array) -> Array:
        D, G, n, H = w.shape
        return _each_group("td,dgh->gth", x.reshape(-1, D), w.reshape(D, G, n * H)).reshape(G, *x.shape[:2], n, H)

    return x, tuple(map(one, weights))


def _project_backward(one_by_one: bool, saved: tuple[Array, tuple[Array, ...]], gradients: tuple[Array, tuple[Array, ...]]):
    (x, weights), (d_x, d_ys), d_weights = saved, gradients, []
    for w, d_y in zip(weights, d_ys, strict=True):
        D, G, n, H = w.shape
        if G <= SUMMED:
            d_w = _each_group("td,gth->dgh", x.reshape(-1, D), _flat(d_y))
            factors = [(d, w[:, g].reshape(D, n * H)) for g, d in enumerate(_flat(d_y))]
        else:
            d_y = jnp.moveaxis(d_y, 0, 2).reshape(-1, G * n * H)  # written so by RoPE's gradient, where there is one
            d_w = x.reshape(-1, D).T @ d_y
            factors = [(d_y, w.reshape(D, -1))]
        d_weights.append(d_w.reshape(w.shape))
        for d, own in factors:
            if one_by_one and d_weights[1:]:  # not the first, which may be added to zeros
                d_x, d = lax.optimization_barrier((d_x, d))
            d_x += (d @ own.T).reshape(x.shape)
    return d_x, tuple(d_weights)


def _contract(y: Array, z: Array, w: Array, one_by_one: bool = False) -> Array:
    """y [B, T, D] + [G, B, T, n, H] × [G, n, H, D], summed over heads and groups; its gradient writes each group in place.

    `one_by_one` as in `_project`.
    """
    contracted: Any = _contracted(y, z, w, one_by_one)
    return contracted


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _contracted(y: Array, z: Array, w: Array, one_by_one: bool) -> Array:
    G, n, H, D = w.shape
    if G <= SUMMED:
        factors = [(z, w.reshape(n * H, D)) for z, w in zip(_flat(z), w, strict=True)]
    else:
        factors = [(jnp.moveaxis(z, 0, 2).reshape(-1, G * n * H), w.reshape(-1, D))]
    for i, (own, w) in enumerate(factors):
        if one_by_one and i:
            y, own = lax.optimization_barrier((y, own))
        y += (own @ w).reshape(y.shape)
    return y


def _contract_backward(one_by_one: bool, saved: tuple[Array, Array], d_y: Array) -> tuple[Array, Array, Array]:
    z, w = saved
    G, n, H, D = w.shape
    flat = d_y.reshape(-1, D)
    d_z = _each_group("td,ghd->gth", flat, w.reshape(G, n * H, D))
    return d_y, d_z.reshape(z.shape), _each_group("td,gth->ghd", flat, _flat(z)).reshape(w.shape)


_projected.defvjp(lambda x, weights, one_by_one: (_projected(x, weights, one_by_one), (x, weights)), _project_backward)
_contracted.defvjp(lambda y, z, w, one_by_one: (_contracted(y, z, w, one_by_one), (z, w)), _contract_backward)


class MLP(nnx.Module):
    """SwiGLU: (silu(x Wg) ∘ x Wu) Wd (arXiv 2002.05202), on `tile` tokens at a time if given."""

    def __init__(self, config: ModelConfig, tile: int | None = None, *, rngs: nnx.Rngs):
        D, F = config.embed_dim, config.mlp_dim
        self.tile = tile
        self.gate = _weight(rngs, (D, F), fan_in=D)
        self.up = _weight(rngs, (D, F), fan_in=D)
        self.down = _weight(rngs, (F, D), fan_in=F * 2 * config.num_layers)

    def __call__(self, x: Array) -> Array:
        weights = tuple(w[...].astype(x.dtype) for w in (self.gate, self.up, self.down))
        if self.tile is None or self.tile >= x.shape[0] * x.shape[1]:
            return swiglu(weights, x)
        return map_tiles(swiglu, weights, x, self.tile)


def swiglu(weights: tuple[Array, Array, Array], x: Array) -> Array:
    """(silu(x Wg) ∘ x Wu) Wd for weights (Wg, Wu [D, F], Wd [F, D]); x […, D]."""
    gate, up, down = weights
    gated, upped = (checkpoint_name(x @ w, "mlp_products") for w in (gate, up))
    return (jax.nn.silu(gated) * upped) @ down


class Layer(nnx.Module):
    """Attention and MLP, each normalised before and added to its input."""

    def __init__(self, config: ModelConfig, attention: Callable, memory: MemoryConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.embed_dim, config.norm_eps)
        self.attention = Attention(config, attention, () if memory.save == "all" else NAMES["attention"], rngs=rngs)
        self.mlp_norm = RMSNorm(config.embed_dim, config.norm_eps)
        self.mlp = MLP(config, memory.mlp_tile, rngs=rngs)

    def __call__(self, x: Array, angles: Array, segment_ids: Array | None, mask: Mask | None) -> Array:
        x = checkpoint_name(x + self.attention(self.attention_norm(x), angles, segment_ids, mask), "attention_sum")
        return x + self.mlp(self.mlp_norm(x))


class Embedding(nnx.Module):
    """A row of D numbers a token."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.table = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (config.vocab_size, config.embed_dim)))


class Transformer(nnx.Module):
    """tokens [B, T] → logits [B, T, V].

    Args:
      config: the shape.
      attention: a callable `(q, k, v, *, is_causal, local_window_size, segment_ids, mask, logits_soft_cap)`, and `sinks` where
        the config has them, hashable and compared by value: `dot_product_attention` (default), `attention_fn(mesh)` for
        global arrays, or `ShardAttention()` inside a `shard_map`.
      unshard: stored parameters of one part of the model → parameters as used; identity by default.
      memory: what the layers keep for their backward; `MemoryConfig()` by default.
      rngs: source of the initial values.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        attention: Callable = dot_product_attention,
        unshard: Unshard | None = None,
        memory: MemoryConfig | None = None,
        rngs: nnx.Rngs,
    ):
        for name, value, ok, wanted in (
            ("config", config, isinstance(config, ModelConfig), "a ModelConfig, such as recipes.tiny()"),
            ("attention", attention, callable(attention), "a function of (q, k, v), such as attention_fn(mesh)"),
            ("unshard", unshard, unshard is None or callable(unshard), "a function of stored parameters, or None"),
            ("memory", memory, memory is None or isinstance(memory, MemoryConfig), "a MemoryConfig, or None"),
            ("rngs", rngs, isinstance(rngs, nnx.Rngs), "nnx.Rngs, such as nnx.Rngs(0)"),
        ):
            if not ok:
                raise ValueError(f"{name} is {in_words(value)}; it must be {wanted}.")
        self.config, self.unshard, self.memory = config, unshard, (memory := memory or MemoryConfig())
        self.embedding = Embedding(config, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Layer:
            return Layer(config, attention, memory, rngs=rngs)

        self.layers = stacked(rngs)
        self.norm = RMSNorm(config.embed_dim, config.norm_eps)
        if not config.tie_embeddings:
            self.head = Embedding(config, rngs=rngs)

    def __call__(
        self,
        tokens: Array,
        *,
        segment_ids: Array | None = None,
        positions: Array | None = None,
        mask: Mask | None = None,
    ) -> Array:
        """Logits of every token's successor (causal) or of the token itself (bidirectional), float32.

        Args:
          tokens: integers [B, T].
          segment_ids: integers, handed to the attention as they are; see there.
          positions: integers [B, T]; 0 … T−1 by default. In a `shard_map` that divides the sequence give them: they say where
            this device's tokens stand, and by default all devices would count from 0. So for the balanced order of a ring.
          mask: a `make_mask` result, in place of the config's causality and window and of `segment_ids`.

        Returns:
          [B, T, V].

        Raises:
          ValueError: shapes or types that do not fit together; ids beyond the vocabulary, where they are known (outside `jit`).
        """
        return self.logits(self.features(tokens, segment_ids=segment_ids, positions=positions, mask=mask), self.output_table())

    def features(
        self,
        tokens: Array,
        *,
        segment_ids: Array | None = None,
        positions: Array | None = None,
        mask: Mask | None = None,
    ) -> Array:
        """Everything but the output matrix: tokens [B, T] → [B, T, D], normalised. Arguments as in `__call__`."""
        config = self.config
        _check_tokens(tokens, segment_ids, positions, mask, config)
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        angles = positions[..., None] * (2 * math.pi / rope_wavelengths(config))
        x = self._used(self.embedding).table[tokens].astype(config.dtype)
        layer, stored = nnx.split(self.layers)

        def apply(x: Array, stored: nnx.State) -> Array:
            used = nnx.merge(layer, self.unshard(stored) if self.unshard else stored)
            return used(x, angles, segment_ids, mask)

        return self._used(self.norm)(scan_layers(apply, x, stored, self.memory))

    def output_table(self) -> Array:
        """The output matrix [V, D], gathered: the embedding's own where tied."""
        return self._used(self.embedding if self.config.tie_embeddings else self.head).table[...]

    def logits(self, features: Array, table: Array) -> Array:
        """[…, D] × [V, D] → […, V] in float32."""
        return jnp.einsum("...d,vd->...v", features, table.astype(features.dtype), preferred_element_type=jnp.float32)

    def _used[M: nnx.Module](self, module: M) -> M:
        """A part of the model with its parameters as used."""
        if self.unshard is None:
            return module
        graph, stored = nnx.split(module)
        return nnx.merge(graph, self.unshard(stored))


def _check_tokens(
    tokens: Array, segment_ids: Array | None, positions: Array | None, mask: Mask | None, config: ModelConfig
) -> None:
    """Refuse what would fail deep inside, or be read wrongly: jax clamps an id beyond the table."""
    if not _is_integers(tokens) or tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens is {in_words(tokens)}; it must be an integer array [B, T], such as jnp.zeros((1, 8), int).")
    B, T = tokens.shape
    if positions is not None and not (_is_integers(positions) and positions.shape in ((B, T), (1, T))):
        raise ValueError(
            f"positions is {in_words(positions)}; it must be integers [B, T] = [{B}, {T}], as tokens. Leave it out for 0 … T−1."
        )
    if mask is not None and segment_ids is not None:
        raise ValueError("mask was given together with segment_ids; put segment_ids into make_mask.")
    if not isinstance(tokens, Tracer) and getattr(tokens, "is_fully_addressable", True):
        known = np.asarray(tokens)  # numpy, because under a trace jax would stage even what is known
        low, high = int(known.min()), int(known.max())
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"tokens holds the id {low if low < 0 else high}; ids must be in [0, {config.vocab_size}). "
                "Raise vocab_size, or use the tokenizer that the model was made for."
            )


def _is_integers(x: object) -> bool:
    return isinstance(x, Array | np.ndarray) and jnp.issubdtype(x.dtype, jnp.integer)


def rope_wavelengths(config: ModelConfig) -> Array:
    """[H/2] wavelengths in tokens: 2π·θ^(2i/H) (RoFormer, arXiv 2104.09864), stretched by `config.rope_scaling` if any."""
    half = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    wavelengths = 2 * math.pi * config.rope_theta**half
    return wavelengths if config.rope_scaling is None else _stretch(wavelengths, config.rope_scaling)


def _stretch(wavelengths: Array, scaling: RopeScaling) -> Array:
    """Llama 3's rule, on wavelengths: 1 keeps one, 0 stretches it by `factor`, and between them frequencies interpolate."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = jnp.clip((scaling.original_length / wavelengths - low) / (high - low), 0, 1)
    return wavelengths / (keep + (1 - keep) / scaling.factor)


def apply_rope(x: Array, angles: Array) -> Array:
    """Turn the pair (x[i], x[i + H/2]) of each head by its angle; x […, B, T, N, H], angles [B or 1, T, H/2], in float32."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _weight(rngs: nnx.Rngs, shape: tuple[int, ...], *, fan_in: int) -> nnx.Param:
    """Truncated normal of variance 1 / fan_in; residual outputs count their 2·L additions in (GPT-2)."""
    return nnx.Param(nnx.initializers.truncated_normal(fan_in**-0.5)(rngs.params(), shape))
