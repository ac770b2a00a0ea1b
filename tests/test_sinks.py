"""Attention sinks against the float64 oracle: on one device, over the mesh, around the ring; without them nothing is traced."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from tests.oracles import TOLERANCE, Case, attention, attention_gradients, errors_beyond, quick_jit
from ulysses_jax.attention import dot_product_attention
from ulysses_jax.mesh import make_mesh, token_order
from ulysses_jax.ulysses import ulysses_attention, ulysses_attention_shard

CASES = {
    "causal": Case(is_causal=True),
    "gqa_cap_scale": Case(T=29, N=6, K=2, is_causal=True, logits_soft_cap=1.5, scale=0.7),
    "packed_window": Case(T=33, S=41, N=6, K=3, local_window_size=(9, 4), segments="packed"),
    "dead_rows": Case(segments="dead", is_causal=True),
    "blocks_per_head": Case(T=40, N=4, K=2, block=8, layouts=4, is_causal=True),
}
RESULTS = ("out", "lse", "dq", "dk", "dv", "dsinks")


def sinks_of(case: Case) -> np.ndarray:
    """[N] float32, of which some outweigh the keys and some are next to nothing."""
    return np.random.default_rng(case.N).permutation(np.linspace(-6, 4, case.N)).astype(np.float32)


def expected(case: Case, dtype: str = "float32", *, lse: bool = True) -> dict[str, np.ndarray]:
    q, k, v, d_out, d_lse = case.arrays(dtype).values()
    options: dict[str, Any] = case.mask_options() | case.score_options()
    options |= {"segment_ids": case.ids(), "sinks": sinks_of(case)}
    d_lse = d_lse if lse else np.zeros_like(d_lse)
    return attention(q, k, v, **options) | attention_gradients(q, k, v, d_out, d_lse, **options)


def on_one_device(implementation: str, case: Case, dtype: str = "float32") -> dict[str, jax.Array]:
    @quick_jit
    def program(q, k, v, sinks, d_out, d_lse):
        options = case.mask_options() | case.score_options() | {"implementation": implementation, "return_residual": True}
        attend = lambda q, k, v, sinks: dot_product_attention(q, k, v, sinks=sinks, **options)  # noqa: E731
        results, back = jax.vjp(attend, q, k, v, sinks)
        return *results, *back((d_out, d_lse))

    q, k, v, d_out, d_lse = case.arrays(dtype).values()
    return dict(zip(RESULTS, program(q, k, v, sinks_of(case), d_out, d_lse), strict=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_equals_the_oracle(implementation, name):
    """σ(sink − lse) for σ(lse − sink), or a log-sum-exp given without the sink, breaks it; in the reference, a sink that is
    scaled, or heads in the order of KV heads.
    """
    got = on_one_device(implementation, CASES[name])
    assert errors_beyond(TOLERANCE["float32"], got, expected(CASES[name])) == {}


def test_equals_the_oracle_in_bfloat16():
    """The share computed in bfloat16 breaks the sinks' dtype, and the log-sum-exp's."""
    got = on_one_device("xla", CASES["causal"], "bfloat16")
    kinds = {name: str(x.dtype) for name, x in got.items()}
    assert kinds == dict.fromkeys(RESULTS, "bfloat16") | {"lse": "float32", "dsinks": "float32"}
    assert errors_beyond(TOLERANCE["bfloat16"], got, expected(CASES["causal"], "bfloat16")) == {}


@pytest.mark.parametrize("sink", [-np.inf, -200.0, 0.0, 200.0])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_query_that_sees_no_key_gives_zeros_and_no_nan_at_any_sink(implementation, sink):
    """−inf − (−inf) inside the share, or exp(sink) without the maximum, breaks it. A sink of −inf is none."""
    case = CASES["dead_rows"]
    ids = case.ids()
    assert ids is not None
    q, k, v, d_out, _ = case.arrays().values()

    @quick_jit
    def program(q, k, v, sinks):
        options = case.mask_options() | {"implementation": implementation}
        out, back = jax.vjp(lambda *x: dot_product_attention(*x[:3], sinks=x[3], **options), q, k, v, sinks)
        return out, *back(d_out)

    got = program(q, k, v, np.full(case.N, sink, np.float32))
    assert all(np.isfinite(x).all() for x in got)
    dead = ids[0] == 9
    assert dead.any()
    assert not np.asarray(got[0])[dead].any()
    if sink == -np.inf:
        np.testing.assert_allclose(got[0], case.expected()["out"], rtol=1e-4, atol=1e-6)
        assert not np.asarray(got[4]).any()


ON_MESH = {
    "gqa": ({"data": 1, "seq": 8}, {}, Case(B=4, T=32, N=8, K=2, H=4, is_causal=True)),
    "heads_of_my_own": ({"data": 2, "seq": 4}, {}, Case(B=4, T=32, N=16, K=8, H=4, segments="dead")),
    "heads_that_do_not_divide": ({"data": 2, "seq": 4}, {}, Case(B=2, T=30, N=6, K=2, H=4, is_causal=True)),
    "more_devices_than_heads": ({"data": 1, "seq": 8}, {}, Case(B=2, T=37, N=3, H=4, logits_soft_cap=2.0)),
    "tensor": ({"data": 2, "seq": 2, "tensor": 2}, {"head_axis": "tensor"}, Case(B=2, T=16, N=8, K=4, H=4, is_causal=True)),
    "ring": ({"data": 2, "ring": 2, "seq": 2}, {"ring_axis": "ring"}, Case(T=48, N=6, K=2, H=4, is_causal=True)),
    "ring_balanced": (
        {"data": 1, "ring": 4, "seq": 2},
        {"ring_axis": "ring", "balanced": True},
        Case(T=48, N=4, K=4, H=4, is_causal=True, logits_soft_cap=1.5),
    ),
    "halo": ({"data": 1, "ring": 4, "seq": 2}, {"ring_axis": "ring"}, Case(T=48, N=4, H=4, local_window_size=(3, 0))),
}


@pytest.mark.parametrize("name", ON_MESH)
def test_each_device_takes_the_sinks_of_its_own_heads(name):
    """The first n sinks on every device, or sinks in each turn of the ring in place of after the merge, break it; a ring's
    gradient of the wrong sign, too.
    """
    axes, keywords, case = ON_MESH[name]
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    order = token_order(case.T, axes["ring"]) if "balanced" in keywords else np.arange(case.T)
    ids = case.mask_options()["segment_ids"]

    @quick_jit
    def program(q, k, v, sinks, d_out):
        options = case.mask_options() | case.score_options() | keywords | {"segment_ids": ids, "mesh": mesh}
        out, back = jax.vjp(lambda *x: ulysses_attention(*x[:3], sinks=x[3], **options), q, k, v, sinks)
        return out, *back(d_out)

    q, k, v, d_out, _ = case.arrays().values()
    *arrays, d_sinks = program(*(x[:, order] for x in (q, k, v)), sinks_of(case), d_out[:, order])
    got = dict(zip(("out", "dq", "dk", "dv"), (np.asarray(x)[:, np.argsort(order)] for x in arrays), strict=True))
    want = expected(case, lse=False)
    del want["lse"]
    assert errors_beyond(TOLERANCE["float32"], got | {"dsinks": d_sinks}, want) == {}


def test_runs_outside_jit_with_sinks_from_the_host():
    case = ON_MESH["gqa"][2]
    q, k, v, *_ = case.arrays().values()
    got = ulysses_attention(q, k, v, mesh=make_mesh(data=2, seq=4), is_causal=True, sinks=jnp.asarray(sinks_of(case)))
    assert errors_beyond(TOLERANCE["float32"], {"out": got}, {"out": expected(case)["out"]}) == {}


def test_without_sinks_nothing_is_traced_for_them():
    """Sinks of −inf for none give the same numbers, and break it."""

    def text(attend, **options) -> str:
        x = jnp.zeros((1, 8, 2, 4))
        return str(jax.make_jaxpr(lambda *x: jax.vjp(functools.partial(attend, **options), *x)[1](x[0]))(x, x, x))

    for attend in (dot_product_attention, functools.partial(ulysses_attention, mesh=make_mesh(seq=2))):
        plain, sunk = text(attend), text(attend, sinks=jnp.zeros(2))
        for operation in (" logistic ", " log1p ", " gather["):
            assert operation not in plain
        assert " logistic " in sunk


def test_it_lowers_inside_a_shard_map_for_hopper():
    """A log-sum-exp that the kernel types as not varying fails to trace."""
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    mesh = AbstractMesh((2, 4), ("data", "seq"), axis_types=(AxisType.Auto,) * 2, abstract_device=device)

    def loss(q, k, v, sinks):
        return ulysses_attention_shard(q, k, v, is_causal=True, sinks=sinks, implementation="pallas").astype(jnp.float32).sum()

    tokens, whole = PartitionSpec("data", "seq"), PartitionSpec()
    specs = (tokens, tokens, tokens, whole)
    on_mesh = jax.shard_map(jax.grad(loss, (0, 1, 2, 3)), mesh=mesh, in_specs=specs, out_specs=specs)
    shapes = [jax.ShapeDtypeStruct((2, 512, heads, 64), jnp.bfloat16) for heads in (8, 4, 4)]
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(on_mesh).trace(*shapes, jax.ShapeDtypeStruct((8,), jnp.float32))
        assert traced.lower(lowering_platforms=("cuda",)).as_text().count("custom_call @mosaic_gpu") == 2
