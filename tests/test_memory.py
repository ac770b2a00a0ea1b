"""What each policy keeps between forward and backward, read from the traced program; and that none changes what is computed."""

import dataclasses
import functools
import types
from typing import Any, cast

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.trainers import FAST, LENGTH, MODEL, by_name, first_state, make_batch, program, relative_error, tiny
from ulysses_jax.checkpoint import Checkpoints
from ulysses_jax.config import LayerMemory, MemoryConfig, OptimizerConfig
from ulysses_jax.data import place
from ulysses_jax.memory import map_tiles
from ulysses_jax.model import Transformer, swiglu
from ulysses_jax.train import batch_shapes, compiler_options

B, T, L, D, N, H = 3, LENGTH, 4, MODEL.embed_dim, MODEL.num_heads, MODEL.head_dim
K, F = MODEL.num_kv_heads, MODEL.mlp_dim
INPUT, OUT, LSE, KEYS, HIDDEN = (B, T, D), (B, T, N, H), (B, N, T), (B, T, K, H), (B, T, F)
DEVICE, HOST = "device", "host"


def kept(layers: int = L, **memory: Any) -> dict[tuple[str, tuple[int, ...]], int]:
    """Activations that the forward's scan over layers stacks up for the backward's: (place, shape) → how many a group."""
    config = dataclasses.replace(MODEL, num_layers=layers)
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, memory=MemoryConfig(**memory), rngs=nnx.Rngs(0))))
    params = nnx.to_pure_dict(state)

    def loss(params):
        return nnx.merge(graph, params)(jnp.zeros((B, T), jnp.int32)).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(params).jaxpr
    groups = layers // len(MemoryConfig(**memory).group(layers))
    scans = [e for e in jaxpr.eqns if e.primitive.name == "scan" and e.params["length"] == groups]
    assert len(scans) == 2, "one over layers forward, one backward"
    outputs: Any = scans[0].outvars
    found: dict[tuple[str, tuple[int, ...]], int] = {}
    for x in outputs:
        shape = x.aval.shape[1:]
        shape = shape[1:] if shape[:1] == (1,) else shape  # one group of heads
        assert shape[-2:] not in ((D, F), (F, D)), "weights are there already"
        if shape[:2] == (B, T) or shape == LSE:
            space = HOST if "host" in str(x.aval.memory_space).lower() else DEVICE
            found[space, shape] = found.get((space, shape), 0) + 1
    return found


def test_inputs_alone():
    assert kept(save="inputs") == {(DEVICE, INPUT): 1}


def test_attention_keeps_its_output_and_log_sum_exp_too():
    """Losing a `checkpoint_name` in the attention breaks it: the name is then never kept."""
    assert kept(save="attention") == {(DEVICE, INPUT): 1, (DEVICE, OUT): 1, (DEVICE, LSE): 1}


def test_projections_keep_queries_keys_and_values_as_attention_took_them():
    assert kept(save="projections") == {(DEVICE, INPUT): 1, (DEVICE, OUT): 2, (DEVICE, LSE): 1, (DEVICE, KEYS): 2}


def test_products_keep_every_product_of_matrices():
    """Leaving `attention_sum` out of the names breaks it: the output's projection is then multiplied again."""
    expected = {(DEVICE, INPUT): 2, (DEVICE, OUT): 3, (DEVICE, LSE): 1, (DEVICE, KEYS): 2, (DEVICE, HIDDEN): 2}
    assert kept(save="products") == expected


def test_all_keeps_everything():
    everything = kept(save="all")
    for place_and_shape, times in kept(save="products").items():
        assert everything[place_and_shape] >= times


