"""Tokens/s of training steps: a recipe, on the devices present, for each implementation of attention asked for.

python -m experiments.bench_train --recipe gpt-1.2b-32k --implementations cudnn --steps 20 --out experiments/results
"""

import dataclasses
import statistics
import time
from pathlib import Path

import jax
import tyro

from experiments import record
from ulysses_jax import costs, recipes
from ulysses_jax.config import MeshConfig, TrainConfig
from ulysses_jax.data import Packing, open_corpus, place
from ulysses_jax.mesh import make_mesh
from ulysses_jax.train import batch_shapes, build


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What to time."""

    recipe: str = "gpt-1.2b-32k"
    implementations: tuple[str, ...] = ("cudnn",)
    seq_len: int | None = None
    """T; the recipe's by default"""
    data: int = 1
    seq: int = 1
    mask_documents: bool = False
    """packed documents; cuDNN cannot mask them"""
    steps: int = 20
    name: str = "train"
    """of the result file"""
    out: Path = Path("experiments/results")


def time_steps(config: TrainConfig) -> dict[str, float]:
    """Train `config.steps` steps; medians over all but the first two, each step waited for."""
    mesh = make_mesh(data=config.mesh.data, seq=config.mesh.seq)
    packing = Packing(open_corpus(config.data).train, config.data, config.model.vocab_size)
    program = build(config, mesh)
    start = time.perf_counter()
    step = program.step.lower(program.abstract, batch_shapes(config, mesh)).compile()
    compiled = time.perf_counter() - start
    state, seconds, losses = program.init(), [], []
    for i in range(config.steps):
        batch = place(packing.batch(i), mesh)
        jax.block_until_ready((state, batch))
        start = time.perf_counter()
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
    typical = statistics.median(seconds[2:])
    tokens = config.data.batch_size * config.data.seq_len
    flops = costs.step_flops(config.model, batch_size=config.data.batch_size, seq_len=config.data.seq_len)
    memory = step.memory_analysis()
    assert memory is not None
    peak = max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in mesh.local_devices)
    return {
        "tokens_per_s": tokens / typical,
        "model_tflops_per_device": flops / typical / mesh.size / 1e12,
        "step_s": typical,
        "compile_s": compiled,
        "peak_gib": peak / 2**30,
        "compiled_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


UNITS = {"tokens_per_s": "tokens/s", "model_tflops_per_device": "TFLOP/s a device", "step_s": "s", "compile_s": "s"}
UNITS |= {"peak_gib": "GiB", "compiled_gib": "GiB", "first_loss": "nats a token", "last_loss": "nats a token"}


def main(bench: Bench) -> None:
    """Time every implementation asked for; the first is ours, the others are its peers."""
    base = recipes.recipe(bench.recipe)
    data = dataclasses.replace(
        base.data, seq_len=bench.seq_len or base.data.seq_len, mask_documents=bench.mask_documents, batch_size=bench.data
    )
    base = dataclasses.replace(base, data=data, mesh=MeshConfig(data=bench.data, seq=bench.seq), steps=bench.steps)
    case = f"{bench.recipe} T={data.seq_len} data={bench.data} seq={bench.seq} remat={base.model.remat}"
    figures = {}
    for implementation in bench.implementations:
        figures[implementation] = time_steps(dataclasses.replace(base, implementation=implementation))
        print(case, implementation, figures[implementation], flush=True)
    first, *others = bench.implementations
    rows = [
        record.row(f"{case} {first}", metric, UNITS[metric], value, **{other: figures[other][metric] for other in others})
        for metric, value in figures[first].items()
    ]
    record.save(bench.name, rows, bench.out)


if __name__ == "__main__":
    main(tyro.cli(Bench))
