"""Compile for H100s on a machine that has none: the kernels' registers and spills, a training step's collectives and memory.

    uv run --extra cuda13 python -m experiments.compile_h100 --out experiments/results

Needs the CUDA wheels but no GPU and no driver. What it writes is what the compiler says, never a timing.
"""

import dataclasses
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # no driver here

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import record
from ulysses_jax import recipes
from ulysses_jax.attention import longformer_blocks, make_mask
from ulysses_jax.attention.hopper import HEAD_DIMS, hopper_attention
from ulysses_jax.config import MeshConfig
from ulysses_jax.plan import _computations, absent_mesh, compile_for, ledger
from ulysses_jax.train import build


def h100_mesh(*, data: int = 1, seq: int = 1) -> Mesh:
    """A training mesh of H100s that need not be there."""
    return absent_mesh("h100", data=data, seq=seq)


def compile_step(recipe: str, *, data: int, seq: int, implementation: str, batch_size: int) -> list[dict]:
    """Collectives (runs a step), what is handed to them, and bytes a device of a recipe's training step."""
    config = recipes.recipe(recipe)
    config = dataclasses.replace(
        config,
        mesh=MeshConfig(data=data, seq=seq),
        implementation=implementation,
        data=dataclasses.replace(config.data, batch_size=batch_size, mask_documents=implementation != "cudnn"),
    )
    mesh = h100_mesh(data=data, seq=seq)
    program = build(config, mesh)
    compiled = compile_for(program)
    text, memory = compiled.as_text() or "", compiled.memory_analysis()
    crossings = ledger(text, mesh)
    assert memory is not None
    case = f"{recipe} data={data} seq={seq} {implementation} {config.memory.save}"
    runs, sent = Counter(), Counter()
    for crossing in crossings:
        kind = "ZeRO's all-to-all" if crossing.kind == "all-to-all" and not crossing.is_exchange else crossing.kind
        runs[f"{kind} over {' × '.join(crossing.axes)}"] += crossing.times
        sent[kind] += crossing.times * crossing.bytes
    rows = [record.row(case, f"runs of {name}", "1 a step", count) for name, count in sorted(runs.items())]
    rows += [record.row(case, f"operands of {kind}", "bytes a device and step", count) for kind, count in sorted(sent.items())]
    beside = beside_the_forward_kernel(text)
    rows.append(record.row(case, "gathers and reduce-scatters begun and not done at a forward kernel", "1", beside))
    rows.append(record.row(case, "arguments", "bytes a device", memory.argument_size_in_bytes))
    rows.append(record.row(case, "temporaries", "bytes a device", memory.temp_size_in_bytes))
    return rows


def beside_the_forward_kernel(program: str) -> int:
    """How many gathers and reduce-scatters XLA has scheduled to run beside an attention kernel whose blocks stay to the end.

    NCCL's kernel waits there for one of the multiprocessors that attention keeps, and for the other devices.
    """
    found = 0
    for instructions in _computations(program)[0].values():
        running = set()
        for name, _, kind, operands, rest in (instruction.groups() for instruction in instructions):
            if kind in ("all-gather-start", "reduce-scatter-start"):
                running.add(name)
            elif kind in ("all-gather-done", "reduce-scatter-done"):
                running.discard(operands.split()[-1].lstrip("%"))
            elif kind == "custom-call" and "ulysses_attention_forward" in rest:
                found += len(running)
    return found


KERNELS = {
    "causal": {"is_causal": True},
    "full": {},
    "window": {"is_causal": True, "local_window_size": (4096, 0)},
    "window to both sides": {"local_window_size": (2048, 2048)},
    "documents": {"is_causal": True, "documents": True},
    "grouped heads": {"is_causal": True, "kv_heads": 16},
    "soft cap": {"is_causal": True, "soft_cap": 30.0},
    "blocks": {"is_causal": True, "block_mask": longformer_blocks(8192)},
    "deterministic": {"is_causal": True, "deterministic": True},
}


