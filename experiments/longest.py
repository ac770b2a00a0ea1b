"""How long a sequence may be, compiled and not run: bytes on the device and on the host of whole steps, for absent H100s.

    uv run --extra cuda13 python -m experiments.longest --out experiments/results

What fits is what the compiler says of a step: arguments and temporaries within the memory that jax may take of a GPU
(`costs.GPUS`), and within the host's. Nothing here is a measurement.
"""

import dataclasses
from pathlib import Path
from typing import Any

import tyro

from experiments import record
from ulysses_jax import costs, recipes
from ulysses_jax.config import DataConfig, MemoryConfig, MeshConfig, OptimizerConfig, TrainConfig
from ulysses_jax.plan import Plan, certify

GIB = 2**30
UNIT = 65536
SENT = {"save": "attention", "offload_layers": 1.0, "mlp_tile": 8192}
ALL_ON_HOST = {"save": "inputs", "mlp_tile": 8192, "offload_optimizer": True, "offload_params": True}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on some GPUs of one host."""

    name: str
    model: str
    devices: int
    length: int
    """the only one, or where a search begins"""
    memory: dict[str, Any]
    host_gib: float
    """of all GPUs together"""
    moments: str = "float32"
    chunks: int = 1
    search: bool = False
    """longer and longer by 65,536 tokens, as long as it fits"""


CASES = [
    Case("activations on the host", "llama-7b", 2, 131072, SENT, 240),
    Case("activations on the host", "llama-7b", 2, 262144, SENT, 240),
    Case("all on the host", "llama-7b", 2, 786432, ALL_ON_HOST, 240, chunks=4, search=True),
    Case("all on the host, moments in bfloat16", "llama-7b", 2, 917504, ALL_ON_HOST, 240, "bfloat16", 4, search=True),
    Case("all on the host", "llama3-8b", 1, 196608, ALL_ON_HOST, 120, chunks=4, search=True),
    Case("all on the host, moments in bfloat16", "llama3-8b", 1, 327680, ALL_ON_HOST, 120, "bfloat16", 4, search=True),
]


def plan_of(case: Case, length: int, gpu: costs.Gpu) -> Plan:
    """The case at a length; with parameters on the host as many sixteenths of the tokens' inputs there as it has room for."""
    memory: dict[str, Any] = case.memory | {"offload_layers": 1.0}
    config = TrainConfig(
        model=dataclasses.replace(recipes.MODELS[case.model](), head_chunks=case.chunks),
        mesh=MeshConfig(seq=case.devices),
        data=DataConfig(seq_len=length, batch_size=1, mask_documents=False),
        memory=MemoryConfig(**memory),
        optimizer=OptimizerConfig(moment_dtype=case.moments),  # pyright: ignore[reportArgumentType]
        implementation="pallas",
    )
    limit = case.host_gib * GIB / case.devices
    if config.memory.offload_params:
        host = costs.host_bytes(config)
        room = limit - sum(host.values()) + host["activations"]
        part = min(1.0, max(0, int(16 * room / host["activations"])) / 16)
        config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, offload_layers=part))
    return Plan(gpu=gpu, config=config, host_limit=limit)


def compile_case(case: Case, length: int, gpu: costs.Gpu) -> tuple[list[dict], bool]:
    """Rows of one length, and whether it fits."""
    plan = plan_of(case, length, gpu)
    compiled, memory = certify(plan), plan.config.memory
    device, host = compiled["device_bytes"] / GIB, compiled["host_bytes"] / GIB
    closed = sum(plan.host.values()) / GIB
    if abs(host - closed) > 0.01 * closed:
        raise ValueError(
            f"the program holds {host:.1f} GiB on the host, where the plan has {closed:.1f}: something stayed or doubled."
        )
    fits = compiled["device_bytes"] <= gpu.memory_bytes and host * GIB <= plan.host_limit
    part = f", {memory.offload_layers:g} of the inputs" if memory.offload_params else ""
    text = f"{case.model} on {case.devices} × {gpu.name}, T={length}: {case.name}{part}, {case.chunks} head chunks"
    rows = [
        record.row(text, "on the device, compiled", "GiB a device", round(device, 2), limit=round(gpu.memory_bytes / GIB, 2)),
        record.row(text, "on the host, compiled", "GiB, all devices", round(host * case.devices, 2), limit=case.host_gib),
        record.row(text, "on the device, planned", "GiB a device", round(sum(plan.device.values()) / GIB, 2)),
        record.row(text, "to and from the host", "GiB a device and step", round(sum(plan.host_traffic.values()) / GIB, 1)),
        record.row(
            text, "predicted step", "s", round(plan.seconds["step"], 1), host_gb_per_s_assumed=gpu.host_bytes_per_s / 1e9
        ),
        record.row(text, "fits", "yes or no", fits),
    ]
    print(f"{text}: {device:.2f} GiB, host {host * case.devices:.2f} GiB, {'fits' if fits else 'does not fit'}", flush=True)
    return rows, fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Longest:
    """What to compile."""

    out: Path = Path("experiments/results")
    gpu: str = "h100"
    cases: tuple[int, ...] = ()
    """by number; all by default"""


def main(options: Longest) -> None:
    """Compile each case, searched ones until they do not fit, and record."""
    gpu, rows = costs.GPUS[options.gpu], []
    for i in options.cases or range(len(CASES)):
        case = CASES[i]
        length, fits = case.length, True
        while fits:
            found, fits = compile_case(case, length, gpu)
            rows += found
            record.save(f"longest_compiled_{options.gpu}", rows, options.out, device=f"none; compiled for {gpu.name}, not run")
            length, fits = length + UNIT, fits and case.search


if __name__ == "__main__":
    main(tyro.cli(Longest))
