"""The exchange: layouts by coded integers, attention over eight devices against the float64 oracle, and what is compiled."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.oracles import TOLERANCE, Case, attention, errors_beyond, quick_jit, relative_error
from ulysses_jax import costs, recipes
from ulysses_jax.attention import dot_product_attention, make_mask
from ulysses_jax.config import deal_heads
from ulysses_jax.mesh import make_mesh
from ulysses_jax.plan import Crossing, ledger
from ulysses_jax.ulysses import (
    group_heads,
    grouped_heads_to_seq,
    grouped_seq_to_heads,
    heads_to_seq,
    seq_to_heads,
    take_heads,
    ulysses_attention,
    ulysses_attention_shard,
    ungroup_heads,
)

TOKENS = PartitionSpec("data", "seq")
HEADS = PartitionSpec("data", None, "seq")


def shard_map(f, mesh, in_specs, out_specs):
    return quick_jit(jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


def coded(B: int, T: int, N: int, H: int) -> np.ndarray:
    """[B, T, N, H] int32 whose digits are batch, token, head and element."""
    b, t, n, h = np.ogrid[:B, :T, :N, :H]
    return ((b * 100 + t) * 100 + n) * 100 + h


@pytest.mark.parametrize(("data", "seq"), [(1, 8), (2, 4), (4, 2)])
def test_seq_to_heads_gives_each_device_all_tokens_of_its_heads(data, seq):
    """Swapping split_axis and concat_axis, or asking for untiled chunks, breaks it."""
    mesh, x = make_mesh(data=data, seq=seq), coded(4, 16, 8, 3)
    moved = shard_map(lambda x: seq_to_heads(x, "seq"), mesh, TOKENS, HEADS)(x)
    np.testing.assert_array_equal(moved, x)  # the same global array …
    for shard in moved.addressable_shards:  # … of which each device now holds other parts
        d, p = np.argwhere(mesh.devices == shard.device)[0]
        rows, heads = 4 // data, 8 // seq
        np.testing.assert_array_equal(shard.data, x[d * rows : (d + 1) * rows, :, p * heads : (p + 1) * heads])


@pytest.mark.parametrize(("data", "seq"), [(1, 8), (2, 4), (4, 2)])
def test_heads_to_seq_undoes_seq_to_heads(data, seq):
    mesh, x = make_mesh(data=data, seq=seq), coded(4, 16, 8, 3)
    there_and_back = shard_map(lambda x: heads_to_seq(seq_to_heads(x, "seq"), "seq"), mesh, TOKENS, TOKENS)(x)
    back_and_there = shard_map(lambda x: seq_to_heads(heads_to_seq(x, "seq"), "seq"), mesh, HEADS, HEADS)(x)
    for result in (there_and_back, back_and_there):
        np.testing.assert_array_equal(result, x)
    assert there_and_back.sharding.shard_shape(x.shape) == (4 // data, 16 // seq, 8, 3)


@pytest.mark.parametrize(("data", "seq"), [(1, 8), (2, 4)])
def test_grouped_heads_cross_on_the_leading_dim_to_the_same_places(data, seq):
    """Groups taken with a stride of P, or the batch left behind the senders' dim, break it."""
    mesh, x = make_mesh(data=data, seq=seq), coded(4, 16, 8, 3)
    moved = shard_map(lambda x: grouped_seq_to_heads(group_heads(x, seq), "seq"), mesh, TOKENS, HEADS)(x)
    np.testing.assert_array_equal(moved, x)
    for shard in moved.addressable_shards:
        d, p = np.argwhere(mesh.devices == shard.device)[0]
        rows, heads = 4 // data, 8 // seq
        np.testing.assert_array_equal(shard.data, x[d * rows : (d + 1) * rows, :, p * heads : (p + 1) * heads])