def compile_kernel(name: str, head_dim: int) -> None:
    """Compile forward and backward of one configuration; ptxas' report goes to standard output."""
    options: dict[str, Any] = dict(KERNELS[name])
    documents, kv_heads = options.pop("documents", False), options.pop("kv_heads", 64)
    soft_cap, deterministic = options.pop("soft_cap", None), options.pop("deterministic", False)
    mesh, T, N = h100_mesh(), 8192, 64  # so many tiles that blocks work off several and the last round is cut
    at = NamedSharding(mesh, PartitionSpec())

    def both(q, k, v, d_out, ids):
        mask = make_mask(T, segment_ids=ids if documents else None, **options)

        def attend(q, k, v):
            return hopper_attention(q, k, v, mask, scale=head_dim**-0.5, logits_soft_cap=soft_cap, deterministic=deterministic)[
                0
            ]

        out, back = jax.vjp(attend, q, k, v)
        return out, back(d_out)

    q, k = (jax.ShapeDtypeStruct((1, T, n, head_dim), jnp.bfloat16, sharding=at) for n in (N, kv_heads))
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32, sharding=at)
    jax.jit(both).lower(q, k, k, q, ids).compile()


def kernel_reports() -> list[dict]:
    """Spilled bytes, registers at launch and serialised products of every kernel configuration, from ptxas."""
    rows = []
    for head_dim in HEAD_DIMS:
        for name in KERNELS:
            child = subprocess.run(
                [sys.executable, "-m", "experiments.compile_h100", "--kernel", name, "--head-dim", str(head_dim)],
                env={**os.environ, "MOSAIC_GPU_DUMP_PTXAS": "1"},
                capture_output=True,
                text=True,
                check=True,
            )
            report = child.stdout + child.stderr
            for part in report.split("Compiling entry function '")[1:]:
                kernel = part.split("_mosaic")[0].removeprefix("ulysses_attention_")
                spilled, used = re.search(r"(\d+) bytes spill stores", part), re.search(r"Used (\d+) registers", part)
                if not kernel.startswith(("forward", "backward")) or spilled is None or used is None:
                    continue
                case = f"H={head_dim} {name}: {kernel}"
                rows.append(record.row(case, "spill stores", "bytes a thread", int(spilled[1])))
                rows.append(record.row(case, "registers at launch", "a thread", int(used[1])))
            serialised = len(re.findall(r"C75\d\d", report))
            rows.append(record.row(f"H={head_dim} {name}", "warnings of serialised wgmma (C75xx)", "1", serialised))
            print(*[f"{r['case']}: {r['metric']} {r['ours']}" for r in rows if f"H={head_dim} {name}" in r["case"]], sep="\n")
    return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compile:
    """What to compile."""

    out: Path = Path("experiments/results")
    steps: bool = True
    """training steps: GPT 1.2B and Llama 3 8B on 8 H100s"""
    kernels: bool = True
    """the attention kernels"""
    kernel: str | None = None
    """only this configuration of the kernels, its report on standard output"""
    head_dim: int = 128


def main(options: Compile) -> None:
    """Compile and record."""
    if options.kernel:
        compile_kernel(options.kernel, options.head_dim)
        return
    if options.kernels:
        record.save("compiled_kernels_h100", kernel_reports(), options.out, device="none; compiled for NVIDIA H100 80GB HBM3")
    if options.steps:
        rows = []
        for recipe, data, seq in (("gpt-1.2b-32k", 2, 4), ("gpt-1.2b-32k", 1, 8), ("llama3-8b-128k", 1, 8)):
            rows += compile_step(recipe, data=data, seq=seq, implementation="pallas", batch_size=data)
            print(*rows[-8:], sep="\n", flush=True)
        record.save("compiled_step_h100", rows, options.out, device="none; compiled for 8 × NVIDIA H100 80GB HBM3")


if __name__ == "__main__":
    main(tyro.cli(Compile))
