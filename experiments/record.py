"""Result files: what was measured, on what, with which versions, at which commit.

A file holds `name`, `commit`, `date`, `device`, `versions`, `command` and `rows`; each row `case`, `metric`, `unit`, `ours` and
`peers` (name → value).
"""

import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

__all__ = ["row", "save"]

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "nvidia-cudnn-cu13", "nvidia-nccl-cu13", "torch")


def row(case: str, metric: str, unit: str, ours: Any, **peers: Any) -> dict:
    """One measured figure, or a list of them, and what the peers gave in the same run."""
    return {"case": case, "metric": metric, "unit": unit, "ours": ours, "peers": peers}


def save(name: str, rows: list[dict], folder: Path, **more) -> Path:
    """Write `folder/name.json`. The commit is git's, or ULYSSES_COMMIT where the code was copied without its history."""
    devices = jax.devices()
    arguments = " ".join(sys.orig_argv[1:])
    content = {
        "name": name,
        "commit": os.environ.get("ULYSSES_COMMIT")
        or _git("rev-parse", "HEAD") + ("-dirty" if _git("status", "--porcelain") else ""),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"{len(devices)} × {devices[0].device_kind}",
        "versions": {"python": sys.version.split()[0], **_versions()},
        "command": f"python {arguments}",
        **more,
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()
