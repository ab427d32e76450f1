"""What is shipped: a wheel and an sdist with all that belongs there, and a command line that starts from the wheel."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import hqqplus
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_version_stands_once() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "hqqplus.__version__"}
    # setuptools reads it without importing the package where it is a plain string.
    (assigned,) = [
        node.value
        for node in ast.parse(Path(hqqplus.__file__).read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert ast.literal_eval(assigned) == hqqplus.__version__


def test_the_oldest_libraries_are_those_of_the_ranges() -> None:
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    ranges = {entry.partition(">=")[0]: entry.partition(">=")[2].partition(",")[0] for entry in dependencies()}
    for name in ("transformers", "peft", "trl", "datasets"):
        assert [*map(int, pinned[name].split("."))][:2] == [*map(int, ranges[name].split("."))][:2], name


def dependencies() -> list[str]:
    found: list[str] = PROJECT["project"]["dependencies"]
    return found


def tracked() -> list[str]:
    """What git knows: others may have left work of theirs in the folder."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split(
        "\n"
    )
    return [name for name in names if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist."""
    source, folder = tmp_path_factory.mktemp("source") / "hqqplus", tmp_path_factory.mktemp("dist")
    # In a copy: a build leaves folders behind.
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_what_is_in_them(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    assert hqqplus.__version__ in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {name for name in tracked() if name.startswith("hqqplus/") and name.endswith(".py")}
    assert modules | {"hqqplus/py.typed", "hqqplus/embedded/model/model.safetensors"} <= names
    assert not [name for name in names if not name.startswith("hqqplus")]
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "Makefile", "recipes/embedded_2bit.yaml", "tests/conftest.py"} <= inside


@pytest.mark.slow
def test_a_clean_environment(built: Path, tmp_path: Path) -> None:
    """With what the command line itself needs and nothing else: no torch, and help all the same."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    programs = tmp_path / "venv" / "bin"
    pip = [str(programs / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    (wheel,) = built.glob("*.whl")
    subprocess.run([*pip, "--no-deps", str(wheel)], check=True)
    done = subprocess.run(
        [*pip, "-c", str(ROOT / "constraints.txt"), "typer", "wrapt"], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"no package index: {done.stderr.strip().splitlines()[-1][:100]}")

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [str(programs / arguments[0]), *arguments[1:]], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    listed = run("hqqplus", "--help")
    for verb in ("train", "quantize", "evaluate", "generate", "export"):
        assert verb in listed
    assert "--nbits" in run("hqqplus", "quantize", "--help")
    assert run("python", "-c", "import hqqplus; print(hqqplus.__version__)").strip() == hqqplus.__version__
    where = run("python", "-c", "import hqqplus; print(hqqplus.__file__)")
    assert str(tmp_path) in where
