"""What a run will need, and what a compiled program sends.

A plan is made in closed form (`costs`), before anything is rented: of the memory policies that fit a GPU it takes the one
predicted to be fastest. Where the CUDA wheels are installed, the real step is compiled for the GPU as a certificate; no GPU is
needed for that.

The communication ledger is read from a program itself.

XLA may add, merge, split or move collectives, so what a step really crosses is read off the optimised HLO: each collective
with the mesh axes it spans, the bytes a device hands to it, how often a step runs it (loops multiply), and where in the source
it comes from.
"""

import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from ulysses_jax import costs
from ulysses_jax.config import DataConfig, MemoryConfig, MeshConfig, ModelConfig, TrainConfig, from_dict, to_dict
from ulysses_jax.memory import HOST
from ulysses_jax.mesh import DATA, RING, SEQ
from ulysses_jax.train import LAYERS, Program, batch_shapes, build
from ulysses_jax.zero import SCOPE

__all__ = ["Crossing", "Plan", "absent_mesh", "certify", "compile_for", "ledger", "longest_plan", "make_plan"]

KINDS = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")
ITEMSIZE = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}

_instruction = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*?)\)(.*)$")
_array = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_called = re.compile(
    r"\b(?:calls|to_apply|branch_computations|true_computation|false_computation)=\{?((?:%?[\w.-]+(?:, )?)+)\}?"
)


