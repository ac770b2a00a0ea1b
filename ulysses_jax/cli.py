"""The command line: a thin door to the library.

ulysses train RECIPE --out DIR [--field value …]
ulysses train --list
"""

import contextlib
import dataclasses
import difflib
import importlib.metadata
import io
import json
import logging
import math
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import jax
import tyro
from rich.console import Console
from rich.logging import RichHandler

from ulysses_jax import costs, recipes, runtime
from ulysses_jax.config import MemoryConfig, MeshConfig, TrainConfig, deal_heads, to_dict
from ulysses_jax.report import show

if TYPE_CHECKING:
    from ulysses_jax.plan import Plan

__all__ = ["main"]

ONE_HOST = 8  # GPUs that a host holds as a rule

USAGE = """usage: ulysses train RECIPE [--out DIR] [--dry-run] [--field value …]
       ulysses train RECIPE --help     every field, with its value in this recipe
       ulysses train --list            the recipes
       ulysses verify RECIPE [--field value …]     is the parallel step what one device computes?
       ulysses export RUN FOLDER [--dtype bfloat16]     a run's weights, as a Hugging Face folder
       ulysses plan --model NAME --gpu h100 --devices 8 [--length T | --longest]     what will it need and take?
       ulysses --version"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Train a recipe, or go on with it where it stopped."""

    config: Annotated[TrainConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands]
    out: Path
    """the run's folder"""
    dry_run: bool = False
    """print shapes, parameter counts and bytes a device, and stop"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigCommand:
    """A command that needs a whole run's config and nothing else."""

    config: Annotated[TrainConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
      the exit status: 0 done, or stopped by SIGTERM and saved; 1 a fault found; 2 refused; 130 stopped by Ctrl-C and saved.
    """
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
                print(USAGE, file=sys.stdout if arguments[-1:] in (["-h"], ["--help"]) else sys.stderr)
                return 0 if arguments[-1:] in (["-h"], ["--help"]) else 2
            case ["--version"]:
                print(importlib.metadata.version("ulysses-jax"))
            case ["train", "--list", *_]:
                list_recipes(console)
            case ["train", name, *rest]:
                return train(name, rest, console)
            case ["verify", name, *rest] if not name.startswith("-"):
                return verify(name, rest, console)
            case ["verify", "-h" | "--help"]:
                print(USAGE)
            case ["verify", *_]:
                raise ValueError(f"verify needs a recipe first; the recipes are {', '.join(recipes.RECIPES)}.")
            case ["plan", *rest]:
                return plan(rest, console)
            case ["export", *rest]:
                export(rest, console)
            case [command, *_]:
                raise ValueError(
                    f"there is no command {command!r}; the commands are: train, verify, plan, export. See ulysses --help."
                )
    except (ValueError, NotImplementedError, OSError) as error:
        if not _is_refusal(error):
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last save", file=sys.stderr)
        return 130
    return 0


def _is_refusal(error: Exception) -> bool:
    """Whether this library raised it, or the file system did; any other error is a bug, and its traceback is wanted."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    ours = frame is not None and Path(frame.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parent)
    return ours or isinstance(error, OSError)


def list_recipes(console: Console) -> None:
    """Names and first lines of the recipes."""
    show(console, "recipes", {name: (make.__doc__ or "").strip() for name, make in recipes.RECIPES.items()})


def train(name: str, arguments: Sequence[str], console: Console) -> int:
    """`ulysses train`."""
    command = _parse(name, arguments)
    if command.dry_run:
        dry_run(command.config, console)
        return 0
    runtime.initialize(command.config.mesh.size)
    runtime.check_memory(name, state_bytes(command.config), command.config.mesh.size)
    if jax.process_index() == 0:
        announce(name, command, console)
    from ulysses_jax.train import run

    with runtime.stopping() as stop:
        if run(command.config, command.out, console, stop=stop) is not None:
            return 0
    return 130 if stop.signal == signal.SIGINT else 0


def state_bytes(config: TrainConfig) -> float:
    """Parameters, gradients and optimizer of one device, those that wait on the host too."""
    held = (costs.device_bytes(config), costs.host_bytes(config))
    return sum(parts[part] for parts in held for part in ("parameters", "gradients", "optimizer"))


def announce(name: str, command: TrainCommand, console: Console) -> None:
    """What is about to run, in two lines."""
    config, parameters = command.config, sum(costs.parameter_counts(command.config.model).values())
    mesh, data = config.mesh, config.data
    console.print(
        f"{name}: {parameters:,} parameters, {config.steps:,} steps of {data.batch_size} sequences × "
        f"{data.seq_len:,} tokens\nmesh {_axes(mesh)} = {mesh.size} devices, ZeRO-{config.zero_stage}, "
        f"run folder {command.out}",
        highlight=False,
        soft_wrap=True,
    )


def _parse(name: str, arguments: Sequence[str], verb: str = "train") -> TrainCommand:
    """The recipe's config with the fields that the arguments name; only `train` has arguments beside them.

    Raises:
      ValueError: no such recipe, no such field, or a value that is not of its field's type.
    """
    whole = TrainCommand(config=recipes.recipe(name), out=Path("runs") / name)
    default = whole if verb == "train" else ConfigCommand(config=whole.config)
    prog, box = f"ulysses {verb} {name}", io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            command, unknown = tyro.cli(
                type(default), args=list(arguments), default=default, prog=prog, return_unknown_args=True
            )
    except SystemExit as stop:
        if stop.code in (0, None):  # --help
            raise
        raise ValueError(f"{_inside(box.getvalue())} See {prog} --help.") from None
    if unknown:
        own = ["--out", "--dry-run"] if verb == "train" else []
        known = [*own, *(f"--{field}" for field in _names(to_dict(command.config)))]
        hint = _close(_spelt(unknown[0]), known) if unknown[0].startswith("-") else " Fields are given as --field value."
        raise ValueError(f"{prog} has no argument {unknown[0]!r}.{hint} See {prog} --help.")
    if isinstance(command, TrainCommand):
        return dataclasses.replace(command, out=command.out.expanduser())  # a shell leaves the ~ of --out=~/run as it is
    return dataclasses.replace(whole, config=command.config)


def _names(fields: dict, prefix: str = "") -> list[str]:
    """Every field of a config as the command line spells it."""
    names = []
    for name, value in fields.items():
        dotted = prefix + name.replace("_", "-")
        if isinstance(value, dict):
            names += _names(value, dotted + ".")
        elif name != "rope_scaling":  # a recipe without one cannot be given one here, field by field
            names.append(dotted)
    return names


def _inside(box: str) -> str:
    """The first paragraph of one of tyro's framed error messages, as a sentence; a frame may be of lines, dashes or nothing."""
    lines = [line.strip(" │|") for line in box.splitlines()[1:]]  # the first is the frame's title
    ruled = "\n".join(line if line.strip("─╰╯-+") else "" for line in lines)
    text = " ".join(ruled.strip().split("\n\n")[0].split())
    for pattern, plainly in (
        (r"^Error parsing (config\S*: )?", ""),  # the config's own refusals name their field
        (r": invalid literal for int\(\) with base 10: (.*)$", r" is \1; it must be a whole number"),
        (r": could not convert string to float: (.*)$", r" is \1; it must be a number"),
        (r"^Missing value for argument '(\S*)'. Expected 1 values$", r"\1 has no value; one must follow it"),
        (r"^invalid choice (\S*) for argument '(\S*)'. Expected one of \((.*)\)$", r"\2 is \1; it must be one of \3"),
    ):
        text = re.sub(pattern, plainly, text.removesuffix("."))
    return text + "."


def verify(name: str, arguments: Sequence[str], console: Console) -> int:
    """`ulysses verify`: a shrunk run on the whole mesh against one device of it."""
    config = _parse(name, arguments, verb="verify").config
    runtime.initialize(config.mesh.size)
    from ulysses_jax.mesh import make_mesh
    from ulysses_jax.verify import expected_exchange
    from ulysses_jax.verify import verify as compare

    verdict = compare(config, make_mesh(**dataclasses.asdict(config.mesh)))
    worst = max(verdict.errors, key=lambda name: verdict.errors[name])
    sent = sum(x.times * x.bytes for x in verdict.crossings if x.is_exchange)
    rows = {
        "mesh": f"{_axes(config.mesh)} = {config.mesh.size} devices, ZeRO-{config.zero_stage}",
        "loss, one device": f"{verdict.loss[0]:.7f}",
        "loss, the mesh": f"{verdict.loss[1]:.7f}",
        "gradients compared": f"{len(verdict.errors)}",
        "worst relative error": f"{verdict.errors[worst]:.1e} ({worst})",
        "all-to-alls": f"{_bytes(sent)} a device and step, closed form {_bytes(expected_exchange(verdict.config))}",
        "verdict": "equal" if not verdict.faults else "NOT equal: " + "; ".join(verdict.faults),
    }
    show(console, f"{name}, shrunk to T = {verdict.config.data.seq_len} and 2 layers", rows)
    return 1 if verdict.faults else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """What a training step needs and takes on GPUs that need not be there, and the memory policy to give it.

    Bytes: "working" is what a layer's backward or the loss holds besides. Times: "matrices" and "attention" are their products,
    "memory" everything between them, "stream" parameters that come from the host a layer at a time, "wire" what devices send
    one another, "host" activations to the host and back; what travels "beside them" is hidden.
    """

    model: str
    """a model (llama3-8b, gpt-7b, llama-7b, …) or a recipe"""
    gpu: str = "h100"
    """h100, h200 or a100"""
    devices: int = 8
    """GPUs, all along the sequence"""
    length: int | None = None
    """tokens of a sequence; the recipe's by default, or 131,072"""
    longest: bool = False
    """search for the longest that fits"""
    host_gib: float = 128.0
    """the host's memory for each device"""
    compile: bool = False
    """compile the real step as well, for which jax's CUDA wheels are needed"""
    json: bool = False
    """print one JSON object"""


def plan(arguments: Sequence[str], console: Console) -> int:
    """`ulysses plan`."""
    from ulysses_jax.plan import certify, longest_plan, make_plan

    command = _plan_command(arguments)
    gpu, recipe = costs.GPUS[command.gpu], recipes.RECIPES.get(command.model)
    model, limit = recipe().model if recipe else recipes.MODELS[command.model](), command.host_gib * 2**30
    if command.longest:
        length = 4096 * command.devices
        found = longest_plan(model, gpu, command.devices, host_limit=limit)
    else:
        length = _length(command, recipe().data.seq_len if recipe else 131072)
        found = make_plan(model, gpu, command.devices, length, host_limit=limit)
    if found is None:
        way_out = "more devices or a smaller model" if command.longest else "more devices, a shorter --length, or --longest"
        raise ValueError(
            f"{command.model} at {length:,} tokens does not fit {command.devices} × {gpu.name} with {command.host_gib:g} GiB "
            f"of host memory each, whatever is recomputed or sent to the host. Use {way_out}."
        )
    compiled = certify(found) if command.compile else None
    if command.json:
        print(json.dumps(found.to_dict() | ({"compiled": compiled} if compiled else {}), indent=1))
    else:
        show_plan(found, compiled, command.model, console)
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Write the weights of a run's newest save as a Hugging Face folder."""

    run: tyro.conf.Positional[Path]
    """the run's folder"""
    folder: tyro.conf.Positional[Path]
    """where to write"""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """of the weights written"""


def export(arguments: Sequence[str], console: Console) -> None:
    """`ulysses export`."""
    command = _command(ExportCommand, "export", arguments)
    runtime.initialize(1)
    from ulysses_jax import hf
    from ulysses_jax.train import load_run, run_config

    config = run_config(command.run)
    before = hf.context_length(config.init_from) if config.init_from is not None else 0
    length = max(config.data.seq_len, before)
    hf.save(load_run(command.run), command.folder, dtype=command.dtype, max_length=length)
    told = f"{command.folder} holds the weights of {command.run}, no tokenizer"
    if config.init_from is not None and not before:
        told += f"; {config.init_from} could not be read, so its context length is the run's {length:,} tokens"
    console.print(told, highlight=False, soft_wrap=True)


def show_plan(found: "Plan", compiled: dict[str, float] | None, model: str, console: Console) -> None:
    """A plan as tables: its policy, bytes on the device, on the host and on the wire, and times; beside them what compiled."""
    config, seconds = found.config, found.seconds
    memory = {k: v for k, v in to_dict(config.memory).items() if v != to_dict(MemoryConfig())[k]}
    title = f"{model} at {config.data.seq_len:,} tokens on {config.mesh.size} × {found.gpu.name}"
    flags = " ".join(f"--memory.{name.replace('_', '-')} {value}" for name, value in memory.items())
    about = {"mesh": f"{_axes(config.mesh)} = {config.mesh.size} devices, ZeRO-{config.zero_stage}"}
    about["policy"] = flags or "the default: attention's outputs are saved"
    about["attention"] = f"--implementation {config.implementation}"
    if config.mesh.size > ONE_HOST:
        about["links"] = "counted as within one host; between hosts they are slower"
    if (idle := config.mesh.seq - config.model.num_heads) > 0:
        heads = config.model.num_heads
        about["idle in attention"] = f"{idle} of {config.mesh.seq} devices along seq, for there are {heads} heads"
    show(console, title, about)
    rows = _parts(found.device)
    rows["of"] = _bytes(found.gpu.memory_bytes)
    if compiled:
        rows["all, compiled"] = f"{_bytes(compiled['device_bytes'])} ({compiled['compile_seconds']:.0f} s)"
    show(console, "bytes a device", rows)
    host = {k: _bytes(v) for k, v in found.host.items() if v}
    if compiled and compiled["host_bytes"]:
        host["all, compiled"] = _bytes(compiled["host_bytes"])
    if host:
        show(console, "bytes of the host, for each device", host)
    show(console, "bytes that leave a device in a step", {k: _bytes(v) for k, v in found.wire.items()})
    if any(found.host_traffic.values()):
        traffic = {k: _bytes(v) for k, v in found.host_traffic.items() if v}
        show(console, f"bytes to and from the host in a step, at {found.gpu.host_bytes_per_s / 1e9:g} GB/s assumed", traffic)
    rates = costs.rates(config, seconds["step"], found.gpu.name)
    times = {k: f"{v:.3g} s" for k, v in seconds.items()}
    times["wire"] += " beside them"
    if len(config.memory.group(config.model.num_layers)) == 1:  # copies of a fraction of layers are not hidden
        times["host"] += " beside them"
    times["speed"] = f"{rates['tokens_per_s']:,.0f} tokens/s, {rates['utilization']:.0%} of peak"
    show(console, "predicted time of a step", times)


def _command[T](kind: type[T], name: str, arguments: Sequence[str]) -> T:
    """What the arguments of a command without a recipe say."""
    prog, box = f"ulysses {name}", io.StringIO()
    known = ["--help", *(f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(cast(Any, kind)))]
    for argument in arguments:  # before tyro, which would rather miss what a mistyped option was to give
        if argument.startswith("--") and _spelt(argument) not in known:
            raise ValueError(f"{prog} has no argument {argument!r}.{_close(_spelt(argument), known)} See {prog} --help.")
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(kind, args=list(arguments), prog=prog, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as stop:
        if stop.code in (0, None):  # --help
            raise
        raise ValueError(f"{_inside(box.getvalue())} See {prog} --help.") from None


def _spelt(argument: str) -> str:
    """An option's name, without the value that may be tied to it."""
    return argument.split("=")[0].replace("_", "-")


def _close(wanted: str, known: Sequence[str]) -> str:
    """The known options that a mistyped one may have meant, as a sentence."""
    close = [x for x in known if x.endswith("." + wanted[2:])] or difflib.get_close_matches(wanted, known, n=2)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _plan_command(arguments: Sequence[str]) -> PlanCommand:
    command = _command(PlanCommand, "plan", arguments)
    command = dataclasses.replace(command, gpu=command.gpu.lower())
    known = [*recipes.MODELS, *recipes.RECIPES]
    if command.model not in known:
        raise ValueError(f"--model is {command.model!r}; it must be one of {', '.join(known)}.")
    if command.gpu not in costs.GPUS:
        raise ValueError(f"--gpu is {command.gpu!r}; it must be one of {', '.join(costs.GPUS)}.")
    if command.devices < 1:
        raise ValueError(f"--devices is {command.devices}; it must be at least 1.")
    if not command.host_gib >= 0:
        raise ValueError(f"--host-gib is {command.host_gib:g}; it must be at least 0, where nothing is sent to the host.")
    if command.length is not None and command.longest:
        raise ValueError(f"--length is {command.length}, but --longest searches for a length itself; leave out one of the two.")
    if command.length is not None and command.length < 2:
        raise ValueError(f"--length is {command.length}; it must be at least 2.")
    return command


def _length(command: PlanCommand, default: int) -> int:
    """Tokens of a planned sequence, which the devices share evenly."""
    length, devices = command.length or default, command.devices
    if length % devices:
        raise ValueError(
            f"--length is {length}{'' if command.length else ' by default'}; it must be a multiple of --devices = {devices}. "
            f"The nearest above is {-(-length // devices) * devices}."
        )
    return length


def dry_run(config: TrainConfig, console: Console) -> None:
    """Shapes, parameters, and bytes a device as the recipe's memory policy has them; needs no device."""
    counts = costs.parameter_counts(config.model)
    total, n = sum(counts.values()), config.mesh.size
    show(console, "parameters", {**{part: f"{count:,}" for part, count in counts.items()}, "all": f"{total:,}"})
    model, mesh, T, B = config.model, config.mesh, config.data.seq_len, config.data.batch_size
    local, itemsize = B // mesh.data // config.accumulation, 2 if model.dtype == "bfloat16" else 4
    mine, dealing = T // (mesh.ring * mesh.seq), deal_heads(model.num_heads, model.num_kv_heads, mesh.seq)

    def exchanged(heads: int, dealt: int) -> str:
        return f"[{local}, {mine}, {heads}, {model.head_dim}] → [{local}, {T // mesh.ring}, {dealt}, {model.head_dim}]"

    sent = itemsize * costs.exchange_elements(model, batch_size=local, seq_len=T // mesh.ring, degree=mesh.seq)
    show(
        console,
        "shapes",
        {
            "mesh": f"{_axes(mesh)} = {n} devices, ZeRO-{config.zero_stage}",
            "tokens [B, T]": f"[{B}, {T}], of which a device holds [{local}, {mine}] a micro-batch",
            "queries a device": exchanged(model.num_heads, len(dealing.queries) // mesh.seq),
            "keys and values a device": exchanged(model.num_kv_heads, len(dealing.keys) // mesh.seq),
            "exchanged a layer": f"{_bytes(sent)} a device, forward",
            "model FLOPs a step": f"{costs.step_flops(model, batch_size=B, seq_len=T):.3e}",
        },
    )
    show(console, "bytes a device", _parts(costs.device_bytes(config)))
    if any((host := costs.host_bytes(config)).values()):
        show(console, "bytes of the host, for each device", _parts(host))


def _parts(found: dict[str, float]) -> dict[str, str]:
    """Bytes by part, and of all together."""
    return {k: _bytes(v) for k, v in found.items() if v} | {"all": _bytes(sum(found.values()))}


def _axes(mesh: MeshConfig) -> str:
    ring = f"ring {mesh.ring} × " if mesh.ring > 1 else ""
    return f"data {mesh.data} × {ring}seq {mesh.seq}"


def _bytes(count: float) -> str:
    power = min(int(math.log(max(count, 1), 1024)), 4)
    return f"{count / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


if __name__ == "__main__":
    sys.exit(main())
