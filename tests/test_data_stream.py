"""Rows read as a stream, from every kind of place that `load_rows` knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset

from hqqplus import data_stream
from hqqplus.data import RowForm
from hqqplus.data_stream import PLACE, Streamed, StreamFault, local_files, read_fault, stream_rows
from hqqplus.errors import UserError

ROWS = [{"text": letter, "n": number} for number, letter in enumerate("abc")]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_files_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").write_text(lines(*ROWS))
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    Dataset.from_list(ROWS).to_csv(tmp_path / "c.csv")
    Dataset.from_list(ROWS).to_parquet(tmp_path / "d.parquet")
    for name in ("a[1].jsonl", "b.json", "c.csv", "d.parquet"):
        path = str(tmp_path / name)
        assert list(stream_rows(path)) == ROWS, name
        assert local_files(path) == [tmp_path / name]
    # Nothing is copied into the cache.
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_a_text_file_is_a_stream_of_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree")
    assert list(stream_rows(str(tmp_path / "a.txt"))) == [{"text": "one\ntwo"}, {"text": "three"}]


def test_a_folder(tmp_path: Path) -> None:
    for folder, name, content in (
        ("j", "train-1.jsonl", lines(ROWS[1])),
        ("j", "train-0.jsonl", lines(ROWS[0])),
        ("j", "test.jsonl", lines(ROWS[2])),
        ("t", "b.txt", "b\n\nb"),
        ("t", "a.txt", "a\n\na"),
        ("n", "notes.md", "no data"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(content)
    assert list(stream_rows(str(tmp_path / "j"))) == ROWS[:2]
    assert list(stream_rows(str(tmp_path / "j"), "test")) == ROWS[2:]
    assert [path.name for path in local_files(str(tmp_path / "j"))] == ["test.jsonl", "train-0.jsonl", "train-1.jsonl"]
    assert list(stream_rows(str(tmp_path / "t"))) == [{"text": "a\n\na"}, {"text": "b\n\nb"}], "a document a file"
    with pytest.raises(UserError, match=r"W: the folder '.*' holds no data file. Allowed: a file"):
        stream_rows(str(tmp_path / "n"), where="W")


def test_the_embedded_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hqqplus.data._embedded_splits", lambda: {"train": ["a", "b"], "validation": ["v"]})
    assert list(stream_rows("embedded:pydoc", "train[:1]+validation")) == [{"text": "a"}, {"text": "v"}]
    assert local_files("embedded:pydoc") == []


def test_a_data_set_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(stream_rows("org/name.v2", "train", "en")) == ROWS
    assert seen == [(("org/name.v2", "en"), {"split": "train", "streaming": True})]
    assert local_files("org/name.v2") == []

    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        UserError, match="W: 'org/name' is no local path, and loading it from the Hugging Face hub failed"
    ):
        stream_rows("org/name", where="W")


@pytest.mark.parametrize(
    ("name", "split", "what"),
    [
        ("gone.jsonl", "train", "there is no file or folder"),
        ("a.xml", "train", "unknown suffix '.xml'"),
        ("empty.jsonl", "train", "is an empty file"),
        ("a.jsonl", "train[:1]", "a stream has only whole splits: train"),
        ("a.jsonl", "tran", "has no split 'tran'; it has 'train'; did you mean 'train'"),
        ("a.jsonl", "train; test", "cannot read the split 'train; test'"),
        ("bad.jsonl", "train", "'.*bad.jsonl', line 2: not valid JSON"),
    ],
)
def test_refused(tmp_path: Path, name: str, split: str, what: str) -> None:
    files = {"a.xml": "<a/>", "empty.jsonl": "", "a.jsonl": lines(*ROWS), "bad.jsonl": '{"text": "a"}\n{"text": b}\n'}
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=f"^W: .*{what}"):
        Streamed.of(stream_rows(str(tmp_path / name), split, where="W"), RowForm("text"), str(tmp_path / name), "W")


def test_the_beginning_of_a_stream(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines({"q": "1", "a": None, "x": 0}, *({"q": str(n), "a": "yes", "x": 0} for n in range(5))))
    found = Streamed.of(stream_rows(str(path)), RowForm(prompt="q", completion="a"), str(path), "W", most=3)
    assert not found.whole
    assert found.form == RowForm(prompt="prompt", completion="completion")
    assert found.head[:2] == [{"prompt": "1", "completion": None}, {"prompt": "0", "completion": "yes"}]
    assert [row[PLACE] for row in found.rows] == list(range(6))
    assert len(list(found.without(2))) == 4
    assert found.part(1, 3).column_names == ["prompt", "completion"]
    assert Streamed.of(stream_rows(str(path)), RowForm("q"), str(path), "W").whole


def test_messages_are_checked_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    good = [{"role": "user", "content": "a"}]
    path.write_text(lines({"m": good}, {"m": [{"role": "user", "content": None}]}, {"m": [*good, {"role": 1}]}))
    with pytest.raises(UserError, match=r"W: row 3 of '.*': column 'm' must hold messages .*, but it holds a list"):
        Streamed.of(stream_rows(str(path)), RowForm(messages="m"), str(path), "W")
    path.write_text(lines({"m": None}, {"m": None}))
    with pytest.raises(UserError, match="W: column 'm' is empty in the first 2 rows"):
        Streamed.of(stream_rows(str(path)), RowForm(messages="m"), str(path), "W")


def test_faults_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines(*ROWS) + "\n" + "{\n")
    assert str(read_fault(ValueError("x"), str(path), "W")) == (
        f"W: '{path}', line 5: not valid JSON: Expecting property name enclosed in double quotes (column 2)"
    )
    path.write_bytes(b'{"text": "\xff\xfe"}\n')
    assert str(read_fault(ValueError("x"), str(path), "W")) == f"W: '{path}', line 1: not UTF-8"
    path.write_text(lines(*ROWS))
    assert str(read_fault(ConnectionError("reset\n by peer"), str(path), "W")) == (
        f"W: cannot read on in '{path}': reset by peer"
    )
    path.unlink()
    assert str(read_fault(FileNotFoundError(), str(path), "W")) == (
        f"W: '{path}' has vanished while it was read (looked for {path})"
    )
    raised = f"Caught StreamFault in DataLoader worker process 0.\nOriginal Traceback\n{data_stream.__name__}."
    assert str(StreamFault(f"{raised}StreamFault: W: x is y\n")) == "W: x is y"
