"""The command line: a thin door to the library.

ulysses train RECIPE --out DIR [--field value …]
ulysses train --list
"""

import dataclasses
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.logging import RichHandler

from ulysses_jax import costs, recipes, runtime
from ulysses_jax.config import TrainConfig
from ulysses_jax.report import show

__all__ = ["main"]

USAGE = """usage: ulysses train RECIPE [--out DIR] [--dry-run] [--field value …]
       ulysses train RECIPE --help     every field, with its value in this recipe
       ulysses train --list            the recipes"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Train a recipe, or go on with it where it stopped."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    out: Path
    """the run's folder"""
    dry_run: bool = False
    """print shapes, parameter counts and bytes a device, and stop"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; answers the exit status: 0 done, 2 refused, 130 interrupted (saved, can go on)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    console = Console()
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_path=False, show_time=False)],
    )
    logging.getLogger("ulysses_jax").setLevel(logging.INFO)
    try:
        match arguments:
            case [] | ["-h" | "--help"] | ["train"] | ["train", "-h" | "--help"]:
                print(USAGE)
                return 0 if arguments else 2
            case ["train", "--list", *_]:
                list_recipes(console)
                return 0
            case ["train", name, *rest]:
                return train(name, rest, console)
            case [command, *_]:
                raise ValueError(f"there is no command {command!r}; the commands are: train. See ulysses --help.")
    except (ValueError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    raise AssertionError("unreachable")


def list_recipes(console: Console) -> None:
    """Names and first lines of the recipes."""
    show(console, "recipes", {name: (make.__doc__ or "").strip() for name, make in recipes.RECIPES.items()})


def train(name: str, arguments: Sequence[str], console: Console) -> int:
    """`ulysses train`."""
    default = TrainCommand(config=recipes.recipe(name), out=Path("runs") / name)
    command = tyro.cli(TrainCommand, args=list(arguments), default=default, prog=f"ulysses train {name}")
    if command.dry_run:
        dry_run(command.config, console)
        return 0
    runtime.initialize(command.config.mesh.size)
    from ulysses_jax.train import run

    return 0 if run(command.config, command.out, console) is not None else 130


def dry_run(config: TrainConfig, console: Console) -> None:
    """Shapes, parameters and the state's bytes a device; needs no device."""
    counts = costs.parameter_counts(config.model)
    total, n = sum(counts.values()), config.mesh.size
    show(console, "parameters", {**{part: f"{count:,}" for part, count in counts.items()}, "all": f"{total:,}"})
    model, mesh, T, B = config.model, config.mesh, config.data.seq_len, config.data.batch_size
    local, itemsize = B // mesh.data // config.accumulation, 2 if model.dtype == "bfloat16" else 4

    def exchanged(heads: int) -> str:
        mine = max(1, heads // mesh.seq)
        return f"[{local}, {T // mesh.seq}, {heads}, {model.head_dim}] → [{local}, {T}, {mine}, {model.head_dim}]"

    sent = itemsize * costs.exchange_elements(model, batch_size=local, seq_len=T, degree=mesh.seq)
    show(
        console,
        "shapes",
        {
            "mesh": f"data {mesh.data} × seq {mesh.seq} = {n} devices, ZeRO-{config.zero_stage}",
            "tokens [B, T]": f"[{B}, {T}], of which a device holds [{local}, {T // mesh.seq}] a micro-batch",
            "queries a device": exchanged(model.num_heads),
            "keys and values a device": exchanged(model.num_kv_heads),
            "exchanged a layer": f"{_bytes(sent)} a device, forward",
            "model FLOPs a step": f"{costs.step_flops(model, batch_size=B, seq_len=T):.3e}",
        },
    )
    stage = config.zero_stage
    parts = {"parameters": 4 * total / (n if stage >= 3 else 1), "gradients": 4 * total / (n if stage >= 2 else 1)}
    parts["optimizer"] = 8 * total / (n if stage >= 1 else 1)
    parts["layer inputs"] = itemsize * model.num_layers * local * (T // mesh.seq) * model.embed_dim
    show(console, "bytes a device", {**{k: _bytes(v) for k, v in parts.items()}, "all": _bytes(sum(parts.values()))})


def _bytes(count: float) -> str:
    power = min(int(math.log(max(count, 1), 1024)), 4)
    return f"{count / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


if __name__ == "__main__":
    sys.exit(main())
