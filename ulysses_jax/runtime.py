"""Processes: joining the others of a multi-host run, keeping other runs out of its folder, and stopping when asked.

One process a host (or a GPU) is started by Slurm or by hand; `initialize` joins them before anything touches a device.
"""

import fcntl
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

__all__ = [
    "PATIENCE",
    "Stop",
    "alone",
    "as_process_0_has_it",
    "check_memory",
    "host_memory",
    "initialize",
    "reserve_memory",
    "stopping",
]

PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=600"


def reserve_memory() -> None:
    """Let jax use nearly all of a GPU's memory, and of the host's; variables that are set already stay as they are.

    By default it preallocates 75 % of a GPU, which also limits how XLA schedules, and pins at most 64 GB of the host, fewer
    than the activations of a long sequence. Call it before anything uses jax's devices.
    """
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"} & os.environ.keys():
        os.environ["XLA_CLIENT_MEM_FRACTION"] = "0.94"
    os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(max(1, int(0.9 * host_memory() / 1e9))))


def host_memory() -> int:
    """Bytes of this host's physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(name: str, state_bytes: float, mesh_size: int) -> None:
    """Refuse a state that virtual CPU devices could only hold by filling the host's memory; call it after `initialize`.

    Args:
      name: the recipe.
      state_bytes: parameters, gradients and optimizer of one device, wherever they lie: a CPU device's memory is the host's.
      mesh_size: devices of the whole mesh.

    Raises:
      ValueError: the devices are CPUs, and the state of those of this process exceeds the host's physical memory.
    """
    devices = mesh_size // jax.process_count()
    needed, there = state_bytes * devices, host_memory()
    if jax.devices()[0].platform == "cpu" and needed > there:
        raise ValueError(
            f"{name} needs {needed / 2**30:,.1f} GiB for the parameters, gradients and optimizer of {devices} devices, but no "
            f"GPU was found, and this host, whose CPU would stand in for them, has {there / 2**30:,.1f} GiB. Install jax for "
            f"GPUs (the extra cuda13, or pip install 'jax[cuda13]'), try the recipe shrunk with ulysses verify {name}, or "
            "count its bytes with --dry-run."
        )


def initialize(mesh_size: int) -> None:
    """Join the run's other processes, if it has any, and make virtual CPU devices for a mesh without accelerators.

    Several processes are recognised by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or by Slurm's own
    variables. Call it before anything else uses jax's devices.

    Args:
      mesh_size: devices of the whole mesh; on CPU each process makes its share of them.

    Raises:
      ValueError: an incomplete set of variables, processes that do not divide the mesh, or a platform without devices.
    """
    reserve_memory()
    processes, index, coordinator = 1, 0, os.environ.get("JAX_COORDINATOR_ADDRESS")
    under_slurm = coordinator is None and "SLURM_STEP_ID" in os.environ
    if coordinator is not None:
        processes, index = _integer("JAX_NUM_PROCESSES"), _integer("JAX_PROCESS_ID")
        if not 0 <= index < processes:
            raise ValueError(
                f"JAX_PROCESS_ID is {index} and JAX_NUM_PROCESSES {processes}; processes are numbered from 0, so the id must "
                "be less than their number. Give each process its own."
            )
    elif under_slurm:
        processes = int(os.environ.get("SLURM_NTASKS", "1"))
    if mesh_size % processes:
        raise ValueError(
            f"the mesh has {mesh_size} devices, which {processes} processes cannot share evenly; choose mesh.data × mesh.seq "
            f"as a multiple of {processes}."
        )
    if coordinator is not None:
        jax.distributed.initialize(coordinator, processes, index)
    elif processes > 1:
        jax.distributed.initialize()
    # Virtual devices share few cores: they may wait for each other longer than XLA's 40 s, and programs that are dispatched
    # ahead may wait for each other for ever.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {PATIENCE}".strip()
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    with suppress(RuntimeError):  # jax has made its devices already, in a notebook for example: make_mesh counts them
        jax.config.update("jax_num_cpu_devices", mesh_size // processes)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        reason = (str(error).splitlines() or ["no backend"])[0]
        raise ValueError(
            f"jax finds no device with JAX_PLATFORMS={platforms or ''} ({reason}). Unset JAX_PLATFORMS, or install the jax "
            "that fits this machine."
        ) from None


def _integer(name: str) -> int:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        raise ValueError(
            f"JAX_COORDINATOR_ADDRESS is set, but {name} is {os.environ.get(name)!r}; it must be an integer. Set "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID for each process, or unset JAX_COORDINATOR_ADDRESS."
        ) from None


def as_process_0_has_it(value: Any) -> Any:
    """A value that JSON can hold, in every process that of process 0; what the others give is not looked at."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8) if jax.process_index() == 0 else np.zeros(0, np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    sent = multihost_utils.broadcast_one_to_all(text if len(text) == length else np.zeros(length, np.uint8))
    return json.loads(np.asarray(sent).tobytes())


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keep every other run from training in a run's folder, by a lock on its config.json; process 0 holds it for all of them.

    Raises:
      ValueError, in every process: another run is at it. Not where the file system knows no locks.
    """
    with (out / "config.json").open("r+") if jax.process_index() == 0 else nullcontext() as file:
        if multihost_utils.broadcast_one_to_all(file is not None and not _locks(file)):
            raise ValueError(
                f"--out {out} is being trained by another process; wait for its end, stop it, or name another folder."
            )
        yield


def _locks(file: IO) -> bool:
    """Lock the file; whether nobody else had."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


class Stop:
    """Whether the run was asked to stop, by SIGINT (Ctrl-C) or SIGTERM."""

    def __init__(self):
        self.signal: signal.Signals | None = None

    def requested(self, step: int) -> bool:
        """True from the step on at which every process knows of the request."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.signal is not None


@contextmanager
def stopping() -> Iterator[Stop]:
    """Turn the first SIGINT or SIGTERM into a request to stop after the step at hand; a second Ctrl-C interrupts at once.

    With several processes, jax's own preemption service carries SIGTERM to all of them, so that they stop at one step.
    """
    stop = Stop()

    def ask(number: int, _) -> None:
        if stop.signal is not None:
            raise KeyboardInterrupt
        stop.signal = signal.Signals(number)
        print("\nstopping after this step; press Ctrl-C again to stop at once", file=sys.stderr)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    signals = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
    before = {s: signal.signal(s, ask) for s in signals}
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
