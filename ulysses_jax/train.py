"""Where the rooms meet: loss, state, training step, loop.

The step is one compiled program. Loss and gradients are computed inside one `shard_map` over the whole mesh, so that every
crossing in it is one the code names: the model's all-to-alls, ZeRO's gathers and reduce-scatters, the sum of the loss. The
optimizer's update is elementwise and runs outside, on arrays that named shardings keep divided.
"""

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from ulysses_jax import costs, hf
from ulysses_jax.attention import check_platform, make_mask
from ulysses_jax.attention.blocked import varying_like
from ulysses_jax.config import MemoryConfig, MeshConfig, OptimizerConfig, TrainConfig, from_dict
from ulysses_jax.data import END, Corpus, Packing, byte_entropy, open_corpus, place, read_ahead
from ulysses_jax.loss import token_losses
from ulysses_jax.memory import HOST, stream_update, to_host
from ulysses_jax.mesh import DATA, RING, SEQ, make_mesh, token_order, token_spec
from ulysses_jax.model import Transformer
from ulysses_jax.report import claim, conclude, describe, draw_losses, read_metrics, read_summary, reporting
from ulysses_jax.runtime import Stop, alone, as_process_0_has_it, stopping
from ulysses_jax.ulysses import ShardAttention
from ulysses_jax.zero import Stored, Unshard, hold, zero_shardings

__all__ = ["Program", "batch_shapes", "build", "compiler_options", "load_run", "make_optimizer", "run", "run_config"]

GPUS = ("gpu", "cuda")  # platforms' names of NVIDIA's
LAYERS = "layers"
WAY_OUT = "the last save is kept. Try a lower optimizer.learning_rate, in another --out."

type Tree = Any
type State = dict[str, Tree]
"""{"params", "opt_state", "step"}: all that a run must save."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A config's compiled parts on a mesh."""

    config: TrainConfig
    mesh: Mesh
    abstract: State
    """shapes, types and shardings of the state"""
    init: Callable[[], State]
    """the first state, born divided"""
    step: jax.stages.Wrapped
    """(state, batch) → (state, {"loss", "grad_norm", "learning_rate", "tokens"}); the state given is consumed"""
    gradients: Callable[[Tree, dict[str, Array]], tuple[Array, Tree, Array]]
    """(params, batch) → (loss, gradients, number of labels), what `step` computes before its update"""
    evaluate: Callable[[Tree, dict[str, Array]], tuple[Array, Array]]
    """(params, batch) → (summed loss in nats, number of labels)"""


def build(config: TrainConfig, mesh: Mesh) -> Program:
    """The training program of a config, ready to be compiled.

    Raises:
      ValueError: a mesh that is not the config's.
    """
    if {"ring": 1, **mesh.shape} != (sizes := dataclasses.asdict(config.mesh)):
        said = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if axis != RING or size > 1)
        raise ValueError(f"the mesh is {dict(mesh.shape)}, but the config says {said}; make it with make_mesh({said}).")

    ring = RING if RING in mesh.shape else None
    attention = ShardAttention(implementation=config.implementation, ring_axis=ring, balanced=config.balanced)
    create = functools.partial(_create, config, attention, Unshard(config.model.dtype, by_copies=exchanges_by_copies(mesh)))
    graph = nnx.split(nnx.eval_shape(create))[0]
    optimizer, schedule = make_optimizer(config.optimizer, config.steps)
    on_host = config.memory.offload_optimizer

    def init() -> State:
        params = nnx.to_pure_dict(nnx.split(create())[1])
        return {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}

    shapes = jax.eval_shape(init)
    whole = NamedSharding(mesh, PartitionSpec())
    parts = params_at, grads_at, opt_at = zero_shardings(
        shapes["params"], shapes["opt_state"], mesh=mesh, stage=config.zero_stage
    )
    update_at = zero_shardings(shapes["params"], (), mesh=mesh, stage=3 if config.zero_stage else 0)[0]
    state_at = _places({"params": params_at, "opt_state": opt_at, "step": whole}, shapes, config.memory)
    scalar = PartitionSpec()
    loss_and_grads = _on_mesh(_loss_and_grads, config, mesh, graph, parts, (scalar, _specs(grads_at), scalar, scalar))
    options = compiler_options(config.memory, mesh)

    def step(state: State, batch: dict[str, Array]) -> tuple[State, dict[str, Array]]:
        loss, grads, tokens, squares = loss_and_grads(state["params"], batch)
        # The update runs where the optimizer's state lies; a stage that keeps parameters whole gathers the result.
        grads, params = (_constrain(x, update_at, config.memory) for x in (grads, state["params"]))
        norm = _norm(grads, squares)
        if on_host:
            params, opt_state = _update_on_host(config, grads, norm, state["opt_state"], params)
        else:
            params, opt_state = _update(config, grads, state["opt_state"], params)
        params = _constrain(params, update_at, config.memory)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(schedule(state["step"])),
            "tokens": tokens,
        }
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics

    return Program(
        config=config,
        mesh=mesh,
        abstract=jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, state_at),
        init=_first_on_host(init, shapes, state_at) if on_host else jax.jit(init, out_shardings=state_at),
        step=jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(state_at, state_at["step"]),
            compiler_options=options,
        ),
        gradients=jax.jit(lambda params, batch: loss_and_grads(params, batch)[:3], compiler_options=options),
        evaluate=jax.jit(
            _on_mesh(_summed_loss, config, mesh, graph, parts, (PartitionSpec(), PartitionSpec())), compiler_options=options
        ),
    )