@dataclasses.dataclass(frozen=True)
class Crossing:
    """One collective of a compiled program."""

    kind: str
    """one of `KINDS`"""
    axes: tuple[str, ...]
    """mesh axes it spans"""
    operands: tuple[tuple[str, tuple[int, ...]], ...]
    """(type, shape) of each operand, on one device"""
    times: int
    """runs a step"""
    source: str
    """jax's name for the operation"""

    @property
    def is_exchange(self) -> bool:
        """Whether it carries heads, where ZeRO's all-to-alls carry parameters and their gradients."""
        return self.kind == "all-to-all" and SCOPE not in re.split(r"[/()]", self.source)

    @property
    def bytes(self) -> int:
        """Bytes of its operands on one device, once."""
        return sum(_itemsize(dtype) * math.prod(shape) for dtype, shape in self.operands)

    def bytes_sent(self, mesh: Mesh) -> float:
        """Bytes that leave a device in one run, by the least that any algorithm needs."""
        n = math.prod(mesh.shape[axis] for axis in self.axes)
        share = {"all-to-all": (n - 1) / n, "all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "reduce-scatter": (n - 1) / n}
        return self.bytes * share.get(self.kind, 1.0)


def ledger(program: str, mesh: Mesh) -> list[Crossing]:
    """Every collective of an optimised HLO module, in program order.

    Args:
      program: `compiled.as_text()`.
      mesh: the mesh it was compiled for.

    Raises:
      ValueError: a loop with a collective in it whose number of turns the program does not tell.
    """
    computations, entry = _computations(program)
    return list(_walk(computations, entry, 1, mesh))


def _walk(computations: dict[str, list[re.Match]], name: str, times: int, mesh: Mesh) -> Iterator[Crossing]:
    types = {match[1]: match[2] for match in computations[name]}
    for match in computations[name]:
        kind, operands, rest = match[3].removesuffix("-start"), match[4], match[5]
        if kind in KINDS and not match[3].endswith("-done"):
            names = [operand.split()[-1].lstrip("%") for operand in operands.split(",") if operand.strip()]
            arrays = tuple(found for operand in names for found in _arrays(types[operand]))
            yield Crossing(kind, _axes(rest, mesh), arrays, times, _source(rest))
        elif kind == "while":
            body = re.search(r"body=%?([\w.-]+)", rest)
            turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
            assert body is not None
            inside = list(_walk(computations, body[1], times * (int(turns[1]) if turns else 1), mesh))
            if inside and turns is None:
                raise ValueError(f"the program runs {inside[0].kind} in a loop of unknown length ({inside[0].source}).")
            yield from inside
        elif kind != "fusion":
            for called in _called.findall(rest):
                for inner in called.split(", "):
                    if inner.lstrip("%") in computations:
                        yield from _walk(computations, inner.lstrip("%"), times, mesh)


def _computations(program: str) -> tuple[dict[str, list[re.Match]], str]:
    """The instructions of each computation, and the entry's name."""
    found: dict[str, list[re.Match]] = {}
    entry, current = "", []
    for line in re.sub(r"/\*.*?\*/", "", program).splitlines():
        if header := re.match(r"^(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            current = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif match := _instruction.match(line):
            current.append(match)
    return found, entry


def _axes(attributes: str, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which a collective's groups run, from any of the three forms in which HLO writes them."""
    if named := re.search(r"replica_groups=mesh\[.*?\] ?\{(.*?)\}", attributes):
        return tuple(axis for axis in mesh.axis_names if f"'{axis}'" in named[1])
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        dims = [int(n) for n in iota[3].split(",")]
        order = [int(n) for n in iota[4].split(",")] if iota[4] else range(len(dims))
        group = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(int(iota[1]), int(iota[2]))[0]
    elif listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", attributes):
        group = np.array([int(n) for n in listed[1].split(",")])
    else:
        return mesh.axis_names
    places = np.stack(np.unravel_index(group, mesh.devices.shape))
    return tuple(axis for axis, along in zip(mesh.axis_names, places, strict=True) if len(set(along.tolist())) > 1)


def _arrays(types: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _array.findall(types)]


def _itemsize(dtype: str) -> int:
    return ITEMSIZE.get(dtype) or max(1, int("".join(filter(str.isdigit, dtype)) or 8) // 8)


def _source(attributes: str) -> str:
    named = re.search(r'op_name="([^"]*)"', attributes)
    return named[1] if named else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that fits, in bytes and seconds a device."""

    gpu: costs.Gpu
    config: TrainConfig
    host_limit: float
    """bytes of the host's memory for each device"""

    @property
    def device(self) -> dict[str, float]:
        """bytes on the device, by part"""
        return costs.device_bytes(self.config)

    @property
    def host(self) -> dict[str, float]:
        """bytes in the host's pinned memory, by part"""
        return costs.host_bytes(self.config)

    @property
    def wire(self) -> dict[str, float]:
        """bytes that leave the device in a step, by part"""
        return costs.wire_bytes(self.config)

    @property
    def host_traffic(self) -> dict[str, float]:
        """bytes between the device and the host in a step, by part; their time is at `gpu.host_bytes_per_s`"""
        return costs.host_traffic(self.config)

    @property
    def seconds(self) -> dict[str, float]:
        """of a step, by part; "step" is the whole"""
        return costs.step_seconds(self.config, self.gpu)

    @property
    def fits(self) -> bool:
        return sum(self.device.values()) <= self.gpu.memory_bytes and sum(self.host.values()) <= self.host_limit

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        parts = {"device_bytes": self.device, "host_bytes": self.host, "wire_bytes": self.wire, "seconds": self.seconds}
        parts |= {"host_traffic_bytes": self.host_traffic, "host_bytes_per_s": self.gpu.host_bytes_per_s}
        return {
            "gpu": self.gpu.name,
            "memory_bytes": self.gpu.memory_bytes,
            "fits": self.fits,
            **parts,
            "config": to_dict(self.config),
        }


def policies(num_layers: int) -> Iterator[MemoryConfig]:
    """Every policy worth trying."""
    kinds: list[dict[str, Any]] = [
        {"save": save, "save_layers": f} | ({"save_others": "attention"} if f < 1 else {})  # of no others at 1
        for save in ("products", "projections")
        for f in (1, 0.5, 0.25)
    ]
    kinds += [{"save": "attention", "save_layers": f} for f in (1, 0.75, 0.5, 0.25)] + [{"save": "inputs"}]
    kinds += [{"save": save, "save_layers": 1, "offload_late": True} for save in ("products", "projections")]
    states = ((False, False), (True, False), (True, True))
    for kind, sent, tile, (optimizer, params) in itertools.product(kinds, (0, 0.25, 0.5, 0.75, 1), (None, 8192), states):
        if (tile and kind["save"] == "products") or ("offload_late" in kind and not sent):
            continue
        if params and (kind.get("save_layers", 1) != 1 or (sent not in (0, 1) and kind["save"] != "inputs")):
            continue
        memory = MemoryConfig(**kind, offload_layers=sent, mlp_tile=tile, offload_optimizer=optimizer, offload_params=params)
        try:
            memory.group(num_layers)
        except ValueError:  # a fraction that this depth does not have
            continue
        yield memory


def make_plan(model: ModelConfig, gpu: costs.Gpu, devices: int, length: int, *, host_limit: float) -> Plan | None:
    """The fastest policy that fits, of equals the one with most room; None if none does.

    All devices are along the sequence, of which a step takes one.
    """
    plans, kernel = [], _kernel(gpu, model)
    for memory in policies(model.num_layers):
        data = DataConfig(seq_len=length, batch_size=1, mask_documents=False)
        config = TrainConfig(model=model, mesh=MeshConfig(seq=devices), data=data, memory=memory, implementation=kernel)
        plan = Plan(gpu=gpu, config=config, host_limit=host_limit)
        if plan.fits:
            plans.append(plan)
    return min(plans, key=lambda p: (p.seconds["step"], sum(p.host.values()), sum(p.device.values())), default=None)


def _kernel(gpu: costs.Gpu, model: ModelConfig) -> Any:
    """The implementation of attention that the plan is for, without documents, to be named to the run: on Hopper GPUs the
    Pallas kernels for every head that they have, which `attention.resolve` takes by itself for those of 64 and 128.
    """
    if model.dtype != "bfloat16" or model.head_dim > max(costs.KERNEL_HEAD_DIMS):
        return "xla"
    if "A100" not in gpu.name:
        return "pallas"
    lacks = model.logits_soft_cap is not None or model.attention_sinks or model.head_dim > 128 or model.head_dim % 8 != 0
    lacks |= model.local_window_size is not None and not model.is_causal
    return "xla" if lacks else "cudnn"


def longest_plan(model: ModelConfig, gpu: costs.Gpu, devices: int, *, host_limit: float) -> Plan | None:
    """The plan of the longest sequence that fits, to a multiple of 4,096 tokens a device; None if not even that does."""
    unit = 4096 * devices
    best, low, high = None, 0, 1
    while (plan := make_plan(model, gpu, devices, high * unit, host_limit=host_limit)) is not None and high < 2**20:
        best, low, high = plan, high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        plan = make_plan(model, gpu, devices, middle * unit, host_limit=host_limit)
        best, low, high = (plan, middle, high) if plan else (best, low, middle)
    return best


# Figures of NVIDIA's datasheets and of the CUDA programming guide; memory is told so that XLA, which without a device schedules
# for 80 % of it, schedules for the 0.94 that jax is let take of a real one.
_TOPOLOGY = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {fpus}
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 clock_rate_ghz: {clock}
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: 0 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""
_HOPPER = {"cores": 132, "fpus": 128, "shared": 233472, "optin": 232448, "clock": 1.98, "cache": 52428800, "major": 9}
_AMPERE = {"cores": 108, "fpus": 64, "shared": 167936, "optin": 166912, "clock": 1.41, "cache": 41943040, "major": 8}
_CHIPS = {
    "h100": _HOPPER | {"bandwidth": 3352320000000},
    "h200": _HOPPER | {"bandwidth": 4800000000000},
    "a100": _AMPERE | {"bandwidth": 2039000000000},
}


def absent_mesh(gpu: str, *, data: int = 1, seq: int = 1, ring: int = 1) -> Mesh:
    """`make_mesh` of GPUs (`costs.GPUS`) that need not be there; needs jax's CUDA wheels."""
    from jax.experimental import topologies

    n, chip = data * ring * seq, costs.GPUS[gpu]
    told = _TOPOLOGY.format(**_CHIPS[gpu], name=chip.name, memory=int(chip.memory_bytes / 0.8))
    topology = topologies.get_topology_desc(gpu, "cuda", target_config=told, topology=f"1x1x{n}")
    sizes = {DATA: data, RING: ring, SEQ: seq} if ring > 1 else {DATA: data, SEQ: seq}
    return Mesh(np.array(topology.devices[:n]).reshape(*sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def compile_for(program: Program, **options: Any) -> jax.stages.Compiled:
    """A training step, compiled for devices that need not be there.

    Such devices do not know their kinds of memory, and jax drops the kinds of its arguments; here they are written back.
    """
    batch = batch_shapes(program.config, program.mesh)
    lowered = program.step.lower(program.abstract, batch)
    if program.config.memory.offload_optimizer:
        from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]

        paths = jax.tree_util.tree_leaves_with_path((program.abstract, batch))
        away = ("opt_state", f"params.{LAYERS}") if program.config.memory.offload_params else ("opt_state",)
        names = [jax.tree_util.keystr(path[1:], simple=True, separator=".") for path, _ in paths]
        kinds = [HOST if x.ndim and name.startswith(away) else "device" for name, (_, x) in zip(names, paths, strict=True)]
        module: Any = lowered.compiler_ir()
        main = next(op for op in module.body.operations if op.attributes["sym_name"].value == "main")
        with module.context:
            attributes = [{a.name: a.attr for a in ir.DictAttr(x)} for x in ir.ArrayAttr(main.attributes["arg_attrs"])]
            for own, kind in zip(attributes, kinds, strict=True):
                own["mhlo.memory_kind"] = ir.StringAttr.get(kind)
            main.attributes["arg_attrs"] = ir.ArrayAttr.get([ir.DictAttr.get(own) for own in attributes])
    return lowered.compile(**options)


def certify(plan: Plan) -> dict[str, float]:
    """What the compiler says that the plan's step takes: bytes on the device and on the host, and seconds to compile.

    It compiles in a process of its own, because this one may have begun to use other devices.

    Raises:
      ValueError: jax's CUDA wheels are not installed, or the step does not compile.
    """
    gpu = next(key for key, value in costs.GPUS.items() if value.name == plan.gpu.name)
    code = "import sys; from ulysses_jax.plan import _certificate; _certificate(*sys.argv[1:])"
    child = subprocess.run(
        [sys.executable, "-c", code, gpu, json.dumps(to_dict(plan.config))],
        env={**os.environ, "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_PLATFORMS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"^certificate (.*)$", child.stdout, re.MULTILINE)
    if found is None:
        why = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(
            f"the step could not be compiled for {plan.gpu.name} ({why[:200]}). It needs jax's CUDA wheels: "
            "pip install 'jax[cuda13]'. Leave out --compile for the closed form alone."
        )
    return json.loads(found[1])


def _certificate(gpu: str, text: str) -> None:
    """In the child: compile, and print what `certify` answers."""
    import time

    config = from_dict(json.loads(text))
    program = build(config, absent_mesh(gpu, **dataclasses.asdict(config.mesh)))
    start = time.perf_counter()
    memory = compile_for(program).memory_analysis()
    assert memory is not None
    answer = {
        "device_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "host_bytes": memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        "compile_seconds": time.perf_counter() - start,
    }
    print("certificate", json.dumps(answer), flush=True)
