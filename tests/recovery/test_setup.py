"""What a run settles before it trains, and what it says of its choices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from hqqplus import models
from hqqplus.errors import UserError
from hqqplus.evaluation.perplexity import Windows
from hqqplus.integrations.trl import sft_config
from hqqplus.recipe import Recipe
from hqqplus.recovery import setup

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe over 40 rows, `t0` to `t39`; sections are laid over it."""
    rows = write(tmp_path / "rows.jsonl", [{"text": f"t{i}", "other": f"o{i}"} for i in range(40)])

    def make(**sections: Any) -> Recipe:
        values = {
            "model": {"name_or_path": "some/model"},
            "data": {"path_or_name": rows},
            "output_dir": str(tmp_path / "out"),
            **sections,
        }
        values["data"] = {"path_or_name": rows, **values["data"]}
        return Recipe.model_validate(values)

    return make


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings(recipe: Recipe, device: torch.device, said: list[str]) -> dict[str, Any]:
    return setup.trainer_settings(recipe, device, said.append)


# The trainer's settings ----------------------------------------------------------------------------------------------


def test_the_optimizer_by_device_said_aloud(make: Callable[..., Recipe], said: list[str]) -> None:
    assert settings(make(), CUDA, said)["optim"] == "paged_adamw_8bit"
    assert said == []
    assert settings(make(), CPU, said)["optim"] == "adamw_torch"
    assert len(said) == 1
    assert "adamw_torch" in said[0]
    assert "paged_adamw_8bit" in said[0]


def test_an_optimizer_that_was_chosen_stays(make: Callable[..., Recipe], said: list[str]) -> None:
    for optim in ("adamw_torch", "sgd"):
        for device in (CPU, CUDA):
            assert settings(make(training={"optim": optim}), device, said)["optim"] == optim
    assert said == []
    paged = make(training={"optim": "paged_adamw_8bit"})
    assert settings(paged, CUDA, said)["optim"] == "paged_adamw_8bit"
    assert said == []
    assert settings(paged, CPU, said)["optim"] == "paged_adamw_8bit"
    assert len(said) == 1
    assert "unpaged" in said[0]


def test_the_precision_by_device(
    make: Callable[..., Recipe], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported: supported)
        assert settings(make(), CUDA, said)["bf16"] is supported
        assert settings(make(), CPU, said)["bf16"] is False
        assert settings(make(training={"bf16": False}), CUDA, said)["bf16"] is False
        assert "bf16" not in settings(make(training={"fp16": True}), CUDA, said)


def test_defaults_give_way_to_what_the_recipe_says(make: Callable[..., Recipe], said: list[str]) -> None:
    found = settings(make(), CPU, said)
    assert found["save_total_limit"] == 2
    assert found["use_cpu"] is True
    assert found["ddp_find_unused_parameters"] is False
    assert "eval_strategy" not in found
    assert settings(make(), CUDA, said)["use_cpu"] is False
    chosen = {"save_total_limit": 5, "ddp_find_unused_parameters": True, "use_cpu": True}
    assert chosen.items() <= settings(make(training=chosen), CUDA, said).items()


def test_eval_steps_mean_that_there_is_evaluation(make: Callable[..., Recipe], said: list[str]) -> None:
    assert settings(make(training={"eval_steps": 5}), CPU, said)["eval_strategy"] == "steps"
    both = {"eval_steps": 5, "eval_strategy": "epoch"}
    assert settings(make(training=both), CPU, said)["eval_strategy"] == "epoch"


def test_the_other_sections_reach_the_trainer(
    make: Callable[..., Recipe], said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup.torch.cuda, "is_bf16_supported", lambda: False)
    recipe = make(
        data={"max_length": 77, "packing": True},
        training={"max_steps": 3, "learning_rate": 3e-3, "eval_steps": 2},
        tracking={"run": "a name"},
        seed=11,
    )
    config = sft_config(settings(recipe, CPU, said), "recipe")
    assert (config.max_length, config.packing, config.eval_packing) == (77, True, False)
    assert (config.max_steps, config.learning_rate, config.seed) == (3, 3e-3, 11)
    assert config.output_dir == str(tmp_path / "out")
    assert (config.report_to, config.run_name) == ([], "a name")
    assert config.eval_strategy == "steps"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("report_to", "expected"),
    # wandb and TensorBoard get callbacks of our own.
    [("wandb", ["none"]), ("mlflow", ["mlflow"]), (["wandb", "mlflow", "swanlab"], ["mlflow", "swanlab"])],
)
def test_trackers_become_a_list(make: Callable[..., Recipe], said: list[str], report_to: Any, expected: Any) -> None:
    assert settings(make(tracking={"report_to": report_to}), CPU, said)["report_to"] == expected


