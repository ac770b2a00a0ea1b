"""The Hopper kernels without a GPU: their arithmetic and protocol in Mosaic's interpreter, and that every configuration lowers
for CUDA.

Interpreted, five things stand in for what the interpreter lacks: products whose left operand is in registers are plain ones,
but the forward's queries stay in shared memory, accumulators are values, what is hidden is compared and not asked of bits, and
dQ is written by each tile of keys apart and summed in float32, in place of TMA's addition.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from tests.oracles import Case, attention, attention_gradients, errors_beyond
from ulysses_jax.attention import hopper_backward, hopper_forward, schedule
from ulysses_jax.attention.hopper import HEAD_DIMS, hopper_attention
from ulysses_jax.attention.masks import BlockMask, make_mask
from ulysses_jax.attention.reference import reference_attention
from ulysses_jax.attention.walk import in_clusters
from ulysses_jax.ulysses import ulysses_attention_shard

# bfloat16 results against float64 of the same inputs: each gradient within 5e-3, the output within 3e-3.
OUTPUT, GRADIENT = 3e-3, 5e-3

INTERPRETED = {
    "causal": (Case(B=1, T=400, N=2, H=64, is_causal=True), False),
    "gqa_window_cap": (
        Case(B=1, T=150, N=2, K=1, H=64, is_causal=True, local_window_size=(40, 0), logits_soft_cap=2.0),
        False,
    ),
    "packed": (Case(B=2, T=140, N=1, H=64, is_causal=True, segments="packed"), False),
    "dead_rows": (Case(B=1, T=130, S=30, N=1, H=64, local_window_size=(20, 5)), False),
    "blocks": (Case(B=1, T=400, N=2, K=1, H=64, is_causal=True, block=128), False),
    "blocks_a_head": (Case(B=1, T=300, N=2, K=1, H=64, block=128, layouts=2, segments="packed"), False),
    "parts_of_a_group": (Case(B=1, T=140, N=8, K=2, H=64, block=128, layouts=8), False),
    "halves": (Case(B=1, T=130, N=1, H=128, is_causal=True), False),
    "deterministic": (Case(B=1, T=130, S=200, N=2, K=1, H=128, is_causal=True), True),
    "deterministic_heads_of_64": (Case(B=1, T=400, N=1, H=64, is_causal=True), True),
    "heads_of_40": (Case(B=1, T=130, N=2, K=1, H=40, is_causal=True), False),
    "heads_of_256": (Case(B=1, T=70, N=1, H=256, is_causal=True), False),
}


def test_heads_are_saved_as_they_are_not_as_they_are_padded():
    q = jax.ShapeDtypeStruct((1, 128, 2, 96), jnp.bfloat16)
    attend = functools.partial(hopper_attention, mask=make_mask(128, is_causal=True), scale=0.1)
    saved = jax.eval_shape(lambda q, k, v: jax.vjp(lambda *x: attend(*x)[0], q, k, v)[1], q, q, q)
    assert {x.shape for x in jax.tree.leaves(saved) if x.ndim == 4} == {q.shape}


def assert_is(want: dict, out, lse) -> None:
    """Output and log-sum-exp are the oracle's."""
    assert not errors_beyond(OUTPUT, {"out": out}, {"out": want["out"]})
    assert not errors_beyond(1e-5, {"lse": lse}, {"lse": want["lse"]})


def assert_equals_the_oracle(attend, arrays: dict, **options) -> None:
    """Output, log-sum-exp and the gradients of cotangents of both are the oracle's."""
    q, k, v, d_out, d_lse = arrays.values()
    (out, lse), back = jax.vjp(attend, *map(jnp.asarray, (q, k, v)))
    dq, dk, dv = back((jnp.asarray(d_out), jnp.asarray(d_lse)))
    assert_is(attention(q, k, v, **options), out, lse)
    gradients = {"dq": dq, "dk": dk, "dv": dv}
    assert not errors_beyond(GRADIENT, gradients, attention_gradients(q, k, v, d_out, d_lse, **options))


