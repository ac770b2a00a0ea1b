"""Saving and restoring: onto every mesh, bit for bit, and around damage."""

import logging
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.trainers import MESHES, by_name, compiled_step, first_state, make_batch, program, take_steps, tiny
from ulysses_jax.checkpoint import MANIFEST, Checkpoints, damage
from ulysses_jax.data import place
from ulysses_jax.mesh import make_mesh

SAVED = tiny(2, 4, zero_stage=3)


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    """A first state in which no two numbers are alike, moments and counts included."""
    rng = np.random.default_rng(0)

    def one(x: jax.Array) -> jax.Array:
        values = rng.normal(size=x.shape) if x.dtype == jnp.float32 else np.asarray(7)
        return jax.device_put(values.astype(x.dtype), x.sharding)

    return jax.tree.map(one, first_state(SAVED))


@pytest.fixture(scope="module")
def folder(state, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    with Checkpoints(path, keep=1) as checkpoints:
        checkpoints.save(7, state)
    return path


@pytest.mark.parametrize(("data", "seq"), [*MESHES, (1, 1), (2, 2), (8, 1)])
@pytest.mark.parametrize("stage", [0, 3])
def test_saved_at_one_mesh_restored_at_every_other_bit_for_bit(data, seq, stage, folder, state):
    """Trap 9; saving each device's shards by its index, in place of global arrays, breaks it."""
    like = program(tiny(data, seq, zero_stage=stage)).abstract
    with Checkpoints(folder, keep=1) as checkpoints:
        found = checkpoints.restore(like)
    assert found is not None
    step, restored = found
    assert step == 7
    jax.tree.map(lambda x, at: (x.sharding, x.dtype) == (at.sharding, at.dtype) or pytest.fail(str(x)), restored, like)
    before, after = by_name(state), by_name(restored)
    assert before.keys() == after.keys()
    for name, x in after.items():
        np.testing.assert_array_equal(x, before[name], err_msg=name)


@pytest.mark.slow
def test_a_step_follows_a_restore_and_scalars_lie_on_every_device(tmp_path):
    """Trap 15; restoring a scalar onto one device breaks the step that follows, whose program wants it everywhere."""
    batches = [make_batch(SAVED, i) for i in range(2)]
    state, _ = take_steps(SAVED, batches[:1])
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        found = checkpoints.restore(program(SAVED).abstract)
    assert found is not None
    scalars = [x for x in jax.tree.leaves(found[1]) if x.ndim == 0]
    assert len(scalars) == 3, "the step, and the counts of Adam and of its schedule"
    for x in scalars:
        assert x.sharding == NamedSharding(program(SAVED).mesh, PartitionSpec())
        assert len(x.addressable_shards) == 8
        assert int(x) == 1
    after, metrics = compiled_step(SAVED)(found[1], place(batches[1], program(SAVED).mesh))
    expected, expected_metrics = take_steps(SAVED, batches)
    assert float(metrics["loss"]) == expected_metrics[1]["loss"]
    after, expected = by_name(after), by_name(expected)
    for name, x in after.items():
        np.testing.assert_array_equal(x, expected[name], err_msg=name)


# What follows needs no model.
MESH = make_mesh(data=2, seq=4)
AT = {"w": NamedSharding(MESH, PartitionSpec(("data", "seq"))), "step": NamedSharding(MESH, PartitionSpec())}
LIKE = {
    "w": jax.ShapeDtypeStruct((512, 128), jnp.float32, sharding=AT["w"]),
    "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=AT["step"]),
}


def small(step: int) -> dict[str, jax.Array]:
    w = np.random.default_rng(step).normal(size=(512, 128)).astype(np.float32)
    return jax.device_put({"w": w, "step": np.int32(step)}, AT)


def save(path: Path, *steps: int, keep: int = 3) -> None:
    with Checkpoints(path, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, small(step))


def restored_step(path: Path) -> int:
    """The step that a restore finds, its values checked."""
    with Checkpoints(path, keep=3) as checkpoints:
        found = checkpoints.restore(LIKE)
    assert found is not None
    step, state = found
    np.testing.assert_array_equal(state["w"], small(step)["w"])
    assert int(state["step"]) == step
    return step


def folders(path: Path) -> set[str]:
    return {p.name for p in path.iterdir() if p.is_dir()}


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def largest(folder: Path) -> Path:
    """Where the array's data is."""
    return max(files(folder), key=lambda p: p.stat().st_size)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a flipped bit": (lambda folder: flip(largest(folder)), "does not match its checksum"),
    "a truncated file": (lambda folder: largest(folder).write_bytes(largest(folder).read_bytes()[:-1]), "does not match"),
    "a missing file": (lambda folder: largest(folder).unlink(), "is missing"),
    "an unreadable manifest": (lambda folder: (folder / MANIFEST).write_text('{"a": ['), "manifest.json is unreadable"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found_and_named_and_the_good_save_before_it_used(kind, tmp_path, caplog):
    """Trap 19; a restore that does not ask `damage` breaks it: the flipped bit then loads as a wrong number."""
    save(tmp_path, 1, 2, 3)
    spoil, message = DAMAGES[kind]
    name = str(largest(tmp_path / "3").relative_to(tmp_path / "3"))
    spoil(tmp_path / "3")
    remains = {p.relative_to(tmp_path / "3"): p.read_bytes() for p in files(tmp_path / "3")}
    with caplog.at_level(logging.WARNING, "ulysses_jax"):
        assert restored_step(tmp_path) == 2
    assert "checkpoint 3 is damaged" in caplog.text
    assert message in caplog.text
    assert name in caplog.text or "manifest" in kind
    assert folders(tmp_path) == {"1", "2", "damaged-3"}
    assert {p.relative_to(tmp_path / "damaged-3"): p.read_bytes() for p in files(tmp_path / "damaged-3")} == remains


def test_every_single_file_is_watched(tmp_path):
    """A bit flipped in any file of a save, metadata included, is found."""
    save(tmp_path, 1)
    assert damage(tmp_path / "1") is None
    watched = [p for p in files(tmp_path / "1") if p.stat().st_size]
    assert len(watched) > 3
    for path in watched:
        flip(path)
        assert damage(tmp_path / "1") == f"file {path.relative_to(tmp_path / '1')} does not match its checksum"
        flip(path)
    assert damage(tmp_path / "1") is None


def test_a_run_saves_again_over_the_step_set_aside(tmp_path):
    """After falling back to the step before, the run comes to the damaged step again and can save it."""
    save(tmp_path, 1, 2)
    flip(largest(tmp_path / "2"))
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        found = checkpoints.restore(LIKE)
        assert found is not None
        assert found[0] == 1
        checkpoints.save(2, small(2))
    assert restored_step(tmp_path) == 2
    assert folders(tmp_path) == {"1", "2", "damaged-2"}


def test_all_damaged_is_an_error_that_names_them(tmp_path):
    save(tmp_path, 1, 2)
    for step in ("1", "2"):
        flip(largest(tmp_path / step))
    for _ in range(2):  # the second call finds no step: None would begin the run anew, over its own log
        with (
            Checkpoints(tmp_path, keep=3) as checkpoints,
            pytest.raises(ValueError, match=r"every checkpoint in .* is damaged; they were renamed \(damaged-1, damaged-2\)"),
        ):
            checkpoints.restore(LIKE)
        assert folders(tmp_path) == {"damaged-1", "damaged-2"}


def test_a_step_damaged_twice_is_set_aside_twice(tmp_path):
    for _ in range(2):
        save(tmp_path, 1, 2)
        flip(largest(tmp_path / "2"))
        assert restored_step(tmp_path) == 1
    assert folders(tmp_path) == {"1", "damaged-2", "damaged-2-2"}


def test_a_part_of_a_save_is_read_by_itself(tmp_path):
    """Without `part` Orbax refuses a tree that lacks some of what was saved."""
    save(tmp_path, 3)
    name = sorted(LIKE)[0]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        found = checkpoints.restore({name: LIKE[name]}, part=True)
    assert found is not None
    assert found[0] == 3
    assert set(found[1]) == {name}
    jax.tree.map(np.testing.assert_array_equal, found[1][name], small(3)[name])


def test_nothing_saved_is_nothing_restored(tmp_path):
    with Checkpoints(tmp_path / "new", keep=1) as checkpoints:
        assert checkpoints.restore(LIKE) is None
        assert checkpoints.latest is None


def test_the_folder_is_made_where_the_others_wait_for_it(tmp_path, monkeypatch):
    """By Orbax, in one process: making it in each lets the second of them occupy a run's folder before the first claims it."""
    seen, manager = [], ocp.CheckpointManager
    monkeypatch.setattr(ocp, "CheckpointManager", lambda path, **how: seen.append(path.exists()) or manager(path, **how))
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=1):
        assert (tmp_path / "run" / "checkpoints").is_dir()
    assert seen == [False]


def test_the_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep=2)
    assert folders(tmp_path) == {"3", "4"}
    assert restored_step(tmp_path) == 4


