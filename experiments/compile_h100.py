"""Compile for H100s on a machine that has none: the kernels' registers and spills, a training step's collectives and memory.

    uv run --extra cuda13 python -m experiments.compile_h100 --out experiments/results

Needs the CUDA wheels but no GPU and no driver. What it writes is what the compiler says, never a timing.
"""

import dataclasses
import os
from collections import Counter
from pathlib import Path

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # no driver here

import numpy as np
import tyro
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from experiments import record
from ulysses_jax import recipes
from ulysses_jax.config import MeshConfig
from ulysses_jax.mesh import DATA, SEQ
from ulysses_jax.plan import ledger
from ulysses_jax.train import batch_shapes, build

# Figures of NVIDIA's H100 SXM5 80 GB datasheet and of the CUDA programming guide for compute capability 9.0.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84978434048
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def h100_mesh(*, data: int = 1, seq: int = 1) -> Mesh:
    """A training mesh of H100s that need not be there."""
    n = data * seq
    topology = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology=f"1x1x{n}")
    return Mesh(np.array(topology.devices[:n]).reshape(data, seq), (DATA, SEQ), axis_types=(AxisType.Auto,) * 2)


def compile_step(recipe: str, *, data: int, seq: int, implementation: str, batch_size: int) -> list[dict]:
    """Collectives (runs a step), bytes handed to all-to-alls, and bytes a device of a recipe's training step."""
    config = recipes.recipe(recipe)
    config = dataclasses.replace(
        config,
        mesh=MeshConfig(data=data, seq=seq),
        implementation=implementation,
        data=dataclasses.replace(config.data, batch_size=batch_size, mask_documents=implementation != "cudnn"),
    )
    mesh = h100_mesh(data=data, seq=seq)
    program = build(config, mesh)
    compiled = program.step.lower(program.abstract, batch_shapes(config, mesh)).compile()
    crossings, memory = ledger(compiled.as_text() or "", mesh), compiled.memory_analysis()
    assert memory is not None
    case = f"{recipe} data={data} seq={seq} {implementation} remat={config.model.remat}"
    runs, sent = Counter(), Counter()
    for crossing in crossings:
        runs[f"{crossing.kind} over {' × '.join(crossing.axes)}"] += crossing.times
        sent[crossing.kind] += crossing.times * crossing.bytes
    rows = [record.row(case, f"runs of {name}", "1 a step", count) for name, count in sorted(runs.items())]
    rows += [record.row(case, f"operands of {kind}", "bytes a device and step", count) for kind, count in sorted(sent.items())]
    rows.append(record.row(case, "arguments", "bytes a device", memory.argument_size_in_bytes))
    rows.append(record.row(case, "temporaries", "bytes a device", memory.temp_size_in_bytes))
    return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compile:
    """What to compile."""

    out: Path = Path("experiments/results")
    steps: bool = True
    """training steps: GPT 1.2B and Llama 3 8B on 8 H100s"""


def main(options: Compile) -> None:
    """Compile and record."""
    if options.steps:
        rows = []
        for recipe, data, seq in (("gpt-1.2b-32k", 2, 4), ("gpt-1.2b-32k", 1, 8), ("llama3-8b-128k", 1, 8)):
            rows += compile_step(recipe, data=data, seq=seq, implementation="cudnn", batch_size=data)
            print(*rows[-8:], sep="\n", flush=True)
        record.save("compiled_step_h100", rows, options.out, device="none; compiled for 8 × NVIDIA H100 80GB HBM3")


if __name__ == "__main__":
    main(tyro.cli(Compile))
