"""What others are handed: the wheel, and the README with its examples."""

import configparser
import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not on the PATH")
    out = tmp_path_factory.mktemp("dist")
    build = [uv, "build", "--quiet", "--wheel", "--out-dir", out, ROOT]
    # The build backend is in uv's cache after the first time; only then does this need no network.
    if subprocess.run([*build, "--offline"], check=False, capture_output=True).returncode:
        subprocess.run(build, check=True, timeout=300)
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def metadata(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = (path for path in wheel.namelist() if path.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    """Broken by: `packages = ["ulysses_jax", "experiments"]` in pyproject.toml; leaving py.typed out."""
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "ulysses_jax").rglob("*.py")}
    about = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    about = {f"ulysses_jax-{PROJECT['version']}.dist-info/{name}" for name in about}
    assert set(wheel.namelist()) == code | {"ulysses_jax/py.typed"} | about
    assert "ulysses_jax/recipes.py" in wheel.namelist()


@pytest.mark.slow
def test_the_wheel_has_the_licence_and_the_command(wheel):
    assert metadata(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()
    scripts = configparser.ConfigParser()
    scripts.read_string(metadata(wheel, "entry_points.txt"))
    assert dict(scripts["console_scripts"]) == {"ulysses": "ulysses_jax.cli:main"}


@pytest.mark.slow
def test_project_wheel_and_installed_package_have_one_version(wheel):
    built = email.message_from_string(metadata(wheel, "METADATA"))
    assert built["License-Expression"] == "Apache-2.0"
    assert built["Version"] == PROJECT["version"] == importlib.metadata.version("ulysses-jax")


def test_the_readme_names_every_extra():
    """Broken by: an extra in pyproject.toml that the README's table lacks, or the other way round."""
    assert set(re.findall(r"^\| `(\w+)` \|", README.split("## In your own code")[0], flags=re.MULTILINE)) == set(
        PROJECT["optional-dependencies"]
    )


def test_the_files_the_readme_links_to_are_there():
    """Broken by: moving the figure."""
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert "docs/exchange.svg" in links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.slow
def test_the_examples_of_the_readme_run_as_written(tmp_path):
    """Broken by: renaming an argument they use."""
    assert len(EXAMPLES) == 6
    script = tmp_path / "examples.py"
    script.write_text("\n".join(EXAMPLES))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    how = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True, "timeout": 300, "check": False}
    ran = subprocess.run([sys.executable, script], **how)
    assert ran.returncode == 0, ran.stderr
    shapes, error, density, *losses = ran.stdout.splitlines()
    assert shapes == "(2, 1024, 8, 64) of which a device holds (1, 256, 8, 64)"
    assert float(error) < 1e-5
    assert re.fullmatch(r"\d+% of the blocks", density)
    assert len(losses) == 3
    assert float(losses[2]) < float(losses[0])
    assert "Involuntary" not in ran.stderr, "XLA gathers activations"
