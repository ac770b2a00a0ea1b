"""The training step and loop: parallelism leaves the loss where it was, and a resumed run repeats it exactly."""

import dataclasses
import functools
import json
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

from tests.trainers import (
    LENGTH,
    MESHES,
    by_name,
    compiled,
    compiled_evaluate,
    compiled_step,
    first_state,
    make_batch,
    program,
    relative_error,
    take_steps,
    tiny,
)
from ulysses_jax import train
from ulysses_jax.checkpoint import Checkpoints
from ulysses_jax.config import CheckpointConfig, DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from ulysses_jax.data import place
from ulysses_jax.mesh import make_mesh
from ulysses_jax.model import Transformer
from ulysses_jax.runtime import Stop, alone
from ulysses_jax.train import build

STEPS = 20


@functools.cache
def trained(config: TrainConfig) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
    """Adam's first moment after one step, which is (1 − b1) times the clipped gradient, and the metrics of 20 steps."""
    state, metrics = take_steps(config, [make_batch(config)])
    moment = by_name(optax.tree.get(state["opt_state"], "mu"))
    for step in range(1, STEPS):
        state, m = compiled_step(config)(state, place(make_batch(config, step), program(config).mesh))
        metrics.append({name: float(x) for name, x in m.items()})
    return moment, metrics