def test_a_fraction_of_layers_is_a_part_of_a_group():
    """Counting `offload_layers` from the end as well breaks it: the layer that saves more would go to the host.

    Taking the layers apart outside of what is recomputed breaks it too: all weights are then saved a second time.
    """
    half = kept(save="attention", save_layers=0.5, offload_layers=0.5)
    assert half == {(HOST, INPUT): 1, (DEVICE, INPUT): 1, (DEVICE, OUT): 1, (DEVICE, LSE): 1}
    most = kept(8, save="attention", offload_layers=0.75)
    places = {HOST: 3, DEVICE: 1}
    assert most == {(at, shape): times for at, times in places.items() for shape in (INPUT, OUT, LSE)}


def test_the_host_takes_all_that_a_layer_saves():
    """Trap 12; marking the scan's carry outside its body (jax#23869) breaks it: the input then stays on the device."""
    assert kept(save="attention", offload_layers=1.0) == {(HOST, INPUT): 1, (HOST, OUT): 1, (HOST, LSE): 1}


def test_the_host_takes_what_the_backward_reads_last():
    """Without `attention_sum` beside it the MLP's backward begins by waiting for the host."""
    found = kept(save="projections", offload_layers=1.0, offload_late=True)
    assert found == {(HOST, INPUT): 1, (HOST, OUT): 1, (HOST, KEYS): 2, (DEVICE, OUT): 1, (DEVICE, LSE): 1, (DEVICE, INPUT): 1}


def test_groups():
    here, away = LayerMemory("attention", False), LayerMemory("inputs", True)
    assert MemoryConfig().group(32) == (here,)
    memory = MemoryConfig(save_layers=0.25, offload_layers=0.5)
    assert memory.group(32) == (away, away, LayerMemory("inputs", False), here)
    assert MemoryConfig(save_layers=1 / 3).group(24) == (LayerMemory("inputs", False),) * 2 + (here,)
    with pytest.raises(ValueError, match=r"30 layers cannot have in equal groups .* The nearest fraction is 0.4"):
        MemoryConfig(save_layers=0.375).group(30)


def test_the_program_does_not_grow_with_depth_where_groups_are_alike():
    def text(layers: int) -> str:
        config = dataclasses.replace(MODEL, num_layers=layers)
        memory = MemoryConfig(save_layers=0.5)
        graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, memory=memory, rngs=nnx.Rngs(0))))
        grad = jax.grad(lambda p: nnx.merge(graph, p)(jnp.zeros((B, T), jnp.int32)).sum())
        return jax.jit(grad).lower(nnx.to_pure_dict(state)).as_text()

    assert len(text(8)) == pytest.approx(len(text(4)), rel=0.01)


@pytest.mark.parametrize("tile", [1, 7, 24, 72, 100])
def test_tiles_equal_the_whole_by_name(tile):
    """Trap 10; returning the last tile's gradient for the sum over tiles breaks it."""
    rng = np.random.default_rng(0)
    shapes = {"gate": (D, F), "up": (D, F), "down": (F, D), "x": (B, T, D), "d_y": (B, T, D)}
    gate, up, down, x, d_y = (jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32) for shape in shapes.values())

    def both(apply):
        y, back = jax.vjp(apply, (gate, up, down), x)
        return {"y": y} | by_name(back(d_y))

    whole, tiled = both(swiglu), both(lambda weights, x: map_tiles(swiglu, weights, x, tile))
    assert {
        name: relative_error(tiled[name], ref) for name, ref in whole.items() if relative_error(tiled[name], ref) > 1e-6
    } == {}


def test_weight_gradients_add_up_over_tiles_in_float32():
    """A sum in bfloat16 breaks it: it stops growing at 256, where one more is less than half a bit."""
    w, x = jnp.ones((1, 1), jnp.bfloat16), jnp.ones((1, 1024, 1), jnp.bfloat16)

    def summed(w):
        y: Any = map_tiles(lambda w, x: x @ w, w, x, 1)
        return y.sum().astype(jnp.float32)

    assert float(jax.grad(summed)(w)[0, 0]) == 1024


