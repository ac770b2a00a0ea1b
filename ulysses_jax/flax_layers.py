"""Ulysses attention under the keywords of Flax's attention layers, NNX and Linen."""

import dataclasses

from jax import Array
from jax.sharding import Mesh

from ulysses_jax.attention import BlockMask, Mask, Segments, Window, check_options, normalize_window
from ulysses_jax.mesh import DATA, SEQ
from ulysses_jax.ulysses import axis_names, check_axes, check_ring, ulysses_attention

__all__ = ["FlaxAttention", "attention_fn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlaxAttention:
    """What `attention_fn` makes: `ulysses_attention` under the keywords of Flax's attention layers.

    Every keyword is named, because Linen drops those that a function does not name.
    """

    mesh: Mesh
    is_causal: bool = False
    scale: float | None = None
    local_window_size: Window = None
    logits_soft_cap: float | None = None
    block_mask: BlockMask | None = None
    implementation: str | None = None
    seq_axis: str = SEQ
    batch_axes: tuple[str, ...] = (DATA,)
    head_axis: str | None = None
    ring_axis: str | None = None
    balanced: bool = False

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Mask | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = True,
        dtype=None,
        precision=None,
        module=None,
        is_causal: bool = False,
        scale: float | None = None,
        local_window_size: Window = None,
        segment_ids: Segments = None,
        logits_soft_cap: float | None = None,
        block_mask: BlockMask | None = None,
        sinks: Array | None = None,
        force_fp32_for_softmax: bool = False,
        qk_attn_weights_einsum=None,
        attn_weights_value_einsum=None,
    ) -> Array:
        del broadcast_dropout, dropout_rng, precision, force_fp32_for_softmax  # the softmax is float32 always
        for name, given, way_out in (
            ("bias", bias is not None, "Leave it out."),
            ("dropout_rate", dropout_rate > 0 and not deterministic, "Set dropout_rate=0 in the attention layer."),
            ("sow_weights", module is not None, "The weights are never held; leave it False."),
            ("qk_attn_weights_einsum", qk_attn_weights_einsum is not None, "Leave it out."),
            ("attn_weights_value_einsum", attn_weights_value_einsum is not None, "Leave it out."),
        ):
            if given:
                raise NotImplementedError(f"{name} is set, which ulysses_attention cannot do. {way_out}")
        if dtype is not None:
            query, key, value = (x.astype(dtype) for x in (query, key, value))
        # A mask replaces the options; what the call itself says beside one is handed on, and refused by name.
        options = (
            dataclasses.replace(self, is_causal=False, local_window_size=None, block_mask=None) if mask is not None else self
        )
        return ulysses_attention(
            query,
            key,
            value,
            mesh=self.mesh,
            mask=mask,
            is_causal=is_causal or options.is_causal,
            local_window_size=options.local_window_size if local_window_size is None else local_window_size,
            segment_ids=segment_ids,
            block_mask=options.block_mask if block_mask is None else block_mask,
            sinks=sinks,
            scale=self.scale if scale is None else scale,
            logits_soft_cap=self.logits_soft_cap if logits_soft_cap is None else logits_soft_cap,
            implementation=self.implementation,
            seq_axis=self.seq_axis,
            batch_axes=self.batch_axes,
            head_axis=self.head_axis,
            ring_axis=self.ring_axis,
            balanced=self.balanced,
        )


def attention_fn(mesh: Mesh, **options) -> FlaxAttention:
    """Ulysses attention for `nnx.MultiHeadAttention` and `linen.MultiHeadDotProductAttention`.

    `options` are those of `ulysses_attention`. A mask given to the layer must be a `make_mask` result; it replaces
    `is_causal`, `local_window_size` and `block_mask`. Flax's layers have no sinks; a layer of your own that learns them
    gives them to the call, `sinks=`. Two results with equal options are equal, so a model that holds one is not recompiled.

    Example:
      >>> layer = nnx.MultiHeadAttention(8, 512, attention_fn=attention_fn(mesh, is_causal=True), decode=False, rngs=rngs)
    """
    known = {field.name for field in dataclasses.fields(FlaxAttention)} - {"mesh"}
    if unknown := sorted(options.keys() - known):
        raise ValueError(
            f"attention_fn has no option {unknown[0]!r}; the options are {', '.join(sorted(known))}. "
            "mask, segment_ids and sinks are given to the layer's call."
        )
    options["batch_axes"] = axis_names(options.get("batch_axes", (DATA,)))
    attention = FlaxAttention(mesh=mesh, **options)
    check_axes(mesh, attention.seq_axis, attention.batch_axes, attention.head_axis, attention.ring_axis)
    check_ring(attention.ring_axis, balanced=attention.balanced)
    check_options(attention.is_causal, attention.scale, attention.logits_soft_cap, attention.implementation)
    normalize_window(attention.local_window_size)
    return attention
