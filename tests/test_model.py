"""The Transformer against its equations, on one device and on a sequence divided over many."""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from tests.trainers import LENGTH, MODEL, by_name, compiled, make_batch, relative_error, tiny
from ulysses_jax import costs, recipes
from ulysses_jax.attention import dot_product_attention, make_mask
from ulysses_jax.config import ModelConfig, RopeScaling
from ulysses_jax.flax_layers import attention_fn
from ulysses_jax.mesh import make_mesh, token_spec
from ulysses_jax.model import RMSNorm, Transformer, _each_group, apply_rope, rope_wavelengths
from ulysses_jax.ulysses import ShardAttention

ONE_LAYER = dataclasses.replace(MODEL, num_layers=1)
BATCH = make_batch(tiny())


def transformer(config: ModelConfig, attention=dot_product_attention) -> Transformer:
    return Transformer(config, attention=attention, rngs=nnx.Rngs(0))


def parts(config: ModelConfig, attention=dot_product_attention) -> tuple[Any, Any]:
    """A model's graph, and its parameters made random: scales about 1, all else about 0."""
    graph, state = nnx.split(nnx.eval_shape(lambda: transformer(config, attention)))
    rng = np.random.default_rng(0)

    def one(path, x) -> np.ndarray:
        return rng.normal(path[-1].key == "scale", 0.3, x.shape).astype(x.dtype)

    return graph, jax.tree_util.tree_map_with_path(one, nnx.to_pure_dict(state))


def forward(config: ModelConfig, params: Any = None, *, tokens=BATCH["tokens"], **options) -> np.ndarray:
    graph, own = parts(config)

    def apply(params, tokens, options):
        return nnx.merge(graph, params)(tokens, **options)

    arguments = own if params is None else params, tokens, options
    return np.asarray(compiled(apply, *arguments)(*arguments))


