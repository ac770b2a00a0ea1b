r"""Training steps timed: models, lengths and memory policies on the devices present, in one process; tokens are random.

    python -m experiments.bench_train --recipe llama-7b-64k --seq 2 --lengths 32768 65536 \
        --policies save=attention save=inputs,mlp_tile=8192,offload_layers=1 --out experiments/results

A policy is `field=value,…` of `MemoryConfig`. Each length is run with each policy and each implementation of attention; of the
implementations the first is ours, the others are its peers. What does not fit is recorded as 0 tokens/s, with the reason.

Other systems are peers by `--peer deepspeed=FILE`. Such a file holds `rows`, each of a `model` (`recipes.MODELS`), `seq_len`,
`devices` and figures under the names used here, such as `tokens_per_s` and `step_s`, of one sequence a step.
"""

import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments import record
from ulysses_jax import costs, recipes
from ulysses_jax.config import MemoryConfig, MeshConfig, OptimizerConfig, TrainConfig
from ulysses_jax.data import place
from ulysses_jax.mesh import make_mesh
from ulysses_jax.runtime import reserve_memory
from ulysses_jax.train import batch_shapes, build


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What to time."""

    recipe: str = "llama-7b-64k"
    implementations: tuple[str, ...] = ("pallas",)
    lengths: tuple[int, ...] = ()
    """T; the recipe's by default"""
    policies: tuple[str, ...] = ()
    """memory policies, such as save=attention,mlp_tile=8192; the recipe's by default"""
    data: int = 1
    seq: int = 1
    batch_size: int | None = None
    """sequences a step; one for each device along `data` by default"""
    layers: int | None = None
    """fewer or more layers than the recipe's"""
    documents: int = 1
    """packed in each sequence, of equal lengths; cuDNN cannot mask them"""
    steps: int = 5
    """timed"""
    warmup: int = 2
    """steps before those, not timed; 0 where one takes minutes"""
    profile: Path | None = None
    """a folder for a profile of one more step"""
    peer: tuple[str, ...] = ()
    """NAME=FILE, another system's figures of the same cases, measured beside this run"""
    name: str = "train"
    """of the result file"""
    out: Path = Path("experiments/results")
    draw: bool = False
    """only draw the figure, from the result files that hold DeepSpeed's figures"""


def policy(text: str) -> dict[str, Any]:
    """`save=attention,mlp_tile=8192` → fields of `MemoryConfig`."""
    fields = dict(part.split("=", 1) for part in text.split(","))
    words = {"true": True, "false": False, "none": None}

    def value(x: str) -> Any:
        return words[x.lower()] if x.lower() in words else json.loads(x) if x[0].isdigit() else x

    return {name: value(x) for name, x in fields.items()}


