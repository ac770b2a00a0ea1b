"""`attention_fn` inside Flax's own attention layers, NNX and Linen, against those layers with their own attention."""

import copy
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from tests.oracles import TOLERANCE, attention, dense_mask, quick_jit, relative_error
from ulysses_jax.attention import make_mask
from ulysses_jax.flax_layers import FlaxAttention, attention_fn
from ulysses_jax.mesh import make_mesh

B, T, N, D = 2, 16, 8, 32
IDS = np.sort(np.random.default_rng(0).integers(1, 4, (B, T)), axis=1).astype(np.int32)
# (options of attention_fn, options of make_mask, the same as dense_mask takes it)
ASKED = {
    "full": ({}, None, {}),
    "causal": ({"is_causal": True}, None, {"is_causal": True}),
    "window": ({"local_window_size": (3, 1)}, None, {"local_window_size": (3, 1)}),
    "mask": ({}, {"is_causal": True, "segment_ids": jnp.asarray(IDS)}, {"is_causal": True, "segment_ids": IDS}),
    "mask_replaces": ({"local_window_size": 1}, {"is_causal": True}, {"is_causal": True}),
}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=2, seq=4)


@pytest.fixture(scope="module")
def x() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (B, T, D))


def dense(options: dict) -> jax.Array:
    """[B or 1, 1, T, T], as Flax takes masks."""
    return jnp.asarray(dense_mask(T, T, **options))[:, None]


def nnx_layer(**options) -> nnx.MultiHeadAttention:
    return nnx.MultiHeadAttention(N, D, decode=False, rngs=nnx.Rngs(0), **options)


def linen_layer(**options) -> linen.MultiHeadDotProductAttention:
    return linen.MultiHeadDotProductAttention(num_heads=N, qkv_features=D, **options)


@pytest.fixture(scope="module")
def linen_params(x):
    return quick_jit(linen_layer().init)(jax.random.key(1), x)


