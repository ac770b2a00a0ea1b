"""Splash attention without a TPU: in Pallas's interpreter against the float64 oracle, and that it lowers for TPUs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from tests.oracles import TOLERANCE, Case, attention, attention_gradients, dense_mask, errors_beyond, quick_jit
from ulysses_jax.attention import longformer_blocks, make_mask, splash
from ulysses_jax.attention.splash import splash_attention
from ulysses_jax.memory import NAMES
from ulysses_jax.mesh import make_mesh
from ulysses_jax.ulysses import ulysses_attention, ulysses_attention_shard

CASES = {
    "full": Case(B=1, T=256, N=2),
    "full_off_the_tile": Case(B=1, T=200, N=2),
    "causal_gqa": Case(B=2, T=300, N=4, K=2, is_causal=True, scale=0.7),
    "window_cap": Case(B=1, T=300, N=3, K=1, local_window_size=(40, 150), logits_soft_cap=1.5),
    "window_to_the_left": Case(B=1, T=300, N=2, local_window_size=(130, 0)),
    "fewer_queries": Case(B=1, T=130, S=300, N=2, is_causal=True),
    "fewer_keys": Case(B=1, T=300, S=130, N=2, is_causal=True),
    "packed": Case(B=2, T=200, N=2, H=16, segments="packed", is_causal=True),
    "scattered": Case(B=2, T=140, S=150, N=2, segments="scattered"),
    "dead_rows": Case(B=2, T=200, N=2, segments="dead", is_causal=True),
    "dead_rows_past_the_window": Case(B=1, T=400, S=100, N=2, local_window_size=(50, 0)),
    "everything": Case(
        B=2, T=290, S=270, N=4, K=2, is_causal=True, local_window_size=(99, 4), segments="dead", logits_soft_cap=2.0, scale=0.5
    ),
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles in either direction."""
    monkeypatch.setattr(splash, "BLOCK", 128)


def results(case: Case, attend: Any, dtype: str = "float32", sinks: np.ndarray | None = None) -> dict[str, Any]:
    @quick_jit
    def program(q, k, v, sinks, d_out, ids):
        out, back = jax.vjp(lambda *x: attend(*x, case.mask_options() | {"segment_ids": ids}), q, k, v, sinks)
        return out, *back(d_out)

    q, k, v, d_out, _ = case.arrays(dtype).values()
    got = program(q, k, v, sinks, d_out, case.mask_options()["segment_ids"])
    return dict(zip(("out", "dq", "dk", "dv", "dsinks"), got, strict=True)) if sinks is not None else named(got[:4])


def named(got: Any) -> dict[str, Any]:
    return dict(zip(("out", "dq", "dk", "dv"), got, strict=True))


def expected(case: Case, dtype: str = "float32", sinks: np.ndarray | None = None) -> dict[str, np.ndarray]:
    q, k, v, d_out, d_lse = case.arrays(dtype).values()
    options: dict[str, Any] = case.mask_options() | case.score_options()
    options |= {"segment_ids": case.ids(), "sinks": sinks}
    out = attention(q, k, v, **options)["out"]
    return {"out": out} | attention_gradients(q, k, v, d_out, np.zeros_like(d_lse), **options)


def interpreted(case: Case) -> Any:
    def attend(q, k, v, sinks, mask_options):
        scale = case.scale or case.H**-0.5
        mask = make_mask(q.shape[1], k.shape[1], **mask_options)
        options = {"scale": scale, "logits_soft_cap": case.logits_soft_cap, "sinks": sinks, "interpret": True}
        return splash_attention(q, k, v, mask, **options)

    return attend


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", CASES)
def test_interpreted_equals_the_oracle(name):
    """Padded keys left to be seen, a tile called full whose corner is not, `NOTHING` left out where rows see nothing, or bands
    that are equal because their shapes are, break it.
    """
    case = CASES[name]
    got = results(case, interpreted(case))
    assert errors_beyond(TOLERANCE["float32"], got, expected(case)) == {}
    ids = case.ids()
    sees = dense_mask(
        case.T, case.S or case.T, is_causal=case.is_causal, local_window_size=case.local_window_size, segment_ids=ids
    )
    dead = np.broadcast_to(~sees.any(2), (case.B, case.T))
    assert dead.any() == (name in ("dead_rows", "dead_rows_past_the_window", "everything"))
    assert not np.asarray(got["out"])[dead].any()
    assert not np.asarray(got["dq"])[dead].any()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", ["causal_gqa", "dead_rows"])
def test_sinks_equal_the_oracle(name):
    case = CASES[name]
    sinks = np.linspace(-3, 4, case.N).astype(np.float32)
    got = results(case, interpreted(case), sinks=sinks)
    assert errors_beyond(TOLERANCE["float32"], got, expected(case, sinks=sinks)) == {}


