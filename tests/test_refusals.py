"""Every misuse of the public functions and of the command line is refused in one line: the value, the relation, the way out.

`TABLE` is the list; each row is a test, and `python -m tests.test_refusals` writes it for people to `REFUSALS.md`.
"""

import contextlib
import io
import shlex
import tempfile
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import pytest

from tests import conftest as conftest  # the same 8 devices when this file is run by itself
from tests.refusals import ATTENTION, FLAX, MESH, Row
from tests.refusals_of_runs import COMMANDS, CONFIG
from ulysses_jax import (
    cli,
)

FILE = Path(__file__).with_name("REFUSALS.md")

PARTS = {
    "Attention on one device": ATTENTION,
    "Attention on a mesh": MESH,
    "Models, ZeRO, checkpoints": FLAX,
    "Configs": CONFIG,
    "The command line": COMMANDS,
}
TABLE = [row for rows in PARTS.values() for row in rows]


def message(row: Row) -> str:
    """What the misuse is told; run it in an empty folder."""
    row.setup()
    try:
        if callable(row.provoke):
            with pytest.raises(row.error) as caught:
                row.provoke()
            assert type(caught.value) is row.error
            said = str(caught.value)
        else:
            told = io.StringIO()
            with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
                status = cli.main(shlex.split(row.provoke))
            assert status == 2, told.getvalue()
            lines = told.getvalue().splitlines()
            assert len(lines) == 1, told.getvalue()
            assert lines[0].startswith("error: ")
            said = lines[0].removeprefix("error: ")
    finally:
        mock.patch.stopall()
    return said.replace(str(Path.cwd()) + "/", "")


def line(row: Row, said: str) -> str:
    """The row as REFUSALS.md shows it."""
    return f"| {row.misuse} | {said.replace('|', chr(92) + '|')} |"


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.misuse)
def test_a_misuse_is_told_the_value_the_relation_and_the_way_out_in_one_line(row, tmp_path, monkeypatch):
    """Broken by removing any one check: the row then fails inside jax or numpy, or not at all."""
    monkeypatch.chdir(tmp_path)
    said = message(row)
    assert [part for part in row.says if part not in said] == [], said
    assert "\n" not in said
    assert said.endswith(".")
    assert line(row, said) in FILE.read_text().splitlines(), "run: python -m tests.test_refusals"


def test_the_table_for_people_has_every_row_and_no_other():
    written = [text.split(" | ")[0].removeprefix("| ") for text in FILE.read_text().splitlines() if text.startswith("| ")]
    assert [name for name in written if name != "misuse"] == [row.misuse for row in TABLE]
    assert len({row.misuse for row in TABLE}) == len(TABLE)


def test_an_error_inside_jax_is_no_refusal_and_keeps_its_traceback(monkeypatch):
    """A bug must not look like a refusal; broken by catching every ValueError in `main`."""
    monkeypatch.setattr(cli, "list_recipes", lambda console: jnp.concatenate([]))
    with pytest.raises(ValueError, match="concatenate"):
        cli.main(["train", "--list"])


def write_table() -> None:
    """Run every row, each in its own folder, and write what it says."""
    text = [
        "# What is refused, and how",
        "",
        "Every row is a test (`tests/test_refusals.py`); `python -m tests.test_refusals` writes this file. Refusals come",
        "before anything compiles: `ValueError` for a wrong request, `NotImplementedError` for an unbuilt one; on the command",
        "line one line on stderr, `error: …`, and exit status 2.",
    ]
    for part, rows in PARTS.items():
        text += ["", f"## {part}", "", "| misuse | it says |", "|---|---|"]
        for row in rows:
            with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
                text.append(line(row, message(row)))
    FILE.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    write_table()
