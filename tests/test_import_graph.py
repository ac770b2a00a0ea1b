"""Who may import whom in the library: a table, so that a new edge is a decision."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "ulysses_jax"

LAYERS = {
    "config": set(),
    "checkpoint": set(),
    "runtime": set(),
    "recipes": {"config"},
    "costs": {"config"},
    "mesh": {"config"},
    "attention": {"config"},
    # The types of loop carries inside a shard_map are attention's.
    "memory": {"config", "attention"},
    "report": {"config"},
    "ring": {"mesh", "attention"},
    # The rule of head counts is config's.
    "ulysses": {"config", "mesh", "attention", "ring"},
    "flax_layers": {"mesh", "attention", "ulysses"},
    # Attention on one device is what a model has when it is handed none.
    "model": {"config", "memory", "attention"},
    # The types of loop carries are attention's.
    "loss": {"attention", "model"},
    "zero": {"mesh"},
    "data": {"config", "mesh"},
    "hf": {"config", "model", "mesh", "zero"},
}
TRAIN = {*LAYERS}
ROOMS = LAYERS | {
    "train": TRAIN,
    "plan": {*TRAIN, "train"},
    # The ledger of collectives is plan's.
    "verify": {*TRAIN, "train", "plan"},
    "cli": {*TRAIN, "train", "plan", "verify"},
}
OUTSIDE = {"experiments", "tests", "notebooks"}


def imported(source: str, package: tuple[str, ...]) -> set[str]:
    """Every module that a file of `package` imports, dotted, wherever in the file; names imported from it count as modules."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


def rooms_entered(source: str, package: tuple[str, ...] = ("ulysses_jax",)) -> set[str]:
    """The rooms of the library that a file imports; the package itself counts as a room of its name."""
    inside = [name.split(".") for name in imported(source, package) if name.split(".")[0] == "ulysses_jax"]
    return {parts[1] if len(parts) > 1 else parts[0] for parts in inside}


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_room_may(path):
    """An import of `ulysses` in attention/blocked.py breaks it, and so does a module that the table lacks."""
    package = ("ulysses_jax", *path.relative_to(ROOT).parts[:-1])
    room = room_of(path)
    assert room in ROOMS, f"{room} is new: give it a row in the table and in the design"
    assert rooms_entered(path.read_text(), package) <= ROOMS[room] | {room}


@pytest.mark.parametrize("path", [*modules(), ROOT / "__init__.py"], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_imports_nothing_that_is_not_shipped(path):
    package = ("ulysses_jax", *path.relative_to(ROOT).parts[:-1])
    assert not {name.split(".")[0] for name in imported(path.read_text(), package)} & OUTSIDE


def test_the_front_door_re_exports_and_does_nothing_else():
    body = ast.parse((ROOT / "__init__.py").read_text()).body
    docstring, *imports = body
    assert isinstance(docstring, ast.Expr)
    for node in imports:
        assert isinstance(node, ast.ImportFrom)
        assert all(alias.asname == alias.name for alias in node.names)


def test_the_table_has_no_cycle():
    graphlib.TopologicalSorter(ROOMS).prepare()


@pytest.mark.parametrize(
    ("source", "package", "rooms"),
    [
        ("import ulysses_jax.train", ("ulysses_jax",), {"train"}),
        ("from ulysses_jax import costs, mesh as m", ("ulysses_jax",), {"costs", "mesh"}),
        ("from ulysses_jax.attention.blocked import x", ("ulysses_jax",), {"attention"}),
        ("def f():\n    from . import zero", ("ulysses_jax",), {"zero"}),
        ("from .masks import x", ("ulysses_jax", "attention"), {"attention"}),
        ("from ..train import x", ("ulysses_jax", "attention"), {"train"}),
        ("import ulysses_jax", ("ulysses_jax",), {"ulysses_jax"}),
        ("import jax\nfrom jax import lax", ("ulysses_jax",), set()),
    ],
)
def test_no_spelling_of_an_import_is_missed(source, package, rooms):
    assert rooms_entered(source, package) == rooms