def test_an_output_that_is_a_file_is_refused_before_anything_else(
    make: Callable[..., Recipe], said: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^output_dir: .*/file is a file"):
        settings(make(output_dir=str(tmp_path / "file")), CPU, said)


# Data ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(random_model: Callable[..., Path]) -> Any:
    """One token a byte; it has BOS and EOS, and writes neither by itself."""
    return models.load_tokenizer(str(random_model("llama")))


def texts(rows: Any) -> list[str]:
    """The rows without the special tokens at their ends."""
    return [text.removeprefix("<s>").removesuffix("</s>") for text in rows["text"]]


def test_rows_are_held_out_where_no_evaluation_set_is_named(
    make: Callable[..., Recipe], tokenizer: Any, said: list[str]
) -> None:
    data = setup.load_data(make(), tokenizer, said.append)
    held_out = data.texts[setup.EVALUATION_SET]
    assert len(held_out) == 2  # a twentieth of 40
    assert len(data.train) == 38
    assert {*texts(data.train), *held_out} == {f"t{i}" for i in range(40)}
    assert len(said) == 1
    assert "2 training rows" in said[0]


def test_the_held_out_rows_follow_the_seed_alone(make: Callable[..., Recipe], tokenizer: Any, said: list[str]) -> None:
    first, again, other = (setup.load_data(make(seed=seed), tokenizer, said.append) for seed in (3, 3, 4))
    assert first.texts == again.texts
    assert list(first.train["text"]) == list(again.train["text"])
    assert other.texts != first.texts


def test_a_few_rows_leave_one_out_and_one_row_is_too_few(
    make: Callable[..., Recipe], tokenizer: Any, said: list[str], tmp_path: Path
) -> None:
    two = write(tmp_path / "two.jsonl", [{"text": "a"}, {"text": "b"}])
    data = setup.load_data(make(data={"path_or_name": two}), tokenizer, said.append)
    assert sorted([*texts(data.train), *data.texts["evaluation"]]) == ["a", "b"]
    assert len(data.train) == 1
    one = write(tmp_path / "one.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=r"^data\.path_or_name: one row is too few"):
        setup.load_data(make(data={"path_or_name": one}), tokenizer, said.append)


def test_no_more_than_some_hundreds_are_held_out(
    make: Callable[..., Recipe], tokenizer: Any, said: list[str], tmp_path: Path
) -> None:
    many = write(tmp_path / "many.jsonl", [{"text": f"t{i}"} for i in range(12_000)])
    data = setup.load_data(make(data={"path_or_name": many}), tokenizer, said.append)
    assert (len(data.train), len(data.texts["evaluation"])) == (11_500, 500)


def test_a_named_evaluation_file_is_used_and_nothing_held_out(
    make: Callable[..., Recipe], tokenizer: Any, said: list[str], tmp_path: Path
) -> None:
    other = write(tmp_path / "other.jsonl", [{"text": "x"}, {"text": "y"}])
    data = setup.load_data(make(data={"eval_path_or_name": other}), tokenizer, said.append)
    assert data.texts == {"evaluation": ["x", "y"]}
    assert texts(data.train) == [f"t{i}" for i in range(40)]
    assert said == []


def test_a_named_evaluation_split_is_used(make: Callable[..., Recipe], tokenizer: Any, said: list[str]) -> None:
    data = setup.load_data(make(data={"split": "train[:30]", "eval_split": "train[38:]"}), tokenizer, said.append)
    assert data.texts == {"evaluation": ["t38", "t39"]}
    assert texts(data.train) == [f"t{i}" for i in range(30)]


def test_rows_end_in_eos_unless_it_is_switched_off(
    make: Callable[..., Recipe], tokenizer: Any, said: list[str]
) -> None:
    column = {"text_field": "other", "eval_split": "train"}
    with_eos = setup.load_data(make(data=column), tokenizer, said.append)
    assert with_eos.train["text"][0] == "<s>o0</s>"
    assert with_eos.texts["evaluation"][0] == "o0"
    without = setup.load_data(make(data={**column, "eos": False}), tokenizer, said.append)
    assert tokenizer.decode(without.train["input_ids"][0]) == "<s>o0"


def test_prompt_and_completion_without_eos_keep_the_loss_on_the_completion(
    make: Callable[..., Recipe], tokenizer: Any, said: list[str]
) -> None:
    columns = {"prompt": "text", "completion": "other", "eval_split": "train", "eos": False}
    row = setup.load_data(make(data=columns), tokenizer, said.append).train[0]
    ids = torch.tensor(row["input_ids"])
    mask = torch.tensor(row["labels"]) != -100
    assert tokenizer.decode(ids[~mask]) == "<s>t0"
    assert tokenizer.decode(ids[mask]) == "o0"


def test_bos_is_written_only_where_the_tokenizer_does_not(tokenizer: Any) -> None:
    class Writes:
        bos_token, bos_token_id = "<s>", 1

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1, 7]}

    class HasNone:
        bos_token = bos_token_id = None

    assert setup.unwritten_bos(tokenizer) == "<s>"
    assert setup.unwritten_bos(Writes()) is None
    assert setup.unwritten_bos(HasNone()) is None


