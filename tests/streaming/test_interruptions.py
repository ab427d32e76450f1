"""Quantizing on the disk, killed, or with a disk that is full: the same bytes in the end."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hqqplus import HqqPlusConfig, files
from hqqplus.errors import UserError
from hqqplus.modules import observe_packing
from hqqplus.shards import read_header
from hqqplus.streaming import Quantized
from hqqplus.streaming import quantize as streaming
from tests.conftest import ROOT
from tests.streaming.checkpoints import MIXED, made, same_tensors, tree

# Interruptions -------------------------------------------------------------------------------------------------------

# Really killed, while layer number KILL is quantized.
_KILLED = """
import json, os, signal, sys
import torch
from hqqplus import HqqPlusConfig
from hqqplus.modules import observe_packing
from hqqplus.streaming import partial, quantize_checkpoint
parent, output, config, kill, seconds = sys.argv[1:]
torch.set_num_threads(1)
partial._NOTE_SECONDS = float(seconds)
seen = []
def observe(name, weight, packed):
    seen.append(name)
    if len(seen) == int(kill):
        os.kill(os.getpid(), signal.SIGKILL)
with observe_packing(observe):
    quantize_checkpoint(parent, output, HqqPlusConfig(**json.loads(config)), device="cpu", quiet=True)
"""


def killed(parent: Path, output: Path, at_layer: int, note_seconds: float = 1e9) -> None:
    """Start `made` in another process, which is killed while it quantizes the layer of that number (from 1)."""
    arguments = [str(parent), str(output), json.dumps(MIXED), str(at_layer), str(note_seconds)]
    done = subprocess.run([sys.executable, "-c", _KILLED, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture(scope="module")
def half_done(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of work that a kill at layer 12 left; to be copied to `NAME.partial`."""
    folder = tmp_path_factory.mktemp("half_done") / "out"
    killed(parent, folder, at_layer=12)
    return folder.with_name("out.partial")


def state(path: Path) -> tuple[int, int, int]:
    """Which file it is, and when it was written: the same only if nobody wrote it again."""
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def layers_packed(call: Callable[[], Quantized]) -> tuple[list[str], Quantized]:
    seen: list[str] = []
    with observe_packing(lambda name, weight, packed: seen.append(name)):
        return seen, call()


@pytest.mark.slow
def test_after_a_kill_finished_files_are_kept(parent: Path, whole: Quantized, tmp_path: Path) -> None:
    output, work = tmp_path / "out", tmp_path / "out.partial"
    killed(parent, output, at_layer=8)
    assert not output.exists()
    finished = {path.name: state(path) for path in (work / "model").iterdir()}
    assert 1 <= len(finished) < len(list(parent.glob("*.safetensors")))
    # And again, later.
    killed(parent, output, at_layer=4)
    later = {path.name: state(path) for path in (work / "model").iterdir()}
    assert len(later) > len(finished)
    assert {name: later[name] for name in finished} == finished

    seen, found = layers_packed(lambda: made(parent, output))
    assert sorted(found.kept) == sorted(later)
    assert {name: state(output / name) for name in later} == later
    in_kept = {key.rpartition(".")[0] for name in later for key in read_header(parent / name)}
    assert not in_kept.intersection(seen)
    assert tree(tmp_path) == ["out", *(f"out/{name}" for name in tree(whole.folder))]
    for name in tree(whole.folder):
        assert (output / name).read_bytes() == (whole.folder / name).read_bytes(), name