def reference(config: ModelConfig, params: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits in float64 numpy, a loop over layers and heads, written from the equations."""

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale

    def rope(x):  # [B, T, H], pairs (i, i + H/2) as complex numbers
        half = config.head_dim // 2
        angles = np.arange(x.shape[1])[:, None] / config.rope_theta ** (np.arange(half) / half)
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag], -1)

    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = p["embedding"]["table"][tokens]
    t = np.arange(tokens.shape[1])
    distance = t[:, None] - t[None, :]
    hidden = (distance < 0) if config.is_causal else np.zeros(distance.shape, bool)
    if config.local_window_size is not None:
        hidden |= abs(distance) > config.local_window_size
    for layer in range(config.num_layers):
        w = jax.tree.map(lambda a, layer=layer: a[layer], p["layers"])
        a, y = w["attention"], norm(x, w["attention_norm"]["scale"])
        for n in range(config.num_heads):
            k = n * config.num_kv_heads // config.num_heads
            projected = []
            for name, head in (("query", n), ("key", k), ("value", k)):
                z = y @ a[name][:, head]
                if config.projection_bias:
                    z = z + a[name + "_bias"][head]
                if config.qk_norm and name != "value":
                    z = norm(z, a[name + "_norm"]["scale"])
                projected.append(z if name == "value" else rope(z))
            q, key, value = projected
            logits = q @ key.swapaxes(1, 2) / math.sqrt(config.head_dim)
            if config.logits_soft_cap is not None:
                logits = config.logits_soft_cap * np.tanh(logits / config.logits_soft_cap)
            weights = np.exp(np.where(hidden, -np.inf, logits))
            sink = np.exp(a["sink_bias"][n]) if config.attention_sinks else 0
            x = x + weights / (weights.sum(-1, keepdims=True) + sink) @ value @ a["out"][n]
        y, m = norm(x, w["mlp_norm"]["scale"]), w["mlp"]
        gate = y @ m["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ m["up"])) @ m["down"]
    table = p["embedding" if config.tie_embeddings else "head"]["table"]
    return norm(x, p["norm"]["scale"]) @ table.T


@pytest.mark.parametrize(
    "change",
    [
        {"qk_norm": False, "projection_bias": False},
        {"num_layers": 3, "num_kv_heads": 8},
        {"tie_embeddings": True, "num_kv_heads": 1, "rope_theta": 100.0},
        {"is_causal": False, "local_window_size": 3, "logits_soft_cap": 2.0},
        {"local_window_size": 4, "norm_eps": 0.1},
        {"attention_sinks": True, "head_chunks": 2},
    ],
    ids=lambda change: ",".join(change),
)
def test_logits_equal_the_equations_in_float64(change):
    """A dropped bias or norm, a wrong KV head for a query, interleaved RoPE pairs or an ignored window break it."""
    config = dataclasses.replace(ONE_LAYER, **change)
    _, params = parts(config)
    logits = forward(config, params)
    assert logits.shape == (8, LENGTH, config.vocab_size)
    assert relative_error(logits, reference(config, params, BATCH["tokens"])) < 1e-5


def test_logits_are_float32_under_bfloat16_and_close():
    config = dataclasses.replace(ONE_LAYER, dtype="bfloat16")
    _, params = parts(config)
    logits = forward(config, params)
    assert logits.dtype == np.float32
    assert 1e-5 < relative_error(logits, reference(config, params, BATCH["tokens"])) < 0.05


def test_packed_documents_equal_documents_alone():
    """Segment ids and restarting positions cut attention at the documents' edges."""
    config = ONE_LAYER
    packed = forward(config, segment_ids=BATCH["segment_ids"], positions=BATCH["positions"])
    ids = BATCH["segment_ids"][0]
    edges = [0, *(np.flatnonzero(np.diff(ids)) + 1), LENGTH]
    assert len(edges) > 2
    for begin, end in itertools.pairwise(edges[:3]):
        alone = forward(config, tokens=BATCH["tokens"][:1, begin:end])
        np.testing.assert_allclose(packed[:1, begin:end], alone, rtol=1e-4, atol=1e-5)


def test_a_prepared_mask_stands_for_causality_window_and_segments():
    config = dataclasses.replace(ONE_LAYER, local_window_size=5)
    ids, positions = BATCH["segment_ids"], BATCH["positions"]
    mask = make_mask(LENGTH, is_causal=True, local_window_size=(5, 0), segment_ids=jnp.asarray(ids))
    with_ids = forward(config, segment_ids=ids, positions=positions)
    np.testing.assert_array_equal(forward(config, mask=mask, positions=positions), with_ids)
    assert relative_error(forward(config, positions=positions), with_ids) > 1e-3


@pytest.mark.parametrize("shape", [(8,), (2, 8, 1)])
def test_tokens_of_the_wrong_shape_are_refused(shape):
    graph, params = parts(ONE_LAYER)
    with pytest.raises(ValueError, match=r"tokens is .*int32\[.*\]; it must be an? integer"):
        jax.eval_shape(lambda p: nnx.merge(graph, p)(jnp.zeros(shape, jnp.int32)), params)


def test_tokens_of_the_wrong_type_are_refused():
    graph, params = parts(ONE_LAYER)
    with pytest.raises(ValueError, match=r"tokens is .*float32\[2, 8\]; it must be an? integer"):
        jax.eval_shape(lambda p: nnx.merge(graph, p)(jnp.zeros((2, 8))), params)


def test_rope_is_a_complex_rotation_by_position():
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(2, 5, 3, 8)).astype(np.float32), rng.integers(0, 1000, (2, 5))
    config = dataclasses.replace(MODEL, head_dim=8, rope_theta=10_000.0)
    angles = positions[..., None] * (2 * math.pi / np.asarray(rope_wavelengths(config)))
    turned = np.asarray(apply_rope(jnp.asarray(x), jnp.asarray(angles)), np.float64)
    frequency = 10_000.0 ** (-np.arange(0, 8, 2) / 8)
    expected = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[..., None] * frequency)[:, :, None]
    np.testing.assert_allclose(turned[..., :4], expected.real, atol=3e-4)
    np.testing.assert_allclose(turned[..., 4:], expected.imag, atol=3e-4)