@pytest.mark.parametrize(("data", "seq"), [(1, 8), (2, 4)])
def test_grouped_heads_to_seq_undoes_grouped_seq_to_heads(data, seq):
    """Reshaping [B, T] to [P, B, T/P] without moving P to the front breaks it, where B > 1."""
    mesh, x = make_mesh(data=data, seq=seq), coded(4, 16, 8, 3)
    back = shard_map(lambda x: ungroup_heads(grouped_heads_to_seq(x, "seq")), mesh, HEADS, TOKENS)(x)
    np.testing.assert_array_equal(back, x)
    there = shard_map(lambda x: ungroup_heads(group_heads(x, seq)), mesh, TOKENS, TOKENS)(x)
    np.testing.assert_array_equal(there, x)
    both = shard_map(lambda x: grouped_seq_to_heads(grouped_heads_to_seq(x, "seq"), "seq"), mesh, HEADS, HEADS)(x)
    np.testing.assert_array_equal(both, x)


def test_groups_that_are_not_the_devices_are_refused():
    with pytest.raises(ValueError, match=r"it must be \[P, B, T/P, N/P, H\] with P = 4.*group_heads\(x, 4\) makes it"):
        shard_map(lambda x: grouped_seq_to_heads(group_heads(x, 2), "seq"), make_mesh(seq=4), TOKENS, HEADS)(coded(4, 16, 8, 3))


