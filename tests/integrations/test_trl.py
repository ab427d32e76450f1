"""What our trainer does with rows, end tokens and cards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from hqqplus import HqqPlusConfig, models
from hqqplus.data import RowForm
from hqqplus.errors import UserError
from hqqplus.evaluation.perplexity import PerplexityResult
from hqqplus.integrations.trl import RecoveryTrainer, sft_config
from hqqplus.recovery.setup import unwritten_bos, without_eos


def trainer(folder: Path, output: Path, rows: Any, **settings: Any) -> tuple[RecoveryTrainer, list[tuple[int, int]]]:
    config = HqqPlusConfig(nbits=2, group_size=32)
    model = models.load_causal_lm(str(folder), quantization=config, device="cpu").requires_grad_(False)
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    saved: list[tuple[int, int]] = []
    arguments = sft_config(
        {"output_dir": str(output), "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, **settings},
        "x",
    )
    made = RecoveryTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=Dataset.from_dict({"input_ids": [[1, 2, 3]]}) if "eval_steps" in settings else None,
        processing_class=models.load_tokenizer(str(folder)),
        evaluator=lambda model, index, count, reduce: PerplexityResult(7.0, 1.9459, 12),
        on_checkpoint=lambda step, seconds, tokens: saved.append((step, tokens)),
    )
    return made, saved


@pytest.mark.parametrize("eos", [True, False])
def test_end_token_is_there_exactly_where_it_is_asked_for(
    random_model: Callable[..., Path], tmp_path: Path, eos: bool
) -> None:
    folder = random_model("llama")
    tokenizer = models.load_tokenizer(str(folder))
    assert unwritten_bos(tokenizer) == "<s>"
    for columns, form in [
        ({"text": ["abc", "de"]}, RowForm(text_field="text")),
        ({"p": ["ab", "d"], "c": ["c", "e"]}, RowForm(prompt="p", completion="c")),
    ]:
        rows = form.to_sft(Dataset.from_dict(columns), "</s>" if eos else None, unwritten_bos(tokenizer))
        made, _ = trainer(folder, tmp_path, rows if eos else without_eos(rows, tokenizer))
        letters = [tokenizer("abc")["input_ids"], tokenizer("de")["input_ids"]]
        bos, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id] if eos else []
        assert [list(row["input_ids"]) for row in made.train_dataset] == [bos + ids + end for ids in letters]


def test_evaluation_is_ours_and_checkpoints_are_reported_after_they_are_whole(
    random_model: Callable[..., Path], tmp_path: Path
) -> None:
    rows = Dataset.from_dict({"text": ["some words to learn"] * 8})
    made, saved = trainer(
        random_model("llama"),
        tmp_path,
        rows,
        max_steps=4,
        per_device_train_batch_size=2,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
    )
    before = {n: p.clone() for n, p in made.model.named_parameters() if not p.requires_grad}
    made.train()
    logged = [entry["eval_perplexity"] for entry in made.state.log_history if "eval_perplexity" in entry]
    assert logged == [7.0, 7.0]
    assert [step for step, _ in saved] == [2, 4]
    assert saved[1][1] == 2 * saved[0][1] == made.tokens > 0
    assert made.seconds > 0
    assert not (tmp_path / "README.md").exists()
    assert all(torch.equal(p, before[n]) for n, p in made.model.named_parameters() if n in before)


def test_complaints_of_the_settings_are_one_sentence() -> None:
    with pytest.raises(UserError, match=r"^recipe: training: .*") as caught:
        sft_config({"output_dir": "x", "use_cpu": True, "load_best_model_at_end": True, "bf16": False}, "recipe")
    assert "\n" not in str(caught.value)
