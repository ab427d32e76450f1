"""A teacher's log-probabilities on the disk: right, found by content, made in several starts, verified."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hqqplus import files, models
from hqqplus.digests import SAMPLE_BYTES, checkpoint_digest
from hqqplus.errors import UserError
from hqqplus.progress import WorkProgress
from hqqplus.recovery import teacher_cache
from hqqplus.recovery.distillation import supervised
from hqqplus.recovery.identity import Identity
from hqqplus.recovery.rows import Row, Survey, iterate
from hqqplus.recovery.teacher import OnlineTeacher
from hqqplus.recovery.teacher_cache import TeacherCache, build_cache

SMALL = {"block_tokens": 40, "batch_tokens": 64, "note_seconds": 0.0, "quiet": True}


@pytest.fixture(scope="module")
def folder(random_model: Callable[..., Path]) -> Path:
    return random_model("llama")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> OnlineTeacher:
    return OnlineTeacher(models.load_causal_lm(str(folder), device="cpu"))


@pytest.fixture(scope="module")
def identity(folder: Path) -> Callable[..., Identity]:
    tokenizer = models.load_tokenizer(str(folder))
    return lambda rows, **changes: Identity.of(
        rows, tokenizer, **{"name": str(folder), "precision": "float32", **changes}
    )


def plain_rows() -> Dataset:
    """Rows of all lengths, with prompts that do not count, and one of them twice."""
    made = np.random.default_rng(0)
    rows = []
    for number in range(30):
        ids = made.integers(5, 260, made.integers(2, 20)).tolist()
        prompt = number % 3 and len(ids) // 2
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list([*rows, rows[4]])


def packed_rows() -> Dataset:
    made = np.random.default_rng(1)
    rows = []
    for _ in range(12):
        lengths = made.integers(1, 12, made.integers(1, 4)).tolist()
        ids = made.integers(5, 260, sum(lengths)).tolist()
        labels = [-100 if made.random() < 0.2 else token for token in ids]
        rows.append({"input_ids": ids, "labels": labels, "seq_lengths": lengths})
    return Dataset.from_list(rows)


def exact(teacher: OnlineTeacher, example: dict[str, Any]) -> torch.Tensor:
    """float64 log-probabilities [n, V] at the supervised positions of a row, each document by itself."""
    found, start = [], 0
    for length in example.get("seq_lengths", [len(example["input_ids"])]):
        part = slice(start, start + length)
        start += length
        labels = torch.tensor(example["labels"][part])[None]
        if length > 1:
            with torch.no_grad():
                logits = teacher.model(input_ids=torch.tensor(example["input_ids"][part])[None]).logits
            found.append(logits[:, :-1][supervised(labels)].double().log_softmax(-1))
    return torch.cat(found) if found else torch.empty(0, 0)


# What is in it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [plain_rows(), packed_rows()], ids=["plain", "packed"])
@pytest.mark.parametrize("k", [4, 1000])
def test_rows_are_found_by_their_content_with_the_parents_log_probabilities(
    teacher: OnlineTeacher, identity: Callable[..., Identity], tmp_path: Path, rows: Dataset, k: int
) -> None:
    cache = build_cache(tmp_path / "cache", rows, teacher, identity(rows), k=k, **SMALL)
    assert cache.k == min(k, 272)
    for example in rows.shuffle(seed=1):
        ids, log_probs = cache.lookup(example)
        expected = exact(teacher, example)
        assert (ids.dtype, log_probs.dtype) == (np.int32, np.float16)
        assert ids.shape == (len(expected), cache.k)
        if len(expected):
            theirs = expected.gather(-1, torch.from_numpy(ids.astype(np.int64)))
            torch.testing.assert_close(torch.from_numpy(log_probs.astype(np.float64)), theirs, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(theirs, expected.topk(cache.k).values, rtol=1e-5, atol=1e-5)
            assert len(set(ids[0])) == cache.k
    different = {Row.of(row).key for row in rows}
    assert cache.rows == len(different)
    assert cache.positions == Survey.of(rows).positions
    assert (tmp_path / "cache" / "ids.bin").stat().st_size == 4 * cache.positions * cache.k
    assert not (tmp_path / "cache.partial").exists()


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_has_the_targets_of_its_supervised_positions_in_their_order(
    teacher: OnlineTeacher, identity: Callable[..., Identity], tmp_path: Path, packed: bool
) -> None:
    rows = packed_rows() if packed else plain_rows()
    cache = build_cache(tmp_path / "cache", rows, teacher, identity(rows), k=272, **SMALL)
    collate = cache.collator(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=packed))
    # As a worker of a data loader gets it: without what is mapped.
    collate([rows[0]])
    collate = pickle.loads(pickle.dumps(collate))
    batch = collate([rows[3], rows[1], rows[7]])
    online = teacher.targets({name: value for name, value in batch.items() if "teacher" not in name})
    counted = supervised(batch["labels"]).sum()
    found = cache.targets(batch)
    assert not any("teacher" in name for name in batch)
    assert found.ids.shape == found.log_probs.shape == (counted, 272)
    expected = online.head.logits(online.hidden).log_softmax(-1).gather(-1, found.ids.long())
    torch.testing.assert_close(found.log_probs.float(), expected, rtol=1e-3, atol=1e-3)


def test_a_row_that_is_not_there_says_so(
    teacher: OnlineTeacher, identity: Callable[..., Identity], tmp_path: Path
) -> None:
    rows = plain_rows()
    cache = build_cache(tmp_path / "cache", rows, teacher, identity(rows), k=4, **SMALL)
    other = {**rows[0], "labels": [-100, *rows[0]["input_ids"][1:]]}
    for example in ({"input_ids": [7, 8, 9], "labels": [7, 8, 9]}, other):
        with pytest.raises(UserError, match="a training row is not in this cache: delete the folder"):
            cache.lookup(example)


@given(st.data())
def test_predicted_tokens_by_their_definition_and_keys_by_content(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    ids = data.draw(st.lists(st.integers(0, 9), min_size=sum(lengths), max_size=sum(lengths)))
    labels = [token if data.draw(st.booleans()) else -100 for token in ids]
    starts = {sum(lengths[:number]) for number in range(len(lengths))}
    row = Row.of({"input_ids": ids, "labels": labels, "seq_lengths": lengths})
    assert row.predicted.tolist() == [t for t in range(len(ids)) if labels[t] != -100 and t not in starts]
    assert row.key == Row.of({"input_ids": np.array(ids), "labels": labels, "seq_lengths": lengths}).key
    assert len(row.key) == 16
    if len(ids) > 1:
        assert row.key != Row.of({"input_ids": ids, "labels": labels, "seq_lengths": [1, len(ids) - 1]}).key or (
            lengths == [1, len(ids) - 1]
        )
        assert row.key != Row.of({"input_ids": ids[:-1], "labels": labels[:-1]}).key
    with pytest.raises(ValueError, match="a row of"):
        Row.of({"input_ids": ids, "labels": labels, "seq_lengths": [len(ids) + 1]})


def test_rows_of_a_data_set_are_the_rows_of_a_collator() -> None:
    for rows in (
        plain_rows(),
        packed_rows(),
        plain_rows().select([0]),
        Dataset.from_dict({"input_ids": [[1, 2]] * 3}),
    ):
        assert [row.key for row in iterate(rows)] == [Row.of(example).key for example in rows]
    assert Survey.of(plain_rows()).digest == Survey.of(plain_rows().shuffle(seed=3)).digest
    assert Survey.of(plain_rows()).digest != Survey.of(plain_rows().select(range(5))).digest


# Made in several starts ----------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


class Dying(OnlineTeacher):
    """Dies at the n-th batch."""

    def __init__(self, model: Any, batches: int) -> None:
        super().__init__(model)
        self.batches = batches

    def hidden_states(self, inputs: Any) -> torch.Tensor:
        if not self.batches:
            raise Killed
        self.batches -= 1
        return super().hidden_states(inputs)


@pytest.mark.parametrize("batches", [0, 3, 7])
def test_a_killed_start_is_gone_on_with_and_ends_the_same_to_the_byte(
    teacher: OnlineTeacher, identity: Callable[..., Identity], tmp_path: Path, batches: int
) -> None:
    rows = plain_rows()
    build_cache(tmp_path / "whole", rows, teacher, identity(rows), k=4, **SMALL)
    with pytest.raises(Killed):
        build_cache(tmp_path / "killed", rows, Dying(teacher.model, batches), identity(rows), k=4, **SMALL)
    partial = tmp_path / "killed.partial"
    assert not (tmp_path / "killed").exists()
    # What a killed process had written and not noted, and its note in work.
    for path in partial.glob("*.bin"):
        path.write_bytes(path.read_bytes() + b"half a row")
    (partial / ".progress.1.tmp.json").write_text("{")
    counting = Dying(teacher.model, 1000)
    build_cache(tmp_path / "killed", rows, counting, identity(rows), k=4, **SMALL)
    whole = Dying(teacher.model, 1000)
    build_cache(tmp_path / "again", rows, whole, identity(rows), k=4, **SMALL)
    if batches:
        assert counting.batches > whole.batches, "what was done is not done again"
    for name in ("keys.bin", "ends.bin", "ids.bin", "logprobs.bin", "manifest.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [
        "ends.bin", "ids.bin", "keys.bin", "logprobs.bin", "manifest.json",
    ]  # fmt: skip


def test_an_unfinished_cache_of_something_else_is_not_gone_on_with(
    teacher: OnlineTeacher, identity: Callable[..., Identity], tmp_path: Path
) -> None:
    rows = plain_rows()
    with pytest.raises(Killed):
        build_cache(tmp_path / "c", rows, Dying(teacher.model, 4), identity(rows), k=4, **SMALL)
    with pytest.raises(UserError, match=r"an unfinished cache of k 4, not 5: delete it, or name another folder$"):
        build_cache(tmp_path / "c", rows, teacher, identity(rows), k=5, **SMALL)
    fewer = rows.select(range(5))
    with pytest.raises(UserError, match="an unfinished cache of other training rows: "):
        build_cache(tmp_path / "c", fewer, teacher, identity(fewer), k=4, **SMALL)
    (tmp_path / "c.partial" / "progress.json").write_text("{}")
    with pytest.raises(UserError, match=r"progress.json is damaged: delete it"):
        build_cache(tmp_path / "c", rows, teacher, identity(rows), k=4, **SMALL)
    (tmp_path / "d.partial").mkdir()
    (tmp_path / "d.partial" / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="this folder is in the way"):
        build_cache(tmp_path / "d", rows, teacher, identity(rows), k=4, **SMALL)


def test_a_full_disk_is_one_sentence_and_the_next_start_goes_on(
    teacher: OnlineTeacher, identity: Callable[..., Identity], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = plain_rows()
    add, left = teacher_cache._Writer.add, [12]

    def full(self: Any, *args: Any) -> None:
        if not left[0]:
            raise OSError(errno.ENOSPC, "no space")
        left[0] -= 1
        add(self, *args)

    monkeypatch.setattr(teacher_cache._Writer, "add", full)
    with pytest.raises(UserError, match=r"c.partial: the disk is full .*: make room and run it again"):
        build_cache(tmp_path / "c", rows, teacher, identity(rows), k=4, **SMALL)
    monkeypatch.undo()
    assert build_cache(tmp_path / "c", rows, teacher, identity(rows), k=4, **SMALL).rows == 30
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(UserError, match="bytes are needed on that disk, 1,000 are free"):
        build_cache(tmp_path / "d", rows, teacher, identity(rows), k=4, **SMALL)


def test_rows_of_which_nothing_is_learnt_are_refused(
    teacher: OnlineTeacher, identity: Callable[..., Identity], tmp_path: Path
) -> None:
    rows = Dataset.from_dict({"input_ids": [[5, 6]], "labels": [[5, -100]]})
    with pytest.raises(UserError, match="no token of the training rows counts"):
        build_cache(tmp_path / "c", rows, teacher, identity(rows), **SMALL)


def test_progress_is_told_in_tokens(
    teacher: OnlineTeacher,
    identity: Callable[..., Identity],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(teacher_cache, "WorkProgress", partial(WorkProgress, line_seconds=0.0))
    rows = plain_rows()
    build_cache(tmp_path / "c", rows, teacher, identity(rows), k=4, **{**SMALL, "quiet": False})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 3
    assert all("tokens/s" in line for line in lines)
    assert lines[-1].startswith("asking the teacher: 100.0 % of ")


# Verified ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(teacher: OnlineTeacher, identity: Callable[..., Identity], tmp_path: Path) -> tuple[Path, Identity]:
    rows = plain_rows()
    build_cache(tmp_path / "cache", rows, teacher, identity(rows), k=4, **SMALL)
    return tmp_path / "cache", identity(rows)


def test_it_opens_again_and_is_not_made_again(made: tuple[Path, Identity], teacher: OnlineTeacher) -> None:
    folder, own = made
    assert TeacherCache.open(folder, own).positions > 0
    again = build_cache(folder, plain_rows(), Dying(teacher.model, 0), own, k=4)
    assert again.lookup(plain_rows()[2])[0].shape[1] == 4


@pytest.mark.parametrize("name", ["keys.bin", "ends.bin", "ids.bin", "logprobs.bin"])
def test_a_flipped_bit_and_a_missing_byte_are_seen(made: tuple[Path, Identity], name: str) -> None:
    folder, own = made
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name} is damaged .*: delete the folder, and it will be made anew$"):
        TeacherCache.open(folder, own)
    TeacherCache.open(folder, own, verify=False)
    (folder / name).write_bytes(data[:-1])
    with pytest.raises(UserError, match=rf"{name} is not as long as it was written: delete the folder"):
        TeacherCache.open(folder, own, verify=False)
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is not as long"):
        TeacherCache.open(folder, own)


def test_a_folder_that_is_no_cache_is_refused(made: tuple[Path, Identity], tmp_path: Path) -> None:
    folder, own = made
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there is no cache of a teacher"):
        TeacherCache.open(tmp_path / "empty", own)
    manifest = json.loads((folder / "manifest.json").read_text())
    for text, message in (
        ("{", "manifest.json is damaged"),
        ("[]", "manifest.json is damaged"),
        (json.dumps({**manifest, "identity": {}}), "manifest.json is damaged"),
        (json.dumps({**manifest, "format": 99}), "another format"),
    ):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=message):
            TeacherCache.open(folder, own)


def test_what_it_was_made_of_is_compared(
    made: tuple[Path, Identity], folder: Path, random_model: Callable[..., Path], tmp_path: Path
) -> None:
    cache, own = made
    tokenizer = models.load_tokenizer(str(folder))

    def other(rows: Dataset, name: Path = folder, precision: str = "float32", tokenizer: Any = tokenizer) -> Identity:
        return Identity.of(rows, tokenizer, str(name), precision=precision)

    assert other(plain_rows().shuffle(seed=2)) == own
    shutil.copytree(folder, tmp_path / "moved")
    assert TeacherCache.open(cache, other(plain_rows(), tmp_path / "moved")).rows == 30, "a copy is the same parent"
    richer = models.load_tokenizer(str(folder))
    richer.add_tokens(["word"])
    for identity, message in (
        (other(plain_rows().select([0, 1])), "this cache is of other training rows: name another folder, or delete"),
        (other(plain_rows(), random_model("qwen2")), rf"of another parent \({folder}, here .*qwen2.*\): name"),
        (other(plain_rows(), precision="8bit"), r"of another precision of the parent \(float32, here 8bit\): name"),
        (other(plain_rows(), tokenizer=richer), "of another tokenizer: name"),
        (other(plain_rows().select([0]), precision="8bit"), "of other training rows and another precision"),
    ):
        with pytest.raises(UserError, match=message):
            TeacherCache.open(cache, identity)


def test_a_fine_tuned_copy_of_the_parent_is_another_parent(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "copy")
    before = checkpoint_digest(tmp_path / "copy")
    assert before == checkpoint_digest(folder)
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[3]
    tensors[name].view(-1)[-1] += 1e-3
    save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    assert checkpoint_digest(tmp_path / "copy") != before
    assert SAMPLE_BYTES >= 4096
    with pytest.raises(UserError, match="no such folder"):
        Identity.of(plain_rows(), models.load_tokenizer(str(folder)), "./nothing", precision="float32")