def _create(config: TrainConfig, attention: Callable, unshard: Unshard) -> Transformer:
    rngs = nnx.Rngs(config.seed)
    return Transformer(config.model, attention=attention, unshard=unshard, memory=config.memory, rngs=rngs)


def _update(config: TrainConfig, grads: Tree, opt_state: Tree, params: Tree) -> tuple[Tree, Tree]:
    """(new parameters, new optimizer state)."""
    updates, opt_state = make_optimizer(config.optimizer, config.steps)[0].update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def _update_on_host(config: TrainConfig, grads: Tree, norm: Array, opt_state: Tree, params: Tree) -> tuple[Tree, Tree]:
    """`_update` where the moments wait on the host: clipped by the norm of all, then a layer at a time."""
    most = config.optimizer.clip_norm
    adamw = _adamw(config.optimizer, make_optimizer(config.optimizer, config.steps)[1])
    scale = jnp.where(norm < most, 1, most / norm)
    params, inner = stream_update(adamw, grads, opt_state[1], _host_layers(params, config.memory), scale=scale)
    return params, (opt_state[0], inner)


def _host_layers(params: Tree, memory: MemoryConfig) -> Tree:
    """Parameters, the layers' said to be on the host where they are: for devices that do not know their memories."""
    return params | {LAYERS: to_host(params[LAYERS])} if memory.offload_params else params


def _constrain(tree: Tree, at: Tree, memory: MemoryConfig) -> Tree:
    """Divided as said; what is on the host is already."""
    here = tree.keys() - {LAYERS} if memory.offload_params else tree.keys()
    return tree | {name: lax.with_sharding_constraint(tree[name], at[name]) for name in here}


def _norm(grads: Tree, squares: Array | None) -> Array:
    """√Σg² over all parameters: of those on the host the `squares` were added up when they left."""
    if squares is None:
        return optax.tree.norm(grads)
    return jnp.sqrt(squares + optax.tree.norm({k: v for k, v in grads.items() if k != LAYERS}, squared=True))


def compiler_options(memory: MemoryConfig, mesh: Mesh) -> dict[str, bool | int | str] | None:
    """What XLA is told about a training step on NVIDIA GPUs; elsewhere nothing.

    Its latency-hiding scheduler is on by default, and sends a layer's gathers and reduce-scatters and the exchange while others
    compute, as long as it believes that they fit: beyond its limit it runs them one by one, and its own rematerialisation
    gathers weights up to six times a layer. What is computed again is `memory`'s to say, so that pass is off. The limit is a
    percentage of what jax preallocates, less the state; it counts buffers in the host's memory as the device's, so that with
    them it has to be beyond both.

    Where GPUs can exchange by copies (`exchanges_by_copies`), they do.
    """
    if mesh.devices.flat[0].platform not in GPUS:
        return None
    limit = 400 if memory.offload_layers or memory.offload_optimizer else 100
    options = {"xla_disable_hlo_passes": "rematerialization", "xla_gpu_memory_limit_slop_factor": limit}
    return options | ({"xla_gpu_use_memcpy_local_p2p": True} if exchanges_by_copies(mesh) else {})