@pytest.mark.parametrize("scaling", [RopeScaling(), RopeScaling(factor=32, low_freq_factor=2, high_freq_factor=8)])
def test_llama3_stretches_frequencies_by_their_wavelength(scaling):
    """The rule of the Llama 3.1 model card, frequency by frequency in float64."""
    config = dataclasses.replace(recipes.llama3_8b(), rope_scaling=scaling)
    expected, kinds = [], set()
    for i in range(config.head_dim // 2):
        frequency = config.rope_theta ** (-2 * i / config.head_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < scaling.original_length / scaling.high_freq_factor:
            kinds.add("kept")
        elif wavelength > scaling.original_length / scaling.low_freq_factor:
            kinds.add("stretched")
            frequency /= scaling.factor
        else:
            kinds.add("between")
            smooth = scaling.original_length / wavelength - scaling.low_freq_factor
            smooth /= scaling.high_freq_factor - scaling.low_freq_factor
            frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        expected.append(2 * math.pi / frequency)
    assert kinds == {"kept", "between", "stretched"}
    np.testing.assert_allclose(rope_wavelengths(config), expected, rtol=1e-5)


def test_norm_is_computed_in_float32_and_keeps_the_type():
    norm = RMSNorm(64, 1e-5)
    norm.scale[...] = jnp.linspace(0.5, 2, 64)
    x = jnp.asarray(np.random.default_rng(0).normal(100, 1, (4, 64)), jnp.bfloat16)
    y, exact = norm(x), np.asarray(x, np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * np.linspace(0.5, 2, 64)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8)


PRESETS = [recipes.tiny, recipes.gpt_1p2b, recipes.gpt_7b, recipes.gpt_30b, recipes.llama3_8b]


def with_sinks() -> ModelConfig:
    return dataclasses.replace(recipes.tiny(), attention_sinks=True)


@pytest.mark.parametrize("preset", [*PRESETS, lambda: MODEL, with_sinks], ids=lambda f: f.__name__)
def test_parameters_are_as_many_as_costs_counts(preset):
    config = preset()
    shapes = nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: transformer(config)))[1])

    def size(tree) -> int:
        return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))

    counts, layers = costs.parameter_counts(config), shapes["layers"]
    assert size(shapes) == sum(counts.values())
    assert counts["embedding"] == size(shapes["embedding"])
    assert counts["mlp"] == size(layers["mlp"])
    assert counts["head"] == (0 if config.tie_embeddings else size(shapes["head"]))
    if not config.qk_norm:
        assert counts["attention"] == size(layers["attention"])


def test_llama_3_8b_has_its_published_number_of_parameters():
    assert sum(costs.parameter_counts(recipes.llama3_8b()).values()) == 8_030_261_248


def loss(graph):
    def one(params, batch):
        logits = nnx.merge(graph, params)(batch["tokens"], segment_ids=batch["segment_ids"])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][..., None], -1)
        return -picked.mean()

    return one


def test_the_program_does_not_grow_with_depth():
    """Unrolling the layers breaks it: each adds its own text, forward and backward."""

    def text(layers: int) -> str:
        graph, params = parts(dataclasses.replace(MODEL, num_layers=layers))
        return jax.jit(jax.grad(loss(graph))).lower(params, BATCH).as_text()

    assert len(text(4)) == pytest.approx(len(text(2)), rel=0.01)


