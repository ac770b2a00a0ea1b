"""Joining processes, and being asked to stop. What they are refused is also in test_refusals.py's manner: one line each."""

import os
import signal
from contextlib import nullcontext
from unittest import mock

import jax
import numpy as np
import pytest

from ulysses_jax import runtime

VARIABLES = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "SLURM_STEP_ID",
    "SLURM_NTASKS",
)


@pytest.fixture
def joined(monkeypatch) -> list[tuple]:
    """The arguments of every call of `jax.distributed.initialize`, which is not made; no launcher's variables are set."""
    calls = []
    assert len(jax.devices()) == 8  # made before the calls below could ask for another number
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: calls.append(arguments))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize(
    ("variables", "mesh_size", "says"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, 8, ("JAX_NUM_PROCESSES is None", "must be an integer", "unset")),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"}, 8, ("JAX_PROCESS_ID is None",)),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
            8,
            ("JAX_NUM_PROCESSES is 'two'", "must be an integer"),
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            8,
            ("JAX_PROCESS_ID is 2", "less than their number", "its own"),
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "0"},
            8,
            ("8 devices", "3 processes", "multiple of 3"),
        ),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "5"}, 8, ("8 devices", "5 processes", "multiple of 5")),
    ],
)
def test_a_launch_that_cannot_work_is_refused_before_the_processes_join(joined, monkeypatch, variables, mesh_size, says):
    """Broken by joining first: a refused process would leave the others waiting for it."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        runtime.initialize(mesh_size)
    assert [part for part in says if part not in str(caught.value)] == []
    assert joined == []


@pytest.mark.parametrize(
    ("variables", "calls"),
    [
        ({}, []),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"}, []),
        ({"SLURM_NTASKS": "4"}, []),  # inside an allocation, but not started by srun
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"}, [()]),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}, [("a:1", 4, 3)]),
    ],
)
def test_processes_join_by_the_variables_of_their_launcher(joined, monkeypatch, variables, calls):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    runtime.initialize(8)
    assert joined == calls


def test_memory_is_reserved_unless_the_user_says_how(monkeypatch):
    """Setting both of jax's names for the fraction breaks it: jax then refuses to start."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    runtime.reserve_memory()
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.94"
    assert int(os.environ["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"]) >= 1
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    runtime.reserve_memory()
    assert "XLA_CLIENT_MEM_FRACTION" not in os.environ


@pytest.mark.parametrize(("platform", "state", "refused"), [("cpu", 4.1, True), ("cpu", 4.0, False), ("gpu", 4.1, False)])
def test_a_state_beyond_the_hosts_memory_is_refused_on_cpus_alone(monkeypatch, platform, state, refused):
    """Eight devices, 32 bytes. Broken by comparing one device's state, or by asking nothing of the platform."""
    monkeypatch.setattr(runtime, "host_memory", lambda: 32)
    monkeypatch.setattr(jax, "devices", lambda: [mock.Mock(platform=platform)])
    refusal = pytest.raises(ValueError, match=r"^big needs .* of 8 devices, but no GPU was found")
    with refusal if refused else nullcontext():
        runtime.check_memory("big", state, 8)


def test_a_platform_without_devices_is_named(joined, monkeypatch):
    def no_devices():
        raise RuntimeError("Unable to initialize backend 'cuda'\nand much more")

    monkeypatch.setattr(jax, "devices", no_devices)
    with pytest.raises(ValueError, match=r"^jax finds no device .*Unable to initialize backend 'cuda'\)\. Unset JAX_PLATFORMS"):
        runtime.initialize(1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_to_stop_after_the_step_and_handlers_come_back(number, capsys):
    """Trap 18. Broken by listening to SIGINT alone: SIGTERM then kills the process."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    with runtime.stopping() as stop:
        assert not stop.requested(1)
        os.kill(os.getpid(), number)
        assert stop.requested(2)
        assert stop.signal == number
    assert "stopping after this step" in capsys.readouterr().err
    assert {s: signal.getsignal(s) for s in before} == before


def test_a_second_ctrl_c_interrupts_at_once():
    """Broken by only remembering the signal: a step that hangs could not be left."""
    with runtime.stopping() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    refused = pytest.raises(ValueError, match="is being trained by another process; wait")
    with runtime.alone(tmp_path), refused, runtime.alone(tmp_path):
        pass
    with runtime.alone(tmp_path):  # let go of again
        pass


def test_every_process_has_what_process_0_has(monkeypatch):
    """A process that keeps what it found itself, or sends it in a length of its own, breaks it."""
    sent = []
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    monkeypatch.setattr(runtime.multihost_utils, "broadcast_one_to_all", lambda x: sent.append(x) or x)
    value = {"step": 40.0, "eval_loss": float("inf"), "said": "é"}
    assert runtime.as_process_0_has_it(value) == value
    shapes = []
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    told = iter(sent)
    monkeypatch.setattr(runtime.multihost_utils, "broadcast_one_to_all", lambda x: shapes.append(np.shape(x)) or next(told))
    assert runtime.as_process_0_has_it(None) == value
    assert shapes == [np.shape(x) for x in sent]