@pytest.mark.slow
def test_after_a_kill_a_file_in_work_is_continued(
    random_model: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parent, output = random_model("llama"), tmp_path / "out"  # one file
    expected, reference = layers_packed(lambda: made(parent, tmp_path / "whole"))
    killed(parent, output, at_layer=9, note_seconds=0)
    assert not list((tmp_path / "out.partial" / "model").iterdir())
    capfd.readouterr()
    seen, found = layers_packed(lambda: made(parent, output, quiet=False))
    assert seen == expected[8:]
    assert f"{output}.partial: goes on where it was, 0 of 1 files are finished" in capfd.readouterr().err
    for name in tree(reference.folder):
        assert (output / name).read_bytes() == (reference.folder / name).read_bytes(), name
    assert found.layers == reference.layers
    # Without a note nothing of the file counts.
    killed(parent, tmp_path / "other", at_layer=9)
    seen, found = layers_packed(lambda: made(parent, tmp_path / "other"))
    assert seen == expected
    assert found.kept == ()


def test_a_kill_at_the_end_costs_no_layer(
    parent: Path, whole: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "write_layers", stop)
        with pytest.raises(KeyboardInterrupt):
            made(parent, tmp_path / "out")
    assert tree(tmp_path)[0] == "out.partial"
    seen, found = layers_packed(lambda: made(parent, tmp_path / "out"))
    assert seen == []
    assert len(found.kept) == len(list(parent.glob("*.safetensors")))
    for name in tree(whole.folder):
        assert (tmp_path / "out" / name).read_bytes() == (whole.folder / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["size", "header", "missing", "layers"])
def test_a_finished_file_that_is_not_as_it_was_is_made_again(
    parent: Path, half_done: Path, whole: Quantized, tmp_path: Path, damage: str
) -> None:
    work = tmp_path / "out.partial"
    shutil.copytree(half_done, work)
    progress = json.loads((work / "progress.json").read_text())
    path = work / "model" / next(iter(progress["files"]))
    if damage == "size":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "header":
        path.write_bytes(path.read_bytes().replace(b'"U8"', b'"I8"'))
    elif damage == "missing":
        path.unlink()
    else:
        (work / "progress.json").write_text(json.dumps({**progress, "layers": {}}))
    found = made(parent, tmp_path / "out")
    assert len(found.kept) <= len(progress["files"]) - 1
    for name in tree(whole.folder):
        assert (tmp_path / "out" / name).read_bytes() == (whole.folder / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"config": {**MIXED, "nbits": 4}}, r"with other settings \(nbits: 2 -> 4\)"),
        ({"dtype": "bfloat16"}, r"with other settings \(dtype: checkpoint -> torch.bfloat16\)"),
        ({"versions": {"hqqplus": "9"}}, r"with other settings \(hqqplus: None -> 9\)"),
        ({"parent": True}, r"an unfinished quantization of another checkpoint"),
    ],
)
def test_work_on_something_else_is_refused_and_left_alone(
    parent: Path, half_done: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    changed = dict(change)
    config = HqqPlusConfig(**changed.pop("config", MIXED))
    if changed.pop("parent", False):
        copy = tmp_path / "parent"
        shutil.copytree(parent, copy)
        killed(copy, tmp_path / "out", at_layer=8)
        os.utime(copy / "config.json")
        parent = copy
    else:
        shutil.copytree(half_done, tmp_path / "out.partial")
    before = {path: state(path) for path in (tmp_path / "out.partial").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=rf"^output: {tmp_path}/out\.partial: .*{says}: delete it, or name another"):
        made(parent, tmp_path / "out", config, **changed)
    assert {path: state(path) for path in (tmp_path / "out.partial").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("content", [None, "thesis.txt", "progress.json"])
def test_a_folder_of_that_name_that_is_none_of_ours(parent: Path, tmp_path: Path, content: str | None) -> None:
    work = tmp_path / "out.partial"
    if content is None:
        work.write_text("precious")
    else:
        work.mkdir()
        (work / content).write_text("precious")
    with pytest.raises(UserError, match=rf"^output: {work}: this (file|folder) is in the way"):
        made(parent, tmp_path / "out")
    assert (work if content is None else work / content).read_text() == "precious"


def test_two_at_once_are_refused(parent: Path, tmp_path: Path) -> None:
    work = tmp_path / "out.partial"
    work.mkdir()
    with (
        files.locked_folder(work, "output"),
        pytest.raises(UserError, match=f"^output: {work}: another process is at work there"),
    ):
        made(parent, tmp_path / "out")
    made(parent, tmp_path / "out")


# The disk ------------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_refused_before_the_work(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(UserError, match=r"^output: .*/out: [\d,]+ bytes are needed on that disk, 1,000,000 are free$"):
        made(parent, tmp_path / "out")
    assert tree(tmp_path) == []


@pytest.mark.slow
def test_what_is_there_already_needs_no_room(
    parent: Path, half_done: Path, whole: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(half_done, tmp_path / "out.partial")
    there = sum(path.stat().st_size for path in (tmp_path / "out.partial" / "model").iterdir())
    needed = sum(path.stat().st_size for path in whole.folder.glob("*.safetensors")) + streaming._SMALL_BYTES
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - there - 2**15))
    with pytest.raises(UserError, match="bytes are needed on that disk"):
        made(parent, tmp_path / "out")
    assert (tmp_path / "out.partial" / "progress.json").is_file()  # what was done is not lost
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - there))
    assert made(parent, tmp_path / "out").kept


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_becomes_full_leaves_what_is_finished(
    parent: Path, whole: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real, written = os.pwrite, 0

    def full(handle: int, data: Any, place: int) -> int:
        nonlocal written
        if written > 40_000:
            raise OSError(number, "full")
        written += len(data)
        return real(handle, data, place)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(UserError) as caught:
            made(parent, tmp_path / "out")
    message = str(caught.value)
    assert message.startswith(f"output: {tmp_path}/out: the disk ")
    assert message.endswith("bytes are free): make room and run it again, it goes on where it was")
    assert not (tmp_path / "out").exists()
    finished = {path.name: state(path) for path in (tmp_path / "out.partial" / "model").iterdir()}
    assert finished
    found = made(parent, tmp_path / "out")
    assert sorted(found.kept) == sorted(finished)
    assert {name: state(tmp_path / "out" / name) for name in finished} == finished
    same_tensors(tmp_path / "out", whole.folder)


def test_a_disk_that_is_full_from_the_start_gets_its_room_back(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="the disk is full"):
        made(parent, tmp_path / "out")
    assert tree(tmp_path) == []


def test_a_full_disk_on_the_other_route(
    random_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError
    from transformers import MixtralForCausalLM

    mixture = random_model("mixtral")  # before nothing can be written any more

    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(MixtralForCausalLM, "save_pretrained", full)
    config = HqqPlusConfig(2, 32, modules_to_not_convert=["*.experts"])  # which are then saved as they were
    with pytest.raises(UserError, match=r"^output: .*: the disk is full \([\d,]+ bytes are free\): make room"):
        made(mixture, tmp_path / "out", config)
    assert tree(tmp_path) == []
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="1,000 are free"):
        made(mixture, tmp_path / "out", config)