@pytest.mark.parametrize("seq", [2, 8])
def test_positions_go_on_across_shards(seq):
    """Trap 7; leaving `positions` to their default inside the shard, 0 … T/P−1, breaks it."""
    mesh = make_mesh(seq=seq)
    graph, params = parts(ONE_LAYER, ShardAttention())
    batch = {"tokens": BATCH["tokens"], "positions": np.broadcast_to(np.arange(LENGTH), BATCH["tokens"].shape)}

    def on_one_device(params, batch):
        return nnx.merge(graph, params)(batch["tokens"], positions=batch["positions"])

    divided = jax.shard_map(
        on_one_device, mesh=mesh, in_specs=(PartitionSpec(), token_spec(mesh)), out_specs=token_spec(mesh), check_vma=False
    )
    logits, expected = np.asarray(compiled(divided, params, batch)(params, batch)), forward(ONE_LAYER, params)
    edges = np.arange(0, LENGTH, LENGTH // seq)
    assert relative_error(logits[:, edges], expected[:, edges]) < 1e-5
    assert relative_error(logits, expected) < 1e-5


@pytest.mark.parametrize(
    ("seq", "heads", "kv_heads", "chunks"),
    [(2, 8, 2, 1), (4, 8, 4, 1), (8, 8, 2, 1), (4, 6, 2, 1), (1, 8, 4, 2), (2, 8, 4, 2), (2, 6, 6, 3), (4, 20, 4, 1)],
)
def test_heads_in_groups_and_chunks_give_the_gradients_of_one_device(seq, heads, kv_heads, chunks):
    """Groups of two, which are summed, and of more; KV heads replicated, and heads computed twice. Zeros left out of the output
    weight of a head's copy break it, as do chunks of KV heads, or sinks, paired with another chunk's queries.
    """
    config = dataclasses.replace(ONE_LAYER, num_heads=heads, num_kv_heads=kv_heads, attention_sinks=True)
    one, params = parts(config)
    many, _ = parts(dataclasses.replace(config, head_chunks=chunks), ShardAttention(implementation="xla"))
    batch = {name: BATCH[name][:2] for name in ("tokens", "labels", "segment_ids", "positions")}

    def losses(graph):
        def summed(params, batch):
            ids = {name: batch[name] for name in ("segment_ids", "positions")}
            logits = jax.nn.log_softmax(nnx.merge(graph, params)(batch["tokens"], **ids))
            return -jnp.take_along_axis(logits, batch["labels"][..., None], -1).sum()

        return summed

    def on_mesh(params, batch):
        return jax.lax.psum(losses(many)(params, batch), ("data", "seq"))

    mesh = make_mesh(seq=seq)
    specs = {"in_specs": (PartitionSpec(), token_spec(mesh)), "out_specs": PartitionSpec()}
    divided = jax.shard_map(jax.value_and_grad(on_mesh), mesh=mesh, **specs)
    value, grads = compiled(divided, params, batch)(params, batch)
    expected, own = compiled(jax.value_and_grad(losses(one)), params, batch)(params, batch)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    errors = {name: relative_error(x, by_name(own)[name]) for name, x in by_name(grads).items()}
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("equation", ["td,dgh->gth", "td,ghd->gth", "td,gth->dgh", "td,gth->ghd"])
def test_products_of_each_group_in_a_batch_are_those_of_the_whole(equation, monkeypatch):
    """What runs on GPUs. Copies counted along another dim than "g" break it."""
    sizes, rng = {"t": 5, "d": 4, "g": 3, "h": 2}, np.random.default_rng(0)
    x, y = (rng.normal(size=[sizes[dim] for dim in dims]) for dims in equation.split("->")[0].split(","))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, cuda, default: cuda(*arrays))
    got = _each_group(equation, jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
    assert relative_error(got, np.einsum(equation, x, y)) < 1e-6


@pytest.mark.slow
def test_a_model_in_its_users_own_loop_trains_as_on_one_device():
    """`attention_fn` on global arrays, nnx's own optimizer and transforms, none of `train.py`; the documents are packed."""
    mesh = make_mesh(data=2, seq=4)
    batch = {name: BATCH[name] for name in ("tokens", "labels", "segment_ids", "positions")}

    def train(attention, batch) -> tuple[list[float], dict[str, np.ndarray]]:
        model = transformer(ONE_LAYER, attention)
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, batch):
            def loss(model):
                logits = model(batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"])
                return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

            value, grads = nnx.value_and_grad(loss)(model)
            optimizer.update(model, grads)
            return value

        losses = [float(step(model, optimizer, batch)) for _ in range(3)]
        return losses, by_name(nnx.to_pure_dict(nnx.state(model)))

    losses, params = train(attention_fn(mesh), jax.device_put(batch, jax.NamedSharding(mesh, token_spec(mesh))))
    losses_1, params_1 = train(dot_product_attention, batch)
    assert losses_1[2] < losses_1[0]
    np.testing.assert_allclose(losses, losses_1, rtol=1e-6)
    for name, x in params.items():
        np.testing.assert_allclose(x, params_1[name], rtol=1e-4, atol=1e-6, err_msg=name)
