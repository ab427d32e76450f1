"""Training rows that are read while they are trained on: their order, what is held out, and exact resumption."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from hqqplus.data_stream import StreamFault
from hqqplus.errors import UserError
from hqqplus.recipe import Recipe, to_dict
from hqqplus.recovery import setup
from hqqplus.recovery.prepare import Preparation
from hqqplus.recovery.rows import ROW_ID, describe_rows
from hqqplus.recovery.streamed import EndlessRows

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(start: int, count: int) -> list[dict[str, Any]]:
    return [{"text": f"{i} is the number that comes before {i + 1}"} for i in range(start, start + count)]


@pytest.fixture
def make(random_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe that streams 40 rows and measures on 5 others; sections are laid over it."""
    rows = write(tmp_path / "rows.jsonl", texts(0, 40))
    others = write(tmp_path / "others.jsonl", texts(900, 5))

    def make(output: str = "out", **sections: Any) -> Recipe:
        data = {"path_or_name": str(rows), "eval_path_or_name": str(others), "max_length": 64, "streaming": True}
        training = {
            "max_steps": 12,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 5e-3,
            "logging_steps": 1,
            "save_steps": 4,
        }
        return Recipe.model_validate(
            {
                "model": {"name_or_path": str(random_model("llama")), "dtype": "float32"},
                "quantization": {"nbits": 2, "group_size": 32},
                "adapter": {"r": 2, "lora_dropout": 0.1},
                "evaluation": {"max_tokens": 300},
                "output_dir": str(tmp_path / output),
                **sections,
                "data": {**data, **sections.get("data", {})},
                "training": {**training, **sections.get("training", {})},
            }
        )

    return make


@pytest.fixture
def prepared(tokenizer: Any, said: list[str]) -> Callable[..., EndlessRows]:
    """The rows that a recipe's run would train on."""

    def prepared(recipe: Recipe, packing: bool = False) -> EndlessRows:
        data = setup.load_data(recipe, tokenizer, said.append)
        settings = {**setup.trainer_settings(recipe, CPU, said.append), "packing": packing}
        arguments = setup.sft_config(settings, "recipe")
        rows = Preparation(tokenizer, arguments, recipe.data.masked_rows, said.append).of(data.train)
        assert isinstance(rows, EndlessRows)
        return rows

    return prepared


def first(rows: EndlessRows, count: int, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(row["input_ids"]) for row in islice(iter(rows), count)]


# Order ---------------------------------------------------------------------------------------------------------------


def test_every_pass_has_every_row_in_an_order_of_its_own(
    make: Callable[..., Recipe], prepared: Callable[..., EndlessRows], tokenizer: Any
) -> None:
    rows = prepared(make(data={"shuffle_buffer": 10}))
    found = first(rows, 120, tokenizer)
    passes = [found[:40], found[40:80], found[80:]]
    expected = sorted(f"<s>{row['text']}</s>" for row in texts(0, 40))
    assert all(sorted(one) == expected for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    assert first(rows, 120, tokenizer) == found, "the same each time"
    assert first(prepared(make(data={"shuffle_buffer": 10}, seed=1)), 120, tokenizer) != found
    rows.set_epoch(7)  # a trainer's passes are none of ours
    assert first(rows, 120, tokenizer) == found
    assert [row[ROW_ID] for row in islice(iter(rows), 120)] == list(range(120))
    assert rows.num_shards == rows.n_shards == 1


def test_without_a_buffer_rows_come_as_they_are(
    make: Callable[..., Recipe], prepared: Callable[..., EndlessRows], tokenizer: Any
) -> None:
    found = first(prepared(make(data={"shuffle_buffer": 0})), 80, tokenizer)
    assert found == [f"<s>{row['text']}</s>" for row in texts(0, 40)] * 2


def test_packed_rows_of_a_stream(
    make: Callable[..., Recipe], prepared: Callable[..., EndlessRows], tokenizer: Any
) -> None:
    rows = prepared(make(data={"max_length": 128}), packing=True)
    found = list(islice(iter(rows), 30))
    assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) <= 128 for row in found)
    assert any(len(row["seq_lengths"]) > 1 for row in found)
    assert list(islice(iter(rows), 30)) == found
    one_pass = list(rows.rows)
    documents = sorted(text for row in one_pass for text in tokenizer.decode(row["input_ids"]).split("</s>") if text)
    assert documents == sorted(f"<s>{row['text']}" for row in texts(0, 40))


