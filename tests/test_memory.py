"""What each rematerialisation policy keeps between forward and backward, read from the traced program."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.trainers import LENGTH, MODEL
from ulysses_jax.memory import rematerialize
from ulysses_jax.model import Transformer

B, T, L, D, N, H = 3, LENGTH, MODEL.num_layers, MODEL.embed_dim, MODEL.num_heads, MODEL.head_dim
INPUT, OUT, LSE = (L, B, T, D), (L, B, T, N, H), (L, B, N, T)


def kept(remat) -> set[tuple[int, ...]]:
    """Shapes of the activations that the forward's scan over layers stacks up for the backward's."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(dataclasses.replace(MODEL, remat=remat), rngs=nnx.Rngs(0))))
    params = nnx.to_pure_dict(state)

    def loss(params):
        return nnx.merge(graph, params)(jnp.zeros((B, T), jnp.int32)).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(params).jaxpr
    scans = [e for e in jaxpr.eqns if e.primitive.name == "scan" and e.params["length"] == L]
    assert len(scans) == 2, "one over layers forward, one backward"
    outputs: Any = scans[0].outvars
    shapes = {x.aval.shape for x in outputs}
    return {shape for shape in shapes if shape[1:3] == (B, T) or shape == LSE}


def test_full_keeps_layer_inputs_alone():
    assert kept("full") == {INPUT}


def test_attention_keeps_its_output_and_log_sum_exp_too():
    """Losing a `checkpoint_name` in the attention breaks it: the name is then never kept."""
    assert kept("attention") == {INPUT, OUT, LSE}


def test_none_keeps_everything():
    everything = kept("none")
    assert everything > {INPUT, OUT, LSE}
    assert (L, B, T, MODEL.mlp_dim) in everything


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="remat is 'some'; it must be one of none, attention, full"):
        rematerialize(lambda x: x, "some")  # pyright: ignore[reportArgumentType]
