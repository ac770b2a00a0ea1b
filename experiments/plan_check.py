"""The plan's closed form against compiled steps, for GPUs that need not be there: bytes on the device and on the host.

    uv run --extra cuda13 python -m experiments.plan_check --out experiments/results

Or against steps that were measured: bytes and seconds.

    uv run python -m experiments.plan_check --measured experiments/results/train_*.json
"""

import collections
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

from experiments import bench_train, record
from ulysses_jax import costs, recipes
from ulysses_jax.config import DataConfig, MemoryConfig, MeshConfig, TrainConfig
from ulysses_jax.plan import Plan, certify

TILED = {"mlp_tile": 8192}
ALL_ON_HOST = {"save": "inputs", "offload_layers": 1.0, "offload_optimizer": True, "offload_params": True, **TILED}
CASES = [  # model, devices, length, policy
    ("llama-1.3b", 2, 32768, {"save": "products"}),
    ("llama-1.3b", 2, 131072, {"save": "attention"}),
    ("llama-7b", 2, 32768, {"save": "projections"}),
    ("llama-7b", 2, 65536, {"save": "attention"}),
    ("llama-7b", 2, 65536, {"save": "projections", "offload_layers": 1.0}),
    ("llama-7b", 2, 65536, {"save": "attention", "save_layers": 0.5}),
    ("llama-7b", 2, 131072, {"save": "attention", "offload_layers": 1.0, **TILED}),
    ("llama-7b", 2, 262144, {"save": "attention", "offload_layers": 1.0, **TILED}),
    ("llama-7b", 2, 524288, {"save": "inputs", "offload_layers": 1.0, "offload_optimizer": True, **TILED}),
    ("llama-7b", 2, 327680, ALL_ON_HOST),
    ("llama3-8b", 1, 196608, ALL_ON_HOST),
    ("llama3-8b", 8, 131072, {"save": "attention"}),
    ("llama3-8b", 1, 32768, {"save": "attention", "offload_layers": 1.0, "offload_optimizer": True, **TILED}),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """What to compare."""

    out: Path = Path("experiments/results")
    gpu: str = "h100"
    cases: tuple[int, ...] = ()
    """by number; all by default"""
    measured: tuple[Path, ...] = ()
    """result files of `bench_train` to compare with instead"""


def runs(path: Path) -> Iterator[tuple[str, Plan, dict[str, Any]]]:
    """The cases of a result file of `bench_train`: (case, its plan, what was measured)."""
    content, figures = json.loads(path.read_text()), collections.defaultdict(dict)
    for row in content["rows"]:
        figures[row["case"]][row["metric"]] = row["ours"]
    gpu = next(gpu for gpu in costs.GPUS.values() if gpu.name in content["device"])
    for case, found in figures.items():
        config = bench_train.config_of(case)
        yield case, Plan(gpu=gpu, config=config, host_limit=float("inf")), found


def compare(options: Check) -> None:
    """Each measured case beside its plan; no seconds where only the first step of a process was timed, as it also allocates."""
    rows = []
    for case, plan, found in (run for path in options.measured for run in runs(path) if "step_s" in run[2]):
        peak, bytes_ = found["peak_gib_so_far"] * 2**30, sum(plan.device.values())
        rows.append(record.row(case, "bytes on the device", "bytes for each device", bytes_, measured=peak))
        print(f"{case}: {bytes_ / 2**30:.1f} GiB, measured {peak / 2**30:.1f}", end="")
        if len(found["each_step_s"]) > 1:
            step = plan.seconds["step"]
            rows.append(record.row(case, "step", "s", step, measured=found["step_s"]))
            print(f"; {step:.2f} s, measured {found['step_s']:.2f}: {step / found['step_s']:.3f}", end="")
        print(flush=True)
    record.save("plan_measured", rows, options.out, device="those of the files")


def main(options: Check) -> None:
    """Compile each case, print it beside its plan, and record both."""
    if options.measured:
        compare(options)
        return
    rows, gpu = [], costs.GPUS[options.gpu]
    for i in options.cases or range(len(CASES)):
        model, devices, length, policy = CASES[i]
        config = TrainConfig(
            model=recipes.MODELS[model](),
            mesh=MeshConfig(seq=devices),
            data=DataConfig(seq_len=length, batch_size=1, mask_documents=False),
            memory=MemoryConfig(**policy),  # pyright: ignore[reportArgumentType]
            implementation="pallas",
        )
        plan = Plan(gpu=gpu, config=config, host_limit=float("inf"))
        compiled, case = certify(plan), f"{model} T={length} on {devices} × {options.gpu}: {policy}"
        for where, parts in (("device", plan.device), ("host", plan.host)):
            closed, found = sum(parts.values()), compiled[f"{where}_bytes"]
            rows.append(record.row(case, f"bytes on the {where}", "bytes for each device", closed, compiled=found))
            print(case, where, f"{closed / 2**30:.2f} GiB, compiled {found / 2**30:.2f}", flush=True)
        rows.append(record.row(case, "predicted step", "s", plan.seconds["step"]))
        rows.append(record.row(case, "compile time", "s", compiled["compile_seconds"]))
        record.save("plan_check", rows, options.out, device=f"none; compiled for {gpu.name}")


if __name__ == "__main__":
    main(tyro.cli(Check))