def test_further_texts_are_read_by_name(
    make: Callable[..., Recipe], tokenizer: Any, said: list[str], tmp_path: Path
) -> None:
    titled = write(tmp_path / "titled.jsonl", [{"title": "no", "text": "yes"}])
    story = write(tmp_path / "story.jsonl", [{"story": "once"}])
    recipe = make(data={"eval_split": "train[:1]"}, evaluation={"texts": {"titled": titled, "story": story}})
    data = setup.load_data(recipe, tokenizer, said.append)
    assert data.texts == {"evaluation": ["t0"], "titled": ["yes"], "story": ["once"]}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"text_field": "txt"}}, r"^data\.path_or_name: text_field: there is no column 'txt'"),
        ({"data": {"eval_path_or_name": "/no/such.jsonl"}}, r"^data\.eval_path_or_name: there is no file"),
        ({"data": {"eval_split": "test"}}, r"^data\.eval_split: .* no split 'test'"),
        ({"evaluation": {"texts": {"mine": "/no/such.txt"}}}, r"^evaluation\.texts\.mine: there is no file"),
    ],
)
def test_bad_data_names_the_option(
    make: Callable[..., Recipe], tokenizer: Any, said: list[str], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        setup.load_data(make(**sections), tokenizer, said.append)


def test_windows_as_the_data_set_that_the_trainer_asks_for() -> None:
    rows = setup.as_dataset(Windows((torch.tensor([1, 2, 3]), torch.tensor([4, 5]))))
    assert list(rows["input_ids"]) == [[1, 2, 3], [4, 5]]


def test_rows_are_prepared_once_and_packed_where_documents_stay_apart(
    make: Callable[..., Recipe], random_model: Callable[..., Path], said: list[str]
) -> None:
    from hqqplus import models

    name = str(random_model("llama"))
    model, tokenizer = models.load_causal_lm(name, dtype="float32", device="cpu"), models.load_tokenizer(name)
    recipe = make(data={"max_length": 64})
    train = setup.load_data(recipe, tokenizer, said.append).train

    def rows(packing: Any) -> setup.TrainingRows:
        return setup.TrainingRows(train, tokenizer, settings(recipe, CPU, said), packing, said.append)

    packed = rows("auto")
    assert packed.rows is None
    found = packed.of(model)
    assert packed.of(None) is found
    assert packed.arguments.packing
    assert "seq_lengths" in found.column_names
    plain = rows(False)
    assert len(plain.of(model)) == len(train) > len(found)
    assert not plain.arguments.packing


@pytest.mark.parametrize(
    ("settled", "section"),
    [(True, {}), (False, {"truncation_mode": "keep_end"}), (False, {"packing_strategy": "bfd_split"})],
)
def test_masked_rows_are_refused_before_there_is_a_model(
    make: Callable[..., Recipe],
    random_model: Callable[..., Path],
    said: list[str],
    tmp_path: Path,
    settled: bool,
    section: dict[str, Any],
) -> None:
    name = str(random_model("llama"))
    model, tokenizer = models.load_causal_lm(name, dtype="float32", device="cpu"), models.load_tokenizer(name)
    pairs = [{"text": "p" * 4, "other": "c"}, {"text": "p" * 40, "other": "c"}, {"text": "ppp", "other": "c"}]
    path = write(tmp_path / "pairs.jsonl", pairs)
    columns = {"prompt": "text", "completion": "other", "eval_path_or_name": path}
    recipe = make(data={"path_or_name": path, "max_length": 16, **columns}, training=section)
    train = setup.load_data(recipe, tokenizer, said.append).train

    def rows(masked: Any) -> setup.TrainingRows:
        said.clear()
        return setup.TrainingRows(train, tokenizer, settings(recipe, CPU, said), "auto", said.append, masked)

    if not settled:
        # What is cut off depends on whether it is packed, and that on the model.
        rows("refuse").check()
        return
    with pytest.raises(UserError, match="1 of 3 training rows have no supervised token"):
        rows("refuse").check()
    checked, unchecked = rows("drop"), rows("drop")
    checked.check()
    line = "data.masked_rows: 1 of 3 training rows have no supervised token: left out"
    assert said[-1] == line
    assert checked.of(model).to_list() == unchecked.of(model).to_list()
    assert said.count(line) == 2, "said once by each"
