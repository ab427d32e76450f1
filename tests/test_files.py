"""Nobody meets half a file: what is written is there whole, or not at all, and nothing else stays behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from hqqplus.errors import UserError
from hqqplus.files import check_output, replacing, replacing_folder, write_json, write_text


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
