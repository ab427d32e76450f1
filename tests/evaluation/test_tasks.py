"""The lm-eval hook on a task of our own: what it scores is what the log-likelihoods say."""

from __future__ import annotations

import importlib.util
import io
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console

import hqqplus
from hqqplus import HqqPlusConfig, models
from hqqplus.errors import UserError
from hqqplus.evaluation.tasks import print_tasks, run_tasks

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'hqqplus[eval]'"
)

QUESTIONS = [
    ("Once upon a", ["time", "blue dog", "tree"], 0),
    ("Lily and Tom were", ["friends", "run", "the sun is"], 0),
    ("The little girl was very", ["happy", "to", "apple with him"], 0),
    ("They went to the", ["park", "is", "said that"], 0),
    ("Her mom said,", ['"Yes, you can."', "dog", "went very went"], 0),
    ("The cat sat on the", ["but", "mat", "ran and"], 1),
    ("He had a big red", ["ball", "slowly", "of"], 0),
    ("She was sad because she lost her", ["toy", "and", "up"], 0),
    ("The sun was", ["shining", "mom", "Tom said"], 0),
    ("Ben liked to play with his", ["toys", "big", "were"], 2),
]
TASK = """task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 3.0}}
"""


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    keys = ("question", "choices", "answer")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in QUESTIONS))
    (folder / "tiny.yaml").write_text(TASK.format(rows=rows))
    return folder


