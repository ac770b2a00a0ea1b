"""The communication ledger: what a compiled program sends, read from the program itself.

XLA may add, merge, split or move collectives, so what a step really crosses is read off the optimised HLO: each collective
with the mesh axes it spans, the bytes a device hands to it, how often a step runs it (loops multiply), and where in the source
it comes from.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

__all__ = ["Crossing", "ledger"]

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
