"""Saving and restoring a run's state with Orbax, onto any mesh, and finding damage before it does harm.

Orbax writes arrays by global index, so what was saved on one mesh restores onto every other. It does not notice a flipped
bit in array data, so each save gets a manifest with the CRC-32 of every file as soon as it is written; a save that no longer
matches is moved aside, named, and the one before it used.
"""

import itertools
import json
import logging
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

__all__ = ["Checkpoints", "damage"]

MANIFEST = "manifest.json"
ASIDE = "damaged-"
_log = logging.getLogger(__name__)

type Tree = Any


class Checkpoints:
    """The saves of one run, in one folder; a context manager that finishes what is being written.

    Args:
      folder: absolute or relative path; made if it is not there.
      keep: how many saves to keep, newest first.

    Raises:
      ValueError: a folder that is a file, or nothing to keep.
    """

    def __init__(self, folder: Path, *, keep: int):
        self.folder = Path(folder).absolute()
        if keep < 1:
            raise ValueError(f"keep is {keep}; it must be at least 1, or no save is left to go on from.")
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"checkpoint folder {self.folder} is a file; name a folder, or move the file away.")
        # Orbax makes the folder in one process, for which the others wait: one that came first would occupy a run's new folder.
        self._options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.folder, options=self._options)
        self._signer, self._signing = ThreadPoolExecutor(1, "checkpoint"), Future()
        self._signing.set_result(None)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    @property
    def latest(self) -> int | None:
        """The newest step saved, good or not."""
        return self._manager.latest_step()

    def save(self, step: int, state: Tree) -> None:
        """Save in the background; returns once the state is copied off the devices. A step already saved is left alone."""
        if step in self._manager.all_steps():
            return
        self.wait()
        self._manager.save(step, args=ocp.args.StandardSave(state), force=True)
        self._signing = self._signer.submit(self._sign, self.folder / str(step))

    def wait(self) -> None:
        """Finish what is being written and signed."""
        self._signing.result()

    def _sign(self, folder: Path) -> None:
        """Once it is written: what is signed later may be damaged by then."""
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            part = folder / f"{MANIFEST}.part"
            part.write_text(json.dumps(_checksums(folder)))
            part.replace(folder / MANIFEST)

    def restore(self, like: Tree, *, part: bool = False) -> tuple[int, Tree] | None:
        """The newest undamaged save, laid out as `like`: a tree of `jax.ShapeDtypeStruct` with shardings.

        Args:
          part: `like` lacks some of what was saved, which is not read; not after a save or another kind of `restore`.

        Returns:
          (step, state), or None where nothing was ever saved.

        Raises:
          ValueError: saves are or were there, but all are damaged; they stay in the folder under damaged names.
        """
        self.wait()
        how = ocp.args.StandardRestore(like)
        if part:
            how = ocp.args.PyTreeRestore(like, ocp.checkpoint_utils.construct_restore_args(like), partial_restore=True)
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            folder = self.folder / str(step)
            signed = (folder / MANIFEST).exists()
            problem = self._agree(damage(folder) if jax.process_index() == 0 else None)
            if problem is None:
                if not signed:
                    _log.warning("checkpoint %d was never signed: its run ended just then; its data cannot be checked", step)
                try:
                    return step, self._manager.restore(step, args=how)
                except Exception as error:
                    # Signed files are as they were written, so that `like` is wrong. Several processes would not all be here.
                    if signed or jax.process_count() > 1:
                        raise
                    problem = f"it was never signed, and cannot be read: {str(error).splitlines()[0]:.200}"
            self._set_aside(step, problem)
        # Set aside now or by a call before: to begin anew in this folder would write over what the run has logged.
        aside = self._agree(", ".join(sorted(path.name for path in self.folder.glob(f"{ASIDE}*"))) or None)
        if aside is not None:
            raise ValueError(
                f"every checkpoint in {self.folder} is damaged; they were renamed ({aside}). Restore one from a backup "
                "under its step's name, or start again with another --out."
            )
        return None

    def close(self) -> None:
        """Finish and let go of the folder."""
        try:
            self.wait()
        finally:
            self._signer.shutdown()
            self._manager.close()

    def _set_aside(self, step: int, problem: str) -> None:
        _log.warning("checkpoint %d is damaged (%s); using the one before it", step, problem)
        self._manager.close()
        if jax.process_index() == 0:
            again = (f"{ASIDE}{step}-{n}" for n in itertools.count(2))  # it may come to be damaged again
            names = itertools.chain([f"{ASIDE}{step}"], again)
            free = next(path for name in names if not (path := self.folder / name).exists())
            (self.folder / str(step)).rename(free)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoint set aside")
        self._manager = ocp.CheckpointManager(self.folder, options=self._options)

    @staticmethod
    def _agree(problem: str | None) -> str | None:
        """Process 0's finding, on every process."""
        if jax.process_count() == 1:
            return problem
        bad = bool(multihost_utils.broadcast_one_to_all(problem is not None))
        return (problem or "found by process 0") if bad else None


def damage(folder: Path) -> str | None:
    """What is wrong with a saved step's files, in words; None if they match their manifest, or were never signed."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        return None
    try:
        expected = json.loads(manifest.read_text())
    except ValueError:
        return f"{MANIFEST} is unreadable"
    found = _checksums(folder)
    for name, (size, checksum) in expected.items():
        if name not in found:
            return f"file {name} is missing"
        if found[name] != [size, checksum]:
            return f"file {name} does not match its checksum"
    return None


def _checksums(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file below `folder`."""
    sums = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(MANIFEST)):
        checksum = 0
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                checksum = zlib.crc32(chunk, checksum)
        sums[str(path.relative_to(folder))] = [path.stat().st_size, checksum]
    return sums