POLICIES: dict[str, dict] = {
    "inputs": {"save": "inputs"},
    "attention": {"save": "attention"},
    "projections": {"save": "projections"},
    "products": {"save": "products"},
    "a half": {"save": "products", "save_layers": 0.5, "save_others": "attention"},
    "to the host": {"save": "attention", "offload_layers": 1.0},
    "what is read last to the host": {"save": "projections", "offload_layers": 1.0, "offload_late": True},
    "a half to the host": {"save": "projections", "save_layers": 0.5, "offload_layers": 0.5},
    "tiled": {"save": "attention", "mlp_tile": 7, "loss_tile": 5},
    "tiles beyond the tokens": {"save": "attention", "mlp_tile": 10_000, "loss_tile": 10_000},
}


@functools.cache
def loss_and_gradients(data: int, seq: int, **memory: Any) -> tuple[float, dict[str, np.ndarray]]:
    config = tiny(data, seq, model={"num_layers": 4}, memory={"loss_tile": 10_000} | memory)
    p = program(config)
    params, batch = first_state(config)["params"], place(make_batch(config), p.mesh)
    loss, grads, _ = jax.jit(p.gradients).lower(params, batch).compile(FAST)(params, batch)
    return float(loss), by_name(grads)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "seq"), [(1, 1), (2, 4)])
@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_changes_loss_or_gradients(policy, data, seq):
    """Saved, recomputed, tiled, sent: equal to everything kept and nothing tiled, each gradient by name (trap 10).

    Taking the layers of a group in reverse breaks it.
    """
    loss, grads = loss_and_gradients(data, seq, **POLICIES[policy])
    reference, expected = loss_and_gradients(data, seq, save="all")
    assert loss == pytest.approx(reference, rel=1e-6)
    errors = {name: relative_error(grads[name], ref) for name, ref in expected.items()}
    assert max(errors.values()) < 1e-6, errors


def take_steps(steps: int = 3, *, data: int = 2, seq: int = 4, **config: Any) -> tuple[dict[str, np.ndarray], list[float]]:
    """Parameters and moments after some steps from `first_state`, and the losses and norms."""
    own = tiny(data, seq, **config)
    p = program(own)
    step = p.step.lower(p.abstract, batch_shapes(own, p.mesh)).compile(FAST)
    state: Any = jax.tree.map(
        lambda x, like: jax.device_put(np.asarray(x, like.dtype), like.sharding), first_state(tiny(2, 4)), p.abstract
    )
    losses = []
    for i in range(steps):
        state, metrics = step(state, place(make_batch(own, i), p.mesh))
        losses += [float(metrics["loss"]), float(metrics["grad_norm"])]
    default = p.mesh.devices.flat[0].default_memory().kind
    for part, offload in ((state["opt_state"], own.memory.offload_optimizer), (layers(state), own.memory.offload_params)):
        assert {x.sharding.memory_kind for x in jax.tree.leaves(part) if x.ndim} == {"pinned_host" if offload else default}
    return by_name(state), losses


@pytest.mark.slow
def test_moments_on_the_host_are_the_same_moments():
    """Clipping each layer by its own norm, or updating the count once a layer, breaks it."""
    (state, losses), (expected, reference) = take_steps(memory={"offload_optimizer": True}), take_steps()
    np.testing.assert_allclose(losses, reference, rtol=1e-6)
    assert state.keys() == expected.keys()
    errors = {name: relative_error(state[name], ref) for name, ref in expected.items() if np.any(ref)}
    assert max(errors.values()) < 1e-6, errors


ALL_ON_HOST = {"offload_optimizer": True, "offload_params": True}


def layers(state: Any) -> Any:
    return state["params"]["layers"]