def test_in_bfloat16_and_tiles_of_512_it_equals_the_oracle():
    """q left in float32 after it is scaled breaks it."""
    case = Case(B=1, T=600, N=2, K=1, H=16, is_causal=True, scale=0.3)
    got = results(case, interpreted(case), "bfloat16")
    assert {str(x.dtype) for x in got.values()} == {"bfloat16"}
    assert errors_beyond(TOLERANCE["bfloat16"], got, expected(case, "bfloat16")) == {}


def test_tables_of_tiles_are_those_of_the_dense_mask():
    """Every tile's corners against its elements; `start > last + right` turned into `>=` breaks it."""
    for T, S, left, right in (
        (300, 300, splash.FAR, 0),
        (300, 260, 40, 90),
        (200, 400, 128, 127),
        (390, 129, 0, 0),
        (256, 256, 0, 1),
    ):
        padded = -(-T // 128) * 128, -(-S // 128) * 128
        band = splash._Band(splash._Options((T, S), (128, 128), (left, right), 1, None, True), padded)
        t, s = np.ogrid[: padded[0], : padded[1]]
        sees = (s >= t - left) & (s <= t + right) & (s < S)
        for i in range(0, padded[0], 128):
            for j in range(0, padded[1], 128):
                part = slice(i, i + 128), slice(j, j + 128)
                real = sees[part][: max(T - i, 0)]
                np.testing.assert_array_equal(band[part].any(), sees[part].any(), err_msg=f"{T, S, i, j}")
                assert not band[part].all() or real.all()


@pytest.fixture
def as_on_a_tpu(monkeypatch):
    monkeypatch.setattr("ulysses_jax.attention._device", lambda: ("tpu", "TPU v5 lite"))
    monkeypatch.setattr("ulysses_jax.attention.splash_attention", functools.partial(splash_attention, interpret=True))


@pytest.mark.usefixtures("as_on_a_tpu", "small_tiles")
@pytest.mark.parametrize("check_vma", [True, False])
def test_ulysses_over_it_equals_the_oracle(check_vma):
    """In a shard_map of either kind, with heads that do not divide and sinks dealt. Without `_unchecked` the first does not
    trace, nor where d_out is turned outside of it.
    """
    case = Case(B=2, T=136, N=6, K=2, is_causal=True, segments="packed")
    sinks, mesh = np.linspace(-3, 4, case.N).astype(np.float32), make_mesh(data=2, seq=4)

    def attend(q, k, v, sinks, mask_options):
        options = mask_options | {"implementation": "splash"}
        if check_vma:
            return ulysses_attention(q, k, v, mesh=mesh, sinks=sinks, **options)
        tokens, rows = PartitionSpec("data", "seq"), PartitionSpec("data")
        ids = options.pop("segment_ids")
        core = lambda q, k, v, s, ids: ulysses_attention_shard(q, k, v, sinks=s, segment_ids=ids, **options)  # noqa: E731
        specs = (tokens, tokens, tokens, PartitionSpec(), rows)
        return jax.shard_map(core, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=False)(q, k, v, sinks, ids)

    got = results(case, attend, sinks=sinks)
    assert errors_beyond(TOLERANCE["float32"], got, expected(case, sinks=sinks)) == {}


def lowered(attend: Any, kind: str = "TPU v5 lite", platform: str = "tpu", **options: Any) -> str:
    """The program of a gradient inside a shard_map on TPUs that need not be there."""
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    mesh = AbstractMesh((2, 4), ("data", "seq"), axis_types=(AxisType.Auto,) * 2, abstract_device=device)

    def loss(q, k, v):
        return attend(functools.partial(ulysses_attention_shard, is_causal=True, **options))(q, k, v).astype(jnp.float32).sum()

    def both(*arrays):
        value, gradients = jax.value_and_grad(loss, (0, 1, 2))(*arrays)
        return value[None, None], gradients

    tokens = PartitionSpec("data", "seq")
    on_mesh = jax.shard_map(both, mesh=mesh, in_specs=tokens, out_specs=tokens)
    shapes = [jax.ShapeDtypeStruct((2, 1536, heads, 64), jnp.bfloat16) for heads in (8, 4, 4)]
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(on_mesh).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


def calls(text: str) -> int:
    return text.count("custom_call @tpu_custom_call")


def test_unnamed_it_lowers_for_tpus_where_it_can_and_xla_where_not():
    """Three kernels: the forward, that of dQ, that of dK and dV. The mask as an operand of [T, T] breaks the last line."""
    text = lowered(lambda f: f)
    assert calls(text) == 3
    assert calls(lowered(lambda f: f, block_mask=longformer_blocks(1536))) == 0
    assert "1536x1536" not in text


def test_where_a_layer_is_recomputed_its_output_is_kept_by_name():
    """Without the kernel's `residual_checkpoint_name` the forward runs twice."""
    policies = jax.checkpoint_policies
    keep = policies.save_only_these_names(*NAMES["attention"])
    assert calls(lowered(lambda f: jax.checkpoint(f, policy=keep))) == 3
    assert calls(lowered(lambda f: jax.checkpoint(f, policy=policies.nothing_saveable))) == 4
