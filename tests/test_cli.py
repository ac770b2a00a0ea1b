"""The command line: recipes, dry runs, overrides, a short run, and stopping by signals."""

import dataclasses
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ulysses_jax import cli, costs, recipes
from ulysses_jax.config import RopeScaling, from_dict, to_dict

SMALL = [
    *("--mesh.data", "1", "--mesh.seq", "2"),
    *("--model.num-layers", "1", "--model.embed-dim", "16", "--model.head-dim", "4", "--model.mlp-dim", "16"),
    *("--data.seq-len", "64", "--data.batch-size", "4", "--data.source", "corpus", "--log-every", "1", "--eval-batches", "1"),
]


def write_corpus(folder: Path) -> None:
    (folder / "corpus").mkdir()
    for name in "abc":
        (folder / "corpus" / f"{name}.txt").write_text(f"all work and no play makes {name} a dull boy\n" * 100)


def parsed(recipe: str, *arguments: str):
    return cli._parse(recipe, arguments)


def test_recipes_are_listed_with_what_they_are(capsys):
    assert cli.main(["train", "--list"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in recipes.RECIPES)
    assert "8 virtual CPU devices" in told


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["train"], 2), (["--help"], 0), (["train", "-h"], 0)])
def test_usage_is_an_answer_to_help_and_a_refusal_of_nothing(capsys, arguments, status):
    assert cli.main(arguments) == status
    told = capsys.readouterr()
    assert (told.out if status == 0 else told.err).startswith("usage: ulysses train RECIPE")
    assert (told.err if status == 0 else told.out) == ""


def test_the_version_is_that_of_the_installed_package(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{importlib.metadata.version('ulysses-jax')}\n"
    assert "ulysses --version" in cli.USAGE


@pytest.mark.parametrize("arguments", [["--out", "~/run"], ["--out=~/run"]])
def test_a_runs_folder_may_be_in_the_home(monkeypatch, arguments):
    """A shell leaves the second as it is; broken by making a folder named ~."""
    monkeypatch.setenv("HOME", "/somebody")
    assert parsed("demo", *arguments).out == Path("/somebody/run")


@pytest.mark.parametrize("memory", [[], ["--memory.offload-optimizer", "True", "--memory.offload-params", "True"]])
def test_a_state_too_large_for_the_cpus_of_this_host_is_refused_before_anything_is_written(
    capsys, monkeypatch, tmp_path, memory
):
    """16 B a parameter, on the host or not. Broken by asking after the run has begun, or by counting devices' bytes alone."""
    monkeypatch.chdir(tmp_path)
    needed = 16 * sum(costs.parameter_counts(recipes.gpt_7b()).values())
    monkeypatch.setattr(cli.runtime, "host_memory", lambda: needed - 1000)
    monkeypatch.setattr("ulysses_jax.train.run", lambda *_, **__: pytest.fail("the run has begun"))
    assert cli.main(["train", "gpt-7b-64k", *memory]) == 2
    told = capsys.readouterr()
    assert "no GPU was found" in told.err
    assert told.out == ""
    assert list(tmp_path.iterdir()) == []
    assert cli.state_bytes(parsed("gpt-7b-64k", *memory).config) * 8 == pytest.approx(needed)


def test_help_shows_every_field_with_its_value_in_the_recipe(capsys):
    """Broken by giving tyro no default: the values are then missing."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "llama3-8b-128k", "--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    config = parsed("llama3-8b-128k").config
    assert [name for name in cli._names(to_dict(config)) if f"--{name}" not in told] == []
    assert "131072" in told


def test_a_dry_run_of_llama_at_128k_gives_the_numbers_of_the_closed_forms(capsys, monkeypatch):
    """Computed by hand: 8,030,261,248 parameters; T/P = 16,384; a layer exchanges 16,384·128·(2·32 + 2·8)·2 B = 320 MiB."""
    monkeypatch.setattr(cli.runtime, "initialize", lambda size: pytest.fail("a dry run needs no device"))
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["train", "llama3-8b-128k", "--dry-run"]) == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in (
        "all 8,030,261,248",
        "embedding 525,336,576",
        "data 1 × seq 8 = 8 devices, ZeRO-3",
        "[1, 131072], of which a device holds [1, 16384]",
        "[1, 16384, 32, 128] → [1, 131072, 4, 128]",
        "[1, 16384, 8, 128] → [1, 131072, 1, 128]",
        "320 MiB a device, forward",
        "parameters 3.739 GiB",  # 4 B · 8,030,261,248 / 8
        "optimizer 7.479 GiB",
        "activations 8.062 GiB",  # of 32 layers · 16,384: 2 B · 4,096 of input, 2 B · 32 · 128 and 4 B · 32 of attention
    ):
        assert part in told


@pytest.mark.parametrize("policy", [[], ["--memory.save", "products"], ["--memory.offload-layers", "1"]])
def test_a_dry_run_tells_what_its_own_policy_takes(capsys, monkeypatch, policy):
    """By the plan's closed form, working set and host included. Adding up state and layer inputs alone breaks it."""
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["train", "llama-7b-64k", "--dry-run", *policy]) == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    config = parsed("llama-7b-64k", *policy).config
    here = costs.device_bytes(config)
    assert f"working {cli._bytes(here['working'])} " in told
    assert f"all {cli._bytes(sum(here.values()))} " in told
    on_host = "bytes of the host, for each device ┌" in told
    assert on_host == bool(sum(costs.host_bytes(config).values())) == ("--memory.offload-layers" in policy)


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--steps", "7"], "steps", 7),
        (["--steps=7"], "steps", 7),
        (["--log_every", "3"], "log_every", 3),
        (["--optimizer.learning-rate", "1e-3"], "optimizer.learning_rate", 1e-3),
        (["--model.is-causal", "False"], "model.is_causal", False),
        (["--tensorboard", "True"], "tensorboard", True),
        (["--model.dtype", "bfloat16"], "model.dtype", "bfloat16"),
        (["--model.local-window-size", "128"], "model.local_window_size", 128),
        (["--implementation", "reference"], "implementation", "reference"),
        (["--implementation", "None"], "implementation", None),
        (["--wandb", "project"], "wandb", "project"),
        (["--data.source", "a b"], "data.source", "a b"),
    ],
)
def test_a_field_of_each_type_is_overridden_and_no_other(arguments, field, value):
    changed, default = to_dict(parsed("demo", *arguments).config), to_dict(parsed("demo").config)
    *parts, last = field.split(".")
    expected = default
    for part in parts:
        expected = expected[part]
    assert expected[last] != value or value is None
    expected[last] = value
    assert changed == default