@pytest.mark.slow
@pytest.mark.parametrize(("data", "seq"), [(1, 1), (2, 4)])
@pytest.mark.parametrize(
    "memory", [{"save": "inputs", "offload_layers": 0.4}, {"save": "attention", "offload_layers": 1.0, "mlp_tile": 7}]
)
def test_parameters_on_the_host_are_the_same_parameters(memory, data, seq):
    """Adding up only one device's squares breaks the norm, and clipping with it; so does counting undivided leaves 8 times."""
    (state, losses), (expected, reference) = (
        take_steps(data=data, seq=seq, memory=memory) for memory in (memory | ALL_ON_HOST, {})
    )
    np.testing.assert_allclose(losses, reference, rtol=1e-6)
    assert min(reference[1::2]) > OptimizerConfig().clip_norm, "clipped in every step"
    assert state.keys() == expected.keys()
    # A key's bias has no gradient but rounding, which Adam makes as large as any.
    rounded = {name for name in expected if "key_bias" in name}
    errors = {name: relative_error(state[name], x) for name, x in expected.items() if np.any(x) and name not in rounded}
    assert max(errors.values()) < 1e-6, errors


def test_a_gradient_leaves_the_loop_for_the_host():
    """Fetching all layers before the scan breaks it: their gradients are then stacked on the device, and so are they."""
    p = program(tiny(2, 4, memory=ALL_ON_HOST))
    loops = [x for x in scans(jax.make_jaxpr(p.step)(p.abstract, batch_shapes(p.config, p.mesh)).jaxpr)]
    shapes = {x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(layers(p.abstract)) if x.ndim > 2}
    stacks = [v.aval for loop in loops for v in (*loop.invars, *loop.outvars) if v.aval.shape in shapes]
    assert len(stacks) >= 3 * len(shapes)
    assert all("host" in str(x.memory_space).lower() for x in stacks), stacks


def scans(jaxpr: Any) -> Any:
    for e in jaxpr.eqns:
        if e.primitive.name == "scan":
            yield e
        for inner in jax.extend.core.jaxprs_in_params(e.params):
            yield from scans(inner)


@pytest.mark.slow
def test_parameters_on_the_host_are_saved_and_restored_there(tmp_path):
    """And onto a device, by a run without; a restore that forgets the memory's kind breaks the step that follows."""
    own = tiny(2, 4, memory=ALL_ON_HOST)
    state = program(own).init()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        for config in (own, tiny(4, 2)):
            found = checkpoints.restore(program(config).abstract)
            assert found is not None
            jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), found[1], state)
            jax.tree.map(lambda x, like: x.sharding == like.sharding or pytest.fail(str(x)), found[1], program(config).abstract)


@pytest.mark.slow
@pytest.mark.parametrize("memory", [{"offload_optimizer": True}, ALL_ON_HOST])
def test_the_first_state_on_the_host_is_the_first_state(memory):
    own = tiny(2, 4, memory=memory)
    first, expected = by_name(program(own).init()), by_name(first_state(tiny(2, 4)))
    assert first.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(first[name], x, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "copies"), [((0, 0), True), ((0, 1), None)])
def test_only_devices_of_one_process_exchange_by_their_copy_engines(processes, copies):
    """XLA cannot write into the memory of another process; counted by hosts or not at all, both would be told to."""
    devices = np.array([types.SimpleNamespace(platform="gpu", process_index=i) for i in processes])
    options = compiler_options(MemoryConfig(), cast(Any, types.SimpleNamespace(devices=devices))) or {}
    assert options.get("xla_gpu_use_memcpy_local_p2p") is copies


def test_moments_in_bfloat16_train_nearly_alike():
    """Casting only the first state breaks it: after a step the moments are float32 again."""
    optimizer = {"warmup_steps": 5, "learning_rate": 3e-3}
    state, losses = take_steps(5, optimizer=OptimizerConfig(**optimizer, moment_dtype="bfloat16"))
    _, reference = take_steps(5, optimizer=OptimizerConfig(**optimizer))
    moments = {name: x.dtype for name, x in state.items() if ".mu." in name or ".nu." in name}
    assert moments
    assert {str(dtype) for dtype in moments.values()} == {"bfloat16"}
    np.testing.assert_allclose(losses, reference, rtol=1e-3)
