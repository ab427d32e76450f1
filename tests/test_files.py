"""Nobody meets half a file: what is written is there whole, or not at all, and nothing else stays behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hqqplus import files
from hqqplus.errors import UserError
from hqqplus.files import (
    check_output,
    check_space,
    full_disk,
    locked_folder,
    made_folder,
    move_folder,
    replacing,
    replacing_folder,
    sha256_of_file,
    sync,
    write_json,
    write_text,
)


class Broken(Exception):
    pass


def tree(folder: Path) -> dict[str, str | None]:
    """Relative path -> text of every file (None: a folder) in `folder`, hidden ones too."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_text(encoding="utf-8") if p.is_file() else None for p in paths}


def fail_at_a_file(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half of the n")
        assert temporary.exists()
        raise Broken


def fail_at_a_folder(path: Path) -> None:
    with replacing_folder(path) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "new.txt").write_text("half of the n")
        raise Broken


@pytest.fixture
def unrenamable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moving a temporary file or folder to its final name fails, as on a disk that has just gone away."""
    replace = os.replace

    def refuse(source: Any, target: Any) -> None:
        if ".tmp" in Path(source).name:
            raise OSError("no more disk")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)


def test_text_and_json_arrive_whole_and_alone(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "deep" / "a.txt", "ä\n")
    write_json(tmp_path / "b.json", {"ö": [1, None], "x": 1.5})
    assert tree(tmp_path) == {
        "b.json": '{\n  "ö": [\n    1,\n    null\n  ],\n  "x": 1.5\n}\n',
        "new": None,
        "new/deep": None,
        "new/deep/a.txt": "ä\n",
    }
    assert json.loads((tmp_path / "b.json").read_text(encoding="utf-8")) == {"ö": [1, None], "x": 1.5}


def test_what_cannot_be_json_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"list": [1, object()]})
    assert tree(tmp_path) == {"a.json": "1\n"}


def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(Broken):
        fail_at_a_file(tmp_path / "a.txt")
    assert tree(tmp_path) == {"a.txt": "old"}


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("old")
    with replacing(tmp_path / "a.png") as temporary:
        assert temporary.suffix == ".png"  # writers choose the format by it
        temporary.write_text("new")
        assert (tmp_path / "a.png").read_text() == "old"
    assert tree(tmp_path) == {"a.png": "new"}


@pytest.mark.usefixtures("unrenamable")
def test_a_file_that_cannot_be_renamed_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(OSError, match="no more disk"):
        write_text(tmp_path / "a.txt", "new")
    assert tree(tmp_path) == {"a.txt": "old"}


def test_a_folder_replaces_the_old_one_altogether(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    with replacing_folder(folder) as temporary:
        (temporary / "new.txt").write_text("new")
        assert tree(folder) == {"old.txt": "old"}
    assert tree(tmp_path) == {"out": None, "out/new.txt": "new"}


def test_a_folder_is_made_with_those_above_it(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "a" / "b") as temporary:
        (temporary / "c.txt").write_text("c")
    assert tree(tmp_path) == {"a": None, "a/b": None, "a/b/c.txt": "c"}


@pytest.mark.parametrize("exists", [True, False])
def test_a_writer_that_fails_leaves_the_old_folder(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "out"
    if exists:
        folder.mkdir()
        (folder / "old.txt").write_text("old")
    before = tree(tmp_path)
    with pytest.raises(Broken):
        fail_at_a_folder(folder)
    assert tree(tmp_path) == before


@pytest.mark.usefixtures("unrenamable")
def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    with pytest.raises(OSError, match="no more disk"), replacing_folder(folder) as temporary:
        (temporary / "new.txt").write_text("new")
    assert tree(tmp_path) == {"out": None, "out/old.txt": "old"}


def test_what_a_killed_process_of_the_same_number_left_is_not_shipped(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "out") as temporary:
        name = temporary.name
    shutil.rmtree(tmp_path / "out")
    (tmp_path / name).mkdir()
    (tmp_path / name / "leftover.txt").write_text("from before")
    with replacing_folder(tmp_path / "out") as temporary:
        assert temporary.name == name
    assert tree(tmp_path) == {"out": None}


def test_outputs_that_cannot_be_written_are_refused_early(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(UserError, match=rf"^output_dir: {path}: {tmp_path / 'file'} is a file"):
            check_output(path, "output_dir")
    check_output(tmp_path, "output_dir")
    check_output(tmp_path / "not" / "yet", "output_dir")
    assert tree(tmp_path) == {"file": ""}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_protected_output_is_refused_early(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="may not be written to"):
        check_output(tmp_path / "out", "output_dir")


def test_a_disk_without_room_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(Path(path))
        return SimpleNamespace(free=12345678)

    monkeypatch.setattr(files.shutil, "disk_usage", usage)
    check_space(tmp_path / "not" / "yet", 12345678, "output")
    with pytest.raises(UserError) as caught:
        check_space(tmp_path / "not" / "yet", 12345679, "output")
    free = "12,345,679 bytes are needed on that disk, 12,345,678 are free"
    assert str(caught.value) == f"output: {tmp_path / 'not' / 'yet'}: {free}"
    assert asked == [tmp_path, tmp_path]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "x"), "the disk is full"),
        (OSError(errno.EDQUOT, "x"), "the disk quota is used up"),
        (OSError(errno.EFBIG, "x"), "a file is too large for it"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"),
            "a file could not be written whole",
        ),
    ],
)
def test_a_full_disk_is_one_sentence(tmp_path: Path, error: Exception, text: str) -> None:
    with (
        pytest.raises(UserError, match=rf"^output: {tmp_path}: {text} \([\d,]+ bytes are free\): buy another$"),
        full_disk(tmp_path, "output", "buy another"),
    ):
        raise error


@pytest.mark.parametrize("error", [OSError(errno.EIO, "x"), UserError("(os error 28)"), RuntimeError("x")])
def test_other_errors_are_what_they_were(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, full_disk(tmp_path, "output"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("there", [None, "file", "empty", "full"])
def test_a_folder_is_moved_over_what_is_there(tmp_path: Path, there: str | None) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "new.txt").write_text("new")
    if there == "file":
        target.write_text("old")
    elif there is not None:
        target.mkdir()
        if there == "full":
            (target / "old.txt").write_text("old")
    move_folder(source, target)
    assert tree(tmp_path) == {"target": None, "target/new.txt": "new"}


@pytest.mark.skipif(os.name == "nt", reason="no locks there")
def test_a_folder_has_one_holder(tmp_path: Path, run_python: Callable[..., Any]) -> None:
    take = f"from hqqplus.files import locked_folder\nwith locked_folder({str(tmp_path)!r}, 'output'): print('held')"
    with locked_folder(tmp_path, "output"):
        with pytest.raises(UserError, match="another process is at work there"), locked_folder(tmp_path, "output"):
            pass
        assert "another process is at work there" in run_python("-c", take, check=False).stderr
    assert run_python("-c", take).stdout == "held\n"
    assert tree(tmp_path) == {}


def test_a_folder_is_synced_with_all_that_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(b"x")
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    sync(tmp_path / "a")
    assert synced == [str(tmp_path / "a" / "b"), str(tmp_path / "a" / "b" / "file"), str(tmp_path / "a")]
    synced.clear()
    sync(tmp_path / "a", recursive=False)
    assert synced == [str(tmp_path / "a")]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_only_a_disk_that_failed_fails_a_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(handle: int) -> None:
        raise OSError(number, "x")

    monkeypatch.setattr(os, "fsync", fail)
    if number == errno.EIO:
        with pytest.raises(OSError, match="x"):
            sync(tmp_path)
    else:
        sync(tmp_path)


def test_the_hash_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()


def test_a_forked_process_holds_no_folder(tmp_path: Path) -> None:
    with locked_folder(tmp_path, "test"):
        ready, is_ready = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(is_ready, b"x")
            signal.pause()
            os._exit(0)
        os.read(ready, 1)
        with pytest.raises(UserError, match="another process"), locked_folder(tmp_path, "test"):
            pass
    try:
        with locked_folder(tmp_path, "test"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_that_stays_empty_goes_again(tmp_path: Path) -> None:
    with made_folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with made_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "c").mkdir()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["c"]
    with made_folder(tmp_path / "a"):
        pass
    with made_folder(tmp_path / "d"):
        (tmp_path / "d" / "file").write_text("kept")
    assert (tmp_path / "d" / "file").is_file()
