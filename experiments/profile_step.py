"""Where a training step's time goes on GPUs: seconds by kind of kernel, and how much communication nothing hides.

python -m experiments.bench_train --recipe llama-7b-64k --seq 2 --profile /tmp/profile
python -m experiments.profile_step --folder /tmp/profile --case "7B 64K, 2 GPUs" --out experiments/results
"""

import collections
import dataclasses
import gzip
import json
import re
from pathlib import Path

import tyro

from experiments import record

KINDS = {  # the first that matches names a kernel
    "communication": r"nccl|p2p|all-?gather|all-?to-?all|reduce-?scatter|all-?reduce|permute|sendrecv",
    "attention": r"ulysses_attention|cudnn.*(sdpa|fprop|bprop|flash)|flash|fmha",
    "matmul": r"gemm|cutlass|nvjet|xmma|cublas|wgmma",
    "copies": r"memcpy|transpose|copy|memset",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """What to read and where to write."""

    folder: Path
    """jax.profiler's, of one step"""
    case: str
    name: str = "profile"
    """of the result file"""
    out: Path = Path("experiments/results")


def read(folder: Path) -> list[dict]:
    """The kernels of a profile: name, ts and dur in µs, pid (device), tid (stream)."""
    path = max(folder.glob("plugins/profile/*/*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    on_gpu = [e for e in events if e.get("ph") == "X" and "GPU" in names.get(e["pid"], "")]
    return [e for e in on_gpu if "Stream" in threads.get((e["pid"], e["tid"]), "")]


def kind_of(name: str) -> str:
    """One of `KINDS`, or "elementwise"."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "elementwise")


def by_kind(events: list[dict]) -> dict[str, float]:
    """Seconds of kernels, summed over streams, for each kind on the busiest device."""
    seconds = collections.defaultdict(collections.Counter)
    for event in events:
        seconds[event["pid"]][kind_of(event["name"])] += event["dur"] / 1e6
    return dict(max(seconds.values(), key=lambda counter: sum(counter.values())).most_common()) if seconds else {}


def exposed(events: list[dict]) -> dict[str, tuple[float, float]]:
    """(seconds in which only communication ran, seconds from the first kernel to the last) of two devices.

    "slowest" is the one that computes longest: the others wait for it, and their waiting shows as communication too, though a
    faster link would not shorten it. "waiting longest" is the one with most of it.
    """
    found = []
    for pid in {event["pid"] for event in events}:
        mine = [e for e in events if e["pid"] == pid]
        spans = {True: [], False: []}
        for e in mine:
            spans[kind_of(e["name"]) == "communication"].append((e["ts"], e["ts"] + e["dur"]))
        talking, working = (_union(spans[flag]) for flag in (True, False))
        alone = _length(talking) - _length(_overlap(talking, working))
        whole = max(e["ts"] + e["dur"] for e in mine) - min(e["ts"] for e in mine)
        found.append((_length(working), alone / 1e6, whole / 1e6))
    return {"slowest": max(found)[1:], "waiting longest": max(found, key=lambda device: device[1])[1:]}


def _union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    joined: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def _overlap(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> list[tuple[float, float]]:
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def _length(spans: list[tuple[float, float]]) -> float:
    return sum(end - start for start, end in spans)


def longest(events: list[dict], count: int = 30) -> list[tuple[str, int, float]]:
    """(kernel, runs, seconds) of the kernels that took longest in all, on one device."""
    first = min((event["pid"] for event in events), default=0)
    runs, seconds = collections.Counter(), collections.Counter()
    for event in events:
        if event["pid"] == first:
            runs[event["name"]] += 1
            seconds[event["name"]] += event["dur"] / 1e6
    return [(name, runs[name], total) for name, total in seconds.most_common(count)]


def main(profile: Profile) -> None:
    """Read a profile and record it."""
    events = read(profile.folder)
    rows = [record.row(profile.case, f"{kind}, busiest device", "s", value) for kind, value in by_kind(events).items()]
    for which, (alone, whole) in exposed(events).items():
        rows.append(record.row(profile.case, f"only communication ran, device {which}", "s", alone))
        rows.append(record.row(profile.case, f"first kernel to last, device {which}", "s", whole))
        rows.append(record.row(profile.case, f"exposed communication, device {which}", "share of the step", alone / whole))
    print(*(f"{row['metric']:52} {row['ours']:.4f} {row['unit']}" for row in rows), sep="\n")
    print(*(f"{seconds * 1e3:9.2f} ms {runs:6d} × {name[:130]}" for name, runs, seconds in longest(events)), sep="\n")
    record.save(profile.name, rows, profile.out)


if __name__ == "__main__":
    main(tyro.cli(Profile))
