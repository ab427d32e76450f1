"""A restarted run measures nothing twice, and never takes an old measurement for a new one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hqqplus import models
from hqqplus.evaluation.perplexity import Windows, perplexity
from hqqplus.recovery.measure import FILE_NAME, Measurement, Meter, Notebook


class Counter:
    """A measurement that counts how often it is made, and is another one each time."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Measurement:
        self.calls += 1
        return Measurement({"evaluation": 10.0 + self.calls, "stories": math.inf}, ["so ä", ""], 1234)


def test_measured_once_and_remembered_by_the_next_process(tmp_path: Path) -> None:
    counter = Counter()
    first = Notebook(tmp_path / "run", writes=True).recall("parent", {"model": "a", "seed": 1}, counter)
    again = Notebook(tmp_path / "run", writes=True).recall("parent", {"seed": 1, "model": "a"}, counter)
    assert first == again == Measurement({"evaluation": 11.0, "stories": math.inf}, ["so ä", ""], 1234)
    assert counter.calls == 1


@pytest.mark.parametrize("other", [{"model": "b", "seed": 1}, {"model": "a", "seed": "1"}, {"model": "a"}, None])
def test_measured_again_when_what_it_depends_on_changes(tmp_path: Path, other: Any) -> None:
    counter, notebook = Counter(), Notebook(tmp_path, writes=True)
    notebook.recall("parent", {"model": "a", "seed": 1}, counter)
    assert notebook.recall("parent", other, counter).perplexities["evaluation"] == 12.0
    assert notebook.recall("parent", other, counter).perplexities["evaluation"] == 12.0
    assert counter.calls == 2


def test_stages_are_noted_beside_each_other(tmp_path: Path) -> None:
    counter, notebook = Counter(), Notebook(tmp_path, writes=True)
    for stage in ("parent", "quantized", "parent", "quantized"):
        notebook.recall(stage, "same", counter)
    assert counter.calls == 2
    assert set(json.loads((tmp_path / FILE_NAME).read_text(encoding="utf-8"))) == {"parent", "quantized"}
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"{",
        b"null",
        b"[1, 2]",
        b"3",
        b"\xff\xfe",
        b'{"parent": 1}',
        b'{"parent": {}}',
        b'{"parent": {"digest": "DIGEST"}}',
        b'{"parent": {"digest": "DIGEST", "measurement": {"perplexity": 3}}}',
        b'{"parent": {"digest": "DIGEST", "measurement": null}}',
    ],
)
def test_a_damaged_notebook_is_written_anew(tmp_path: Path, damaged: bytes) -> None:
    counter, notebook = Counter(), Notebook(tmp_path, writes=True)
    notebook.recall("parent", "same", counter)
    digest = json.loads((tmp_path / FILE_NAME).read_text(encoding="utf-8"))["parent"]["digest"]
    (tmp_path / FILE_NAME).write_bytes(damaged.replace(b"DIGEST", digest.encode()))
    assert notebook.recall("parent", "same", counter).perplexities["evaluation"] == 12.0
    assert notebook.recall("parent", "same", counter).perplexities["evaluation"] == 12.0
    assert counter.calls == 2


def test_a_process_that_does_not_write_reads(tmp_path: Path) -> None:
    counter = Counter()
    reader = Notebook(tmp_path / "run", writes=False)
    reader.recall("parent", "same", counter)
    assert not (tmp_path / "run").exists()
    Notebook(tmp_path / "run", writes=True).recall("parent", "same", counter)
    assert reader.recall("parent", "same", counter).perplexities["evaluation"] == 12.0
    assert counter.calls == 2


def test_a_measurement_that_fails_is_not_noted(tmp_path: Path) -> None:
    def fail() -> Measurement:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        Notebook(tmp_path, writes=True).recall("parent", "same", fail)
    assert list(tmp_path.iterdir()) == []


def test_the_meter_measures_every_set_and_prompt(random_model: Callable[..., Path]) -> None:
    folder = str(random_model("llama"))
    model, tokenizer = models.load(folder), models.load_tokenizer(folder)
    windows = {
        "evaluation": Windows((torch.arange(3, 40), torch.arange(5, 30))),
        "stories": Windows((torch.arange(60, 90),)),
    }
    measured = Meter(windows, tokenizer, ["ab", "c"], 3, 2).measure(model, 77)
    assert measured.perplexities == {name: perplexity(model, each).perplexity for name, each in windows.items()}
    assert measured.perplexities["evaluation"] != measured.perplexities["stories"]
    assert len(measured.samples) == 2
    assert measured.model_bytes == 77
