"""Damaged data: files of every kind through `load_rows`, and what comes out of them through `RowForm`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import strategies as st

from hqqplus.data import RowForm, load_rows
from tests.fuzz.mutate import mutated, mutated_json
from tests.fuzz.oracle import judged, run, tree

ROWS: list[dict[str, Any]] = [
    {"text": "a first row\nof two lines", "prompt": "q?", "completion": "a.", "n": 1},
    {"text": "ünïcödé 🙂 \u2028", "prompt": "p", "completion": "c", "n": 2},
    {"text": 'third, "quoted"', "prompt": "x", "completion": "y", "n": 3},
]
MESSAGES = [
    {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]} for n in range(3)
]
FORMS = (RowForm(text_field="text"), RowForm(prompt="prompt", completion="completion"), RowForm(messages="messages"))


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


CSV = b'text,prompt,completion\n"a, b",q,a\n"two\nlines",q,"say ""hi"""\nplain,,\n'
TXT = "Some text.\n\nAnd more of it, with ünïcödé.\n".encode()


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def parquet(folder: Path) -> tuple[bytes, ...]:
    seeds = []
    for number, (rows, codec) in enumerate(((ROWS, "snappy"), (MESSAGES, "none"), (ROWS * 50, "zstd"))):
        pa.parquet.write_table(pa.Table.from_pylist(rows), folder / f"{number}.parquet", compression=codec)
        seeds.append((folder / f"{number}.parquet").read_bytes())
    return tuple(seeds)


def read(path: Path, split: str) -> None:
    rows = load_rows(str(path), split=split)
    for form in FORMS:
        if judged(lambda form=form: (form.check(rows), True)) is not None:
            made = judged(lambda form=form: form.to_sft(rows, "</s>", "<s>"))
            for row in made.select(range(min(5, len(made)))) if made is not None else ():
                assert all(value is not None for value in row.values())


def fuzz(tmp_path: Path, examples: int, files: st.SearchStrategy[tuple[str, bytes]], split: str = "train") -> None:
    folder = tmp_path / "data"
    numbers = iter(range(10**9))

    def check(example: tuple[str, bytes]) -> None:
        suffix, content = example
        number = next(numbers)
        # A name of its own: no example gets what was cached of another.
        path = folder / f"rows{number}{suffix}"
        folder.mkdir()
        path.write_bytes(content)
        before = tree(folder)
        try:
            judged(lambda: read(path, split))
            assert tree(folder) == before
        finally:
            shutil.rmtree(folder)
            if number % 50 == 0:
                shutil.rmtree(tmp_path / "cache", ignore_errors=True)

    run(examples, files, check)


tiers = [40, pytest.param(500, marks=[pytest.mark.slow, pytest.mark.long])]


@pytest.mark.parametrize("examples", tiers)
def test_json_lines(tmp_path: Path, examples: int) -> None:
    files = st.one_of(
        mutated((lines(ROWS), lines(MESSAGES))),
        st.lists(mutated_json((*ROWS, *MESSAGES)), min_size=1, max_size=4).map(b"\n".join),
    )
    fuzz(tmp_path, examples, st.tuples(st.just(".jsonl"), files))


@pytest.mark.parametrize("examples", tiers)
def test_json(tmp_path: Path, examples: int) -> None:
    seeds = (json.dumps(ROWS).encode(), json.dumps(MESSAGES, indent=1).encode())
    files = st.one_of(mutated(seeds), mutated_json((ROWS, MESSAGES)))
    fuzz(tmp_path, examples, st.tuples(st.just(".json"), files))


@pytest.mark.parametrize("examples", tiers)
def test_csv_and_text(tmp_path: Path, examples: int) -> None:
    suffixes = st.sampled_from((".csv", ".csv", ".txt", ".TXT"))
    fuzz(tmp_path, examples, st.tuples(suffixes, mutated((CSV, TXT))))


@pytest.mark.parametrize("examples", tiers)
def test_parquet(tmp_path: Path, examples: int) -> None:
    fuzz(tmp_path, examples, st.tuples(st.just(".parquet"), mutated(parquet(tmp_path))))


@pytest.mark.parametrize("examples", [15, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.long])])
def test_the_wrong_suffix(tmp_path: Path, examples: int) -> None:
    """A file that is something else than it is called."""
    contents = (lines(ROWS), json.dumps(ROWS).encode(), CSV, TXT, *parquet(tmp_path))
    suffixes = st.sampled_from((".jsonl", ".json", ".csv", ".txt", ".parquet"))
    fuzz(tmp_path, examples, st.tuples(suffixes, st.one_of(st.sampled_from(contents), st.binary(max_size=200))))


@pytest.mark.parametrize("examples", [15, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.long])])
def test_folders(tmp_path: Path, examples: int) -> None:
    """Several files in a folder, one of them damaged."""
    folder = tmp_path / "data"

    def check(example: tuple[str, str, bytes]) -> None:
        name, suffix, content = example
        folder.mkdir()
        (folder / "train-0.jsonl").write_bytes(lines(ROWS))
        (folder / f"{name}{suffix}").write_bytes(content)
        before = tree(folder)
        try:
            judged(lambda: read(folder, "train"))
            assert tree(folder) == before
        finally:
            shutil.rmtree(folder)
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)

    names = st.sampled_from(("train-1", "test", "README", "dataset_info", "x"))
    suffixes = st.sampled_from((".jsonl", ".json", ".csv", ".md", ".py", ".yaml"))
    run(examples, st.tuples(names, suffixes, mutated((lines(ROWS), CSV, b"---\nconfigs: []\n---\n"))), check)


@pytest.mark.parametrize("examples", [40, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.long])])
def test_splits(tmp_path: Path, examples: int) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "rows.txt").write_bytes(TXT)
    splits = mutated((b"train", b"train[:2]", b"train[:5%]+train[1:]", b"train[-1:]")).map(
        lambda split: split.decode("utf-8", "replace")
    )

    def check(example: tuple[str, str]) -> None:
        name, split = example
        judged(lambda: load_rows(str(tmp_path / name), split=split))

    run(examples, st.tuples(st.sampled_from(("rows.jsonl", "rows.txt")), splits), check)
