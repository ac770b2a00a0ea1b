"""What a run leaves and tells: its folder, a live line on the terminal, trackers, a figure and a summary.

    config.json     the resolved config, and a hash of the corpus
    metrics.jsonl   one object a logged step
    checkpoints/    see checkpoint.py
    summary.json    written last: a folder that has one is complete
    loss.png

Only process 0 of a run writes or tells anything.
"""

import dataclasses
import importlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from ulysses_jax.config import TrainConfig, to_dict

__all__ = [
    "Metrics",
    "Reporter",
    "claim",
    "conclude",
    "describe",
    "draw_losses",
    "read_metrics",
    "read_summary",
    "reporting",
    "show",
]

type Metrics = dict[str, float]


# What may change between a run and its continuation: where it runs and what it tells, not what it computes.
MAY_CHANGE = {
    "mesh",
    "zero_stage",
    "implementation",
    "accumulation",
    "memory",
    "model.head_chunks",  # memory too, and mesh.seq bounds it
    "checkpoint",
    "log_every",
    "eval_every",
    "eval_batches",
    "tensorboard",
    "wandb",
}


def claim(out: Path, config: TrainConfig, corpus: str, *, write: bool = True) -> None:
    """Make `out` this run's folder, or make sure that it already is. Nothing in it is changed unless it is new.

    Args:
      out: the folder.
      config: the resolved config.
      corpus: hash of the corpus.
      write: whether this process may write.

    Raises:
      ValueError: a folder that holds something else, another run, or a config.json that cannot be read; a new folder for a
        run whose tracker is not installed or has no login.
    """
    path, unfinished = out / "config.json", out / "config.tmp"
    if not path.exists():
        occupied = out.exists() and (not out.is_dir() or any(p != unfinished for p in out.iterdir()))
        if occupied and not path.exists():  # looked for again: meanwhile the process that writes may have claimed the folder
            raise ValueError(f"--out {out} is occupied and is no run of ulysses (it has no config.json); name another folder.")
    if not path.exists():
        if write:
            _check_trackers(config)  # here too, so that what is refused leaves no folder
            try:
                out.mkdir(parents=True, exist_ok=True)
                text = json.dumps({"config": to_dict(config), "corpus": corpus}, indent=2)
                unfinished.write_text(text + "\n")
                unfinished.replace(path)
            except OSError as error:
                raise ValueError(f"--out {out} cannot be written ({error.strerror}); name a folder that can.") from None
        return
    try:
        stored = json.loads(path.read_text())
        before, corpus_before = dict(stored["config"]), stored["corpus"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"--out {out} is damaged: {path} cannot be read. Restore that file, or name another folder.") from None
    now = json.loads(json.dumps(to_dict(config)))
    if changed := _differences(before, now):
        name, was, is_now = changed[0]
        raise ValueError(
            f"--out {out} holds another run: there {name} is {was!r}, here {is_now!r}"
            + (f" (and {len(changed) - 1} more differ)" if len(changed) > 1 else "")
            + ". Name another folder, or give the same values to go on with it."
        )
    if corpus_before != corpus:
        raise ValueError(
            f"--out {out} was trained on other files than data.source {config.data.source!r} now holds (their names or sizes "
            "changed), so its order of tokens cannot go on. Restore the files, or name another folder."
        )


def read_summary(out: Path) -> Metrics | None:
    """The summary of a complete run, None of any other.

    Raises:
      ValueError: a summary.json that cannot be read.
    """
    path = out / "summary.json"
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text())
        return {name: float(summary[name]) for name in {"step": 0, "eval_loss": 0} | summary}
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"--out {out} is damaged: {path} cannot be read. Remove that file to have it made again.") from None


def describe(summary: Metrics) -> str:
    """A summary in a line."""
    text = f"held-out loss {summary['eval_loss']:.4f} nats a token"
    if "eval_bits_per_byte" in summary:
        text += f" = {summary['eval_bits_per_byte']:.3f} bits a byte; the bytes' own unigram entropy is "
        text += f"{summary['unigram_bits_per_byte']:.3f} bits"
    return text


def conclude(console: Console, out: Path, summary: Metrics) -> None:
    """A complete run's summary as a small table."""
    rows = {"steps": f"{summary['step']:.0f}"}
    for name, key, form in (
        ("training loss, last step", "loss", "{:.4f} nats a token"),
        ("held-out loss", "eval_loss", "{:.4f} nats a token"),
        ("held-out bits a byte", "eval_bits_per_byte", "{:.3f}"),
        ("the bytes' own unigram entropy", "unigram_bits_per_byte", "{:.3f} bits"),
        ("speed, median", "tokens_per_s", "{:,.0f} tokens/s"),
    ):
        if key in summary:
            rows[name] = form.format(summary[key])
    show(console, f"{out} is complete", rows | {"curve": "loss.png"})