def random_batch(config: TrainConfig, documents: int) -> dict[str, np.ndarray]:
    """Random tokens, whose successors are the labels."""
    B, T = config.data.batch_size, config.data.seq_len
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (B, T + 1), dtype=np.int32)
    t = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    length = -(-T // documents)
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "positions": t % length, "weights": np.ones((B, T), np.float32)}
    return batch | ({"segment_ids": t // length + 1} if config.data.mask_documents else {})


def time_steps(
    config: TrainConfig, *, steps: int, warmup: int, documents: int = 1, profile: Path | None = None
) -> dict[str, Any]:
    """The median of `steps` steps after `warmup` others, each waited for; memory, compile time, losses and rates.

    The step is compiled beforehand. Without warm-up the first that is timed also connects the devices to one another.
    """
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    program, start = build(config, mesh), time.perf_counter()
    step = program.step.lower(program.abstract, batch_shapes(config, mesh)).compile()
    compiled, memory = time.perf_counter() - start, step.memory_analysis()
    assert memory is not None
    host = random_batch(config, documents)
    state, batch, seconds, losses = program.init(), place(host, mesh, balanced=config.balanced), [], []
    jax.block_until_ready((state, batch))
    for _ in range(warmup + steps):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
        losses.append(float(metrics["loss"]))
    if profile:
        with jax.profiler.trace(str(profile)):
            state, metrics = step(state, batch)
            jax.block_until_ready(state)
    typical = statistics.median(seconds[warmup:])
    seen = costs.seen_pairs(host["positions"], is_causal=config.model.is_causal, window=config.model.local_window_size)
    peak = max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in mesh.local_devices)
    return {
        **costs.rates(config, typical, mesh.devices.flat[0].device_kind, pairs=seen),
        "step_s": typical,
        "slowest_step_s": max(seconds[warmup:]),
        "each_step_s": seconds,  # warm-up first
        "compile_s": compiled,
        "peak_gib_so_far": peak / 2**30,  # of this process: it only rises from case to case
        "compiled_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
        "compiled_host_gib": (memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes) / 2**30,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


UNITS = {
    "tokens_per_s": "tokens/s",
    "tokens_per_s_per_device": "tokens/s a device",
    "model_tflops_per_device": "TFLOP/s a device",
}
UNITS |= {"step_s": "s", "slowest_step_s": "s", "each_step_s": "s", "compile_s": "s", "peak_gib_so_far": "GiB"}
UNITS |= {"compiled_gib": "GiB", "compiled_host_gib": "GiB", "first_loss": "nats a token", "last_loss": "nats a token"}


def attempt(config: TrainConfig, **how: Any) -> dict[str, Any]:
    """`time_steps`, or 0 tokens/s and the reason."""
    try:
        return time_steps(config, **how)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        return {"tokens_per_s": 0.0, "reason": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:
        gc.collect()


def same_case(peer: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """What a peer's file says of this model, length and number of devices, by our names; {} if nothing."""
    sizes = {"seq_len": config.data.seq_len, "devices": config.mesh.size}
    for row in peer["rows"]:
        known = recipes.MODELS.get(row["model"])
        figures = {metric: row[metric] for metric in UNITS if metric in row}
        if known and known() == config.model and sizes.items() <= row.items() and config.data.batch_size == 1 and figures:
            return figures
    return {}


def cases(bench: Bench) -> Iterator[tuple[str, TrainConfig]]:
    """Each length with each policy, under a name that says all that is not the recipe's."""
    base = recipes.recipe(bench.recipe)
    model = dataclasses.replace(base.model, num_layers=bench.layers or base.model.num_layers)
    for length in bench.lengths or (base.data.seq_len,):
        for text in bench.policies or ("",):
            data = dataclasses.replace(
                base.data, seq_len=length, mask_documents=bench.documents > 1, batch_size=bench.batch_size or bench.data
            )
            config = dataclasses.replace(
                base,
                model=model,
                data=data,
                mesh=MeshConfig(data=bench.data, seq=bench.seq),
                memory=MemoryConfig(**policy(text)) if text else base.memory,
                optimizer=OptimizerConfig(warmup_steps=2),
                steps=1000,
            )
            case = f"{bench.recipe} L={model.num_layers} T={length} B={data.batch_size} data={bench.data} seq={bench.seq} "
            yield case + f"documents={bench.documents} {text or 'as the recipe'}", config


def config_of(case: str) -> TrainConfig:
    """The config that a case and its implementation, as a result file names them, stand for: the inverse of `cases`."""
    recipe, layers, T, B, data, seq, documents, *policy, implementation = case.split()
    number = lambda text: int(text.split("=")[1])  # noqa: E731
    bench = Bench(
        recipe=recipe,
        layers=number(layers),
        lengths=(number(T),),
        batch_size=number(B),
        data=number(data),
        seq=number(seq),
        documents=number(documents),
        policies=() if policy == ["as", "the", "recipe"] else tuple(policy),
    )
    ((_, config),) = cases(bench)
    return dataclasses.replace(config, implementation=implementation)


def draw(folder: Path) -> Path:
    """Bars of tokens/s beside DeepSpeed's, from all result files of training that hold both."""
    import matplotlib.pyplot as plt

    found, devices = [], set()
    for path in sorted(folder.glob("train_*.json")):
        content = json.loads(path.read_text())
        rows = [row for row in content["rows"] if row["metric"] == "tokens_per_s" and row["peers"].get("deepspeed")]
        found += [(row["case"].split(), row["ours"], row["peers"]["deepspeed"]) for row in rows]
        devices |= {content["device"]} if rows else set()
    found.sort(key=lambda row: (row[0][0], int(row[0][2][2:])))
    figure, axis = plt.subplots(figsize=(7, 4))
    for shift, name, column in ((-0.2, "ulysses_jax", 1), (0.2, "DeepSpeed-Ulysses", 2)):
        axis.bar(np.arange(len(found)) + shift, [row[column] for row in found], 0.4, label=name)
    for i, (_, ours, theirs) in enumerate(found):
        axis.annotate(f"{ours / theirs:.2f} ×", (i, max(ours, theirs)), ha="center", va="bottom", fontsize=9)
    labels = [f"{case[0].removeprefix('llama-').rsplit('-', 1)[0].upper()}\n{int(case[2][2:]):,} tokens" for case, *_ in found]
    axis.set_xticks(range(len(found)), labels, fontsize=9)
    axis.set_ylabel("tokens/s")
    axis.set_title(f"Training step, ZeRO-3, bf16, {' and '.join(sorted(devices))}", fontsize=10)
    axis.legend(fontsize=9)
    figure.tight_layout()
    path = folder / "train.png"
    figure.savefig(path, dpi=130)
    return path


def main(bench: Bench) -> None:
    """Time every case asked for, print it, and write it after each, so that a lost machine loses one case."""
    if bench.draw:
        print(draw(bench.out))
        return
    reserve_memory()
    files = {name: json.loads(Path(path).read_text()) for name, path in (text.split("=", 1) for text in bench.peer)}
    about = {name: {key: value for key, value in peer.items() if key != "rows"} for name, peer in files.items()}
    how, rows = {"steps": bench.steps, "warmup": bench.warmup, "documents": bench.documents, "profile": bench.profile}, []
    for case, config in cases(bench):
        figures = {name: same_case(peer, config) for name, peer in files.items()}
        for implementation in bench.implementations:
            figures[implementation] = attempt(dataclasses.replace(config, implementation=implementation), **how)
            print(case, implementation, json.dumps(figures[implementation]), flush=True)
        ours = bench.implementations[0]
        for metric, value in figures[ours].items():
            peers = {other: figures[other][metric] for other in figures if other != ours and metric in figures[other]}
            rows.append(record.row(f"{case} {ours}", metric, UNITS.get(metric, "1"), value, **peers))
        record.save(bench.name, rows, bench.out, **({"peers": about} if about else {}))


if __name__ == "__main__":
    main(tyro.cli(Bench))
