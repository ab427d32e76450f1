"""The harness sees what it is there to see, and leftovers go."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from hqqplus import files
from hqqplus.recovery import teacher_cache
from hqqplus.streaming import partial
from tests.faults.runs import Place, differences
from tests.faults.server import Events, Kill


def run_folder(folder: Path) -> Place:
    """What a run might leave, with its own name in it."""
    place = Place(folder)
    for step in (3, 6):
        checkpoint = place.out / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "optimizer.pt").write_bytes(bytes(range(200)))
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": step, "loss": 1 / 3}]}))
    (place.out / "report.json").write_text(json.dumps({"name": str(folder), "train_seconds": 1.5, "ppl": [6, 1.25]}))
    (place.out / "log.jsonl").write_text('{"step": 3}\n')
    return place


def flip_a_bit(place: Place) -> None:
    content = bytearray((place.out / "checkpoint-6" / "optimizer.pt").read_bytes())
    content[100] ^= 1
    (place.out / "checkpoint-6" / "optimizer.pt").write_bytes(content)


def change_a_number(place: Place) -> None:
    state = place.out / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text().replace("0.3333333333333333", "0.3333333333333334"))


def log_twice(place: Place) -> None:
    (place.out / "log.jsonl").write_text('{"step": 3}\n{"step": 3}\n')


def lose_the_report(place: Place) -> None:
    (place.out / "report.json").unlink()


def leave_something(place: Place) -> None:
    (place.out / ".report.77.tmp.md").write_text("half")


def leave_a_folder(place: Place) -> None:
    (place.out / ".adapter.77.tmp").mkdir()


CHANGES = [flip_a_bit, change_a_number, log_twice, lose_the_report, leave_something, leave_a_folder]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_difference_is_seen(tmp_path: Path, change: Callable[[Place], None]) -> None:
    one, other = run_folder(tmp_path / "run-0001"), run_folder(tmp_path / "run-0002")
    assert differences(one, other) == []
    change(one)
    assert len(differences(one, other)) == 1


def test_times_older_checkpoints_and_what_was_printed_are_no_difference(tmp_path: Path) -> None:
    one, other = run_folder(tmp_path / "run-0001"), run_folder(tmp_path / "run-0002")
    report = one.out / "report.json"
    report.write_text(report.read_text().replace("1.5", "99.0"))
    (one.out / "checkpoint-3").rename(one.out / "checkpoint-4")
    (one.folder / "000.log").write_text("hello")
    assert differences(one, other) == []


def test_changes_below_the_folder_are_counted(tmp_path: Path) -> None:
    # The hook itself stays until a process ends: what it does is called by hand.
    events = Events(str(tmp_path), Kill())
    (tmp_path / "sub").mkdir()
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        events._announced("open", (str(tmp_path / "a"), "w", os.O_WRONLY | os.O_CREAT))
        events._announced("open", (str(tmp_path / "a"), "r", os.O_RDONLY))
        events._announced("os.remove", ("b", handle))
        (tmp_path / "a").touch()
        (tmp_path / "b").touch()
        events._announced("os.rename", (str(tmp_path / "a"), str(tmp_path / "b"), -1, -1))
        events._announced("os.remove", ("b", handle))
        events._announced("os.mkdir", (str(tmp_path / "sub"), 0o777, -1))
        events._announced("os.remove", (str(tmp_path.parent / "b"), -1))
        events._announced("os.listdir", (str(tmp_path),))
    finally:
        os.close(handle)
    assert [event.partition(":")[0] for event in events.seen] == ["open", "os.rename", "os.remove"]


def leave(folder: Path) -> set[str]:
    """What killed writers leave in `folder`; returns the names of what is not theirs."""
    ours = {
        ".report.12.tmp.md",
        ".adapter.3.tmp",
        ".backbone.4567.old",
        ".manifest.8.tmp.json",
        ".block-0000.9.tmp.bin",
    }
    others = {"adapter", ".cache", ".gitignore", "a.12.tmp", ".tmp", ".12.tmp", ".notes.tmp.md", ".notes.x1.tmp"}
    for name in ours | others:
        if "adapter" in name or "backbone" in name:
            (folder / name / "below").mkdir(parents=True)
        else:
            (folder / name).write_text("x")
    return others


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    others = leave(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / ".hqqplus.5.tmp.json").write_text("x")
    files.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*others, "model"}
    assert (tmp_path / "model" / ".hqqplus.5.tmp.json").exists()
    # Who holds a folder alone may tidy up below it too.
    with files.locked_folder(tmp_path, "output"):
        assert not (tmp_path / "model" / ".hqqplus.5.tmp.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {*others, "model"}


def test_the_names_that_are_removed_are_those_that_are_written(tmp_path: Path) -> None:
    with files.replacing(tmp_path / "report.json") as first, files.replacing_folder(tmp_path / "adapter") as second:
        first.touch()
        assert first.exists()
        assert second.exists()
        files.remove_leftovers(tmp_path)
        assert not first.exists()
        assert not second.exists()
        first.touch()
        second.mkdir()


def test_a_cache_that_was_done_when_it_was_killed(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3, 4]]})
    assert [seen for seen, _ in teacher_cache._blocks(rows, 0, set(), 8)] == [2]
    assert list(teacher_cache._blocks(rows, 2, set(), 8)) == []
    assert not teacher_cache.is_made(tmp_path / "teacher")
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / teacher_cache.PROGRESS).write_text("{}")
    assert teacher_cache.is_made(tmp_path / "teacher")
    assert list((tmp_path / "teacher").iterdir()) == []


def test_the_rest_of_a_packed_folder_that_was_done(tmp_path: Path) -> None:
    output, rest = tmp_path / "base", tmp_path / "base.partial"
    partial.remove_rest(output)
    (rest / "model").mkdir(parents=True)
    (rest / "progress.json").write_text("{}")
    partial.remove_rest(output)
    assert (rest / "model").is_dir(), "there is work in it"
    (rest / "model").rmdir()
    with files.locked_folder(rest, "output"):
        partial.remove_rest(output)
    assert rest.is_dir(), "somebody begins in it"
    partial.remove_rest(output)
    assert not rest.exists()