@pytest.mark.slow
@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_equals_the_oracle_and_has_no_races(name, monkeypatch):
    """Without `_drain` the interpreter reports barriers left uncompleted; with a length compared by `<=` errors are beyond."""
    case, deterministic = INTERPRETED[name]
    # Heads that read one KV head walked together, or in pairs, which so few tiles would not be.
    if parts := {"gqa_window_cap": 1, "blocks": 1, "parts_of_a_group": 2}.get(name):
        monkeypatch.setattr(hopper_backward, "parts_of_group", lambda group, tiles: parts)
    arrays = case.arrays("bfloat16")
    mask = make_mask(case.T, case.S or case.T, **case.mask_options())
    scale = case.score_options()["scale"] or case.H**-0.5

    def attend(q, k, v):
        return hopper_attention(
            q,
            k,
            v,
            mask,
            scale=scale,
            logits_soft_cap=case.logits_soft_cap,
            deterministic=deterministic,
            interpret=plgpu.InterpretGPUParams(detect_races=True),
        )

    assert_equals_the_oracle(attend, arrays, **case.mask_options(), **case.score_options())


@pytest.mark.slow
def test_logits_that_rise_by_little_and_by_much_equal_the_oracle():
    """A running maximum that lags without bound has P infinite in 16 bits."""
    case = Case(B=1, T=130, S=512, N=1, H=128)
    assert HEAD_DIMS[case.H].lags
    arrays = case.arrays("float16")
    rise = np.repeat([9.0, 3.0, 1.0, 0.2], 128)[:, None, None]  # walked from right to left
    arrays["k"] = (arrays["k"] * rise).astype(arrays["k"].dtype)
    attend = functools.partial(
        hopper_attention, mask=make_mask(case.T, case.S), scale=0.1, interpret=plgpu.InterpretGPUParams()
    )
    assert_equals_the_oracle(attend, arrays, scale=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("H", [64, 128])
def test_dq_added_up_in_float16_takes_cotangents_keys_and_values_of_any_size(H):
    """Sums that are not in a unit of each row's own vanish or overflow; a unit that leaves out the cotangent of the log-sum-exp
    has nothing of it where it stands alone.
    """
    case = Case(B=1, T=200, N=2, K=1, H=H, is_causal=True, local_window_size=(100, 0))
    q, k, v, d_out, d_lse = map(jnp.asarray, case.arrays("bfloat16").values())
    mask = make_mask(case.T, **case.mask_options())
    assert hopper_backward._in_16_bits(q, mask)
    attend = functools.partial(hopper_attention, mask=mask, scale=H**-0.5, interpret=plgpu.InterpretGPUParams())
    _, back = jax.vjp(attend, q, k, v)
    # All that these powers of two change is exponents.
    small, large = (jnp.where(jnp.arange(case.T) % 2, a, b) for a, b in ((2.0**-80, 2.0**-60), (2.0**70, 2.0**-70)))
    plain = back((d_out, d_lse))[0]
    for size in (small, large):
        dq = back(((d_out * size[:, None, None]).astype(d_out.dtype), d_lse * size))[0]
        np.testing.assert_array_equal(dq.astype(jnp.float32), plain.astype(jnp.float32) * size[:, None, None])
    for size in (2.0**-30, 2.0**30):
        _, other = jax.vjp(attend, q / size, k * size, v * size)
        dq = other((d_out, d_lse * size))[0]
        np.testing.assert_array_equal(dq.astype(jnp.float32), plain.astype(jnp.float32) * size * size)
    dq = back((jnp.zeros_like(d_out), d_lse))[0]
    want = attention_gradients(q, k, v, jnp.zeros_like(d_out), d_lse, **case.mask_options())
    assert not errors_beyond(GRADIENT, {"dq": dq}, {"dq": want["dq"]})


@pytest.mark.slow
@pytest.mark.parametrize(("N", "K", "short"), [(1, 1, 0), (2, 1, 0), (1, 1, 3)])
def test_a_last_round_cut_in_parts_equals_the_oracle(N, K, short, monkeypatch, multiprocessors):
    """On three multiprocessors four tiles leave one, whose keys, and in the backward queries, are cut in two. Parts weighted
    alike, or a share of dQ that replaces the others', break it; so does taking for whole what is padded to eights.
    """
    multiprocessors(3)
    monkeypatch.setattr(schedule, "WORTH", 1)
    monkeypatch.setattr(hopper_backward, "parts_of_group", lambda group, tiles: 1)
    case = Case(B=1, T=512 // N, S=512 - short, N=N, K=K, H=64)
    assert schedule.last_round(4, case.T // 128, 4)[0] == schedule.last_round(4, 4, case.T // HEAD_DIMS[64].keys.block)[0] == 1
    attend = functools.partial(
        hopper_attention,
        mask=make_mask(case.T, case.S),
        scale=case.H**-0.5,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    assert_equals_the_oracle(attend, case.arrays("bfloat16"), scale=case.H**-0.5)


@pytest.fixture
def two_multiprocessors(monkeypatch, multiprocessors):
    """So that each block of a small case works off several tiles; gives the orders that are met."""
    met, inner = [], hopper_forward.order_of_queries

    def order_of_queries(*arguments):
        met.append(inner(*arguments))
        return met[-1]

    multiprocessors(2)
    monkeypatch.setattr(hopper_forward, "order_of_queries", order_of_queries)
    return met


SEVERAL_TILES = {
    "causal": (Case(B=1, T=530, N=2, H=64, is_causal=True), True),
    "causal_clusters": (Case(B=1, T=512, N=2, K=1, H=64, is_causal=True), True),
    "causal_clusters_few_keys": (Case(B=1, T=512, S=200, N=2, H=64, is_causal=True), True),
    "full_clusters": (Case(B=1, T=512, S=300, N=2, H=64), True),
    "window": (Case(B=1, T=530, N=2, H=64, local_window_size=(150, 60)), True),
    "window_of_few_steps": (Case(B=1, T=530, N=2, H=128, local_window_size=(150, 60)), True),
    "window_of_few_steps_few_keys": (Case(B=1, T=512, S=200, N=2, H=128, local_window_size=(90, 40)), True),
    "window_of_many_steps": (Case(B=1, T=768, N=2, K=1, H=128, is_causal=True, local_window_size=(300, 0)), True),
    "packed": (Case(B=2, T=530, N=2, K=1, H=64, is_causal=True, segments="packed"), False),
    "blocks_a_head": (Case(B=1, T=530, N=2, H=64, block=128, layouts=2), True),
    "packed_blocks_a_head": (Case(B=2, T=530, N=2, H=64, block=128, layouts=2, segments="packed"), False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SEVERAL_TILES)
def test_blocks_that_work_off_several_tiles_equal_the_oracle(two_multiprocessors, name, monkeypatch):
    """A buffer of queries filled before it is free is a race. A step that only one block of a cluster takes, not passed by by
    the other, or passed by by both, breaks the clusters.
    """
    case, known = SEVERAL_TILES[name]
    if name == "window_of_many_steps":
        monkeypatch.setattr(hopper_forward, "FEW", 2)
    q, k, v, *_ = map(jnp.asarray, case.arrays("bfloat16").values())
    mask = make_mask(case.T, case.S or case.T, **case.mask_options())
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    out, lse = hopper_attention(q, k, v, mask, scale=0.125, interpret=interpret)
    (order,) = two_multiprocessors
    assert order.known == known
    assert order.items.shape[1] > 2
    assert_is(attention(q, k, v, **case.mask_options(), scale=0.125), out, lse)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lengths", "keys"),
    [([300, 270, 230], [0, 1, 2]), ([300, 270, 230], [2, 0, 1]), ([340, 240, 220], [2, 1, 0])],
    ids=["in_order", "in_another", "backwards"],
)
def test_documents_that_end_within_a_tile_equal_the_oracle(two_multiprocessors, lengths, keys):
    """A warpgroup whose queries see nothing of the tiles left over lets them go: one too many breaks the output, one not let go
    of stands still.
    """
    lengths = np.array(lengths)  # they end in the first half of a tile, whose second is all of the next; or both in the second
    case = Case(B=1, T=800, N=2, H=64)
    ids = np.repeat(np.arange(3), lengths)[None], np.repeat(keys, lengths[keys])[None]
    q, k, v, *_ = map(jnp.asarray, case.arrays("bfloat16").values())
    mask = make_mask(case.T, segment_ids=(jnp.asarray(ids[0]), jnp.asarray(ids[1])))
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    out, lse = hopper_attention(q, k, v, mask, scale=0.125, interpret=interpret)
    assert_is(attention(q, k, v, segment_ids=ids, scale=0.125), out, lse)


@pytest.mark.slow
def test_clusters_leave_what_is_cut_for_all(monkeypatch, multiprocessors):
    """On four multiprocessors, two clusters, nine pairs of tiles leave one. Its two tiles taken for pairs break it."""
    multiprocessors(4)
    monkeypatch.setattr(schedule, "WORTH", 1)
    case = Case(B=1, T=256, S=512, N=9, K=3, H=64)
    assert schedule.last_round(18, 2, 4) == (2, 2)
    q, k, v, *_ = map(jnp.asarray, case.arrays("bfloat16").values())
    mask = make_mask(case.T, case.S)
    assert in_clusters(mask, case.N, case.T, 128)
    out, lse = hopper_attention(q, k, v, mask, scale=0.125, interpret=plgpu.InterpretGPUParams(detect_races=True))
    assert_is(attention(q, k, v, scale=0.125), out, lse)


@pytest.mark.slow
def test_a_piece_of_a_sequence_has_its_diagonal_anywhere():
    """Queries that stand 37 behind their keys: masking only the first tile walked breaks it."""
    case = Case(B=1, T=300, N=1, H=64)
    q, k, v, d_out, _ = map(jnp.asarray, case.arrays("bfloat16").values())
    mask = make_mask(case.T, is_causal=True, shift=jnp.int32(37))

    kernel = functools.partial(hopper_attention, interpret=plgpu.InterpretGPUParams())
    oracle = functools.partial(reference_attention, logits_soft_cap=None)
    out, back = jax.vjp(lambda q, k, v: kernel(q, k, v, mask, scale=0.125)[0], q, k, v)
    exact = (x.astype(jnp.float32) for x in (q, k, v))
    want, want_back = jax.vjp(lambda q, k, v: oracle(q, k, v, mask, scale=0.125)[0], *exact)
    assert not errors_beyond(OUTPUT, {"out": out}, {"out": want})
    names: list[str] = ["dq", "dk", "dv"]
    got, expected = (dict(zip(names, b, strict=True)) for b in (back(d_out), want_back(d_out.astype(jnp.float32))))
    assert not errors_beyond(GRADIENT, got, expected)


LOWERED = {
    "causal": {"is_causal": True},
    "full": {},
    "window": {"local_window_size": (300, 7)},
    "packed": {"is_causal": True, "packed": True},
    "cap": {"is_causal": True, "cap": 30.0},
    "blocks": {"is_causal": True, "block_mask": BlockMask(np.random.default_rng(0).random((8, 8, 8)) < 0.5, 128)},
    "deterministic": {"is_causal": True, "deterministic": True},
}


def lowered_for_cuda(head_dim: int, name: str, T: int = 1000) -> str:
    options = dict(LOWERED[name])
    packed, cap, deterministic = (options.pop(key, None) for key in ("packed", "cap", "deterministic"))
    N, K = 8, 2

    def step(q, k, v, d_out, ids):
        mask = make_mask(T, segment_ids=ids if packed else None, **options)
        kernel = lambda q, k, v: hopper_attention(  # noqa: E731
            q, k, v, mask, scale=0.1, logits_soft_cap=cap, deterministic=bool(deterministic)
        )[0]
        out, back = jax.vjp(kernel, q, k, v)
        return out, back(d_out)

    shape = lambda heads: jax.ShapeDtypeStruct((2, T, heads, head_dim), jnp.bfloat16)  # noqa: E731
    ids = jax.ShapeDtypeStruct((2, T), jnp.int32)
    return jax.jit(step).trace(shape(N), shape(K), shape(K), shape(N), ids).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", LOWERED)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_configuration_lowers_for_cuda(head_dim, name):
    fused = HEAD_DIMS[head_dim].fused
    kernels = (2 if fused and name != "deterministic" else 3) + (0 if fused else 1)
    assert lowered_for_cuda(head_dim, name).count("custom_call @mosaic_gpu") == kernels


@pytest.mark.parametrize("name", LOWERED)
@pytest.mark.parametrize("few", [False, True], ids=["a_tile_a_block", "dealt"])
def test_a_turn_is_given_for_each_that_is_taken(name, few, monkeypatch, multiprocessors):
    """And one more, so that the first warpgroup may begin. The interpreter knows no turns; a GPU would stand still."""
    said, inner = [], hopper_forward.ptx
    monkeypatch.setattr(hopper_forward, "ptx", lambda text: said.append(text) or inner(text))
    if few:
        multiprocessors(2)
    lowered_for_cuda(128, name, T=1024)
    assert said.count(hopper_forward.TAKE_TURN) >= 2
    assert said.count(hopper_forward.GIVE_TURN) == said.count(hopper_forward.TAKE_TURN) + 1
    if name == "packed":  # of an item's first step, of its others, and of those that only the other warpgroup takes
        assert said.count(hopper_forward.TAKE_TURN) == 3


@pytest.mark.parametrize("name", ["causal", "full", "cap", "deterministic"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_clusters_lower_for_cuda(head_dim, name, monkeypatch, multiprocessors):
    """What tells them is their barriers, through which two blocks let go of what both read."""
    multiprocessors(2)
    made, inner = [], plgpu.ClusterBarrier
    monkeypatch.setattr(plgpu, "ClusterBarrier", lambda **options: made.append(options) or inner(**options))
    kernels = 3 if name == "deterministic" else 2
    assert lowered_for_cuda(head_dim, name, T=1024).count("custom_call @mosaic_gpu") == kernels
    assert made


def test_a_window_beyond_any_length_lowers(monkeypatch, multiprocessors):
    """Its sides taken as they are overflow int32."""
    multiprocessors(2)
    monkeypatch.setitem(LOWERED, "beyond", {"local_window_size": (2**31, 2**31)})
    assert lowered_for_cuda(128, "beyond", T=1024).count("custom_call @mosaic_gpu") == 2


@pytest.mark.parametrize(("name", "sums"), [("causal", "f32"), ("window", "f16")])
def test_what_dq_is_added_to_is_made_when_it_is_needed(name, sums):
    """Zeros that hang on nothing XLA writes for all layers of a model at once, and keeps."""
    broadcast = rf"broadcast_in_dim %(\d+)#0, dims = \[\] : \(tensor<{sums}>\) -> tensor<2x1024x8x128x{sums}>"
    program = lowered_for_cuda(128, name)
    (barrier,) = re.findall(broadcast, program)
    assert f"%{barrier}:2 = stablehlo.optimization_barrier" in program


@pytest.mark.parametrize("name", ["causal", "full", "packed", "blocks"])
@pytest.mark.parametrize("few", [False, True], ids=["a_tile_a_block", "dealt"])
def test_under_x64_they_lower_the_same(name, few, monkeypatch, multiprocessors):
    """A sum of int32 that becomes an int64 breaks it, of what is dealt, evened, or cut for all, too."""
    if few:  # seven multiprocessors leave two of 128 tiles over
        multiprocessors(2 if name != "full" else 7)
        monkeypatch.setattr(schedule, "WORTH", 1)
    kernels = 3 if few and name == "full" else 2
    with jax.enable_x64(True):
        assert lowered_for_cuda(128, name, T=1024 if few else 1000).count("custom_call @mosaic_gpu") == kernels


def test_ids_that_come_back_give_nan_and_not_a_wrong_answer():
    ids = jnp.asarray(np.repeat([1, 2, 1], [40, 50, 38])[None], jnp.int32)
    mask = make_mask(128, segment_ids=ids)
    assert mask.contiguous is not None
    assert not mask.contiguous[0]
    q = jnp.ones((1, 128, 1, 64), jnp.bfloat16)
    out, _ = hopper_attention(q, q, q, mask, scale=1.0, interpret=plgpu.InterpretGPUParams())
    assert np.isnan(np.asarray(out, np.float32)).all()


EACH_HEAD = BlockMask(np.random.default_rng(0).random((8, 4, 4)) < 0.5, 128)


@pytest.mark.parametrize("block_mask", [None, EACH_HEAD, BlockMask(EACH_HEAD.layout[:1], 128)], ids=["", "each_head", "one"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("few", [False, True], ids=["a_tile_a_block", "dealt"])
def test_chosen_by_name_it_lowers_inside_a_shard_map_for_hopper_and_only_there(few, packed, block_mask, multiprocessors):
    """Typing dQ's buffer as varying, reading loop bounds without computing on them, or making lists of a device's own layouts
    outside the trace, fails to trace.
    """
    if few:  # what is dealt to two, in a cluster or evened out
        multiprocessors(2)

    def lowered(kind: str, packed: bool) -> str:
        device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
        mesh = AbstractMesh((2, 4), ("data", "seq"), axis_types=(AxisType.Auto,) * 2, abstract_device=device)

        def loss(q, k, v, ids):
            options = {"is_causal": True, "block_mask": block_mask, "implementation": "pallas"}
            attend = functools.partial(ulysses_attention_shard, **options)
            return attend(q, k, v, segment_ids=ids if packed else None).astype(jnp.float32).sum()[None]

        tokens, whole = PartitionSpec("data", "seq"), PartitionSpec("data")
        on_mesh = jax.shard_map(
            jax.grad(lambda *x: loss(*x)[0], (0, 1, 2)), mesh=mesh, in_specs=(tokens, tokens, tokens, whole), out_specs=tokens
        )
        shapes = [jax.ShapeDtypeStruct((2, 512, heads, 64), jnp.bfloat16) for heads in (8, 4, 4)]
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.jit(on_mesh).trace(*shapes, jax.ShapeDtypeStruct((2, 512), jnp.int32))
            return traced.lower(lowering_platforms=("cuda",)).as_text()

    assert lowered("NVIDIA H100 80GB HBM3", packed).count("custom_call @mosaic_gpu") == 2
    assert "mosaic_gpu" not in lowered("NVIDIA GeForce RTX 4090", packed=True)  # documents: neither ours nor cuDNN's