def test_a_step_already_saved_is_left_alone(tmp_path):
    save(tmp_path, 1)
    before = {p: p.read_bytes() for p in files(tmp_path / "1")}
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(1, small(99) | {"step": small(1)["step"]})
        assert checkpoints.latest == 1
    assert {p: p.read_bytes() for p in files(tmp_path / "1")} == before
    assert restored_step(tmp_path) == 1


def test_a_save_is_signed_as_soon_as_it_is_written(tmp_path):
    """Signing with the next save, or at the end, breaks it: a crash before would leave the newest unchecked."""
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(1, small(1))
        deadline = time.monotonic() + 60
        while not (tmp_path / "1" / MANIFEST).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert damage(tmp_path / "1") is None
        assert (tmp_path / "1" / MANIFEST).exists()


def test_an_unsigned_save_is_told_of_and_passed_over_if_it_cannot_be_read(tmp_path, caplog):
    """A run that was killed while it wrote. To sign such files afterwards would vouch for what nobody checked."""
    save(tmp_path, 1, 2)
    (tmp_path / "2" / MANIFEST).unlink()
    with caplog.at_level(logging.WARNING, "ulysses_jax"):
        assert restored_step(tmp_path) == 2
        assert "checkpoint 2 was never signed" in caplog.text
        assert not (tmp_path / "2" / MANIFEST).exists()
        for path in files(tmp_path / "2"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert restored_step(tmp_path) == 1
    assert folders(tmp_path) == {"1", "damaged-2"}