# Accumulation and packing alternate so that each mesh and each stage meets both, and each of the two with the other.
MATRIX = [
    (data, seq, stage, 1 + (i + stage) % 2, (i + stage // 2) % 2 == 0)
    for i, (data, seq) in enumerate(MESHES)
    for stage in range(4)
] + [(1, 1, stage, 1 + stage % 2, stage % 2 == 0) for stage in (1, 2, 3)]  # stage 0 of one device is what all are compared with


@pytest.mark.slow
@pytest.mark.parametrize(("data", "seq", "stage", "accumulation", "packed"), MATRIX)
def test_loss_and_gradients_equal_one_devices(data, seq, stage, accumulation, packed):
    """Trap 1; a psum left out of, or doubled in, `Unshard` or the loss breaks it, and so does a mean of shard means."""
    moment, metrics = trained(tiny(data, seq, zero_stage=stage, accumulation=accumulation, mask_documents=packed))
    moment_1, metrics_1 = trained(tiny(mask_documents=packed))
    for name in ("loss", "grad_norm"):
        assert metrics[0][name] == pytest.approx(metrics_1[0][name], rel=1e-6), name
    assert metrics_1[0]["grad_norm"] > 1, "the clipping must be at work"
    assert moment.keys() == moment_1.keys()
    errors = {name: relative_error(moment[name], moment_1[name]) for name in moment}
    assert max(errors.values()) < 1e-5, errors
    losses, losses_1 = (np.array([m["loss"] for m in ms]) for ms in (metrics, metrics_1))
    np.testing.assert_allclose(losses, losses_1, rtol=1e-6)
    assert losses[-1] < losses[0] - 0.5, "it must learn, or equal losses say nothing"


@pytest.mark.slow
def test_masked_token_objective_equals_one_devices():
    bidirectional: Any = {"is_causal": False, "local_window_size": 5}
    config, one = (tiny(*mesh, model=bidirectional) for mesh in ((2, 4), (1, 1)))
    batches = [make_batch(config, i) for i in range(3)]
    (_, metrics), (_, metrics_1) = take_steps(config, batches), take_steps(one, batches)
    for m, m_1 in zip(metrics, metrics_1, strict=True):
        assert m["loss"] == pytest.approx(m_1["loss"], rel=1e-6)
        assert m["tokens"] == m_1["tokens"] > 0


def test_loss_is_the_cross_entropy_of_the_logits():
    """The tiled loss against log-softmax of all logits in float64."""
    config = tiny()
    batch = make_batch(config)
    state = first_state(config)

    graph = nnx.split(nnx.eval_shape(lambda: Transformer(config.model, rngs=nnx.Rngs(0))))[0]

    def forward(params, batch):
        model = nnx.merge(graph, params)
        return model(batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])

    logits = np.asarray(compiled(forward, state["params"], batch)(state["params"], batch), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(logp, batch["labels"][..., None], -1)[..., 0]
    summed, count = compiled_evaluate(config)(state["params"], place(batch, program(config).mesh))
    assert float(count) == batch["weights"].sum()
    assert float(summed) == pytest.approx((nats * batch["weights"]).sum(), rel=1e-6)


ON_A_MESH, ON_ONE = (tiny(*mesh, zero_stage=stage) for mesh, stage in (((2, 4), 3), ((1, 1), 3)))


def masked(where) -> dict[str, np.ndarray]:
    batch = make_batch(ON_ONE)
    batch["weights"][where] = 0
    return batch


@pytest.mark.parametrize(
    "where",
    [
        pytest.param((slice(None), slice(0, 0)), id="nothing masked"),
        pytest.param((slice(0, 4), slice(6, 12)), id="all of one device's labels masked"),
        pytest.param((slice(None), slice(6, 24)), id="labels on one device of each row only"),
    ],
)
def test_every_label_counts_once(where):
    """Trap 6; a count divided by shard before the sum, or labels shifted inside the shard, break it."""
    batch = masked(where)
    (_, (m,)), (_, (m_1,)) = take_steps(ON_A_MESH, [batch]), take_steps(ON_ONE, [batch])
    assert m["tokens"] == m_1["tokens"] == batch["weights"].sum()
    assert m["loss"] == pytest.approx(m_1["loss"], rel=1e-6)
    assert m["grad_norm"] == pytest.approx(m_1["grad_norm"], rel=1e-5)


def test_a_batch_without_labels_costs_nothing_and_harms_nothing():
    """Trap 6; dividing by the count without the floor of one breaks it."""
    state, (m,) = take_steps(ON_A_MESH, [masked(slice(None))])
    assert (m["loss"], m["tokens"], m["grad_norm"]) == (0, 0, 0)
    assert all(np.isfinite(x).all() for x in by_name(state).values())


OPTIMIZER = OptimizerConfig(learning_rate=0.1, warmup_steps=10, weight_decay=0.5, final_fraction=0.1, clip_norm=2.0)


def test_decay_shrinks_matrices_only():
    params = first_state(tiny())["params"]
    optimizer, schedule = train.make_optimizer(OPTIMIZER, steps=100)

    def second_update(params):  # the first has a learning rate of 0
        zeros, state = jax.tree.map(jnp.zeros_like, params), optimizer.init(params)
        return optimizer.update(zeros, optimizer.update(zeros, state, params)[1], params)[0]

    updates, params = by_name(compiled(second_update, params)(params)), by_name(params)
    decayed = {name for name, x in updates.items() if np.any(x)}
    assert decayed == {name for name in params if not name.endswith(("scale", "bias"))}
    assert {"embedding.table", "layers.attention.query", "layers.mlp.down", "head.table"} < decayed
    for name in decayed:
        np.testing.assert_allclose(updates[name], -0.5 * np.asarray(schedule(1)) * params[name], rtol=1e-6)


def test_schedule_warms_up_linearly_and_falls_as_a_cosine():
    schedule = train.make_optimizer(OPTIMIZER, steps=100)[1]
    values = [np.asarray(schedule(step)) for step in (0, 5, 10, 55, 100, 200)]
    np.testing.assert_allclose(values, [0, 0.05, 0.1, 0.055, 0.01, 0.01], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 3])
def test_warmup_longer_than_the_run_is_cut(steps):
    schedule = train.make_optimizer(OPTIMIZER, steps=steps)[1]
    assert np.asarray(schedule(steps - 1)) == pytest.approx(0.1)


@pytest.mark.parametrize(("norm", "left"), [(1.0, 1.0), (8.0, 2.0)])
def test_gradients_are_clipped_by_their_global_norm(norm, left):
    gradient = {"a": norm * np.array([[0.6, 0.0]], np.float32), "b": norm * np.array([[0.8]], np.float32)}
    optimizer, _ = train.make_optimizer(OPTIMIZER, steps=100)
    state = optimizer.update(gradient, optimizer.init(gradient), gradient)[1]
    clipped = {name: x / 0.1 for name, x in by_name(optax.tree.get(state, "mu")).items()}
    np.testing.assert_allclose(clipped["a"], [[0.6 * left, 0]], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], [[0.8 * left]], rtol=1e-6)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"document {i} says " + "a few words " * (20 + i))
    return folder


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    """`run` compiles each program anew; here those of equal configs are shared."""

    def shared(config: TrainConfig, _) -> train.Program:
        step = types.SimpleNamespace(lower=lambda *_: types.SimpleNamespace(compile=lambda: compiled_step(config)))
        own, evaluate = program(config), compiled_evaluate(config)
        return dataclasses.replace(own, init=lambda: first_state(config), step=step, evaluate=evaluate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build", shared)
        yield


def run_config(text: Path) -> TrainConfig:
    data = DataConfig(source=str(text), seq_len=LENGTH, batch_size=8)
    options = {"steps": 40, "checkpoint": CheckpointConfig(every=20), "log_every": 1, "eval_batches": 1}
    return dataclasses.replace(tiny(2, 4), data=data, **options)


QUIET = Console(quiet=True)


def losses(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == sorted(set(steps)), "each step is logged once"
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def saved(out: Path, config: TrainConfig) -> dict[str, np.ndarray]:
    with Checkpoints(out / "checkpoints", keep=2) as checkpoints:
        restored = checkpoints.restore(program(config).abstract)
    assert restored is not None
    assert restored[0] == 40
    return by_name(restored[1])


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    """40 steps in one go: the folder, the losses, the last state."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train.run(run_config(text), out, QUIET) is not None
    return out, losses(out), saved(out, run_config(text))


def interrupt(config: TrainConfig, out: Path, monkeypatch, *, stop_at: int | None = None, crash_at: int | None = None) -> None:
    def requested(_, step: int) -> bool:
        if step == crash_at:
            raise KeyboardInterrupt
        return step == stop_at

    with monkeypatch.context() as patch:
        patch.setattr(Stop, "requested", requested)
        if crash_at is None:
            assert train.run(config, out, QUIET) is None
        else:
            with pytest.raises(KeyboardInterrupt):
                train.run(config, out, QUIET)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"stop_at": 20}, {"crash_at": 25}], ids=["asked to stop", "crashed after the save"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(how, text, uninterrupted, tmp_path, monkeypatch):
    """Trap 8; reading from batch 0 after the restore, or restoring the parameters alone, breaks it."""
    config, out = run_config(text), tmp_path / "run"
    interrupt(config, out, monkeypatch, **how)
    assert max(losses(out)) == next(iter(how.values()))
    assert train.run(config, out, QUIET) is not None
    _, whole_losses, whole_state = uninterrupted
    assert losses(out) == whole_losses
    state = saved(out, config)
    assert state.keys() == whole_state.keys()
    for name, x in state.items():
        np.testing.assert_array_equal(x, whole_state[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "seq", "stage"), [(4, 2, 3), (2, 4, 1)])
def test_a_run_goes_on_at_another_degree_and_stage(data, seq, stage, text, uninterrupted, tmp_path, monkeypatch):
    """Traps 8 and 9; a batch that depends on the mesh, or a checkpoint of device-local arrays, breaks it."""
    out = tmp_path / "run"
    interrupt(run_config(text), out, monkeypatch, stop_at=20)
    config = dataclasses.replace(run_config(text), mesh=MeshConfig(data=data, seq=seq), zero_stage=stage)
    assert train.run(config, out, QUIET) is not None
    np.testing.assert_allclose(list(losses(out).values()), list(uninterrupted[1].values()), rtol=1e-6)


def test_another_run_is_refused_its_folder(text, tmp_path, monkeypatch):
    config, out = run_config(text), tmp_path / "run"
    interrupt(config, out, monkeypatch, stop_at=1)
    with pytest.raises(ValueError, match=r"--out .* holds another run: there optimizer.learning_rate is 0.003, here 0.1"):
        train.run(dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=0.1, warmup_steps=5)), out, QUIET)


def test_a_run_that_another_process_is_at_is_refused_or_found_complete(text, uninterrupted, tmp_path, monkeypatch):
    """A second start would write over the first's log, save into its folder, or finish it again."""
    config, out = run_config(text), tmp_path / "run"
    interrupt(config, out, monkeypatch, stop_at=1)
    with alone(out), pytest.raises(ValueError, match="is being trained by another process; wait for its end"):
        train.run(config, out, QUIET)
    summary = uninterrupted[0] / "summary.json"
    seen = [None, json.loads(summary.read_text())]  # the other ends between the first look and the lock
    monkeypatch.setattr(train, "read_summary", lambda out: seen.pop(0))
    assert train.run(config, out, QUIET) == json.loads(summary.read_text())
    assert seen == []
    assert not (out / "summary.json").exists()


def test_a_damaged_summary_is_named_and_stays(text, tmp_path, monkeypatch):
    config, out = run_config(text), tmp_path / "run"
    interrupt(config, out, monkeypatch, stop_at=1)
    (out / "summary.json").write_text('{"step": ')
    with pytest.raises(ValueError, match=r"is damaged: .*summary.json cannot be read. Remove that file"):
        train.run(config, out, QUIET)
    assert (out / "summary.json").read_text() == '{"step": '


def test_a_complete_run_is_not_run_again(text, uninterrupted):
    out = uninterrupted[0]
    before = {path: path.read_bytes() for path in out.glob("*.*")}
    assert {path.name for path in before} == {"config.json", "metrics.jsonl", "summary.json", "loss.png"}
    summary = train.run(run_config(text), out, QUIET)
    assert summary == json.loads((out / "summary.json").read_text())
    assert before == {path: path.read_bytes() for path in out.glob("*.*")}


def test_parameters_that_are_not_finite_are_not_saved(text, tmp_path, monkeypatch):
    """A row that no token reads spoils neither loss nor gradient; saved, the run could never go on."""
    config = run_config(text)

    def spoilt() -> train.State:
        state = first_state(config)
        table = state["params"]["embedding"]["table"]
        return state | {"params": state["params"] | {"embedding": {"table": table.at[-1].set(jnp.inf)}}}

    shared = train.build
    monkeypatch.setattr(train, "build", lambda config, mesh: dataclasses.replace(shared(config, mesh), init=spoilt))
    with pytest.raises(ValueError, match=r"parameters are not finite after step \d+; the last save is kept"):
        train.run(config, tmp_path / "run", QUIET)
    assert not any((tmp_path / "run" / "checkpoints").iterdir())


def test_a_loss_that_is_not_finite_ends_the_run(text, tmp_path, monkeypatch):
    """At the first logged step, and nothing of it is written; looking only where a checkpoint is due breaks it."""
    config = run_config(text)

    def spoilt() -> train.State:
        state = first_state(config)
        return state | {"params": jax.tree.map(lambda x: x * jnp.nan, state["params"])}

    shared = train.build
    monkeypatch.setattr(train, "build", lambda config, mesh: dataclasses.replace(shared(config, mesh), init=spoilt))
    with pytest.raises(ValueError, match=r"the loss is nan at step 1; the last save is kept. Try a lower"):
        train.run(config, tmp_path / "run", QUIET)
    assert not any((tmp_path / "run" / "checkpoints").iterdir())
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_mesh_that_is_not_the_configs_is_refused():
    with pytest.raises(ValueError, match=r"but the config says data=2, seq=4; make it with make_mesh\(data=2, seq=4\)"):
        build(tiny(2, 4), make_mesh(data=4, seq=2))
    with pytest.raises(ValueError, match=r"'ring': 2, 'seq': 2}, but the config says data=2, seq=4"):
        build(tiny(2, 4), make_mesh(data=2, ring=2, seq=2))