def exchanges_by_copies(mesh: Mesh) -> bool:
    """Whether copy engines do the mesh's all-to-alls: XLA has them for GPUs of one process.

    No kernel waits for them and they wait for none; NCCL's kernels take multiprocessors from attention's.
    """
    devices = list(mesh.devices.flat)
    return devices[0].platform in GPUS and len({device.process_index for device in devices}) == 1


def _places(at: State, shapes: State, memory: MemoryConfig) -> State:
    """The state's shardings with the kinds of memory: where one is named all have to be, or jax ignores them."""
    if not memory.offload_optimizer:
        return at
    placed = jax.tree.map(lambda x: x.with_memory_kind("device"), at)
    placed["opt_state"] = jax.tree.map(_placed, at["opt_state"], shapes["opt_state"])
    if memory.offload_params:
        placed["params"] |= {LAYERS: jax.tree.map(_placed, at["params"][LAYERS], shapes["params"][LAYERS])}
    return placed


def _placed(at: NamedSharding, x: jax.ShapeDtypeStruct) -> NamedSharding:
    return at.with_memory_kind(HOST if x.ndim else "device")


def _first_on_host(init: Callable[[], State], shapes: State, state_at: State) -> Callable[[], State]:
    """As `init`, where the device would not have room for the optimizer's state: AdamW's begins as zeros."""
    params = jax.jit(lambda: init()["params"], out_shardings=state_at["params"])

    def zeros(x: jax.ShapeDtypeStruct, at: NamedSharding) -> Array:
        size = at.shard_shape(x.shape)
        return jax.make_array_from_callback(x.shape, at, lambda _: np.zeros(size, x.dtype))

    def first() -> State:
        rest = {name: jax.tree.map(zeros, shapes[name], state_at[name]) for name in ("opt_state", "step")}
        return {"params": params(), **rest}

    return first


def make_optimizer(config: OptimizerConfig, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Clipping by global norm, then AdamW with decay on matrices only; and its schedule, step → learning rate."""
    warmup = min(config.warmup_steps, steps - 1)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=config.learning_rate * config.final_fraction,
    )

    return optax.chain(optax.clip_by_global_norm(config.clip_norm), _adamw(config, schedule)), schedule


def _adamw(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    def decays(params: Tree) -> Tree:
        def one(path, _) -> bool:
            return not any(str(key.key).endswith(("scale", "bias")) for key in path)

        return jax.tree_util.tree_map_with_path(one, params)

    adamw = optax.adamw(schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decays)
    return adamw if config.moment_dtype == "float32" else _kept_in(adamw, jnp.dtype(config.moment_dtype))


def _kept_in(inner: optax.GradientTransformation, dtype: jnp.dtype) -> optax.GradientTransformation:
    """`inner`, its state's arrays kept in `dtype` between updates."""

    def cast(state: Tree, dtype) -> Tree:
        return jax.tree.map(lambda x: x.astype(dtype) if x.ndim else x, state)

    def update(updates: Tree, state: Tree, params: Tree | None = None) -> tuple[Tree, Tree]:
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)


