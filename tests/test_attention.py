"""Every implementation of attention on one device against the float64 oracle: one battery, each gradient by name."""

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracles import TOLERANCE, Case, attention, attention_gradients, errors_beyond, quick_jit
from ulysses_jax.attention import _say_once, dot_product_attention, longformer_blocks, make_mask
from ulysses_jax.attention.blocked import blocked_attention

CASES = {
    "full": Case(),
    "causal": Case(is_causal=True),
    "window": Case(local_window_size=(5, 2)),
    "packed": Case(segments="packed", is_causal=True),
    "scattered": Case(segments="scattered"),
    "soft_cap": Case(logits_soft_cap=1.5),
    "scale": Case(scale=0.7, local_window_size=3),
    "gqa": Case(N=6, K=2, is_causal=True),
    "mqa": Case(N=3, K=1),
    "fewer_queries": Case(T=13, S=31, is_causal=True),
    "fewer_keys": Case(T=37, S=11, is_causal=True),
    "off_the_tile": Case(T=29, is_causal=True, N=4, K=2),
    "dead_rows": Case(segments="dead", is_causal=True),
    "dead_rows_past_the_window": Case(T=40, S=10, local_window_size=(4, 0)),
    "blocks": Case(T=29, S=43, N=2, block=8),
    "blocks_per_head": Case(T=40, N=4, K=2, block=8, layouts=4, is_causal=True),
    "blocks_of_five": Case(T=33, N=2, block=5, layouts=2, segments="scattered", local_window_size=(15, 9)),
    "blocks_packed": Case(T=96, N=3, K=1, block=16, layouts=3, segments="packed", logits_soft_cap=2.0),
    "everything": Case(
        T=33, S=41, N=6, K=3, is_causal=True, local_window_size=(9, 4), segments="packed", logits_soft_cap=2.0, scale=0.5
    ),
}


def door(implementation: str, q, k, v, mask_options: dict, score_options: dict):
    return dot_product_attention(q, k, v, **mask_options, **score_options, implementation=implementation, return_residual=True)


def in_tiles(q, k, v, mask_options: dict, score_options: dict):
    """Tiles of 8 queries and 16 keys, or of as many blocks: several in either direction, and a remainder."""
    mask = make_mask(q.shape[1], k.shape[1], **mask_options)
    scale = score_options["scale"] or q.shape[-1] ** -0.5
    soft_cap = score_options["logits_soft_cap"]
    unit = 5 if mask.blocks is not None and mask.blocks.block == 5 else 8
    return blocked_attention(q, k, v, mask, scale=scale, logits_soft_cap=soft_cap, block_q=unit, block_k=2 * unit)


IMPLEMENTATIONS: dict[str, Callable] = {
    "reference": functools.partial(door, "reference"),
    "xla": functools.partial(door, "xla"),
    "xla_in_tiles": in_tiles,
}
# Tiles differ from one tile in the ranges they visit, not in the arithmetic within.
BLOCKS = tuple(name for name, case in CASES.items() if case.block)
TILED = ("causal", "window", "scattered", "gqa", "fewer_queries", "fewer_keys", "dead_rows", *BLOCKS, "everything")
BATTERY = [(x, name) for x in IMPLEMENTATIONS for name in (TILED if x == "xla_in_tiles" else CASES)]


def with_gradients(attend: Callable, case: Case, dtype: str = "float32") -> dict[str, jax.Array]:
    """Results and gradients by name, from one compiled program."""

    @quick_jit
    def program(q, k, v, d_out, d_lse, ids):
        mask_options = case.mask_options() | {"segment_ids": ids}
        results, back = jax.vjp(lambda q, k, v: attend(q, k, v, mask_options, case.score_options()), q, k, v)
        return *results, *back((d_out, d_lse))

    results = program(*case.arrays(dtype).values(), case.mask_options()["segment_ids"])
    return dict(zip(("out", "lse", "dq", "dk", "dv"), results, strict=True))


@functools.cache
def battery_result(implementation: str, name: str) -> dict[str, jax.Array]:
    return with_gradients(IMPLEMENTATIONS[implementation], CASES[name])


@pytest.mark.parametrize(("implementation", "name"), BATTERY)
def test_equals_the_oracle(implementation, name):
    """In the backward, `- d_lse` turned into `+ d_lse`, or the window's `s >= t - left` into `s > t - left`, breaks it; in
    `blocks`, a tile that is full in one sequence and counts as full in all.
    """
    case = CASES[name]
    got = battery_result(implementation, name)
    assert errors_beyond(TOLERANCE["float32"], got, case.expected()) == {}


