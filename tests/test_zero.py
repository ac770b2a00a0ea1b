"""ZeRO: what each device holds at each stage, and that gathering and scattering are the sum they stand for."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.trainers import MESHES, by_name, compiled, program, relative_error, tiny
from ulysses_jax import train
from ulysses_jax.mesh import make_mesh
from ulysses_jax.zero import Unshard, hold, undivided, zero_shardings

MESH = make_mesh(data=2, seq=4)
ALL, WHOLE = ("data", "seq"), PartitionSpec()
PARAMS = {
    "embedding": {"table": jax.ShapeDtypeStruct((264, 32), jnp.float32)},
    "layers": {
        "query": jax.ShapeDtypeStruct((8, 16, 24), jnp.float32),
        "second": jax.ShapeDtypeStruct((8, 12, 24), jnp.float32),
        "equal": jax.ShapeDtypeStruct((16, 8, 8), jnp.float32),
        "odd": jax.ShapeDtypeStruct((8, 12, 3), jnp.float32),
    },
    "scale": jax.ShapeDtypeStruct((33,), jnp.float32),
}
# The first dim that 8 divides, never the stacked one; none for 12 × 3 and 33. Dividing the largest breaks it.
DIVIDED = {
    "embedding.table": PartitionSpec(ALL),
    "layers.query": PartitionSpec(None, ALL),
    "layers.second": PartitionSpec(None, None, ALL),
    "layers.equal": PartitionSpec(None, ALL),
    "layers.odd": WHOLE,
    "scale": WHOLE,
}


def specs(tree: Any) -> dict[str, PartitionSpec]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, NamedSharding))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf.spec for path, leaf in leaves}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_stage_divides_what_it_says(stage):
    state = {"mu": PARAMS, "count": jax.ShapeDtypeStruct((), jnp.int32)}
    params, grads, opt_state = (specs(x) for x in zero_shardings(PARAMS, state, mesh=MESH, stage=stage))
    whole = dict.fromkeys(DIVIDED, WHOLE)
    assert params == (DIVIDED if stage >= 3 else whole)
    assert grads == (DIVIDED if stage >= 2 else whole)
    moments = DIVIDED if stage >= 1 else whole
    assert opt_state == {"count": WHOLE} | {f"mu.{name}": spec for name, spec in moments.items()}


OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=8),
    "lion": optax.lion(0.1),
    "multi_transform": optax.multi_transform(
        {"a": optax.adam(1e-3), "b": optax.sgd(0.1)}, lambda p: jax.tree.map(lambda _: "a", p)
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizers_state_is_divided_by_the_same_rule(name):
    """Moments of the parameters' shapes like their parameters, factored ones by their own dims, counts whole."""
    params = {"layers": PARAMS["layers"], "table": PARAMS["embedding"]["table"]}
    state = jax.eval_shape(OPTIMIZERS[name].init, params)
    at = zero_shardings(params, state, mesh=MESH, stage=1)[2]
    like_params = specs(zero_shardings(params, (), mesh=MESH, stage=3)[0])
    shapes = {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in jax.tree_util.tree_leaves_with_path(state)}
    found, some = specs(at), 0
    assert found.keys() == shapes.keys()
    for path, x in shapes.items():
        NamedSharding(MESH, found[path]).shard_shape(x.shape)  # raises where a dim is not divisible
        for param, spec in like_params.items():
            own: Any = functools.reduce(lambda tree, key: tree[key], param.split("."), params)
            if path.endswith(param) and x.shape == own.shape:
                assert found[path] == spec, path
                some += spec != WHOLE
        if not x.shape:
            assert found[path] == WHOLE
        if "layers" in path and found[path] != WHOLE:
            assert found[path][0] is None, "layers are scanned, never divided"
    assert some or name == "adafactor"
    assert any(spec != WHOLE for spec in found.values())


def test_undivided_names_exactly_the_leaves_without_a_divisible_dim():
    assert undivided(PARAMS, mesh=MESH) == ["layers.odd", "scale"]
    assert undivided(PARAMS, mesh=make_mesh(seq=4)) == ["scale"]
    assert undivided(PARAMS, mesh=MESH, stacked=None) == ["scale"]
    assert undivided(PARAMS, mesh=make_mesh()) == []


