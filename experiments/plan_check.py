"""The plan's closed form against compiled steps: bytes on the device and on the host, for GPUs that need not be there.

uv run --extra cuda13 python -m experiments.plan_check --out experiments/results
"""

import dataclasses
from pathlib import Path

import tyro

from experiments import record
from ulysses_jax import costs, recipes
from ulysses_jax.config import DataConfig, MemoryConfig, MeshConfig, TrainConfig
from ulysses_jax.plan import Plan, certify

TILED = {"mlp_tile": 8192}
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


def main(options: Check) -> None:
    """Compile each case, print it beside its plan, and record both."""
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