@pytest.mark.parametrize("name", ["causal", "everything"])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_equals_the_oracle_in_bfloat16(implementation, name):
    case = CASES[name]
    got = with_gradients(IMPLEMENTATIONS[implementation], case, "bfloat16")
    assert {name: str(x.dtype) for name, x in got.items()} == {x: "bfloat16" for x in got} | {"lse": "float32"}
    assert errors_beyond(TOLERANCE["bfloat16"], got, case.expected(dtype="bfloat16")) == {}


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_is_exact_in_float64(implementation):
    """A float32 literal or cast anywhere inside breaks it."""
    case = CASES["everything"]
    with jax.enable_x64(True):
        got = with_gradients(IMPLEMENTATIONS[implementation], case, "float64")
        assert errors_beyond(TOLERANCE["float64"], got, case.expected(dtype="float64")) == {}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_that_sees_no_key_gives_zeros(implementation):
    case = CASES["dead_rows"]
    ids = case.ids()
    assert ids is not None
    dead = ids[0] == 9
    got = battery_result(implementation, "dead_rows")
    assert dead.any()
    assert not np.asarray(got["out"])[dead].any()
    assert not np.asarray(got["dq"])[dead].any()
    assert np.isneginf(np.asarray(got["lse"]).transpose(0, 2, 1)[dead]).all()
    assert all(np.isfinite(np.asarray(got[name])).all() for name in ("out", "dq", "dk", "dv"))


def test_a_prepared_mask_equals_its_options():
    case = CASES["everything"]
    q, k, v, *_ = case.arrays().values()
    attend = quick_jit(functools.partial(dot_product_attention, implementation="xla", **case.score_options()))
    got = attend(q, k, v, mask=make_mask(case.T, case.S, **case.mask_options()))
    np.testing.assert_allclose(got, battery_result("xla", "everything")["out"], rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_logits_overflow_neither_forward_nor_backward(implementation):
    """Logits of ±1000 in float32: without the running maximum, or with the mask outside the exp, there are NaNs."""

    @quick_jit
    def program(q, k, v):
        attend = lambda q, k, v: IMPLEMENTATIONS[implementation](q, k, v, {"is_causal": True}, Case().score_options())  # noqa: E731
        results, back = jax.vjp(attend, q, k, v)
        return results, back(jax.tree.map(jnp.ones_like, results))

    q, k, v, *_ = Case().arrays().values()
    results, gradients = program(40 * q, 40 * k, v)
    assert all(np.isfinite(x).all() for x in (*results, *gradients))
    x = np.asarray(q[:, :, 0] @ k[:, :, 0].swapaxes(1, 2)) * 1600 * 8**-0.5
    winner = np.where(np.tri(24, dtype=bool), x, -np.inf).argmax(-1)
    clear = np.sort(np.where(np.tri(24, dtype=bool), x, -np.inf), axis=-1)
    clear = clear[..., -1] - clear[..., -2] > 20
    assert clear.sum() > 24
    got = np.asarray(results[0][:, :, 0])
    want = np.take_along_axis(v[:, :, 0], winner[..., None], axis=1)
    np.testing.assert_allclose(got[clear], want[clear], rtol=1e-6)


def test_memory_of_the_blocked_program_is_linear_in_length():
    """Saving the probabilities for the backward, or a dense mask, breaks it: T·S·4 bytes are 64 MiB here."""

    def temporaries(length: int) -> int:
        x = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        loss = lambda *x: jnp.sum(jnp.asarray(dot_product_attention(*x, is_causal=True, implementation="xla")))  # noqa: E731
        analysis = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    short, long = temporaries(4096), temporaries(8192)
    assert short < 4096 * 4096 * 4 / 4
    assert long < 2.2 * short


def test_oracle_gradients_are_finite_differences():
    """The oracle's own hand-written gradients, so that it cannot be wrong together with an implementation."""
    case = CASES["everything"]
    q, k, v, d_out, d_lse = (x.astype(np.float64) for x in case.arrays().values())
    options = case.mask_options() | case.score_options() | {"segment_ids": case.ids()}
    rng = np.random.default_rng(0)
    direction = {name: rng.standard_normal(x.shape) for name, x in zip("qkv", (q, k, v), strict=True)}
    gradients = attention_gradients(q, k, v, d_out, d_lse, **options)

    def value(step: float, moved: str) -> float:
        x = {name: x + step * direction[name] * (name == moved) for name, x in zip("qkv", (q, k, v), strict=True)}
        got = attention(**x, **options)
        seen = np.isfinite(got["lse"])
        return (got["out"] * d_out).sum() + (got["lse"][seen] * d_lse[seen]).sum()

    for name in "qkv":
        measured = (value(1e-5, name) - value(-1e-5, name)) / 2e-5
        np.testing.assert_allclose((gradients[f"d{name}"] * direction[name]).sum(), measured, rtol=1e-7)


def heads(*shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.zeros(shape, dtype)


X = heads(2, 8, 4, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": X[0]}, r"q has shape \[8, 4, 8\]; it must be \[batch, length, heads, head size\]"),
        ({"v": X.astype(int)}, r"v has dtype int32; it must be .*float32"),
        ({"v": X[:, :4]}, r"k has shape \[2, 8, 4, 8\] and v \[2, 4, 4, 8\]; they must be equal"),
        ({"q": X[:1]}, r"q has shape \[1, 8, 4, 8\] and k \[2, 8, 4, 8\]; batch and head size must be equal"),
        ({"k": X[:, :, :3], "v": X[:, :, :3]}, r"q has N = 4 heads and k has K = 3; K must divide N"),
        ({"q": X.astype(jnp.bfloat16)}, r"dtypes bfloat16, float32, float32; they must be equal"),
        ({"mask": jnp.ones((8, 8), bool)}, r"it must come from make_mask. A dense \[T, S\] mask cannot scale"),
        ({"mask": make_mask(8), "is_causal": True}, r"mask was given together with is_causal"),
        ({"mask": make_mask(8, 16)}, r"mask was made for T = 8, S = 16, but q has T = 8 and k has S = 8"),
        ({"logits_soft_cap": 0.0}, r"logits_soft_cap is 0.0; it must be .*> 0"),
        ({"implementation": "pallas_triton"}, r"implementation is 'pallas_triton'; it must be None or one of pallas, cudnn"),
    ],
)
def test_refuses_what_does_not_fit_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        dot_product_attention(**({"q": X, "k": X, "v": X} | arguments))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "options", "lacking"),
    [
        (jnp.float32, 64, {}, "dtype float32"),
        (jnp.bfloat16, 60, {}, "head size 60"),
        (jnp.bfloat16, 512, {}, "head size 512"),
        (jnp.bfloat16, 64, {"segment_ids": jnp.zeros((1, 16), jnp.int32)}, "segment_ids"),
        (jnp.bfloat16, 64, {"logits_soft_cap": 30.0}, "logits_soft_cap"),
        (jnp.bfloat16, 64, {"local_window_size": (4, 2)}, r"local_window_size \(4, 2\)"),
        (jnp.bfloat16, 64, {"return_residual": True}, "return_residual"),
    ],
)
def test_cudnn_refuses_what_it_lacks(dtype, head_dim, options, lacking):
    x = heads(1, 16, 2, head_dim, dtype=dtype)
    with pytest.raises(NotImplementedError, match=f"implementation='cudnn' cannot do {lacking}.*use implementation='xla'"):
        dot_product_attention(x, x, x, implementation="cudnn", **options)