@pytest.mark.parametrize("stage", [-1, 4, "3"])
def test_an_unknown_stage_is_refused(stage):
    with pytest.raises(ValueError, match="ZeRO has stages 0, 1, 2 and 3"):
        zero_shardings(PARAMS, (), mesh=MESH, stage=stage)


def bytes_of(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def divided_bytes(tree: Any, divided: bool) -> int:
    """Bytes of the tiny model's tree that a device must hold: an eighth of all leaves that are not listed as undivided."""
    if not divided:
        return bytes_of(tree)
    whole = undivided(tree, mesh=MESH)
    leaves = {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}
    return sum(bytes_of(x) if name in whole else bytes_of(x) // 8 for name, x in leaves.items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_device_holds_its_stages_bytes_of_the_state(stage):
    """The state is born divided; out_shardings left out of `init`, or ignored by the rule, break it."""
    p = program(tiny(2, 4, zero_stage=stage))
    state = compiled(p.init)()
    for part, divided in (("params", stage >= 3), ("opt_state", stage >= 1)):
        expected = divided_bytes(p.abstract[part], divided)
        for device in MESH.devices.flat:
            shards = [s for x in jax.tree.leaves(state[part]) for s in x.addressable_shards if s.device == device]
            assert sum(s.data.nbytes for s in shards) == expected
    saved = bytes_of(state["opt_state"]) / divided_bytes(state["opt_state"], True)
    assert 7 < saved <= 8, "nearly everything is divided"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_device_holds_its_stages_bytes_of_the_gradients(stage):
    """Read from the traced program: what the `shard_map` over the mesh answers, a device."""
    config = tiny(2, 4, zero_stage=stage, accumulation=4)
    p = program(config)
    traced = jax.make_jaxpr(p.step)(p.abstract, train.batch_shapes(config, p.mesh))
    (on_devices,) = [e for e in equations(traced.jaxpr) if e.primitive.name == "shard_map"]
    _, *grads, _ = on_devices.params["jaxpr"].outvars
    expected = divided_bytes(p.abstract["params"], stage >= 2)
    assert sum(math.prod(x.aval.shape) * x.aval.dtype.itemsize for x in grads) == expected
    scans = [e for e in equations(on_devices.params["jaxpr"]) if e.primitive.name == "scan"]
    (over_micro_batches,) = [e for e in scans if e.params["length"] == 4]
    assert bytes_of([x.aval for x in over_micro_batches.outvars]) == expected + 4, "pieces are added up, and the loss"


def equations(jaxpr: Any):
    """Every equation of a traced program, at any depth."""
    for e in jaxpr.eqns:
        yield e
        for x in jax.tree.leaves(e.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(x, "eqns"):
                yield from equations(x)
            elif hasattr(x, "jaxpr"):
                yield from equations(x.jaxpr)


SMALL = {"layers": {"w": (2, 16, 3), "bias": (2, 8)}, "table": (8, 5), "odd": (3, 5), "scale": (24,)}


def small() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(size=s).astype(np.float32), SMALL, is_leaf=lambda s: isinstance(s, tuple))


def through_unshard(mesh, stage: int, dtype: str, device_loss: Callable, *, by_copies: bool = False) -> Any:
    """The gradient of Σ_devices device_loss(params as used, device's x)."""
    params_at, grads_at, _ = zero_shardings(small(), (), mesh=mesh, stage=stage)

    def local(params, x):
        def loss(pieces):
            held = hold(params, params_at, grads_at)
            held = jax.tree.map(lambda s, piece: type(s)(piece, s.whole, s.dim, s.axes), held, pieces, is_leaf=is_stored)
            return device_loss(Unshard(dtype, by_copies)(held), x)

        pieces = jax.tree.map(lambda s: s.piece, hold(params, params_at, grads_at), is_leaf=is_stored)
        return jax.grad(loss)(pieces)

    spec = functools.partial(jax.tree.map, lambda s: s.spec)
    return jax.shard_map(local, mesh=mesh, in_specs=(spec(params_at), PartitionSpec(ALL)), out_specs=spec(grads_at))


def is_stored(x: Any) -> bool:
    return hasattr(x, "piece")


def device_loss(used: Any, x: jax.Array) -> jax.Array:
    """Different on every device, by its x."""
    leaves = enumerate(jax.tree.leaves(used))
    return sum((jnp.sin(w.astype(jnp.float32) * x.sum() * (i + 1)).sum() for i, w in leaves), jnp.zeros(()))


X = np.random.default_rng(1).normal(size=(8,)).astype(np.float32)


BY_COPIES = pytest.mark.parametrize("by_copies", [False, True], ids=["gather", "copies"])


@BY_COPIES
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize(("data", "seq"), MESHES)
def test_unshard_sums_gradients_as_one_device_would(data, seq, stage, by_copies):
    """A mean in place of the sum, or pieces joined along the wrong dim, break it."""
    summed = through_unshard(make_mesh(data=data, seq=seq), stage, "float32", device_loss, by_copies=by_copies)
    grads = by_name(compiled(summed, small(), X)(small(), X))
    expected = by_name(jax.jit(jax.grad(lambda p: sum(device_loss(p, x[None]) for x in X)))(small()))
    for name, g in grads.items():
        assert relative_error(g, expected[name]) < 1e-5, name


@BY_COPIES
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_gradients_of_bfloat16_weights_are_summed_in_float32(stage, by_copies):
    """Summing before the cast breaks it: the sum of eight bfloat16 numbers would keep 8 bits."""
    summed = through_unshard(MESH, stage, "bfloat16", lambda used, x: device_loss(used, x), by_copies=by_copies)

    def used(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x if path[-1].key in ("scale",) else x.astype(jnp.bfloat16), params
        )

    grads = by_name(compiled(summed, small(), X)(small(), X))
    each = [by_name(jax.grad(lambda p, x=x: device_loss(p, x[None]))(used(small()))) for x in X]
    for name, g in grads.items():
        assert g.dtype == np.float32
        assert relative_error(g, sum(np.asarray(e[name], np.float64) for e in each)) < 1e-5, name


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_are_gathered_in_bfloat16_and_gradients_scattered_in_float32(stage):
    """Read before the backend's own passes, because CPUs widen bfloat16. Gathering before the cast breaks it."""
    config = tiny(2, 4, zero_stage=stage, model={"dtype": "bfloat16"})
    p = program(config)
    (on_devices,) = [
        e
        for e in equations(jax.make_jaxpr(p.step)(p.abstract, train.batch_shapes(config, p.mesh)).jaxpr)
        if e.primitive.name == "shard_map"
    ]
    crossings: dict[str, list] = {}
    for e in equations(on_devices.params["jaxpr"]):
        if e.primitive.name in ("reduce_scatter", "all_gather"):
            crossings.setdefault(e.primitive.name, []).append(e.invars[0].aval)
    assert {x.dtype for x in crossings["reduce_scatter"]} == {jnp.dtype("float32")}
    gathered = [x for x in crossings["all_gather"] if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in gathered if x.ndim >= 2} == ({jnp.dtype("bfloat16")} if stage == 3 else set())
    assert {x.dtype for x in gathered if x.ndim < 2} == ({jnp.dtype("float32")} if stage == 3 else set())


@pytest.mark.parametrize("stage", [2, 3])
def test_copies_carry_weights_and_their_gradients_in_bfloat16(stage, monkeypatch):
    """As the products take and give them; the cast to float32 before the crossing doubles the bytes and breaks it."""
    monkeypatch.setattr(train, "exchanges_by_copies", lambda mesh: True)
    config = tiny(2, 4, zero_stage=stage, model={"dtype": "bfloat16"})
    p = train.build(config, make_mesh(data=2, seq=4))
    traced = equations(jax.make_jaxpr(p.step)(p.abstract, train.batch_shapes(config, p.mesh)).jaxpr)
    found = [e for e in traced if e.primitive.name in ("all_to_all", "all_gather", "reduce_scatter")]
    own = [e for e in found if "zero" in str(e.source_info.name_stack)]
    assert {e.primitive.name for e in own} == {"all_to_all"}
    assert {e.invars[0].aval.dtype for e in own if e.invars[0].aval.ndim >= 3} == {jnp.dtype("bfloat16")}
    others = [e.invars[0].aval for e in found if e not in own and e.primitive.name != "all_to_all"]
    assert not [x for x in others if jnp.issubdtype(x.dtype, jnp.floating)]