def test_every_field_can_be_given_and_none_is_lost():
    """Each field of a recipe, given its own value, comes back the same; the RoPE's of one that stretches it too."""
    config = recipes.recipe("llama3-8b-128k")
    assert config.model.rope_scaling == RopeScaling()
    arguments = []
    for name in cli._names(to_dict(config)):
        value = to_dict(config)
        for part in name.replace("-", "_").split("."):
            value = value[part]
        arguments += [f"--{name}", str(value)]
    assert len(arguments) > 80
    assert parsed("llama3-8b-128k", *arguments).config == config
    stretched = parsed("llama3-8b-128k", "--model.rope-scaling.factor", "4").config.model.rope_scaling
    assert stretched == dataclasses.replace(RopeScaling(), factor=4.0)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_config_comes_back_from_json(name):
    """Leaving any part at its default breaks it, as the optimizer's was."""
    config = recipes.recipe(name)
    changed = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, moment_dtype="bfloat16"), seed=7)
    assert from_dict(json.loads(json.dumps(to_dict(changed)))) == changed


@pytest.mark.parametrize(("name", "value"), [("stepz", 3), ("steps", {"a": 1})])
def test_fields_that_a_config_has_not_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"TrainConfig takes no {name} = "):
        from_dict(to_dict(recipes.recipe("demo")) | {name: value})


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a corpus, and a run of three steps in `run`."""
    folder = tmp_path_factory.mktemp("cli")
    write_corpus(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["train", "demo", "--out", "run", "--steps", "3", "--eval-every", "2", *SMALL]) == 0
    return folder


def test_a_run_leaves_its_config_metrics_summary_figure_and_checkpoint(finished):
    out = finished / "run"
    config = json.loads((out / "config.json").read_text())["config"]
    resolved = parsed("demo", "--steps", "3", "--eval-every", "2", *SMALL).config
    assert config == json.loads(json.dumps(to_dict(resolved)))

    lines = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(
        {"grad_norm", "learning_rate", "tokens", "tokens_per_s", "model_tflops_per_device"} <= line.keys() for line in steps
    )
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 3]

    summary = json.loads((out / "summary.json").read_text())
    assert summary["step"] == 3
    assert summary["loss"] == steps[-1]["loss"]
    assert summary["eval_loss"] == pytest.approx(lines[-1]["eval_loss"])
    # Bits a byte count the loss of all labels over the labels that are bytes: here no held-out row ends a document.
    assert summary["eval_bits_per_byte"] == pytest.approx(summary["eval_loss"] / 0.6931471805599453, rel=0.02)
    assert 3 < summary["unigram_bits_per_byte"] < 8
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert (out / "checkpoints" / "3").is_dir()


def test_the_same_command_says_complete_and_changes_nothing(finished, monkeypatch, capsys):
    """Broken by not reading summary.json: the run would be compiled and evaluated again."""
    monkeypatch.chdir(finished)
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    assert cli.main(["train", "demo", "--out", "run", "--steps", "3", "--eval-every", "2", *SMALL]) == 0
    told = capsys.readouterr().out
    assert told.startswith("demo: ")
    assert "mesh data 1 × seq 2 = 2 devices, ZeRO-3, run folder run" in told
    assert "run is complete: 3 steps" in " ".join(told.split())
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)], ids=["SIGINT", "SIGTERM"])
def test_a_stopped_run_is_saved_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys, number, status):
    """Trap 18, one process. Broken by `Stop` not listening to the signal, or by a loop that leaves without saving."""
    write_corpus(tmp_path)
    steps = 300
    command = ["train", "demo", "--out", "run", "--steps", str(steps), "--checkpoint.every", str(steps), *SMALL]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-m", "ulysses_jax.cli", *command],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    assert "stopping after this step" in err
    assert "Traceback" not in err
    (saved,) = (int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit())
    assert 2 <= saved < steps
    assert f"step {saved} is saved" in " ".join(out.split())
    assert not (tmp_path / "run" / "summary.json").exists()

    monkeypatch.chdir(tmp_path)
    assert cli.main(command) == 0
    assert f"continuing from step {saved}" in capsys.readouterr().out
    lines = [json.loads(text) for text in metrics.read_text().splitlines()]
    logged = [line["step"] for line in lines if "loss" in line]
    assert logged == sorted(set(logged))
    assert logged[:saved] == list(range(1, saved + 1))
    assert logged[-1] == steps
