"""The README tells the truth: its commands run, its Python runs, its tables are the measured ones."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import run_verb
from tests.conftest import ROOT, load_benchmark

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
MAKE = [c for c in COMMANDS if c.startswith("make ")]
# These need a GPU or the hub: what can be checked here is that their recipe is good.
REMOTE = [c for c in COMMANDS if c.startswith("accelerate launch ")]
LOCAL = [c for c in COMMANDS if c not in MAKE and c not in REMOTE]


def test_it_starts_with_the_two_commands() -> None:
    assert blocks("bash")[0].split("\n")[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("command", MAKE)
def test_make_targets_exist(command: str) -> None:
    subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("command", REMOTE)
def test_recipes_of_long_runs_are_valid(command: str) -> None:
    from hqqplus.recipe import load_recipe

    words = shlex.split(command)
    start = words.index("-m")
    assert words[: start + 2][-2:] == ["-m", "hqqplus.train"]
    options = dict(zip(words[2:start:2], words[3:start:2], strict=True))
    assert options.keys() <= {"--config_file", "--num_processes"}
    # What is in it, tests/test_accelerate_configurations.py looks at.
    assert (ROOT / options.get("--config_file", "recipes/accelerate/ddp.yaml")).is_file()
    load_recipe(ROOT / words[start + 2], words[start + 3 :])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the recipes in it, so that what the commands write stays out of the repository."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    return folder


SHORT = (
    " training.max_steps=2",
    " evaluation.max_tokens=1000",
    " calibration.samples=16",
    " calibration.epochs=1",
)


@pytest.mark.slow
def test_every_other_command_and_the_python_run_in_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The run is cut short; all else is as it stands.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    assert len(LOCAL) >= 7
    monkeypatch.chdir(folder)
    for command in LOCAL:
        words = shlex.split(command)
        if words[0] == "hqqplus":
            run_verb(words[1:])
            continue
        short = SHORT if "hqqplus.train" in command else ()
        done = subprocess.run(command + "".join(short), shell=True, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    (code,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "runs" / "packed_again" / "model.safetensors").is_file()


def test_tables_are_the_measured_ones() -> None:
    tables = load_benchmark("tables")
    assert README.count("<!-- table:") == 9
    assert tables.filled(README) == README


def test_files_that_it_names_are_there() -> None:
    for name in re.findall(r"`((?:hqqplus|benchmarks|recipes)/[\w/.]+\.\w+)`|\]\(([\w/.]+)\)", README):
        assert (ROOT / (name[0] or name[1])).exists(), name