@pytest.fixture(scope="module")
def adapted(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A real small model at 2 bits, embeddings packed too, with a random adapter; and its tokenizer."""
    name = str(shared / "models" / "stories260K")
    config = HqqPlusConfig(nbits=2, group_size=32, overrides={"embed_tokens": {"nbits": 8}})
    packed = models.load_causal_lm(name, quantization=config)
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapter = tmp_path_factory.mktemp("adapter")
    get_peft_model(packed, lora).save_pretrained(adapter)
    packed = models.load_causal_lm(name, quantization=config)
    return models.put_adapter(packed, adapter), models.load_tokenizer(name)


@torch.no_grad()
def log_likelihood(model: Any, tokenizer: Any, question: str, choice: str) -> float:
    """ln p(choice | question), the tokens of the choice being those that it adds to the question's."""
    whole, given = tokenizer(f"{question} {choice}")["input_ids"], tokenizer(question)["input_ids"]
    log_probabilities = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(log_probabilities[i - 1, whole[i]].item() for i in range(len(given), len(whole)))


@needs_harness
def test_the_accuracy_is_the_one_of_the_log_likelihoods(adapted: tuple[Any, Any], folder: Path) -> None:
    model, tokenizer = adapted
    scores = [[log_likelihood(model, tokenizer, q, choice) for choice in choices] for q, choices, _ in QUESTIONS]
    right = [
        max(range(3), key=row.__getitem__) == answer for row, (_, _, answer) in zip(scores, QUESTIONS, strict=True)
    ]
    normed = [[s / len(c) for s, c in zip(row, q[1], strict=True)] for row, q in zip(scores, QUESTIONS, strict=True)]
    right_normed = [max(range(3), key=row.__getitem__) == q[2] for row, q in zip(normed, QUESTIONS, strict=True)]
    assert 0 < sum(right) < len(QUESTIONS)

    found = run_tasks(model, tokenizer, ["tiny_choice"], include_path=folder, batch_size=4)
    task = found["tasks"]["tiny_choice"]
    assert task["metrics"]["acc"]["value"] == pytest.approx(sum(right) / len(QUESTIONS))
    assert task["metrics"]["acc_norm"]["value"] == pytest.approx(sum(right_normed) / len(QUESTIONS))
    spread = torch.tensor(right).double().std() / len(QUESTIONS) ** 0.5
    assert task["metrics"]["acc"]["stderr"] == pytest.approx(spread.item())
    assert (task["version"], task["shots"], task["examples"]) == (3.0, 0, len(QUESTIONS))
    assert json.loads(json.dumps(found)) == found
    # With the packed model alone the scores are others.
    with model.disable_adapter():
        assert log_likelihood(model, tokenizer, "Once upon a", "time") != scores[0][0]


@needs_harness
def test_it_leaves_no_trace(adapted: tuple[Any, Any], folder: Path) -> None:
    model, tokenizer = adapted
    ids = torch.arange(3, 30)[None]
    before = model.eval()(input_ids=ids).logits
    model.train()
    flags = [part.training for part in model.modules()]
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    run_tasks(model, tokenizer, ["tiny_choice"], include_path=folder, limit=2)
    assert [part.training for part in model.modules()] == flags
    assert (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert torch.equal(model.eval()(input_ids=ids).logits, before)


@needs_harness
def test_limit_and_shots(adapted: tuple[Any, Any], folder: Path) -> None:
    model, tokenizer = adapted
    found = [
        run_tasks(model, tokenizer, ["tiny_choice"], include_path=folder, **options)["tasks"]["tiny_choice"]
        for options in ({"limit": 3}, {"limit": 0.5}, {"num_fewshot": 2})
    ]
    assert [(one["examples"], one["shots"]) for one in found] == [(3, 0), (5, 0), (10, 2)]


@needs_harness
def test_the_table(adapted: tuple[Any, Any], folder: Path) -> None:
    found = run_tasks(*adapted, ["tiny_choice"], include_path=folder, limit=4)
    console = Console(width=100, record=True, file=io.StringIO())
    print_tasks(found, console)
    text = console.export_text()
    metrics = found["tasks"]["tiny_choice"]["metrics"]
    first = next(line for line in text.splitlines() if "tiny_choice" in line)
    cells = ["tiny_choice", "0", "4", "acc", f"{metrics['acc']['value']:.4f}", f"± {metrics['acc']['stderr']:.4f}"]
    assert [cell.strip() for cell in first.strip("│ ").split("│")] == cells
    assert sum("acc" in line for line in text.splitlines()) == 2


def test_a_table_without_errors_and_of_a_group() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    metrics = {"word_perplexity": {"value": 12.5, "stderr": None}}
    task = {"version": None, "shots": None, "examples": None, "metrics": metrics}
    print_tasks({"lm_eval": "1", "limit": None, "tasks": {"[red]group": task}}, console)
    assert "[red]group" in console.export_text(clear=False)
    assert "12.5000" in console.export_text()


@needs_harness
@pytest.mark.slow
@pytest.mark.long
def test_names_among_those_of_the_harness(adapted: tuple[Any, Any], folder: Path) -> None:
    with pytest.raises(UserError, match=r"no task, group or tag 'hellaswagg'; near matches: .*\bhellaswag\b"):
        run_tasks(*adapted, ["hellaswagg"])
    with pytest.raises(UserError, match=r"'tiny_choise'; near matches: tiny_choice"):
        run_tasks(*adapted, ["tiny_choice", "tiny_choise"], include_path=folder)
    found = run_tasks(*adapted, [str(folder / "tiny.yaml")], limit=1)
    assert found["tasks"]["tiny_choice"]["examples"] == 1
    # The hub is out of reach here (HF_HUB_OFFLINE).
    with pytest.raises(UserError, match=r"tasks: hellaswag: the task or its data cannot be loaded: .*hellaswag"):
        run_tasks(*adapted, ["hellaswag"])


@needs_harness
@pytest.mark.parametrize(
    ("tasks", "options", "said"),
    [
        ([], {}, "tasks: name one at least"),
        (["tiny_choice"], {"include_path": "/no/where"}, "there is no folder '/no/where'"),
        (["tiny_choice"], {"limit": 0}, "limit is 0: it must be a number of examples"),
        (["tiny_choice"], {"num_fewshot": -1}, "num_fewshot is -1: it must be 0 or more"),
    ],
)
def test_bad_options(random_model: Callable[..., Path], tasks: list[str], options: Any, said: str) -> None:
    model = hqqplus.load(random_model("llama"))
    with pytest.raises(UserError, match=said):
        run_tasks(model, None, tasks, **options)


@needs_harness
def test_rows_that_are_not_there(adapted: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TASK.format(rows=tmp_path / "nothing.jsonl"))
    with pytest.raises(UserError, match=r"tasks: tiny_choice: .* cannot be loaded: .*nothing\.jsonl"):
        run_tasks(*adapted, ["tiny_choice"], include_path=tmp_path)


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"tasks: they need the package lm-eval: pip install 'hqqplus\[eval\]'"):
        run_tasks(None, None, ["hellaswag"])