def test_heads_are_dealt_whole_each_with_the_kv_head_it_reads_and_as_evenly_as_can_be():
    """Every N ≤ 40, K that divides it, and P ≤ 16, by counting. Parts of N/K // P queries, which would keep each KV head's
    queries together but deal more than ⌈N/P⌉ heads to a device, break it; so does ordering sizes by bytes before time.
    """
    for N, P in itertools.product(range(1, 41), range(1, 17)):
        for K in (k for k in range(1, N + 1) if N % k == 0):
            dealing = deal_heads(N, K, P)
            n, m = len(dealing.queries) // P, len(dealing.keys) // P
            assert (len(dealing.queries), len(dealing.keys)) == (n * P, m * P)
            assert [dealing.queries[slot] for slot in dealing.slots] == list(range(N))
            read = [dealing.keys[slot // n * m + slot % n * m // n] for slot in range(n * P)]
            assert read == [head * K // N for head in dealing.queries], (N, K, P)
            group = N // K
            parts = {g: math.ceil(K * math.ceil(group / g) / P) for g in range(1, group + 1)}  # a device's, by their size
            assert n == math.ceil(N / P), (N, K, P)
            assert m == min(count for g, count in parts.items() if count * g == n), (N, K, P)
            if N % P == K % P == 0:
                assert (dealing.queries, dealing.keys) == (tuple(range(N)), tuple(range(K)))
            if N % P == P % K == 0:
                assert m == 1, (N, K, P)


@pytest.mark.parametrize(("seq", "N", "K"), [(8, 8, 2), (8, 16, 8), (4, 20, 2), (2, 6, 6), (4, 12, 3), (4, 6, 2), (8, 28, 4)])
def test_each_device_receives_its_query_heads_and_the_kv_heads_they_read(seq, N, K):
    """`take_heads` with another order of its runs breaks it, and so does dealing device by device with a stride of P."""
    mesh, dealing = make_mesh(seq=seq), deal_heads(N, K, seq)
    q, k = coded(2, 8, N, 3), coded(2, 8, K, 3)

    def exchange(q, k):
        q, k = (seq_to_heads(take_heads(x, heads), "seq") for x, heads in ((q, dealing.queries), (k, dealing.keys)))
        return q, k, take_heads(heads_to_seq(q, "seq"), dealing.slots)

    q_moved, k_moved, back = shard_map(exchange, mesh, TOKENS, (HEADS, HEADS, TOKENS))(q, k)
    np.testing.assert_array_equal(back, q)
    n, m = math.ceil(N / seq), len(dealing.keys) // seq
    for q_here, k_here in zip(q_moved.addressable_shards, k_moved.addressable_shards, strict=True):
        assert (q_here.data.shape[1:3], k_here.data.shape[1:3]) == ((8, n), (8, m))
        heads = np.asarray(q_here.data)[0, 0, :, 0] // 100  # the code's digits of the head
        np.testing.assert_array_equal(q_here.data, q[:, :, heads])
        np.testing.assert_array_equal(np.asarray(k_here.data)[:, :, np.arange(n) * m // n], k[:, :, heads * K // N])


SHAPE: dict[str, Any] = {"B": 4, "T": 32, "N": 8, "H": 4}
CASES = {
    "full": Case(**SHAPE),
    "causal_gqa": Case(B=4, T=32, N=16, K=8, H=4, is_causal=True),
    "two_kv_heads": Case(**SHAPE, K=2, is_causal=True),
    "one_kv_head": Case(**SHAPE, K=1),
    "packed": Case(**SHAPE, segments="packed", is_causal=True),
    "window": Case(**SHAPE, local_window_size=(9, 3)),
    "cap_and_scale": Case(**SHAPE, logits_soft_cap=1.5, scale=0.7, is_causal=True),
    "fewer_queries": Case(B=4, T=16, S=40, N=8, H=4, is_causal=True),
    "everything": Case(
        **SHAPE, S=48, K=4, is_causal=True, local_window_size=(11, 5), segments="dead", logits_soft_cap=2.0, scale=0.5
    ),
}
MESHES = [(1, 1), (1, 8), (2, 4), (4, 2)]


def program(case: Case, attend, *, gradients: bool = True):
    """(q, k, v, d_out, ids) → results by name."""

    def run(q, k, v, d_out, ids):
        options = case.mask_options() | case.score_options() | {"segment_ids": ids}
        if not gradients:
            return {"out": attend(q, k, v, **options)}
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, **options), q, k, v)
        return dict(zip(("out", "dq", "dk", "dv"), (out, *back(d_out)), strict=True))

    return run


def arguments(case: Case) -> tuple[Any, ...]:
    q, k, v, d_out, _ = case.arrays().values()
    return q, k, v, d_out, case.mask_options()["segment_ids"]


@functools.cache
def expected(name: str) -> dict[str, np.ndarray]:
    want = CASES[name].expected(lse_cotangent=False)
    return {x: want[x] for x in ("out", "dq", "dk", "dv")}


@functools.cache
def on_one_device(name: str) -> np.ndarray:
    case = CASES[name]
    return np.asarray(quick_jit(program(case, dot_product_attention, gradients=False))(*arguments(case))["out"])


@functools.cache
def compiled(name: str, data: int, seq: int, gradients: bool = True) -> jax.stages.Compiled:
    attend = functools.partial(ulysses_attention, mesh=make_mesh(data=data, seq=seq))
    return quick_jit(program(CASES[name], attend, gradients=gradients)).lower(*placed(name, data, seq)).compile()


def placed(name: str, data: int, seq: int) -> tuple[Any, ...]:
    """The arguments as a training step holds them."""
    mesh = make_mesh(data=data, seq=seq)
    *arrays, ids = arguments(CASES[name])
    return *jax.device_put(arrays, NamedSharding(mesh, TOKENS)), jax.device_put(ids, NamedSharding(mesh, PartitionSpec("data")))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("data", "seq"), MESHES)
def test_equals_the_oracle_and_one_device(data, seq, name):
    """`heads_to_seq` left out, a repeat of KV heads in the wrong order, or a scale by P breaks it."""
    case = CASES[name]
    got = compiled(name, data, seq)(*placed(name, data, seq))
    assert errors_beyond(TOLERANCE["float32"], got, expected(name)) == {}
    assert relative_error(got["out"], on_one_device(name)) <= TOLERANCE["placement"]
    assert got["out"].sharding.shard_shape(got["out"].shape) == (4 // data, case.T // seq, case.N, case.H)


# (axes and sizes, keywords): other people's meshes.
OTHER_MESHES = {
    "other_names": ({"fsdp": 2, "sp": 4}, {"seq_axis": "sp", "batch_axes": ("fsdp",)}),
    "seq_first": ({"sp": 4, "fsdp": 2}, {"seq_axis": "sp", "batch_axes": "fsdp"}),
    "batch_whole": ({"data": 2, "seq": 4}, {"batch_axes": ()}),
    "two_batch_axes": ({"replica": 2, "fsdp": 2, "seq": 2}, {"batch_axes": ("replica", "fsdp")}),
    "tensor": ({"data": 2, "seq": 2, "tensor": 2}, {"head_axis": "tensor"}),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", OTHER_MESHES)
def test_equals_the_oracle_on_other_meshes(name, kind):
    """A literal "seq" or "data" anywhere inside breaks it; so does a sharding constraint on an Explicit mesh."""
    axes, keywords = OTHER_MESHES[name]
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))
    case = CASES["packed"]
    attend = functools.partial(ulysses_attention, mesh=mesh, **keywords)
    with jax.set_mesh(mesh):
        got = quick_jit(program(case, attend))(*arguments(case))
    assert errors_beyond(TOLERANCE["float32"], got, expected("packed")) == {}
    batch = math.prod(axes[axis] for axis in np.atleast_1d(keywords.get("batch_axes", ("data",))))
    length, heads = axes[keywords.get("seq_axis", "seq")], axes.get(keywords.get("head_axis", ""), 1)
    assert got["out"].sharding.shard_shape(got["out"].shape) == (4 // batch, 32 // length, 8 // heads, 4)


@contextlib.contextmanager
def compilations() -> Iterator[Callable[[], int]]:
    """Counts the programs that XLA compiles inside."""
    durations: list[float] = []

    def listen(event: str, duration_secs: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            durations.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: len(durations)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("on_mesh", [False, True], ids=["from_the_host", "already_placed"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_runs_outside_jit_and_compiles_once(kind, on_mesh):
    """A `jax.jit` of a fresh closure in each call breaks it."""
    mesh = jax.make_mesh((2, 4), ("data", "seq"), axis_types=(kind,) * 2)
    case = CASES["packed"]
    q, k, v, _, ids = arguments(case)
    if on_mesh:
        q, k, v = (jax.device_put(x, NamedSharding(mesh, TOKENS)) for x in (q, k, v))
    attend = functools.partial(ulysses_attention, mesh=mesh, is_causal=True, segment_ids=ids)
    first = attend(q, k, v)
    with compilations() as number:
        second = attend(q, k, v)
        assert number() == 0
        jax.jit(lambda x: x + 1)(q)
        assert number() == 1, "what is compiled is not counted"
    np.testing.assert_array_equal(first, second)
    assert relative_error(first, expected("packed")["out"]) <= TOLERANCE["float32"]


@pytest.mark.parametrize(("data", "seq"), [(1, 8), (2, 4)])
@pytest.mark.parametrize("ids_are", ["local", "whole", "mask"])
def test_the_core_runs_in_a_shard_map_of_the_callers(ids_are, data, seq):
    """With default `check_vma`; taking this device's ids for the whole sequence's breaks it."""
    case = CASES["packed"]
    ids_spec = TOKENS if ids_are == "local" else PartitionSpec("data")

    def attend(q, k, v, *, segment_ids, **options: Any):
        if ids_are == "mask":
            options = {"mask": make_mask(case.T, segment_ids=segment_ids, is_causal=options["is_causal"])}
        else:
            options["segment_ids"] = segment_ids
        return ulysses_attention_shard(q, k, v, **options)

    specs = {"in_specs": ((TOKENS,) * 4 + ((ids_spec, ids_spec),)), "out_specs": TOKENS}
    got = shard_map(program(case, attend), make_mesh(data=data, seq=seq), **specs)(*arguments(case))
    assert errors_beyond(TOLERANCE["float32"], got, expected("packed")) == {}


def test_the_core_takes_kv_heads_that_are_whole_where_an_axis_divides_those_of_queries():
    """Multi-query attention under tensor parallelism: gradients of k and v are sums over that axis."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "seq", "tensor"), axis_types=(AxisType.Auto,) * 3)
    case = Case(B=2, T=16, N=4, K=1, H=8, is_causal=True)
    q, k, v, d_out, _ = map(jnp.asarray, case.arrays().values())
    tokens, heads = PartitionSpec("data", "seq"), PartitionSpec("data", "seq", "tensor")
    core = functools.partial(ulysses_attention_shard, is_causal=True)
    attend = jax.shard_map(core, mesh=mesh, in_specs=(heads, tokens, tokens), out_specs=heads)

    @jax.jit
    def run(q, k, v, d_out):
        out, back = jax.vjp(attend, q, k, v)
        return dict(zip(("out", "dq", "dk", "dv"), (out, *back(d_out)), strict=True))

    want = case.expected(lse_cotangent=False)
    got = run(q, k, v, d_out)
    assert errors_beyond(TOLERANCE["float32"], got, {name: want[name] for name in got}) == {}


def test_global_arrays_inside_a_shard_map_over_another_axis():
    """Stages of a pipeline, say; over an axis of attention's own it is refused, by name."""
    mesh = jax.make_mesh((2, 2, 2), ("pipe", "data", "seq"), axis_types=(AxisType.Auto,) * 3)
    case = Case(B=2, T=16, N=4, K=2, H=8, is_causal=True)
    q, k, v, d_out, _ = map(jnp.asarray, case.arrays().values())
    core = functools.partial(ulysses_attention, mesh=mesh, is_causal=True)

    @jax.jit
    def run(q, k, v, d_out):
        attend = jax.shard_map(core, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), axis_names={"pipe"})
        out, back = jax.vjp(attend, q, k, v)
        return dict(zip(("out", "dq", "dk", "dv"), (out, *back(d_out)), strict=True))

    want = case.expected(lse_cotangent=False)
    got = run(q, k, v, d_out)
    assert errors_beyond(TOLERANCE["float32"], got, {name: want[name] for name in got}) == {}
    with pytest.raises(ValueError, match=r"mesh axis 'seq' is divided already.* Call ulysses_attention_shard"):
        jax.shard_map(core, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))(q, k, v)


def test_gradients_of_copied_heads_add_up_in_float32():
    """In bfloat16 the sum of 64 copies' loses three of its eight bits."""
    copies = np.random.default_rng(0).normal(1, 0.1, (1, 4, 64, 8))
    x, d = jnp.ones((1, 4, 1, 8), jnp.bfloat16), jnp.asarray(copies, jnp.bfloat16)
    (gradient,) = jax.vjp(lambda x: take_heads(x, (0,) * 64), x)[1](d)
    want = np.asarray(d, np.float64).sum(2, keepdims=True)
    assert relative_error(gradient, want) < 2.0**-9
    assert gradient.dtype == jnp.bfloat16


@pytest.mark.parametrize("inside_jit", [False, True], ids=["eager", "jit"])
def test_a_prepared_mask_equals_its_options(inside_jit):
    """Replicating the mask's ids instead of dividing them over the batch gives shapes that do not fit."""
    case = CASES["everything"]
    q, k, v, *_ = arguments(case)
    mask = make_mask(case.T, case.S, **case.mask_options())
    attend = functools.partial(ulysses_attention, mesh=make_mesh(data=2, seq=4), **case.score_options())
    got = (quick_jit(attend) if inside_jit else attend)(q, k, v, mask=mask)
    assert relative_error(got, on_one_device("everything")) <= TOLERANCE["placement"]


@pytest.mark.parametrize("boundary", [16, 13], ids=["on_a_shard_edge", "off_a_shard_edge"])
def test_trap_3_packed_documents_equal_documents_alone(boundary):
    """Leaving segment_ids out of the core's call to attention breaks it."""
    case = Case(**SHAPE)
    q, k, v, *_ = arguments(case)
    ids = jnp.asarray(np.broadcast_to(np.arange(32) >= boundary, (4, 32)), jnp.int32)
    packed = ulysses_attention(q, k, v, mesh=make_mesh(data=1, seq=4), is_causal=True, segment_ids=ids)
    alone = [attention(q[:, d], k[:, d], v[:, d], is_causal=True)["out"] for d in (slice(boundary), slice(boundary, None))]
    assert relative_error(packed, np.concatenate(alone, axis=1)) <= TOLERANCE["float32"]


def errors_in(got: dict[str, Any], want: dict[str, np.ndarray]) -> dict[str, float]:
    """Errors, by name, beyond the tolerance; absolute where zero is wanted, as of dQ where each query sees one key."""
    assert set(got) <= set(want)
    sizes = {name: np.linalg.norm(want[name]) or 1.0 for name in got}
    errors = {name: float(np.linalg.norm(np.asarray(x, np.float64) - want[name]) / sizes[name]) for name, x in got.items()}
    return {name: error for name, error in errors.items() if not error <= TOLERANCE["float32"]}


# T and S of 37 or 41 leave the last device fewer tokens than the others, of 13 over 8 devices the last one none.
PRIMES = {
    "full": Case(B=2, T=37, N=4, H=2),
    "causal": Case(B=2, T=37, N=4, K=2, H=2, is_causal=True),
    "fewer_queries": Case(B=2, T=13, S=41, N=4, H=2),
    "fewer_keys": Case(B=2, T=41, S=13, N=4, K=1, H=2, local_window_size=(40, 7), segments="dead", logits_soft_cap=2.0),
    "only_keys_uneven": Case(B=2, T=16, S=37, N=4, H=2, segments="scattered"),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", PRIMES)
def test_trap_4_prime_lengths_equal_the_oracle(name, kind):
    """Attention that is handed the pads of K and V, or a pad in front of the sequence, breaks it."""
    case, mesh = PRIMES[name], jax.make_mesh((1, 8), ("data", "seq"), axis_types=(kind,) * 2)
    attend = functools.partial(ulysses_attention, mesh=mesh, implementation="reference")
    with jax.set_mesh(mesh):
        got = quick_jit(program(case, attend))(*arguments(case))
    assert errors_in(got, case.expected(lse_cotangent=False)) == {}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_trap_4_prime_lengths_outside_jit_and_with_a_prepared_mask(kind):
    """Placing T = 41 on 4 devices before it is padded breaks it."""
    case, mesh = PRIMES["fewer_keys"], jax.make_mesh((2, 4), ("data", "seq"), axis_types=(kind,) * 2)
    q, k, v, *_ = arguments(case)
    mask = make_mask(case.T, case.S, **case.mask_options())
    out = ulysses_attention(q, k, v, mesh=mesh, mask=mask, **case.score_options())
    assert errors_in({"out": out}, case.expected()) == {}


@pytest.mark.parametrize("ids_are", ["local", "whole"])
def test_trap_4_a_padded_sequence_in_a_shard_map_of_the_callers(ids_are):
    """Ids that keep their pads once gathered break it."""
    case, mesh = Case(B=2, T=37, N=4, H=2, segments="packed"), make_mesh(data=2, seq=4)
    q, k, v, _, (ids, _) = arguments(case)
    pad = lambda x: np.pad(x, ((0, 0), (0, 3)) + ((0, 0),) * (x.ndim - 2), constant_values=1)  # noqa: E731
    ids, ids_spec = (pad(ids), TOKENS) if ids_are == "local" else (ids, PartitionSpec("data"))
    attend = lambda q, k, v, ids: ulysses_attention_shard(q, k, v, segment_ids=ids, length=37)  # noqa: E731
    out = shard_map(attend, mesh, (TOKENS, TOKENS, TOKENS, ids_spec), TOKENS)(pad(q), pad(k), pad(v), ids)
    assert errors_in({"out": out[:, :37]}, case.expected()) == {}
    np.testing.assert_array_equal(out[:, 37:], 0)


HEADS_OF_OTHERS = [(N, K) for N in (6, 7, 20, 28, 40) for K in (1, 2, 4, 8) if N % K == 0]


@pytest.mark.parametrize("P", [2, 4, 8])
@pytest.mark.parametrize(("N", "K"), HEADS_OF_OTHERS)
def test_trap_5_any_head_counts_equal_the_oracle(N, K, P):
    """Padding Q's heads and K's apart, each to a multiple of P, breaks the ratio of their groups."""
    case = Case(B=1, T=37, N=N, K=K, H=2, is_causal=True, local_window_size=11, segments="packed")
    attend = functools.partial(ulysses_attention, mesh=make_mesh(seq=P), implementation="reference")
    got = quick_jit(program(case, attend, gradients=False))(*arguments(case))
    assert errors_in(got, case.expected()) == {}


@pytest.mark.parametrize("masked", [{"segments": "packed"}, {"local_window_size": (5, 2)}], ids=["segments", "window"])
@pytest.mark.parametrize(
    ("N", "K", "P", "T"),
    [(7, 1, 2, 37), (7, 1, 2, 1), *((6, 2, 4, T) for T in (37, 3, 1)), *((28, 4, 8, T) for T in (37, 7, 1))],
)
def test_trap_5_gradients_of_any_head_counts_and_lengths_equal_the_oracle(N, K, P, T, masked):
    """Counting the copies that fill a device's slots once more in the gradient breaks it; whole ids of one token taken for a
    device's own break T = 1.
    """
    case = Case(B=1, T=T, N=N, K=K, H=2, **masked)
    attend = functools.partial(ulysses_attention, mesh=make_mesh(seq=P), implementation="reference")
    got = quick_jit(program(case, attend))(*arguments(case))
    assert errors_in(got, case.expected(lse_cotangent=False)) == {}


def test_trap_11_a_window_that_crosses_shards_and_tiles():
    """Shards are 136 tokens and tiles 512. Leaving the window out of the core's call to attention breaks it."""
    case = Case(B=1, T=1088, N=8, K=1, H=2, local_window_size=(150, 20))
    want = case.expected(lse_cotangent=False)
    got = quick_jit(program(case, functools.partial(ulysses_attention, mesh=make_mesh(seq=8))))(*arguments(case))
    assert errors_beyond(TOLERANCE["float32"], got, {name: want[name] for name in got}) == {}


def collectives(text: str) -> collections.Counter:
    """How often each collective stands in a compiled program."""
    kinds = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute|collective-broadcast"
    return collections.Counter(re.findall(rf"= .*? ({kinds})(?:-start)?\(", text))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("data", "seq"), MESHES)
def test_trap_2_the_program_exchanges_q_k_v_and_the_output_and_their_gradients_and_nothing_else(data, seq, name):
    """Each shard attending to itself has no all-to-all; gathering K and V, or ids that are whole, shows as all-gather."""
    text = compiled(name, data, seq).as_text()
    assert text is not None
    assert collectives(text) == ({} if seq == 1 else {"all-to-all": 8})


def test_trap_2_the_forward_exchanges_q_k_v_and_the_output():
    text = compiled("packed", 2, 4, gradients=False).as_text()
    assert text is not None
    assert collectives(text) == {"all-to-all": 4}


@functools.cache
def crossings(N: int, K: int, P: int, T: int) -> list[Crossing]:
    """The ledger of attention's forward and backward, B = 2 and H = 4."""
    mesh = make_mesh(seq=P)
    case = Case(B=2, T=T, N=N, K=K, H=4, is_causal=True)
    attend = functools.partial(ulysses_attention, mesh=mesh, implementation="reference")
    text = quick_jit(program(case, attend)).lower(*arguments(case)).compile().as_text()
    assert text is not None
    return ledger(text, mesh)


def exchanged(N: int, K: int, P: int, T: int) -> int:
    return sum(c.bytes * c.times for c in crossings(N, K, P, T))


@pytest.mark.parametrize("P", [2, 4, 8])
@pytest.mark.parametrize(("N", "K"), [(8, 8), (16, 8), (8, 2), (8, 1), (6, 3)], ids=["mha", "gqa", "kv2", "kv1", "uneven"])
def test_the_ledger_of_the_exchange_equals_the_closed_form(N, K, P):
    """Forward and as much again backward; (P−1)/P of it leaves a device. K heads where m are dealt break it for K < P."""
    config = dataclasses.replace(recipes.tiny(), num_heads=N, num_kv_heads=K, head_dim=4)
    elements = costs.exchange_elements(config, batch_size=2, seq_len=32, degree=P)
    found = crossings(N, K, P, 32)
    assert {(c.kind, c.axes) for c in found} == {("all-to-all", ("seq",))}
    assert exchanged(N, K, P, 32) == 2 * elements * 4
    sent = sum(c.bytes_sent(make_mesh(seq=P)) for c in found)
    assert sent == pytest.approx(exchanged(N, K, P, 32) * (P - 1) / P, rel=1e-12)


def test_the_exchange_is_constant_in_t_and_p_together_and_with_fewer_kv_heads_grows_by_their_part():
    """A gather in place of an all-to-all grows with T for every K."""
    for N, K in ((8, 8), (16, 8)):
        assert exchanged(N, K, 2, 16) == exchanged(N, K, 4, 32) == exchanged(N, K, 8, 64)
    for P, T in ((2, 16), (4, 32), (8, 64)):  # K = 1: queries and output as ever, one KV head of all T tokens to each device
        assert exchanged(8, 1, P, T) == 2 * 4 * (2 * 2 * T * 4 * (8 // P + 1))


X = jnp.zeros((4, 32, 8, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_axis": "sp"}, r"seq_axis names 'sp', but the mesh has axes \('data', 'seq'\)"),
        ({"batch_axes": ("fsdp",)}, r"batch_axes names 'fsdp'.*batch_axes=\(\) for none"),
        ({"head_axis": "tensor"}, r"head_axis names 'tensor'"),
        ({"batch_axes": ("seq",)}, r"each mesh axis may be used once"),
        ({name: X[:3] for name in "qkv"}, r"batch B = 3 is not divisible by 2, the size of mesh axis data"),
        (
            {name: X[:, :, :6] for name in "qkv"} | {"head_axis": "seq", "seq_axis": "data", "batch_axes": ()},
            r"query heads N = 6 is not divisible by 4",
        ),
        (
            {name: X[:, :, :2] for name in "kv"} | {"head_axis": "seq", "seq_axis": "data", "batch_axes": ()},
            r"KV heads K = 2 is not divisible by 4",
        ),
        ({"ring_axis": "ring"}, r"ring_axis names 'ring'"),
        ({"q": X[:, :30], "ring_axis": "data", "batch_axes": ()}, r"query length T = 30 is not divisible by 8, .* data × seq"),
        (
            {name: X[:, :30] for name in "kv"} | {"ring_axis": "data", "batch_axes": ()},
            r"key length S = 30 is not divisible by 8",
        ),
        ({"k": X[:, :, :3], "v": X[:, :, :3]}, r"K must divide N"),
        ({"mask": jnp.ones((32, 32), bool)}, r"it must come from make_mask. A dense \[T, S\] mask cannot scale"),
        ({"mask": make_mask(32, 16)}, r"mask was made for T = 32, S = 16"),
        (
            {"segment_ids": jnp.zeros((4, 8), jnp.int32)},
            r"segment_ids is int32\[4, 8\]; it must be integers \[B, T\] with T = 32",
        ),
        ({"segment_ids": jnp.zeros((2, 32), jnp.int32)}, r"segment_ids are for a batch of 2, but q has B = 4"),
        ({"implementation": "triton"}, r"implementation is 'triton'"),
    ],
)
def test_refuses_what_the_mesh_cannot_divide_before_anything_compiles(arguments, message):
    with pytest.raises(ValueError, match=message), compilations() as number:
        ulysses_attention(**({"q": X, "k": X, "v": X, "mesh": make_mesh(data=2, seq=4)} | arguments))
    assert number() == 0


def test_the_core_refuses_an_axis_that_is_not_there():
    with pytest.raises(ValueError, match="axis_name is 'seq', but the code does not run inside a shard_map"):
        ulysses_attention_shard(X, X, X)