def test_cudnn_refuses_odd_lengths():
    """cuDNN's backward takes none: said here, before a gradient says it from inside jax."""
    x = heads(1, 17, 2, 64, dtype=jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"cannot do lengths 17 and 17 \(only even ones"):
        dot_product_attention(x, x, x, implementation="cudnn")


@pytest.mark.usefixtures("cudnn_declared")
@pytest.mark.parametrize(
    ("head_dim", "options", "chosen"),
    [
        (128, {}, "pallas"),
        (64, {}, "pallas"),
        (96, {}, "cudnn"),
        (64, {"logits_soft_cap": 30.0}, "pallas"),
        (96, {"logits_soft_cap": 30.0}, "pallas"),
        (320, {"logits_soft_cap": 30.0}, "xla"),
    ],
)
def test_on_hopper_the_faster_kernel_is_chosen_that_can_do_it(monkeypatch, caplog, head_dim, options, chosen):
    """Choosing "cudnn" whatever it lacks, or for heads of 64, breaks it."""
    monkeypatch.setattr("ulysses_jax.attention._device", lambda: ("gpu", "NVIDIA H100 80GB HBM3"))
    x = jax.ShapeDtypeStruct((1, 256, 2, head_dim), jnp.bfloat16)
    _say_once.cache_clear()
    with caplog.at_level("INFO", logger="ulysses_jax.attention"):
        jax.eval_shape(functools.partial(dot_product_attention, **options), x, x, x)
    assert f"implementation='{chosen}'" in caplog.text