def _differences(before: dict, now: dict, prefix: str = "") -> list[tuple[str, object, object]]:
    """(name, was, is) of every field that differs and may not."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        name, was, is_now = prefix + key, before.get(key), now.get(key)
        if name in MAY_CHANGE or was == is_now:
            continue
        if isinstance(was, dict) and isinstance(is_now, dict):
            found += _differences(was, is_now, name + ".")
        else:
            found.append((name, was, is_now))
    return found


@dataclasses.dataclass(frozen=True)
class Reporter:
    """Where the metrics of each logged step go."""

    console: Console
    write: Callable[[Metrics], None]
    advance: Callable[[int], None]

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)


@contextmanager
def reporting(config: TrainConfig, out: Path, console: Console, *, first_step: int, speaks: bool) -> Iterator[Reporter]:
    """A reporter for the steps from `first_step` on; logged steps at or after it, left by an interrupted run, are dropped.

    Raises:
      ValueError: a tracker is asked for whose package is not installed, or which cannot be reached.
    """
    if not speaks:
        yield Reporter(Console(quiet=True), lambda metrics: None, lambda step: None)
        return
    trackers = _trackers(config, out)
    path = out / "metrics.jsonl"
    kept = [line for line in read_metrics(path) if line["step"] <= first_step]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    bar = Progress(
        BarColumn(bar_width=15),
        MofNCompleteColumn(),
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
        disable=not console.is_terminal,
    )
    with bar, path.open("a", buffering=1) as file:
        task = bar.add_task("compiling", total=config.steps, completed=first_step)

        def write(metrics: Metrics) -> None:
            file.write(json.dumps(metrics) + "\n")
            for track in trackers:
                track(metrics)
            text = _line(metrics)
            bar.update(task, description=text)
            if not console.is_terminal:
                console.print(f"step {metrics['step']:>6}/{config.steps}  {text}", highlight=False)

        yield Reporter(console, write, lambda step: bar.update(task, completed=step))


def read_metrics(path: Path) -> list[Metrics]:
    """The lines of a `metrics.jsonl`, up to one that a crash cut short or damaged."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
            float(line["step"])
        except (ValueError, TypeError, KeyError):
            break
        lines.append(line)
    return lines


def draw_losses(metrics: list[Metrics], path: Path, *, baseline: tuple[str, float] | None = None) -> None:
    """Training and held-out loss over steps, in bits a token, with an optional labelled level to compare with."""
    from matplotlib.figure import Figure  # slow to import, used once

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    bits = 1 / math.log(2)
    for key, style, label in (("loss", "-", "training"), ("eval_loss", "o", "held out")):
        points = [(line["step"], line[key] * bits) for line in metrics if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    if baseline:
        axes.axhline(baseline[1], color="gray", linestyle="--", label=baseline[0])
    axes.set(xlabel="step", ylabel="loss, bits a token")
    axes.legend()
    figure.savefig(path, dpi=150)


def show(console: Console, title: str, rows: dict[str, str]) -> None:
    """Names and values as a small table."""
    table = Table("", Column(overflow="fold"), title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table, highlight=False)


def _line(metrics: Metrics) -> str:
    parts = [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else [f"held-out loss {metrics['eval_loss']:.4f}"]
    if "tokens_per_s" in metrics:
        parts.append(f"{metrics['tokens_per_s']:,.0f} tokens/s")
        parts.append(f"{metrics['model_tflops_per_device']:.4g} TFLOP/s/device")
    if "utilization" in metrics:
        parts.append(f"{metrics['utilization']:.0%} of peak")
    return "  ".join(parts)


def _check_trackers(config: TrainConfig) -> None:
    """Refuse a tracker whose package is not installed or has no login. Nothing is written for it."""
    for name, module in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        if value := getattr(config, name):
            try:
                importlib.import_module(module)
            except ModuleNotFoundError:
                package = module.lower()
                raise ValueError(
                    f"{name} is {value!r}, which needs the package {package}: pip install {package}, or leave it out."
                ) from None
    if config.wandb:
        import wandb  # pyright: ignore[reportMissingImports]

        try:
            wandb.login(verify=False)  # finds a key or asks for one; whether the server takes it is asked when the run opens
        except wandb.Error as error:
            raise _no_wandb(config, error) from None


def _no_wandb(config: TrainConfig, error: Exception) -> ValueError:
    said = " ".join(str(error).split()).removesuffix(".")
    return ValueError(
        f"wandb is {config.wandb!r}, but Weights & Biases cannot be used ({said}). Run wandb login, set WANDB_MODE=offline, "
        "or leave it out."
    )


def _trackers(config: TrainConfig, out: Path) -> list[Callable[[Metrics], None]]:
    _check_trackers(config)
    trackers = []
    if config.tensorboard:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

        board = SummaryWriter(str(out / "tensorboard"))
        trackers.append(lambda m: [board.add_scalar(k, v, int(m["step"])) for k, v in m.items() if k != "step"])
    if config.wandb:
        import wandb  # pyright: ignore[reportMissingImports]

        try:
            run = wandb.init(project=config.wandb, name=out.name, dir=str(out), config=to_dict(config), resume="allow")
        except wandb.Error as error:
            raise _no_wandb(config, error) from None
        trackers.append(lambda m: run.log({k: v for k, v in m.items() if k != "step"}, step=int(m["step"])))
    return trackers