def test_workers_share_out_the_files(
    make: Callable[..., Recipe], prepared: Callable[..., EndlessRows], tmp_path: Path
) -> None:
    for number in range(3):
        write(tmp_path / "many" / f"train-{number}.jsonl", texts(100 * number, 10))
    rows = prepared(make(data={"path_or_name": str(tmp_path / "many"), "split": "train"}))

    def batches(workers: int, count: int) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
        loader: Any = DataLoader(rows, batch_size=2, num_workers=workers, collate_fn=list)
        for batch in islice(iter(loader), count):
            yield [(row[ROW_ID], tuple(row["input_ids"])) for row in batch]

    for workers in (0, 2):
        found = list(batches(workers, 30))
        # Every time: workers that knew of each other's passes would be in time with each other only mostly.
        assert all(list(batches(workers, 30)) == found for _ in range(4 if workers else 1))
        seen = [row for batch in found for row in batch]
        assert len({number for number, _ in seen}) == 60
        assert len({ids for _, ids in seen}) == 30, "no row is lost"
    # More workers than files: those without one end at once.
    assert len(list(batches(5, 20))) == 20


def test_processes_take_turns(
    make: Callable[..., Recipe], prepared: Callable[..., EndlessRows], tmp_path: Path
) -> None:
    from accelerate.data_loader import prepare_data_loader

    for number in range(3):
        write(tmp_path / "many" / f"train-{number}.jsonl", texts(100 * number, 10))
    rows = prepared(make(data={"path_or_name": str(tmp_path / "many")}))
    seen = []
    for index in range(2):
        loader: Any = DataLoader(
            rows, batch_size=2, collate_fn=lambda batch: torch.tensor([row[ROW_ID] for row in batch])
        )
        shared = prepare_data_loader(loader, num_processes=2, process_index=index, dispatch_batches=False)
        seen.append([batch.tolist() for batch in islice(iter(shared), 20)])
    assert seen[0] == [[n, n + 1] for n in range(0, 80, 4)]
    assert seen[1] == [[n, n + 1] for n in range(2, 80, 4)]


# What is known before ------------------------------------------------------------------------------------------------


def test_the_beginning_is_held_out_where_no_evaluation_set_is_named(
    make: Callable[..., Recipe],
    prepared: Callable[..., EndlessRows],
    tokenizer: Any,
    said: list[str],
    tmp_path: Path,
) -> None:
    # A copy of a row that is held out does not come back in by another door.
    path = write(tmp_path / "more.jsonl", [*texts(0, 99), *texts(0, 1)])
    recipe = make(data={"path_or_name": str(path), "eval_path_or_name": None})
    data = setup.load_data(recipe, tokenizer, said.append)
    held_out = [row["text"] for row in texts(0, 5)]
    assert data.texts[setup.EVALUATION_SET] == held_out
    assert data.documents()[:2] == [row["text"] for row in texts(5, 2)]
    assert any("the first 5 rows of the stream are held out" in line for line in said)
    found = first(prepared(recipe), 94, tokenizer)
    assert sorted(found) == sorted(f"<s>{row['text']}</s>" for row in texts(5, 94))


