"""A run's folder, its metrics through a resume, its live line and its figure."""

import dataclasses
import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from rich.console import Console

from ulysses_jax import recipes
from ulysses_jax.config import CheckpointConfig, MemoryConfig, MeshConfig, TrainConfig, to_dict
from ulysses_jax.report import claim, conclude, describe, draw_losses, read_metrics, read_summary, reporting

CONFIG = recipes.recipe("demo")
SUMMARY = {
    "step": 60,
    "loss": 2.0,
    "eval_loss": 2.1,
    "eval_bits_per_byte": 3.03,
    "unigram_bits_per_byte": 4.5,
    "tokens_per_s": 9e4,
}


def changed(**fields) -> TrainConfig:
    return dataclasses.replace(CONFIG, **fields)


def test_a_claimed_folder_holds_the_whole_config_and_can_be_claimed_again(tmp_path):
    out = tmp_path / "a" / "run"
    claim(out, CONFIG, "corpus")
    before = (out / "config.json").read_text()
    assert json.loads(before) == {"config": json.loads(json.dumps(to_dict(CONFIG))), "corpus": "corpus"}
    claim(out, CONFIG, "corpus")
    assert (out / "config.json").read_text() == before
    assert [path.name for path in out.iterdir()] == ["config.json"]


def test_a_process_that_may_not_write_leaves_no_folder(tmp_path):
    claim(tmp_path / "run", CONFIG, "corpus", write=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("written", ["config.tmp", "config.json"])
def test_a_process_that_looks_while_the_writer_claims_the_folder_is_not_refused(tmp_path, monkeypatch, written):
    """Of several processes one writes, and another sees its config.json too late to read it, or still as config.tmp.

    Broken by looking for config.json only before the listing, or by counting config.tmp as another's file.
    """
    out, listing = tmp_path / "run", Path.iterdir
    out.mkdir()

    def late(folder: Path):
        monkeypatch.undo()
        claim(out, CONFIG, "corpus")
        (out / "config.json").rename(out / written)
        return listing(folder)

    monkeypatch.setattr(Path, "iterdir", late)
    claim(out, CONFIG, "corpus", write=False)
    claim(out, CONFIG, "corpus")
    with pytest.raises(ValueError, match="another run"):
        claim(out, changed(seed=1), "corpus", write=False)


def without(package: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setitem(sys.modules, package, None)


def wandb_refuses(call: str, words: str) -> Callable[[pytest.MonkeyPatch], None]:
    calls = {name: mock.Mock(side_effect=RuntimeError(words) if name == call else None) for name in ("login", "init")}
    return lambda patch: patch.setitem(sys.modules, "wandb", mock.Mock(Error=RuntimeError, **calls))


TRACKERS = pytest.mark.parametrize(
    ("config", "lacks", "says"),
    [
        (changed(tensorboard=True), without("tensorboardX"), "needs the package tensorboardx: pip install tensorboardx, or"),
        (
            changed(wandb="project"),
            without("wandb"),
            "wandb is 'project', which needs the package wandb: pip install wandb, or",
        ),
        (changed(wandb="project"), wandb_refuses("login", "No key.\nLog in."), r"cannot be used \(No key. Log in\). Run wandb"),
    ],
    ids=["no tensorboardX", "no wandb", "no login"],
)


@TRACKERS
def test_a_tracker_that_cannot_be_used_is_refused_before_there_is_a_folder(tmp_path, monkeypatch, config, lacks, says):
    """Broken by asking for trackers only where they are opened."""
    lacks(monkeypatch)
    with pytest.raises(ValueError, match=says):
        claim(tmp_path / "run", config, "corpus")
    assert list(tmp_path.iterdir()) == []
    claim(tmp_path / "run", config, "corpus", write=False)  # only the process that writes tracks


@TRACKERS
def test_a_run_that_goes_on_is_refused_a_tracker_where_it_is_opened(tmp_path, monkeypatch, config, lacks, says):
    """Its folder is there already, and where it is complete it needs no tracker."""
    lacks(monkeypatch)
    claim(tmp_path / "run", CONFIG, "corpus")
    claim(tmp_path / "run", config, "corpus")
    with (
        pytest.raises(ValueError, match=says),
        reporting(config, tmp_path / "run", Console(quiet=True), first_step=0, speaks=True),
    ):
        pass


def test_a_project_that_the_server_refuses_is_told_in_a_line(tmp_path, monkeypatch):
    """That is known once the run is opened; broken by letting the package's own error through."""
    wandb_refuses("init", "permission denied")(monkeypatch)
    with (
        pytest.raises(ValueError, match=r"wandb is 'project', but Weights & Biases cannot be used \(permission denied\)"),
        reporting(changed(wandb="project"), tmp_path, Console(quiet=True), first_step=0, speaks=True),
    ):
        pass


@pytest.mark.parametrize(
    "now",
    [
        changed(mesh=MeshConfig(data=1, seq=2)),
        changed(zero_stage=1),
        changed(accumulation=2),
        changed(checkpoint=CheckpointConfig(every=7)),
        changed(memory=MemoryConfig(save="all")),
        changed(mesh=MeshConfig(data=2), model=dataclasses.replace(CONFIG.model, head_chunks=2)),
    ],
    ids=["mesh", "ZeRO stage", "accumulation", "checkpoint", "memory", "head chunks"],
)
def test_a_run_may_go_on_elsewhere(tmp_path, now):
    """Broken by comparing the configs whole."""
    claim(tmp_path / "run", CONFIG, "corpus")
    claim(tmp_path / "run", now, "corpus")


@pytest.mark.parametrize(
    ("now", "says"),
    [
        (changed(steps=61), "there steps is 60, here 61. "),
        (changed(seed=1), "there seed is 0, here 1. "),
        (
            changed(model=dataclasses.replace(CONFIG.model, mlp_dim=8, num_layers=3)),
            r"there model.mlp_dim is 384, here 8 \(and 1 more differ\)",
        ),
        (changed(model=recipes.llama3_8b()), "model"),
    ],
    ids=["steps", "seed", "two fields", "another model"],
)
def test_what_is_computed_may_not_change_within_a_run(tmp_path, now, says):
    """Broken by leaving out the recursion into parts of the config."""
    claim(tmp_path / "run", CONFIG, "corpus")
    with pytest.raises(ValueError, match=says):
        claim(tmp_path / "run", now, "corpus")


def test_after_a_resume_each_step_has_one_line(tmp_path):
    """The lines after the saved step are written again, not twice; broken by opening the file without dropping them."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, "loss": 9.0}) + "\n" for i in (1, 2, 3, 4)) + '{"step": 5, "lo')
    with reporting(CONFIG, tmp_path, Console(quiet=True), first_step=2, speaks=True) as report:
        for step in (3, 4):
            report.write({"step": step, "loss": 1.0})
            assert read_metrics(path)[-1]["step"] == step  # on disk at once, should the process die
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 9.0), (2, 9.0), (3, 1.0), (4, 1.0)]


@pytest.mark.parametrize("rest", ['{"step": 2, "lo', "[2]", '"2"', '{"loss": 1}', "\udcff"])
def test_metrics_are_read_up_to_a_damaged_line(tmp_path, rest):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + rest.encode(errors="surrogateescape") + b"\n")
    assert read_metrics(path) == [{"step": 1}]
    assert read_metrics(tmp_path / "none") == []


def test_processes_that_do_not_speak_write_nothing(tmp_path):
    with reporting(CONFIG, tmp_path, Console(), first_step=0, speaks=False) as report:
        report.write({"step": 1, "loss": 1.0})
        report.say("hello")
    assert list(tmp_path.iterdir()) == []


def test_the_live_line_shows_everything_in_100_columns(tmp_path):
    """Bar, steps, loss, tokens/s, TFLOP/s and time left, uncut at the widest numbers; broken by 10 columns more of text."""
    text = io.StringIO()
    console = Console(force_terminal=True, width=100, file=text, color_system=None, legacy_windows=False)
    speed = {"tokens_per_s": 12_345_678.9, "model_tflops_per_device": 612.34}
    with reporting(changed(steps=100_000), tmp_path, console, first_step=0, speaks=True) as report:
        report.write({"step": 99_990, "loss": 10.12345, **speed})
        report.advance(99_990)
    line = text.getvalue().replace("\r", "\n").splitlines()[-2]
    shown = line.split("K")[-1]  # after the code that clears the line
    assert len(shown) <= 100
    for part in ("━", " 99990/100000 loss 10.1235  12,345,678 tokens/s".replace("678", "679"), "612.3 TFLOP/s/device", "left"):
        assert part in shown


def test_without_a_terminal_each_logged_step_is_a_line(tmp_path):
    text = io.StringIO()
    with reporting(CONFIG, tmp_path, Console(file=text, width=100), first_step=0, speaks=True) as report:
        report.write({"step": 5, "loss": 1.5, "tokens_per_s": 1000.0, "model_tflops_per_device": 0.25})
        report.write({"step": 5, "eval_loss": 1.25})
    lines = [line.rstrip() for line in text.getvalue().splitlines() if line.strip()]
    assert lines == [
        "step      5/60  loss 1.5000  1,000 tokens/s  0.25 TFLOP/s/device",
        "step      5/60  held-out loss 1.2500",
    ]


def test_a_summary_is_told_beside_the_bytes_own_entropy(tmp_path):
    text = io.StringIO()
    conclude(Console(file=text, width=100), tmp_path, SUMMARY)
    for part in ("held-out bits a byte", "3.030", "unigram entropy", "4.500 bits", "90,000 tokens/s", "loss.png"):
        assert part in text.getvalue()
    assert describe(SUMMARY) == (
        "held-out loss 2.1000 nats a token = 3.030 bits a byte; the bytes' own unigram entropy is 4.500 bits"
    )


def test_only_a_complete_run_has_a_summary(tmp_path):
    assert read_summary(tmp_path) is None
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    assert read_summary(tmp_path) == SUMMARY


def test_losses_are_drawn_in_bits_with_their_baseline(tmp_path, monkeypatch):
    """Broken by plotting nats."""
    drawn = {}
    from matplotlib.axes import Axes

    monkeypatch.setattr(Axes, "plot", lambda self, x, y, style, label: drawn.__setitem__(label, (x, y)))
    monkeypatch.setattr(Axes, "legend", lambda self: None)
    metrics = [{"step": 1, "loss": math.log(2)}, {"step": 2, "loss": 2 * math.log(2)}, {"step": 2, "eval_loss": math.log(2)}]
    draw_losses(metrics, tmp_path / "loss.png", baseline=("entropy", 4.5))
    assert drawn == {"training": ((1, 2), (1.0, 2.0)), "held out": ((2,), (1.0,))}
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