ELSEWHERE = [  # platform, kind, head size, options, what is said
    ("gpu", "NVIDIA A100-SXM4-80GB", 128, {"is_causal": True}, "'cudnn'"),
    ("gpu", "NVIDIA L4", 128, {"local_window_size": (4, 0)}, "'cudnn'"),
    ("gpu", "NVIDIA A100-SXM4-80GB", 256, {}, "'xla', as 'cudnn' cannot do head size 256"),
    ("gpu", "NVIDIA A100-SXM4-80GB", 64, {"sinks": jnp.zeros(2)}, "'xla', as 'cudnn' cannot do sinks"),
    ("gpu", "NVIDIA A100-SXM4-80GB", 64, {"implementation": "pallas"}, "'cudnn', as it has no 'pallas'"),
    ("gpu", "NVIDIA GeForce RTX 4090", 64, {"logits_soft_cap": 9.0}, "'xla', as 'cudnn' cannot do logits_soft_cap"),
    ("gpu", "NVIDIA B200", 256, {"is_causal": True}, "'cudnn'"),
    ("gpu", "NVIDIA GB200", 64, {"segment_ids": jnp.zeros((1, 256), jnp.int32)}, "'xla', as 'cudnn' cannot do segment_ids"),
    ("gpu", "Tesla T4", 64, {}, "'xla', as 'cudnn' cannot do Tesla T4"),
    ("gpu", "AMD Instinct MI300X", 64, {}, "'xla', as 'cudnn' cannot do AMD"),
    ("tpu", "TPU v5 lite", 128, {"is_causal": True}, "'splash'"),
    ("tpu", "TPU v5 lite", 64, {"segment_ids": jnp.zeros((1, 256), jnp.int32), "sinks": jnp.zeros(2)}, "'splash'"),
    ("tpu", "TPU v6 lite", 64, {"implementation": "pallas"}, "'splash', as it has no 'pallas'"),
    ("tpu", "TPU v4", 64, {"return_residual": True}, "'xla', as 'splash' cannot do return_residual"),
    ("tpu", "TPU v4", 64, {"block_mask": longformer_blocks(256)}, "'xla', as 'splash' cannot do block_mask"),
    ("cpu", "cpu", 64, {}, "'xla'"),
]


@pytest.mark.usefixtures("cudnn_declared")
@pytest.mark.parametrize(("platform", "kind", "head_dim", "options", "said"), ELSEWHERE)
def test_elsewhere_what_the_hardware_has_is_chosen_and_said_in_one_line(
    monkeypatch, caplog, platform, kind, head_dim, options, said
):
    """cuDNN on any GPU whatever, or its widest heads before Hopper, breaks it, as does "splash" whatever it lacks."""
    monkeypatch.setattr("ulysses_jax.attention._device", lambda: (platform, kind))
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_compute_capability", lambda capability: True)
    x = jax.ShapeDtypeStruct((1, 256, 2, head_dim), jnp.bfloat16)
    _say_once.cache_clear()
    with caplog.at_level("INFO", logger="ulysses_jax.attention"):
        for _ in range(2):
            jax.eval_shape(functools.partial(dot_product_attention, **options), x, x, x)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"attention on {kind} uses implementation={said}")
    assert (", as " in caplog.messages[0]) == (", as " in said)


@pytest.mark.parametrize(
    ("kind", "named", "error", "message"),
    [
        ("Tesla T4", "cudnn", NotImplementedError, r"'cudnn' cannot do Tesla T4 \(only NVIDIA's from sm80 on"),
        ("NVIDIA A100-SXM4-80GB", "splash", ValueError, "'splash' needs a TPU, but the devices are 'gpu'; use 'xla'"),
    ],
)
def test_what_is_named_and_not_there_is_refused(monkeypatch, kind, named, error, message):
    monkeypatch.setattr("ulysses_jax.attention._device", lambda: ("gpu", kind))
    x = heads(1, 64, 2, 64, dtype=jnp.bfloat16)
    with pytest.raises(error, match=message):
        dot_product_attention(x, x, x, implementation=named)


@pytest.fixture
def cudnn_declared(monkeypatch):
    """As if a cuDNN and a GPU were here: jax looks for them before it lowers."""
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91002)


@pytest.mark.usefixtures("cudnn_declared")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, ("NO_MASK", "0")),
        ({"is_causal": True}, ("CAUSAL", "0")),
        # cuDNN counts the query itself: left = 4 is a length of 5.
        ({"local_window_size": (4, 0)}, ("CAUSAL", "5")),
        ({"local_window_size": 4, "is_causal": True}, ("CAUSAL", "5")),
    ],
)
def test_cudnn_lowers_for_cuda_with_its_mask(options, said):
    """Handing the window on without `is_causal`, or not at all, breaks it."""
    x = heads(1, 64, 2, 64, dtype=jnp.bfloat16)

    def attend(q, k, v):
        return dot_product_attention(q, k, v, implementation="cudnn", **options)

    def lowered(f) -> str:
        return jax.jit(f).trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text().replace("\\22", '"')

    forward = lowered(attend)
    both = lowered(lambda *x: jax.vjp(attend, *x)[1](x[0]))
    for text, calls in ((forward, 1), (both, 2)):
        masks = re.findall(r'"mask_type": "(\w+)"', text)
        windows = re.findall(r'"sliding_window_length": (\d+)', text)
        assert list(zip(masks, windows, strict=True)) == [said] * calls
    assert "__cudnn$fmhaSoftmaxBackward" in both
    assert "__cudnn$fmhaSoftmaxBackward" not in forward