def test_an_evaluation_split_is_streamed_too(make: Callable[..., Recipe], tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path / "two" / "train.jsonl", texts(0, 10))
    write(tmp_path / "two" / "test.jsonl", texts(50, 3))
    section = {"path_or_name": str(tmp_path / "two"), "eval_path_or_name": None, "eval_split": "test"}
    data = setup.load_data(make(data=section), tokenizer, lambda text: None)
    assert data.texts[setup.EVALUATION_SET] == [row["text"] for row in texts(50, 3)]
    assert len(data.documents()) == 10


def test_only_the_beginning_is_looked_at(
    make: Callable[..., Recipe], tokenizer: Any, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hqqplus import data_stream

    monkeypatch.setattr(data_stream, "HEAD_ROWS", 12)
    data = setup.load_data(make(), tokenizer, said.append)
    assert data.documents() == [row["text"] for row in texts(0, 12)]
    assert said == ["data.streaming: what looks at text before training sees the first 12 rows"]
    monkeypatch.setattr(data_stream, "HEAD_CHARACTERS", 100)
    assert len(setup.load_data(make(), tokenizer, said.append).documents()) == 3


@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("form", ["text", "pair", "messages"])
def test_rows_are_what_they_are_without_streaming(
    make: Callable[..., Recipe],
    prepared: Callable[..., EndlessRows],
    tokenizer: Any,
    tmp_path: Path,
    form: str,
    eos: bool,
) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    pairs = [(f"question {i}?", f"answer {i}") for i in range(20)]
    rows: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
        # A column called like another one of TRL's is none of its business.
        "text": ([{"t": f"{q} {a}", "prompt": 1} for q, a in pairs], {"text_field": "t"}),
        "pair": ([{"completion": q, "answer": a} for q, a in pairs], {"prompt": "completion", "completion": "answer"}),
        "messages": (
            [{"m": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs],
            {"messages": "m"},
        ),
    }
    content, columns = rows[form]
    path = write(tmp_path / "form.jsonl", [*content, dict.fromkeys(content[0])])  # an empty row is left out
    recipe = make(
        data={"path_or_name": str(path), "shuffle_buffer": 0, "eos": eos, **columns, "eval_path_or_name": str(path)}
    )
    streamed = prepared(recipe)
    values = to_dict(recipe)
    plain = Recipe.model_validate({**values, "data": {**values["data"], "streaming": False}})
    whole = setup.load_data(plain, tokenizer, lambda text: None)
    settings = {**setup.trainer_settings(plain, CPU, lambda text: None), "packing": False}
    expected = Preparation(tokenizer, setup.sft_config(settings, "recipe"), "refuse", lambda text: None).of(
        whole.train
    )
    found = list(islice(iter(streamed), 20))
    for name in ("input_ids", "labels"):
        assert [row[name] for row in found] == list(expected[name])


def test_row_ids_in_words(make: Callable[..., Recipe], prepared: Callable[..., EndlessRows], tokenizer: Any) -> None:
    rows = prepared(make(data={"shuffle_buffer": 0}))
    row = next(islice(iter(rows), 41, None))
    said = describe_rows(rows, [row[ROW_ID], 7], tokenizer, {41: row["input_ids"]})
    assert said == "row 41 of the stream: '<s>1 is the number that comes before 2</s>'; row 7 of the stream"


# What goes wrong -----------------------------------------------------------------------------------------------------


def test_a_file_that_vanishes_or_changes_under_a_run(
    make: Callable[..., Recipe], prepared: Callable[..., EndlessRows], tmp_path: Path
) -> None:
    rows, path = prepared(make()), tmp_path / "rows.jsonl"
    content = path.read_text()
    path.unlink()
    with pytest.raises(StreamFault, match=r"^data.path_or_name: '.*rows.jsonl' has vanished while it was read"):
        next(iter(rows))
    path.write_text(content + content)
    with pytest.raises(StreamFault, match=r"rows.jsonl' has changed while it was trained on"):
        next(iter(rows))
    # In the middle of a pass the file is open; the next pass needs it again.
    rows = prepared(make())
    passing = iter(rows)
    next(passing)
    path.unlink()
    with pytest.raises(StreamFault, match="vanished"):
        list(passing)
    # A worker's error is one sentence too.
    path.write_text(content)
    rows = prepared(make())
    path.unlink()
    with pytest.raises(StreamFault) as caught:
        next(iter(DataLoader(rows, num_workers=1, collate_fn=list)))
    assert str(caught.value).startswith("data.path_or_name: ")
    assert "\n" not in str(caught.value)


def test_a_damaged_line_further_on_is_named(make: Callable[..., Recipe], tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", texts(0, 30))
    path.write_text(path.read_text() + '{"text": "broken"\n')
    with pytest.raises(UserError, match=r"bad.jsonl', line 31: not valid JSON"):
        setup.load_data(make(data={"path_or_name": str(path)}), tokenizer, lambda text: None)


def test_a_row_of_another_type_further_on_is_named(
    make: Callable[..., Recipe], tokenizer: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / "types.jsonl", [*texts(0, 30), {"text": ["a"]}])
    with pytest.raises(UserError, match=r"row 31 of '.*': column 'text' must hold text as the rows before do, but it"):
        setup.load_data(make(data={"path_or_name": str(path)}), tokenizer, lambda text: None)


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ({"path_or_name": "nothing/here.jsonl"}, "data.path_or_name: there is no file or folder"),
        ({"split": "train[:10]"}, "is a slice, and a stream has only whole splits: train"),
        ({"split": "trian"}, "has no split 'trian'; it has 'train'; did you mean 'train'"),
        ({"text_field": "txt"}, "data.path_or_name: text_field: there is no column 'txt'; the columns are 'text'"),
        ({"messages": "text"}, "messages: column 'text' must hold lists of messages"),
        ({"eval_path_or_name": None, "eval_split": "test"}, "data.eval_split: .* has no split 'test'"),
        ({"config_name": "en"}, "has no configurations"),
    ],
)
def test_refused_before_training(
    make: Callable[..., Recipe], tokenizer: Any, section: dict[str, Any], what: str
) -> None:
    with pytest.raises(UserError, match=what):
        setup.load_data(make(data=section), tokenizer, lambda text: None)


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "packing"), [(0, True), (2, False)])
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    make: Callable[..., Recipe], tmp_path: Path, workers: int, packing: bool
) -> None:
    from hqqplus.train import run

    for number in range(2):
        write(tmp_path / "many" / f"train-{number}.jsonl", texts(100 * number, 10))
    sections: dict[str, Any] = {
        "data": {"path_or_name": str(tmp_path / "many"), "shuffle_buffer": 8, "packing": packing, "max_length": 128},
        # 12 steps of 4 rows: two passes over 20 rows, more where they are packed.
        "training": {"dataloader_num_workers": workers},
    }

    def ended(recipe: Recipe) -> tuple[dict[str, torch.Tensor], list[Any]]:
        output = Path(recipe.output_dir)
        curve = json.loads((output / "report.json").read_text())["loss_curve"]
        return load_file(output / "adapter" / "adapter_model.safetensors"), curve

    whole, broken = make("whole", **sections), make("broken", **sections)
    run(whole)
    run(broken)
    # What a process killed in its second pass leaves: checkpoints up to there, nothing that is shipped.
    output = Path(broken.output_dir)
    left = sorted(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    assert [folder.name for folder in left] == ["checkpoint-8", "checkpoint-12"]
    shutil.rmtree(left[-1])
    shutil.rmtree(output / "adapter")
    for report in output.glob("report.*"):
        report.unlink()
    # Data that is away for a while costs nothing but the attempt.
    (tmp_path / "many").rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"^data.path_or_name: .*many"):
        run(broken)
    (tmp_path / "away").rename(tmp_path / "many")
    assert left[0].is_dir()
    run(broken)
    (ours, our_curve), (theirs, their_curve) = ended(broken), ended(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert our_curve == their_curve