def value_and_gradient(apply, x):
    """Output, and the gradient of its squared norm in x."""

    def loss(x):
        out = apply(x)
        return (out**2).sum(), out

    (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(x)
    return out, gradient


@pytest.mark.parametrize("name", ASKED)
def test_an_nnx_layer_equals_its_own_attention(mesh, x, name):
    options, mask_options, plain = ASKED[name]
    mask: Any = mask_options and make_mask(T, **mask_options)
    graph, state = nnx.split(nnx_layer(attention_fn=attention_fn(mesh, **options)))
    own_graph, own_state = nnx.split(nnx_layer())

    @quick_jit
    def ours_and_own(x):
        ours = value_and_gradient(lambda x: nnx.merge(graph, state)(x, mask=mask), x)
        return ours, value_and_gradient(lambda x: nnx.merge(own_graph, own_state)(x, mask=dense(plain)), x)

    ours, own = ours_and_own(x)
    assert relative_error(ours[0], own[0]) <= TOLERANCE["float32"]
    assert relative_error(ours[1], own[1]) <= TOLERANCE["float32"]


def test_an_nnx_layer_called_causal_is_causal(mesh, x):
    """NNX hands `is_causal` of the call on; dropping it in `FlaxAttention.__call__` breaks it."""
    layer, own = nnx_layer(attention_fn=attention_fn(mesh)), nnx_layer()
    got = nnx.jit(lambda layer, x: layer(x, is_causal=True))(layer, x)
    want = nnx.jit(lambda layer, x: layer(x, mask=dense({"is_causal": True})))(own, x)
    assert relative_error(got, want) <= TOLERANCE["float32"]


@pytest.mark.parametrize("name", ASKED)
def test_a_linen_layer_equals_its_own_attention(mesh, x, linen_params, name):
    options, mask_options, plain = ASKED[name]
    mask = mask_options and make_mask(T, **mask_options)
    layer = linen_layer(attention_fn=attention_fn(mesh, **options))

    @quick_jit
    def ours_and_own(x):
        ours = value_and_gradient(lambda x: layer.apply(linen_params, x, mask=mask), x)
        return ours, value_and_gradient(lambda x: linen_layer().apply(linen_params, x, mask=dense(plain)), x)

    ours, own = ours_and_own(x)
    assert relative_error(ours[0], own[0]) <= TOLERANCE["float32"]
    assert relative_error(ours[1], own[1]) <= TOLERANCE["float32"]


def test_trap_14_a_mask_given_through_linen_changes_the_output(mesh, x, linen_params):
    """`mask` taken by **kwargs instead of by name breaks it: Linen then leaves it out without a word."""
    layer = linen_layer(attention_fn=attention_fn(mesh))
    apply = quick_jit(layer.apply)
    masked = apply(linen_params, x, mask=make_mask(T, segment_ids=jnp.asarray(IDS)))
    want = quick_jit(linen_layer().apply)(linen_params, x, mask=dense({"segment_ids": IDS}))
    assert relative_error(masked, want) <= TOLERANCE["float32"]
    assert relative_error(apply(linen_params, x), want) > 0.1


@pytest.mark.parametrize("beside", [{"is_causal": True}, {"segment_ids": "ids"}, {"local_window_size": (3, 0)}])
def test_what_a_call_says_beside_a_mask_is_refused_not_dropped(mesh, beside):
    """Dropping it would let a layer called causal see the future."""
    q = jnp.ones((2, 16, 8, 4))
    ids = jnp.zeros((2, 16), jnp.int32)
    given: Any = {name: ids if value == "ids" else value for name, value in beside.items()}
    with pytest.raises(ValueError, match="mask"):
        attention_fn(mesh)(q, q, q, mask=make_mask(16), **given)
    attention_fn(mesh, is_causal=True)(q, q, q, mask=make_mask(16))  # an option is replaced


def test_a_call_hands_on_sinks(mesh):
    """Leaving them out of what `FlaxAttention.__call__` hands on breaks it."""
    q, k, v = (jax.random.normal(key, (B, T, N, 4)) for key in jax.random.split(jax.random.key(3), 3))
    sinks = jnp.linspace(-1, 2, N)
    got = quick_jit(attention_fn(mesh, is_causal=True))(q, k, v, sinks=sinks)
    assert relative_error(got, attention(q, k, v, is_causal=True, sinks=sinks)["out"]) <= TOLERANCE["float32"]


def call(layers: str, linen_params, x, options: dict, **arguments):
    """One layer of either kind, made with `options` and called with `arguments`."""
    if layers == "nnx":
        return nnx_layer(**options)(x, rngs=nnx.Rngs(1), **arguments)
    return linen_layer(**options).apply(linen_params, x, rngs={"dropout": jax.random.key(2)}, **arguments)


@pytest.mark.parametrize("layers", ["nnx", "linen"])
def test_a_dense_mask_is_refused(mesh, x, linen_params, layers):
    mask = dense({"is_causal": True})
    with pytest.raises(ValueError, match=r"must come from make_mask. A dense \[T, S\] mask cannot scale to long sequences"):
        call(layers, linen_params, x, {"attention_fn": attention_fn(mesh)}, mask=mask)


def test_equal_options_are_equal_and_do_not_recompile(mesh, x):
    """A closure, or `eq=False` on the dataclass, breaks it: NNX would compile the layer anew."""
    first, second = (attention_fn(make_mesh(data=2, seq=4), is_causal=True, local_window_size=(4, 4)) for _ in range(2))
    assert first == second == copy.copy(first)
    assert hash(first) == hash(second)
    assert first != attention_fn(mesh, local_window_size=(4, 4))
    assert first != attention_fn(make_mesh(data=1, seq=4), is_causal=True, local_window_size=(4, 4))
    traced = []

    @nnx.jit
    def apply(layer, x):
        traced.append(x)
        return layer(x)

    apply(nnx_layer(attention_fn=first), x)
    apply(nnx_layer(attention_fn=second), x)
    assert len(traced) == 1


Q = jnp.zeros((B, T, N, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bias": jnp.zeros((1, N, T, T))}, "bias is set, which ulysses_attention cannot do. Leave it out"),
        ({"dropout_rate": 0.1, "deterministic": False}, "dropout_rate is set.*Set dropout_rate=0 in the attention layer"),
        ({"module": object()}, "sow_weights is set.*leave it False"),
        ({"qk_attn_weights_einsum": jnp.einsum}, "qk_attn_weights_einsum is set"),
        ({"attn_weights_value_einsum": jnp.einsum}, "attn_weights_value_einsum is set"),
    ],
)
def test_refuses_what_it_cannot_do(mesh, arguments, message):
    with pytest.raises(NotImplementedError, match=message):
        attention_fn(mesh)(Q, Q, Q, **arguments)


@pytest.mark.parametrize("layers", ["nnx", "linen"])
@pytest.mark.parametrize("asked", ["dropout", "sow_weights"])
def test_what_it_cannot_do_is_refused_through_the_layers_too(mesh, x, linen_params, layers, asked):
    """Leaving `module` or `dropout_rate` unnamed breaks it for Linen, which would drop them."""
    options = {"attention_fn": attention_fn(mesh)} | (
        {"dropout_rate": 0.5, "deterministic": False} if asked == "dropout" else {}
    )
    with pytest.raises(NotImplementedError, match=f"{asked}.* is set"):
        call(layers, linen_params, x, options, **({"sow_weights": True} if asked == "sow_weights" else {}))


def test_dropout_is_no_matter_where_it_is_off(mesh, x):
    layer = nnx_layer(attention_fn=attention_fn(mesh), dropout_rate=0.5, deterministic=True)
    want = nnx.jit(lambda layer, x: layer(x))(nnx_layer(attention_fn=attention_fn(mesh)), x)
    np.testing.assert_array_equal(nnx.jit(lambda layer, x: layer(x))(layer, x), want)


def test_refuses_options_that_are_not_its_own(mesh):
    with pytest.raises(ValueError, match=r"attention_fn has no option 'casual'; the options are .*is_causal"):
        attention_fn(mesh, casual=True)
    with pytest.raises(ValueError, match="seq_axis names 'sp', but the mesh has axes"):
        attention_fn(mesh, seq_axis="sp")


def test_every_keyword_of_flax_is_named():
    """A `**kwargs` in the signature would take what Linen has already thrown away."""
    kinds = {parameter.kind for parameter in inspect.signature(FlaxAttention.__call__).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    flax_keywords = set(inspect.signature(linen.dot_product_attention).parameters)
    flax_keywords -= {"einsum_dot_general"}  # the layers have no such option
    assert flax_keywords <= set(inspect.signature(FlaxAttention.__call__).parameters)
