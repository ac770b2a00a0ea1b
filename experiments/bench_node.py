"""What one node of GPUs does with Llama 3 8B: by length, its longest step, Ulysses beside rings, and from few GPUs to all.

    python -m experiments.bench_node --out experiments/results                   # on the GPUs present
    python -m experiments.bench_node --layers 4 --lengths 32768                  # a model cut in depth, where there are few
    python -m experiments.bench_node --predict --devices 8 --gpu h100            # the plan's figures; needs no GPU

Each case runs under the memory policy that `ulysses plan` chooses for it. A case starts if the time it is predicted to take is
left of `--seconds`, and the result file is written after each, so that a run that is cut off keeps what it has; `--only` runs
the others later.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import tyro

from experiments import record
from experiments.bench_train import UNITS, attempt
from ulysses_jax import costs, recipes
from ulysses_jax.config import DataConfig, MemoryConfig, MeshConfig, OptimizerConfig, TrainConfig
from ulysses_jax.plan import Plan, longest_plan, make_plan
from ulysses_jax.runtime import reserve_memory

GIB = 2**30
COMPILE_S = 40  # what compiling a case takes
PIN_S = 0.9  # a GiB of the host's memory, which a process pins in its first step (`results/train_7b_256k.json`)
SPLIT_LENGTH = 131_072  # of the rings beside Ulysses, and of strong scaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What to run."""

    model: str = "llama3-8b"
    layers: int | None = None
    """fewer layers than the model's"""
    gpu: str = "h100"
    """whose plan chooses the policies: h100, h200 or a100"""
    devices: int | None = None
    """all that are present by default"""
    lengths: tuple[int, ...] = (32_768, 65_536, 131_072, 262_144)
    steps: int = 2
    """timed, after one that is not; of steps longer than a minute one is timed, the first"""
    host_gib: float = 64.0
    """of the host's memory, for each device"""
    seconds: float = 540.0
    """for everything"""
    only: tuple[str, ...] = ()
    """cases whose names hold one of these; all by default"""
    predict: bool = False
    """only the plan's figures"""
    tiny: bool = False
    """small sizes that CPU devices can do"""
    name: str = "node"
    """of the result file"""
    out: Path = Path("experiments/results")


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement: a plan, under a name that says what it is for."""

    name: str
    plan: Plan | None
    """None: nothing that is tried makes it fit"""


def cases(bench: Bench, devices: int) -> Iterator[Case]:
    """The most wanted first."""
    gpu, limit, model = costs.GPUS[bench.gpu], bench.host_gib * GIB, _model(bench)
    lengths = (512, 1024) if bench.tiny else bench.lengths
    split = 512 if bench.tiny else SPLIT_LENGTH
    for T in lengths:
        yield Case(f"T={T}", make_plan(model, gpu, devices, T, host_limit=limit))
    few = [n for n in (1, 2, 4) if n < devices]
    for n in reversed(few[-2:]):
        yield Case(f"T={split} on {n} of the GPUs", make_plan(model, gpu, n, split, host_limit=limit))
    for ring in (2, 4):
        whole = make_plan(model, gpu, devices, split, host_limit=limit)
        if devices % ring == 0 and devices > ring and whole is not None and not bench.predict:  # the plan knows no rings
            mesh = MeshConfig(seq=devices // ring, ring=ring)
            config = dataclasses.replace(whole.config, mesh=mesh)
            yield Case(f"T={split}, Ulysses {mesh.seq} × ring {ring}", dataclasses.replace(whole, config=config))
    if not bench.tiny:
        longest = longest_plan(model, gpu, devices, host_limit=limit)
        million = make_plan(model, gpu, devices, 2**20, host_limit=limit)
        yield Case("a million tokens", million)
        yield Case("the longest that the plan has fit", longest)


def _model(bench: Bench):
    model = recipes.tiny() if bench.tiny else recipes.MODELS[bench.model]()
    heads = {"num_heads": 8, "num_kv_heads": 8, "head_dim": 16} if bench.tiny else {}
    return dataclasses.replace(model, num_layers=bench.layers or model.num_layers, **heads)


def predicted(plan: Plan) -> dict[str, float]:
    """The plan's figures under the names of those that are measured."""
    took = plan.seconds["step"]
    return {
        **costs.rates(plan.config, took, plan.gpu.name),
        "step_s": took,
        "compiled_gib": sum(plan.device.values()) / GIB,
        "compiled_host_gib": sum(plan.host.values()) / GIB,
    }


def _on_cpu(config: TrainConfig) -> TrainConfig:
    """Small and fast to compile, to see that everything runs."""
    return dataclasses.replace(
        config,
        implementation="xla",
        memory=MemoryConfig(),
        data=DataConfig(seq_len=config.data.seq_len, batch_size=1, mask_documents=False),
    )


def main(bench: Bench) -> None:
    """Run the cases, or predict them."""
    start = time.perf_counter()
    if not bench.predict:
        reserve_memory()
    devices = bench.devices or jax.device_count()
    rows: list[dict] = []
    more = {"device": f"none; predicted for {devices} × {costs.GPUS[bench.gpu].name}"} if bench.predict else {}
    for case in cases(bench, devices):
        if bench.only and not any(part in case.name for part in bench.only):
            continue
        if case.plan is None:
            print(f"{case.name}: does not fit, whatever is recomputed or sent to the host", flush=True)
            continue
        config = dataclasses.replace(case.plan.config, optimizer=OptimizerConfig(warmup_steps=2), steps=1000)
        config = _on_cpu(config) if bench.tiny else config
        label = f"{bench.model} L={config.model.num_layers} {case.name} {_policy(config.memory)}"
        foreseen = predicted(case.plan)
        step = foreseen["step_s"]
        how = {"steps": bench.steps, "warmup": 1} if step < 60 else {"steps": 1, "warmup": 0}
        left, runs = bench.seconds - (time.perf_counter() - start), sum(how.values())
        before = COMPILE_S + PIN_S * foreseen["compiled_host_gib"] * config.mesh.size
        if not bench.predict and step * runs + before > left:
            print(f"{label}: not started, {left:.0f} s are left for {before:.0f} s and {runs} × {step:.0f} s", flush=True)
            continue
        found = foreseen if bench.predict else attempt(config, **how)
        for metric, value in found.items():
            peers = {} if bench.predict or metric not in foreseen else {"predicted": foreseen[metric]}
            rows.append(record.row(label, metric, UNITS.get(metric, "1"), value, **peers))
        print(label, json.dumps(found), flush=True)
        record.save(bench.name, rows, bench.out, **more)


def _policy(memory: MemoryConfig) -> str:
    """The fields that are not the defaults."""
    default = MemoryConfig()
    own = {f.name: getattr(memory, f.name) for f in dataclasses.fields(memory)}
    return " ".join(f"{name}={value}" for name, value in own.items() if value != getattr(default, name)) or "the default policy"


if __name__ == "__main__":
    main(tyro.cli(Bench))