def batch_shapes(config: TrainConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, types and shardings of a global batch, for compiling before there is one."""
    at = NamedSharding(mesh, token_spec(mesh))
    at = at.with_memory_kind("device") if config.memory.offload_optimizer else at
    shape = (config.data.batch_size, config.data.seq_len)
    names = {"tokens": np.int32, "labels": np.int32, "positions": np.int32, "weights": np.float32}
    if config.data.mask_documents:
        names["segment_ids"] = np.int32
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=at) for name, dtype in names.items()}


def run(config: TrainConfig, out: Path, console: Console | None = None, *, stop: Stop | None = None) -> dict[str, float] | None:
    """Train to the end, or go on where a run in `out` stopped.

    The folder holds `config.json`, `metrics.jsonl`, `checkpoints/`, and at the end `summary.json` and `loss.png`.

    Args:
      config: the whole run.
      out: its folder.
      console: where it tells of itself.
      stop: asks it to stop; by default it listens to SIGINT and SIGTERM itself.

    Returns:
      the summary, or None where the run was asked to stop; its state is saved then.

    Raises:
      ValueError: a folder that belongs to another run or is damaged, data or devices that do not fit the config.
    """
    from ulysses_jax.checkpoint import Checkpoints  # Orbax: the step itself does without

    console = console or Console()
    corpus = open_corpus(config.data)
    if corpus.vocab_size is not None and config.model.vocab_size < corpus.vocab_size:
        raise ValueError(
            f"model.vocab_size is {config.model.vocab_size}; text read as bytes needs at least {corpus.vocab_size} "
            "(256 bytes, the end of a document, a mask)."
        )
    packing = Packing(corpus.train, config.data, config.model.vocab_size, is_causal=config.model.is_causal)
    packing.batch(0)  # unreadable or unfitting data shows before anything compiles
    if config.init_from is not None and not (out / "checkpoints").exists():
        hf.check(config.init_from, config.model)
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    check_platform(config.implementation, mesh.devices.flat[0].platform)
    speaks = jax.process_index() == 0
    claim(out, config, corpus.fingerprint, write=speaks)
    console = console if speaks else Console(quiet=True)
    if (summary := _read_complete(out, config, console)) is not None:
        return summary

    program = build(config, mesh)
    listening = stopping() if stop is None else contextlib.nullcontext(stop)
    with (
        alone(out),
        Checkpoints(out / "checkpoints", keep=config.checkpoint.keep) as checkpoints,
        listening as stop,
    ):
        if (summary := _read_complete(out, config, console)) is not None:  # by a run that ended meanwhile
            return summary
        first, state = checkpoints.restore(program.abstract) or (0, None)
        if first:
            console.print(f"continuing from step {first}", highlight=False)
        with reporting(config, out, console, first_step=first, speaks=speaks) as report:
            kind = mesh.devices.flat[0].device_kind
            report.say(f"compiling for {mesh.size} × {kind}")
            step = program.step.lower(program.abstract, batch_shapes(config, mesh)).compile()
            state = _first_state(program) if state is None else state
            state, finished = _loop(program, step, state, first, packing, corpus, checkpoints, report, stop)
        if not finished:
            console.print(
                f"stopped; step {int(state['step'])} is saved, and the same command goes on from there", highlight=False
            )
            return None
        summary = _summary(program, state, corpus, out)
        if speaks:
            _finish(out, summary)
    conclude(console, out, summary)
    return summary


def run_config(out: Path) -> TrainConfig:
    """What a run was started with.

    Raises:
      ValueError: a folder that is no run.
    """
    path = out / "config.json"
    try:
        return from_dict(json.loads(path.read_text())["config"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{out} is no run of ulysses: {path} cannot be read. Name the --out of a run.") from None


def load_run(out: Path) -> Transformer:
    """The model of a run's newest save, in the host's memory: a GPU need not have room for all of it.

    Raises:
      ValueError: a folder that is no run, or has no undamaged save.
    """
    from ulysses_jax.checkpoint import Checkpoints

    config = dataclasses.replace(run_config(out), mesh=MeshConfig(), memory=MemoryConfig(), implementation=None)
    try:
        here = jax.local_devices(backend="cpu")
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        here = jax.local_devices()
    params = build(config, make_mesh(devices=here[:1])).abstract["params"]
    with Checkpoints(out / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
        if (found := checkpoints.restore({"params": params}, part=True)) is None:
            raise ValueError(f"{out} has no save yet; it has one after {config.checkpoint.every} steps.")
    graph = nnx.split(nnx.eval_shape(lambda: Transformer(config.model, rngs=nnx.Rngs(0))))[0]
    return nnx.merge(graph, found[1]["params"])


def _first_state(program: Program) -> State:
    """Random parameters, or those of `init_from`, and an optimizer that has seen nothing."""
    state, folder = program.init(), program.config.init_from
    if folder is not None:
        del state["params"]  # there is not room for both
        state["params"] = hf.load_params(folder, program.abstract["params"])
    return state


def _loop(program, step, state, first, packing, corpus, checkpoints, report, stop) -> tuple[State, bool]:
    """Steps `first` to the last; answers the state, and whether it got there."""
    config = program.config
    kind = program.mesh.devices.flat[0].device_kind
    since, at, ahead, pairs = time.perf_counter(), first, None, 0
    for i, batch in zip(range(first + 1, config.steps + 1), read_ahead(packing, range(first, config.steps)), strict=True):
        state, metrics = step(state, place(batch, program.mesh, balanced=config.balanced))
        pairs += costs.seen_pairs(batch["positions"], is_causal=config.model.is_causal, window=config.model.local_window_size)
        jax.block_until_ready(ahead)  # one step runs while the next is prepared, never more
        ahead = metrics["loss"]
        if i % config.log_every == 0 or i in (1, config.steps):
            values = {name: float(x) for name, x in metrics.items()}
            _refuse_divergence(values, i)
            seconds = (time.perf_counter() - since) / (i - at)
            report.write({"step": i, **values, **costs.rates(config, seconds, kind, pairs=pairs // (i - at))})
            since, at, pairs = time.perf_counter(), i, 0
        report.advance(i)
        asked = stop.requested(i)
        if config.eval_every and i % config.eval_every == 0 and i < config.steps:
            report.write({"step": i, **evaluate(program, state["params"], corpus)})
            since, at, pairs = time.perf_counter(), i, 0
        if asked or i == config.steps or i % config.checkpoint.every == 0:
            _refuse_divergence(metrics, i)
            if not config.memory.offload_params and not _all_finite(state["params"]):
                raise ValueError(f"parameters are not finite after step {i}; {WAY_OUT}")
            checkpoints.save(i, state)
        if asked and i < config.steps:
            return state, False
    return state, True


def _refuse_divergence(metrics: dict[str, Any], step: int) -> None:
    """End the run before what is not finite is logged or saved; the loss is that of before the update, its gradient's not."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(value := float(metrics[name])):
            raise ValueError(f"the {name} is {value} at step {step}; {WAY_OUT}")


@jax.jit
def _all_finite(tree: Tree) -> Array:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def evaluate(program: Program, params: Tree, corpus: Corpus) -> dict[str, float]:
    """Loss on the first `eval_batches` batches of the held-out documents; for text also in bits a byte."""
    config = program.config
    packing = Packing(corpus.held_out, config.data, config.model.vocab_size, is_causal=config.model.is_causal, shuffle=False)
    loss = labels = byte_labels = 0.0
    for i in range(min(config.eval_batches, -(-packing.rows // config.data.batch_size))):
        batch = packing.batch(i)
        for j in range(config.data.batch_size):  # rows past the end of the documents come round again: they count once
            if i * config.data.batch_size + j >= packing.rows:
                batch["weights"][j] = 0
        byte_labels += float(((batch["labels"] < END) * batch["weights"]).sum())
        summed, count = program.evaluate(params, place(batch, program.mesh, balanced=config.balanced))
        loss, labels = loss + float(summed), labels + float(count)
    result = {"eval_loss": loss / max(labels, 1)}
    if corpus.is_bytes and config.model.is_causal:
        result["eval_bits_per_byte"] = loss / math.log(2) / max(byte_labels, 1)
    return result


def _summary(program: Program, state: State, corpus: Corpus, out: Path) -> dict[str, float]:
    steps = [line for line in read_metrics(out / "metrics.jsonl") if "tokens_per_s" in line]
    speeds = [line["tokens_per_s"] for line in steps[1:] or steps]
    summary = {"step": int(state["step"]), **evaluate(program, state["params"], corpus)}
    if steps:
        summary |= {"loss": steps[-1]["loss"], "tokens_per_s": float(np.median(speeds))}
    if "eval_bits_per_byte" in summary:
        summary["unigram_bits_per_byte"] = byte_entropy(corpus.held_out)
    return summary


def _read_complete(out: Path, config: TrainConfig, console: Console) -> dict[str, float] | None:
    """The summary of a run that is complete, as process 0 finds it: none goes on where another does not.

    Raises:
      ValueError, in every process: a summary.json that cannot be read.
    """
    found = None
    if jax.process_index() == 0:
        try:
            found = read_summary(out)
        except ValueError as error:
            found = str(error)
    found = as_process_0_has_it(found)
    if isinstance(found, str):
        raise ValueError(found)
    if found is not None:
        console.print(f"{out} is complete: {config.steps} steps, {describe(found)}.", highlight=False)
    return found


def _finish(out: Path, summary: dict[str, float]) -> None:
    with (out / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({name: summary[name] for name in ("step", "eval_loss", "eval_bits_per_byte") if name in summary}) + "\n"
        )
    entropy = summary.get("unigram_bits_per_byte")
    baseline = None if entropy is None else ("entropy of single bytes, held out", entropy)
    draw_losses(read_metrics(out / "metrics.jsonl"), out / "loss.png", baseline=baseline)
    unfinished = out / "summary.tmp"
    unfinished.write_text(json.dumps(summary, indent=2) + "\n")
    unfinished.replace(out / "summary.json")


def _on_mesh(local: Callable, config: TrainConfig, mesh: Mesh, graph, parts: tuple, out_specs) -> Callable:
    """`local(config, graph, (params' and gradients' shardings), params, batch)`, on every device's own part."""
    params_at, grads_at, _ = parts

    def on_one_device(params: Tree, batch: dict[str, Array]):
        return local(config, graph, hold(_host_layers(params, config.memory), params_at, grads_at), batch)

    return jax.shard_map(on_one_device, mesh=mesh, in_specs=(_specs(params_at), token_spec(mesh)), out_specs=out_specs)


def _loss_and_grads(
    config: TrainConfig, graph, stored: Tree, batch: dict[str, Array]
) -> tuple[Array, Tree, Array, Array | None]:
    """(mean loss over the labels of the global batch, its gradient, their number, Σg² of gradients on the host), micro-batch by
    micro-batch.

    The mean is one sum over one count. Each device differentiates its own share of it; `Unshard` adds the shares up.
    """
    tokens = lax.psum(batch["weights"].sum(), _axes(config))
    pieces = jax.tree.map(lambda x: (x.piece, x.squares), stored, is_leaf=_is_stored)

    def share(pieces: Tree, micro: dict[str, Array]) -> Array:
        def own(x: Stored, new: tuple[Array, Array | None]) -> Stored:
            return dataclasses.replace(x, piece=new[0], squares=new[1])

        held = jax.tree.map(own, stored, pieces, is_leaf=_is_stored)
        return _local_loss(config, nnx.merge(graph, held), micro) / jnp.maximum(tokens, 1)

    def add(total: tuple[Array, Tree], micro: dict[str, Array]) -> tuple[tuple[Array, Tree], None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(share)(pieces, micro)), None

    if config.accumulation == 1:
        loss, grads = jax.value_and_grad(share)(pieces, batch)
    else:
        micros = jax.tree.map(lambda x: x.reshape(config.accumulation, -1, *x.shape[1:]), batch)
        zeros = jax.tree.map(lambda x: varying_like(jnp.zeros(x.shape, x.dtype), x), pieces)
        start = varying_like(jnp.zeros((), jnp.float32), batch["weights"])
        (loss, grads), _ = lax.scan(add, (start, zeros), micros)

    def squared(x: Stored, new: tuple[Array, Array | None]) -> Array | None:
        """over all devices: of pieces each has its own, of what is not divided all have the same"""
        return None if new[1] is None else new[1].sum() if x.dim is None else lax.psum(new[1].sum(), x.axes)

    squares = jax.tree.leaves(jax.tree.map(squared, stored, grads, is_leaf=_is_stored))
    grads = jax.tree.map(lambda _, new: new[0], stored, grads, is_leaf=_is_stored)
    return lax.psum(loss, _axes(config)), grads, tokens, jnp.stack(squares).sum() if squares else None


def _summed_loss(config: TrainConfig, graph, stored: Tree, batch: dict[str, Array]) -> tuple[Array, Array]:
    loss = _local_loss(config, nnx.merge(graph, stored), batch)
    return lax.psum(loss, _axes(config)), lax.psum(batch["weights"].sum(), _axes(config))


def _local_loss(config: TrainConfig, model: Transformer, batch: dict[str, Array]) -> Array:
    """The summed loss of this device's tokens. The mask is prepared here, once for all layers."""
    ids, ring = batch.get("segment_ids"), config.mesh.ring
    if ids is not None:
        ids = lax.all_gather(ids, _axes(config)[1:], axis=1, tiled=True)
    window = config.model.local_window_size
    mask = None
    if ring == 1:
        mask = make_mask(
            config.data.seq_len,
            is_causal=config.model.is_causal,
            local_window_size=None if window is None else (window, 0 if config.model.is_causal else window),
            segment_ids=ids,
        )
    elif ids is not None and config.balanced:  # each turn makes masks of its own, from ids in the sequence's order
        ids = ids[:, np.argsort(token_order(config.data.seq_len, ring))]
    features = model.features(
        batch["tokens"], positions=batch["positions"], mask=mask, segment_ids=ids if mask is None else None
    )
    return token_losses(model, features, batch["labels"], batch["weights"], tile=config.memory.loss_tile)


def _axes(config: TrainConfig) -> tuple[str, ...]:
    """The mesh's axes, as `make_mesh` names them."""
    return (DATA, SEQ) if config.mesh.ring == 1 else (DATA, RING, SEQ)


def _specs(shardings: Tree) -> Tree:
    return jax.tree.map(lambda s: s.spec, shardings)


def _is_stored(x: Any) -> bool:
    return isinstance(x, Stored)
