"""The notes of unfinished work: what counts as done, and what does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hqqplus.quantization.statistics import LayerStatistics
from hqqplus.shards import Form
from hqqplus.streaming import partial
from hqqplus.streaming.partial import PartialFolder, partial_folder

STATISTICS = LayerStatistics((2, 4), 2, 64, 1, 16, 0.1, 2.5, 0.0, 0.0)
FILES: dict[str, dict[str, Form]] = {
    "one.safetensors": {"norm": ((3,), torch.float32), "a.W_q": ((2, 2), torch.uint8)},
    "two.safetensors": {"b.W_q": ((2, 2), torch.uint8), "c.W_q": ((1, 2), torch.uint8)},
}
# Tensor of the checkpoint -> its layer.
LAYERS = {"one.safetensors": {"a.weight": "a"}, "two.safetensors": {"b.weight": "b", "c.weight": "c"}}
SETTINGS: dict[str, Any] = {"quantization": {"nbits": 2}, "device": "cpu"}


class Stop(Exception):
    pass


def write_one(folder: PartialFolder) -> None:
    with folder.writing("one.safetensors", FILES["one.safetensors"]) as file:
        file.writer.write("norm", torch.ones(3))
        file.note("norm")
        file.writer.write("a.W_q", torch.ones(2, 2, dtype=torch.uint8))
        file.note("a.weight", "a", STATISTICS)


def stop_in_two(output: Path, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finish file one and a half of file two."""
    monkeypatch.setattr(partial, "_NOTE_SECONDS", seconds)

    def work() -> None:
        with partial_folder(output, SETTINGS, {}) as folder:
            write_one(folder)
            with folder.writing("two.safetensors", FILES["two.safetensors"]) as file:
                file.writer.write("b.W_q", torch.full((2, 2), 7, dtype=torch.uint8))
                file.note("b.weight", "b", STATISTICS)
                raise Stop

    with pytest.raises(Stop):
        work()


@pytest.mark.parametrize("noted", [True, False])
def test_what_was_noted_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noted: bool) -> None:
    output = tmp_path / "deep" / "out"
    stop_in_two(output, 0 if noted else 1e9, monkeypatch)
    with partial_folder(output, SETTINGS, {}) as folder:
        assert folder.begun
        assert folder.finished(FILES, LAYERS) == ["one.safetensors"]
        assert sorted(folder.layers) == (["a", "b"] if noted else ["a"])
        with folder.writing("two.safetensors", FILES["two.safetensors"]) as file:
            assert list(file.written) == (["b.weight"] if noted else [])
            if not noted:
                file.writer.write("b.W_q", torch.full((2, 2), 7, dtype=torch.uint8))
                file.note("b.weight", "b", STATISTICS)
            file.writer.write("c.W_q", torch.zeros(1, 2, dtype=torch.uint8))
            file.note("c.weight", "c", STATISTICS)
        assert sorted(folder.layers) == ["a", "b", "c"]
        folder.become_output()
    assert sorted(path.name for path in output.iterdir()) == ["one.safetensors", "two.safetensors"]
    assert (output / "two.safetensors").read_bytes()[-6:] == bytes([7, 7, 7, 7, 0, 0])
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_work_that_came_to_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Stop), partial_folder(tmp_path / "out", SETTINGS, {}):
        raise Stop
    assert list(tmp_path.iterdir()) == []


def test_layers_of_what_is_lost_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_in_two(tmp_path / "out", 0, monkeypatch)
    work = tmp_path / "out.partial"
    (work / "model" / "one.safetensors").unlink()
    (work / "two.safetensors.part").write_bytes(b"something else")
    with partial_folder(tmp_path / "out", SETTINGS, {}) as folder:
        assert folder.finished(FILES, LAYERS) == []
        assert folder.layers == {}
        assert not folder.begun
    assert not work.exists()


def test_a_file_that_is_no_longer_wanted_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_in_two(tmp_path / "out", 0, monkeypatch)
    with partial_folder(tmp_path / "out", SETTINGS, {}) as folder:
        only = {"one.safetensors": FILES["one.safetensors"]}
        assert folder.finished(only, LAYERS) == ["one.safetensors"]
        assert sorted(folder.layers) == ["a"]


def test_the_notes_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_in_two(tmp_path / "out", 0, monkeypatch)
    notes = json.loads((tmp_path / "out.partial" / "progress.json").read_text())
    assert notes["format"] == 1
    assert notes["settings"] == SETTINGS
    assert notes["current"] == "two.safetensors"
    assert notes["tensors"] == ["b.weight"]
    assert list(notes["files"]) == ["one.safetensors"]
