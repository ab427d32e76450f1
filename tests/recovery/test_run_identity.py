"""A run continues with what it was begun with: each thing that may be another one is noticed by itself."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, Features, List, Value
from safetensors.torch import load_file, save_file

from hqqplus import models
from hqqplus.adapters import Fingerprint
from hqqplus.errors import UserError
from hqqplus.recipe import Recipe, load_recipe
from hqqplus.recovery.run_identity import (
    DATA_COMMIT,
    LIBRARIES,
    changed_versions,
    check_identity,
    data_identity,
    rows_digest,
    run_identity,
)

ROWS = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}] * 3
FINGERPRINT = Fingerprint("some/model", "abc", "0a" * 32, {"nbits": 2}, parent_digest="0b" * 16, solver=1)


@pytest.fixture
def parent(random_model: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_model("llama"), tmp_path / "parent"))


@pytest.fixture
def recipe(parent: Path, tmp_path: Path) -> Recipe:
    values = {
        "model": {"name_or_path": str(parent)},
        "data": {"path_or_name": str(tmp_path / "rows.jsonl")},
        "output_dir": str(tmp_path / "out"),
    }
    return Recipe.model_validate(values)


@pytest.fixture
def tokenizer(parent: Path) -> Any:
    return models.load_tokenizer(str(parent))


def edit_weight(folder: Path, key: str = "model.norm.weight") -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[key].view(-1)[0] += 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# Rows ----------------------------------------------------------------------------------------------------------------


def test_rows_are_told_by_what_is_trained_on() -> None:
    rows = Dataset.from_list(ROWS)
    digest = rows_digest(rows)
    assert rows_digest(rows.select(range(len(rows)))) == digest
    assert rows_digest(rows.add_column("text", ["x"] * len(rows))) == digest, "no collator reads it"
    assert rows_digest(rows.with_format("torch")) == digest
    narrow = Features({name: List(Value("int32")) for name in ("input_ids", "labels")})
    assert rows_digest(rows.cast(narrow)) == digest
    changed = {
        "a token": [{"input_ids": [1, 2, 9], "labels": [-100, 2, 3]}, *ROWS[1:]],
        "a label": [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, *ROWS[1:]],
        "one row less": ROWS[1:],
        "another order": [ROWS[1], ROWS[0], *ROWS[2:]],
        "another border": [
            {"input_ids": [1, 2], "labels": [-100, 2]},
            {"input_ids": [3, 4, 5], "labels": [3, 4, 5]},
            *ROWS[2:],
        ],
        "no labels": [{"input_ids": row["input_ids"]} for row in ROWS],
        "documents": [{**row, "seq_lengths": [len(row["input_ids"])]} for row in ROWS],
    }
    digests = {name: rows_digest(Dataset.from_list(values)) for name, values in changed.items()}
    assert len({digest, *digests.values()}) == 1 + len(changed)
    assert rows_digest(rows.select([])) != digest


def test_borders_of_batches_leave_no_trace() -> None:
    rows = [{"input_ids": list(range(n % 7 + 1))} for n in range(2500)]
    whole = Dataset.from_list(rows)
    shuffled = whole.shuffle(seed=1)
    assert rows_digest(shuffled) == rows_digest(Dataset.from_list(list(shuffled)))
    assert rows_digest(shuffled) != rows_digest(whole)


def test_a_stream_is_told_by_its_files(recipe: Recipe, tmp_path: Path) -> None:
    path, stream = tmp_path / "rows.jsonl", Dataset.from_list(ROWS).to_iterable_dataset()
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    digest = data_identity(stream, recipe)
    assert digest.keys() == {"training data"}
    shutil.copy(path, tmp_path / "copy.jsonl")
    path.write_text('{"text": "one"}\n{"text": "owt"}\n')
    assert data_identity(stream, recipe) != digest
    shutil.copy(tmp_path / "copy.jsonl", path)
    assert data_identity(stream, recipe) == digest, "the time of a file does not matter"
    section = recipe.data.model_copy(update={"split": "test"})
    assert data_identity(stream, recipe.model_copy(update={"data": section})) != digest

    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(path, folder / "a.jsonl")
    section = recipe.data.model_copy(update={"path_or_name": str(folder)})
    of_folder = recipe.model_copy(update={"data": section})
    digest = data_identity(stream, of_folder)
    (folder / ".hidden").write_text("x")
    assert data_identity(stream, of_folder) == digest
    (folder / "a.jsonl").rename(folder / "b.jsonl")
    assert data_identity(stream, of_folder) != digest, "files are read in the order of their names"


def test_a_stream_of_the_hub_is_told_by_its_name_and_commit(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    section = recipe.data.model_copy(update={"path_or_name": "some/rows"})
    of_hub = recipe.model_copy(update={"data": section})
    unreachable = data_identity(stream, of_hub)
    assert unreachable.keys() == {"training data"}
    for commit in ("abc", "def"):
        monkeypatch.setattr(
            huggingface_hub.HfApi, "dataset_info", lambda *args, commit=commit, **_: SimpleNamespace(sha=commit)
        )
        assert data_identity(stream, of_hub) == {**unreachable, DATA_COMMIT: commit}
    with pytest.raises(UserError, match=r"commit of the training data: abc \(checkpoint\), def \(here\)"):
        check_identity({**unreachable, DATA_COMMIT: "abc"}, data_identity(stream, of_hub), "checkpoint-2", False)
    # What could not be asked then is not missed now.
    assert check_identity(unreachable, data_identity(stream, of_hub), "checkpoint-2", False) == []


# The whole -----------------------------------------------------------------------------------------------------------


def test_nothing_differs_from_itself(recipe: Recipe, tokenizer: Any) -> None:
    rows = Dataset.from_list(ROWS)
    known = run_identity(recipe, tokenizer, rows, FINGERPRINT)
    assert known.keys() >= {
        "parent",
        "the parent's contents",
        "quantization.nbits",
        "solver version",
        "packed weights",
    }
    assert known.keys() >= {"tokenizer", "chat template", "training data"}
    assert all(isinstance(value, str) for value in known.values())
    noted = json.loads(json.dumps(known))
    assert check_identity(noted, run_identity(recipe, tokenizer, rows, FINGERPRINT), "here", False) == []
    assert check_identity({}, known, "a checkpoint from before", False) == []


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("parent", {"parent_digest": "ff" * 16}),
        ("quantization.nbits", {"quantization": {"nbits": 4}}),
        ("solver version", {"solver": 2}),
        ("packed weights", {"packed_sha256": "ff" * 32}),
        ("tokenizer", None),
        ("chat template", None),
        ("training data", None),
    ],
)
def test_each_thing_by_itself_is_refused_or_allowed(
    recipe: Recipe, tokenizer: Any, name: str, changes: dict[str, Any] | None
) -> None:
    rows = Dataset.from_list(ROWS)
    stored = run_identity(recipe, tokenizer, rows, FINGERPRINT)
    if name == "tokenizer":
        tokenizer.add_tokens(["word"])
    elif name == "chat template":
        tokenizer.chat_template = "{{ messages }}"
    elif name == "training data":
        rows = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [-100, 2, 9]}, *ROWS[1:]])
    here = run_identity(recipe, tokenizer, rows, dataclasses.replace(FINGERPRINT, **changes or {}))
    with pytest.raises(UserError) as caught:
        check_identity(stored, here, Path("out/checkpoint-7"), False)
    text = str(caught.value)
    assert text.startswith(f"out/checkpoint-7: this checkpoint was made with something else: {name}: ")
    assert text.count(" (checkpoint), ") == text.count(" (here)") == 1
    assert "put it back as it was, give this run its own output_dir, or say --allow-mismatch" in text
    (sentence,) = check_identity(stored, here, Path("out/checkpoint-7"), True)
    assert sentence.startswith(f"out/checkpoint-7: this checkpoint was made with something else: {name}: ")


def test_the_parent_is_known_before_there_is_a_backbone(recipe: Recipe, tokenizer: Any, parent: Path) -> None:
    stored = run_identity(recipe, tokenizer, Dataset.from_list(ROWS))
    early = run_identity(recipe, tokenizer)
    assert "chat template" not in early, "preparing the rows may settle another one"
    assert check_identity(stored, early, "here", False) == []
    edit_weight(parent)
    with pytest.raises(UserError, match=rf"parent: {parent} with contents \w+ \(checkpoint\), {parent} with contents"):
        check_identity(stored, run_identity(recipe, tokenizer), "here", False)


def test_a_packed_model_names_its_parent_before_it_is_loaded(
    recipe: Recipe, tokenizer: Any, parent: Path, tmp_path: Path
) -> None:
    import hqqplus

    hqqplus.quantize_folder(str(parent), tmp_path / "packed", hqqplus.HqqPlusConfig())
    fingerprint = Fingerprint.read(tmp_path / "packed")
    assert fingerprint is not None
    section = recipe.model.model_copy(update={"name_or_path": str(tmp_path / "packed")})
    early = run_identity(recipe.model_copy(update={"model": section}), tokenizer)
    assert early == {k: v for k, v in fingerprint.identity().items() if k != "chat template"}


def test_other_library_versions_are_said() -> None:
    here = dict.fromkeys(LIBRARIES, "1.0") | {"python": "3.11"}
    assert changed_versions(here, here, "out/checkpoint-7") == []
    assert changed_versions({}, here, "out/checkpoint-7") == []
    assert changed_versions({**here, "python": "3.12"}, here, "out/checkpoint-7") == []
    (said,) = changed_versions({**here, "torch": "0.9", "trl": "2.0"}, here, "out/checkpoint-7")
    assert said.startswith(
        "out/checkpoint-7: written with other library versions: torch 0.9 (checkpoint), 1.0 (here); "
    )
    assert "trl 2.0 (checkpoint), 1.0 (here): the run goes on" in said


# A run ---------------------------------------------------------------------------------------------------------------


def begun(parent: Path, folder: Path) -> Path:
    """The recipe of a run that was stopped behind its checkpoint."""
    from hqqplus.train import run

    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"{n} is a number"}) + "\n" for n in range(20)))
    values = {
        "model": {"name_or_path": str(parent), "dtype": "float32"},
        "adapter": {"r": 2, "init": "default"},
        "data": {"path_or_name": str(folder / "rows.jsonl"), "max_length": 32, "packing": False},
        "training": {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2},
        "evaluation": {"max_tokens": 100, "parent": False},
        "output_dir": str(folder / "out"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    run(load_recipe(path))
    # As a kill between the two checkpoints leaves it.
    for name in ("checkpoint-2", "adapter", "report.json", "report.md", "report.png"):
        target = folder / "out" / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    return path


@pytest.mark.slow
@pytest.mark.parametrize("change", ["parent", "tokenizer", "chat template", "training data"])
def test_a_run_is_not_continued_with_something_else(
    parent: Path, tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from hqqplus.train import main

    path = begun(parent, tmp_path)
    if change == "parent":
        edit_weight(parent, "model.embed_tokens.weight")
    elif change == "chat template":
        (parent / "chat_template.jinja").write_text("{{ messages }}")
    elif change == "tokenizer":
        values = json.loads((parent / "tokenizer_config.json").read_text())
        (parent / "tokenizer_config.json").write_text(json.dumps({**values, "unk_token": "</s>"}))
    else:
        text = (tmp_path / "rows.jsonl").read_text()
        (tmp_path / "rows.jsonl").write_text(text.replace("7 is a number", "7 is a figure"))
    files = {one: one.read_bytes() for one in (tmp_path / "out").rglob("*") if one.is_file()}
    capsys.readouterr()
    assert main([str(path)]) == 2
    said = capsys.readouterr().err
    checkpoint = tmp_path / "out" / "checkpoint-1"
    assert f"{checkpoint}: this checkpoint was made with something else: {change}: " in said
    assert {one: one.read_bytes() for one in (tmp_path / "out").rglob("*") if one.is_file()} == files
    assert main([str(path), "--allow-mismatch"]) == 0
    assert f"{change}: " in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter" / "hqqplus.json").is_file()


@pytest.mark.slow
def test_an_adapter_names_the_rows_it_was_trained_on(parent: Path, tmp_path: Path) -> None:
    from hqqplus.train import main

    path = begun(parent, tmp_path)
    noted = json.loads((tmp_path / "out" / "checkpoint-1" / "hqqplus_checkpoint.json").read_text())
    assert main([str(path)]) == 0
    fingerprint = Fingerprint.read(tmp_path / "out" / "adapter")
    assert fingerprint is not None
    assert fingerprint.data == noted["identity"]["training data"]
    assert fingerprint.tokenizer == noted["identity"]["tokenizer"]
    assert fingerprint.packed_sha256 == noted["identity"]["packed weights"]
    assert torch.isfinite(models.load(tmp_path / "out" / "adapter")(torch.arange(3, 9).view(1, -1)).logits).all()
