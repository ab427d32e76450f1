"""What our trainer does with rows, end tokens, cards, a parent to learn from, and state and rates of its own."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hqqplus import HqqPlusConfig, models
from hqqplus.data import RowForm
from hqqplus.errors import UserError
from hqqplus.evaluation.perplexity import PerplexityResult
from hqqplus.integrations.trl import Extras, RecoveryTrainer, prepare_rows, sft_config
from hqqplus.recovery.checkpoints import publish
from hqqplus.recovery.distillation import Distillation, LossWeights, distillation_loss
from hqqplus.recovery.identity import Identity
from hqqplus.recovery.setup import unwritten_bos, without_eos
from hqqplus.recovery.teacher import OnlineTeacher
from hqqplus.recovery.teacher_cache import TeacherCache, build_cache
from tests.conftest import ROOT


@pytest.fixture(autouse=True, scope="module")
def _little_garbage() -> Iterator[None]:
    """Every trainer collects garbage when it ends; what is imported is none, and takes a second to look through."""
    gc.freeze()
    yield
    gc.unfreeze()


def trainer(
    folder: Path, output: Path, rows: Any, options: dict[str, Any] | None = None, **settings: Any
) -> tuple[RecoveryTrainer, list[tuple[int, int]]]:
    """A trainer of LoRA on a 2-bit model, with `settings` of `SFTConfig` and `options` of ours; what it saved."""
    config = HqqPlusConfig(nbits=2, group_size=32)
    model = models.load_causal_lm(str(folder), quantization=config, device="cpu").requires_grad_(False)
    dropout = settings.pop("lora_dropout", 0.0)
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=dropout)
    model = get_peft_model(model, lora)
    if settings.pop("train_norm", False):
        model.get_base_model().model.norm.weight.requires_grad_(True)
    saved: list[tuple[int, int]] = []

    def on_checkpoint(written: Path, step: int, seconds: float, tokens: int) -> None:
        publish(written, output / f"checkpoint-{step}")
        saved.append((step, tokens))

    made = RecoveryTrainer(
        model=model,
        args=arguments(output, **settings),
        train_dataset=rows,
        eval_dataset=Dataset.from_dict({"input_ids": [[1, 2, 3]]}) if "eval_steps" in settings else None,
        processing_class=models.load_tokenizer(str(folder)),
        evaluator=lambda model, index, count, reduce: PerplexityResult(7.0, 1.9459, 12),
        on_checkpoint=on_checkpoint,
        **options or {},
    )
    return made, saved


def arguments(output: Path, **settings: Any) -> Any:
    fixed = {"output_dir": str(output), "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True}
    return sft_config({**fixed, **settings}, "x")


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


# Rows prepared without a model ---------------------------------------------------------------------------------------

WORDS = [
    "once",
    "upon",
    "a",
    "time",
    "there",
    "was",
    "small",
    "dog",
    "that",
    "liked",
    "to",
    "run",
    "in",
    "the",
    "park",
]
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ message['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def sentences(count: int) -> list[str]:
    return [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 3 + i % 7)) for i in range(1, count + 1)]


def texts(count: int = 24) -> Dataset:
    return Dataset.from_dict({"text": sentences(count)})


FORMS = {
    "text": texts(),
    "completion": Dataset.from_dict({"prompt": sentences(24), "completion": sentences(24)[::-1]}),
    "messages": Dataset.from_dict(
        {
            "messages": [
                [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]
                for text in sentences(24)
            ]
        }
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 40},
        {"max_length": 64, "packing": True},
        {"max_length": 64, "packing": True, "packing_strategy": "wrapped"},
        {"max_length": 40, "shuffle_dataset": True, "completion_only_loss": False},
        {"max_length": 64, "assistant_only_loss": True},
    ],
    ids=["plain", "packed", "wrapped", "shuffled", "assistant"],
)
def test_rows_prepared_without_a_model_are_those_the_trainer_would_train_on(
    random_model: Callable[..., Path], tmp_path: Path, form: str, settings: dict[str, Any]
) -> None:
    if "assistant_only_loss" in settings and form != "messages":
        pytest.skip("for messages alone")
    folder = random_model("llama")
    tokenizer = models.load_tokenizer(str(folder))
    tokenizer.chat_template = TEMPLATE
    model = models.load_causal_lm(str(folder), device="cpu")
    theirs = SFTTrainer(
        model=model, args=arguments(tmp_path, **settings), train_dataset=FORMS[form], processing_class=tokenizer
    )
    rows = prepare_rows(FORMS[form], tokenizer, arguments(tmp_path, **settings))
    columns = [
        "input_ids",
        "labels",
        *(["seq_lengths"] if settings.get("packing_strategy", "bfd") == "bfd" and settings.get("packing") else []),
    ]
    assert [{c: row[c] for c in columns} for row in rows] == [
        {c: row[c] for c in columns} for row in theirs.train_dataset
    ]
    assert any(-100 in row["labels"] for row in rows) == (
        (form == "completion" and "completion_only_loss" not in settings) or "assistant_only_loss" in settings
    )

    ours, _ = trainer(folder, tmp_path, rows, {"prepared": True}, **settings)
    assert ours.padding_free == theirs.padding_free
    assert list(ours.train_dataset) == list(rows), "not packed, cut or shuffled again"
    found, expected = next(iter(ours.get_train_dataloader())), next(iter(theirs.get_train_dataloader()))
    assert found.keys() == expected.keys()
    assert all(torch.equal(torch.as_tensor(found[name]), torch.as_tensor(expected[name])) for name in found)


def test_a_chat_template_may_come_from_a_file_and_not_from_a_model(
    random_model: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer = models.load_tokenizer(str(random_model("llama")))
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    rows = prepare_rows(
        FORMS["messages"], tokenizer, arguments(tmp_path, chat_template_path=str(tmp_path / "template.jinja"))
    )
    assert tokenizer.decode(rows[0]["input_ids"]).startswith("<user>")
    with pytest.raises(UserError, match=r"training.chat_template_path: some/model: give a file"):
        prepare_rows(FORMS["messages"], tokenizer, arguments(tmp_path, chat_template_path="some/model"))


# Distillation --------------------------------------------------------------------------------------------------------


def online(folder: Path, **weights: float) -> Distillation:
    teacher = OnlineTeacher(models.load_causal_lm(str(folder), device="cpu"))
    return Distillation(LossWeights(**weights), teacher)


def step(made: RecoveryTrainer, examples: list[Any]) -> tuple[float, Tensor]:
    """Loss and gradient of one batch, as a training step makes them."""
    made.model.train()
    made.model.zero_grad()
    batch = made._prepare_inputs(made.data_collator(examples))
    count = (batch["labels"][:, 1:] != -100).sum()
    with made.compute_loss_context_manager():
        loss = made.compute_loss(made.accelerator.prepare_model(made.model), batch, num_items_in_batch=count)
    loss.backward()
    grads = [p.grad.flatten() for p in made.model.parameters() if p.grad is not None]
    return float(loss.detach()), torch.cat(grads)


def test_distillation_brings_the_student_nearer_to_its_parent(
    random_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = random_model("llama")
    made, _ = trainer(
        folder,
        tmp_path,
        texts(),
        {"distillation": online(folder, kl=1.0, ce=0.0, hidden=0.0)},
        max_steps=30,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        logging_steps=1,
        save_strategy="no",
        lr_scheduler_type="constant",
    )
    made.train()
    logs = [entry for entry in made.state.log_history if "kl" in entry]
    assert len(logs) == 30
    # Of the three parts KL alone counts; the others are told nevertheless.
    assert all(entry["loss"] == pytest.approx(entry["kl"], rel=1e-4) for entry in logs)
    assert all(entry["hidden"] == 0 for entry in logs), "not worked out where it does not count"
    assert logs[-1]["kl"] < 0.6 * logs[0]["kl"]
    assert logs[-1]["ce"] == pytest.approx(5.6, abs=0.3)
    assert 0 <= logs[-1]["mean_token_accuracy"] <= 1
    assert logs[-1]["num_tokens"] == made.tokens > 0


@pytest.mark.slow
@pytest.mark.long
def test_a_real_model_comes_nearer_to_its_parent_than_with_cross_entropy_alone(
    shared: Path, tinystories: Path, tmp_path: Path
) -> None:
    """stories260K at 2 bits, the same rows, steps and learning rate; the parent online, and a cache of 64 tokens."""
    folder = shared / "models" / "stories260K"
    tokenizer = models.load_tokenizer(str(folder))
    lines = (tinystories / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    stories = [next(iter(json.loads(line).values())) for line in lines[:240]]
    settings: dict[str, Any] = {"max_length": 128, "packing": True}
    rows, held_out = (
        prepare_rows(Dataset.from_dict({"text": part}), tokenizer, arguments(tmp_path, **settings))
        for part in (stories[40:], stories[:40])
    )
    parent = OnlineTeacher(models.load_causal_lm(str(folder), device="cpu"))
    identity = Identity.of(rows, tokenizer, str(folder), precision="float32")
    cache = build_cache(tmp_path / "cache", rows, parent, identity, quiet=True)
    found = {}
    for name, distillation in {
        "ce": None,
        "online": Distillation(LossWeights(), parent),
        "cache": Distillation(LossWeights(hidden=0.0), cache),
    }.items():
        options = {"distillation": distillation, "prepared": True}
        made, _ = trainer(
            folder, tmp_path, rows, options, max_steps=40, learning_rate=5e-3, per_device_train_batch_size=8,
            save_strategy="no", gradient_checkpointing=False, **settings,
        )  # fmt: skip
        made.train()
        student, kl, count = OnlineTeacher(made.model.get_base_model()), 0.0, 0
        for example in held_out:
            batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([example])
            own, theirs = student.targets(batch), parent.targets(batch)
            labels = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]
            loss = distillation_loss(own.hidden, own.head, labels, theirs, LossWeights(1.0, 0.0, 0.0))
            kl, count = kl + float(loss.kl), count + loss.positions
        found[name] = kl / count
    assert found["online"] < 0.97 * found["ce"], found
    assert found["cache"] < 0.97 * found["ce"], found


def test_the_loss_is_the_one_of_its_parts_and_counts_what_trls_counts(
    random_model: Callable[..., Path], tmp_path: Path
) -> None:
    """With cross-entropy alone it is TRL's own loss, gradient and metrics, packed or not."""
    folder = random_model("llama", tied=True)
    for packing in (False, True):
        settings: dict[str, Any] = {"max_length": 64, "packing": packing}
        ours, _ = trainer(
            folder, tmp_path, texts(), {"distillation": online(folder, kl=0.0, ce=1.0, hidden=0.0)}, **settings
        )
        theirs, _ = trainer(folder, tmp_path, texts(), **settings)
        examples = [ours.train_dataset[i] for i in range(3)]
        found, expected = step(ours, examples), step(theirs, examples)
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-7)
        own, trls = ours._metrics["train"], theirs._metrics["train"]
        assert own["num_tokens"] == trls["num_tokens"]
        assert own["mean_token_accuracy"] == pytest.approx(trls["mean_token_accuracy"])
        assert own["ce"][0] == pytest.approx(expected[0], rel=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_a_cache_of_all_tokens_is_the_parent_itself(
    random_model: Callable[..., Path], tmp_path: Path, packing: bool
) -> None:
    folder = random_model("llama")
    settings: dict[str, Any] = {"max_length": 64, "packing": packing}
    tokenizer = models.load_tokenizer(str(folder))
    rows = prepare_rows(FORMS["completion"], tokenizer, arguments(tmp_path, **settings))
    weights = {"kl": 1.0, "ce": 0.5, "hidden": 0.0}
    there = online(folder, **weights)
    identity = Identity.of(rows, tokenizer, str(folder), precision="float32")
    cache = build_cache(tmp_path / "cache", rows, there.source, identity, k=10**6, quiet=True)  # type: ignore[arg-type]
    found = {}
    for name, distillation in (("online", there), ("cache", Distillation(LossWeights(**weights), cache))):
        options = {"distillation": distillation, "prepared": True}
        made, _ = trainer(folder, tmp_path, rows, options, dataloader_num_workers=1, **settings)
        batch = next(iter(made.get_train_dataloader()))
        assert ("teacher_ids" in batch) == (name == "cache")
        found[name] = step(made, [rows[i] for i in range(3)])
    assert found["cache"][0] == pytest.approx(found["online"][0], abs=1e-3)
    torch.testing.assert_close(
        found["cache"][1], found["online"][1], rtol=1e-2, atol=1e-3 * float(found["online"][1].abs().max())
    )


def adapter_after(
    folder: Path, output: Path, rows: Any, options: dict[str, Any], **settings: Any
) -> dict[str, Tensor]:
    """The trained parameters after a run."""
    fixed = {"logging_steps": 1, "save_strategy": "no", "lr_scheduler_type": "constant", **settings}
    resume = fixed.pop("resume", None)
    made, _ = trainer(folder, output, rows, options, **fixed)
    made.train(resume_from_checkpoint=resume)
    return {name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **tolerance)


@pytest.mark.parametrize("packing", [False, True])
def test_two_accumulated_batches_are_one_of_twice_the_size(
    random_model: Callable[..., Path], tmp_path: Path, packing: bool
) -> None:
    folder = random_model("llama")
    settings: dict[str, Any] = {
        "max_steps": 2, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "packing": packing,
        "max_length": 64,
    }  # fmt: skip
    rows, options = FORMS["completion"], {"distillation": online(folder)}
    whole = adapter_after(folder, tmp_path, rows, options, per_device_train_batch_size=4, **settings)
    halves = adapter_after(
        folder, tmp_path, rows, options, per_device_train_batch_size=2, gradient_accumulation_steps=2, **settings
    )
    same(halves, whole, rtol=1e-4, atol=1e-6)
    start = trainer(folder, tmp_path, rows)[0].model
    moved = [(whole[n] - p).abs().max() for n, p in start.named_parameters() if n in whole]
    assert max(moved) > 1e-4


def test_gradient_checkpointing_and_autocast(random_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = random_model("llama")
    options = {"distillation": online(folder)}
    found = {}
    for name, settings in {
        "plain": {"gradient_checkpointing": False},
        "checkpointing": {"gradient_checkpointing": True},
        "bf16": {"gradient_checkpointing": True, "bf16": True},
    }.items():
        made, _ = trainer(folder, tmp_path, texts(), options, **settings)
        found[name] = step(made, [made.train_dataset[i] for i in range(3)])
    assert found["checkpointing"][0] == found["plain"][0]
    torch.testing.assert_close(found["checkpointing"][1], found["plain"][1])
    assert found["bf16"][0] != found["plain"][0]
    assert found["bf16"][0] == pytest.approx(found["plain"][0], rel=0.02)
    likeness = torch.nn.functional.cosine_similarity(found["bf16"][1], found["plain"][1], dim=0)
    assert likeness > 0.98


def test_called_without_it_the_model_is_what_it_was(random_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = random_model("llama")
    made, _ = trainer(folder, tmp_path, texts(), {"distillation": online(folder)})
    plain, _ = trainer(folder, tmp_path, texts())
    ids = torch.arange(5, 15)[None]
    for kwargs in ({}, {"labels": ids}):
        ours, theirs = (m.model.eval()(input_ids=ids, **kwargs) for m in (made, plain))
        assert torch.equal(ours.logits, theirs.logits)
        assert ours.loss == theirs.loss
    generated = [m.model.generate(input_ids=ids, max_new_tokens=4, do_sample=False) for m in (made, plain)]
    assert torch.equal(*generated)
    parameters = {name for name, _ in made.model.named_parameters()}
    assert parameters == {name for name, _ in plain.model.named_parameters()}, "the parent is in nobody's tree"
    with pytest.raises(UserError, match="cannot be split between processes"):
        made.compute_loss(made.model, {"shift_labels": ids})


@pytest.mark.parametrize("source", [pytest.param("online", marks=pytest.mark.slow), "cache"])
def test_a_resumed_distillation_ends_where_an_uninterrupted_one_does(
    random_model: Callable[..., Path], tmp_path: Path, source: str
) -> None:
    folder = random_model("llama")
    tokenizer = models.load_tokenizer(str(folder))
    rows = prepare_rows(texts(), tokenizer, arguments(tmp_path, max_length=64, packing=True))
    distillation = online(folder)
    if source == "cache":
        identity = Identity.of(rows, tokenizer, str(folder), precision="float32")
        cache = build_cache(tmp_path / "cache", rows, distillation.source, identity, k=8, quiet=True)  # type: ignore[arg-type]
        distillation = Distillation(LossWeights(hidden=0.0), cache)
    options = {"distillation": distillation, "prepared": True}
    settings: dict[str, Any] = {
        "lora_dropout": 0.2, "max_steps": 6, "packing": True, "max_length": 64, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3,
    }  # fmt: skip
    whole = adapter_after(folder, tmp_path / "a", rows, options, **settings)
    resumed = adapter_after(
        folder, tmp_path / "b", rows, options, resume=str(tmp_path / "a" / "checkpoint-3"), **settings
    )
    same(resumed, whole, rtol=0, atol=0)


# Learning rates and state of their own -------------------------------------------------------------------------------


def norm_of(model: Any) -> Tensor:
    return model.get_base_model().model.norm.weight


@pytest.mark.parametrize(
    "optim",
    [
        "adamw_torch",
        "adamw_8bit",
        pytest.param("adamw_torch_fused", marks=pytest.mark.slow),
        pytest.param("paged_adamw_8bit", marks=pytest.mark.slow),
    ],
)
def test_parameters_with_a_learning_rate_of_their_own(
    random_model: Callable[..., Path], tmp_path: Path, optim: str
) -> None:
    folder = random_model("llama")
    settings: dict[str, Any] = {
        "optim": optim, "max_steps": 4, "learning_rate": 1e-3, "weight_decay": 0.1, "lr_scheduler_type": "linear",
        "train_norm": True, "save_strategy": "no", "logging_steps": 1,
    }  # fmt: skip

    def groups(model: Any) -> list[dict[str, Any]]:
        lora_a = [p for name, p in model.named_parameters() if "lora_A" in name]
        return [
            {"params": [norm_of(model), lora_a[0]], "lr": 1e-2},
            {"params": lora_a[1:3], "lr": 5e-2, "weight_decay": 0.5},
        ]

    made, _ = trainer(folder, tmp_path, texts(), {"param_groups": groups}, **settings)
    made.create_optimizer_and_scheduler(4)
    optimizer, parameters = made.optimizer, [p for p in made.model.parameters() if p.requires_grad]
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(parameters)
    assert found.keys() == {id(p) for p in parameters}
    lora_a = [p for name, p in made.model.named_parameters() if "lora_A" in name]
    assert found[id(norm_of(made.model))] == (1e-2, 0.0), "no decay on norms"
    assert found[id(lora_a[0])] == (1e-2, 0.1)
    assert found[id(lora_a[1])] == found[id(lora_a[2])] == (5e-2, 0.5)
    assert found[id(lora_a[3])] == (1e-3, 0.1)
    optimizer.step()
    made.lr_scheduler.step()
    rates = [group["lr"] for group in optimizer.param_groups if group["params"]]
    assert sorted(set(rates)) == pytest.approx([0.75e-3, 0.75e-2, 3.75e-2]), "the scheduler scales all of them"

    moved = {}
    for name, options in (("own", {"param_groups": groups}), ("plain", {})):
        run, _ = trainer(folder, tmp_path, texts(), options, **settings)
        before = norm_of(run.model).detach().clone()
        run.train()
        moved[name] = (norm_of(run.model).detach() - before).abs().max()
    assert moved["own"] > 5 * moved["plain"] > 0


def test_groups_that_make_no_sense_are_refused(random_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = random_model("llama")
    for groups in (
        lambda model: [{"params": [model.get_base_model().model.norm.weight], "lr": 1.0}],  # frozen
        lambda model: [{"params": [next(p for p in model.parameters() if p.requires_grad)]}] * 2,
    ):
        made, _ = trainer(folder, tmp_path, texts(), {"param_groups": groups})
        with pytest.raises(ValueError, match="one that the model trains, and stand in one group"):
            made.create_optimizer()


def test_state_that_peft_does_not_save_is_in_the_checkpoint_and_comes_back_first(
    random_model: Callable[..., Path], tmp_path: Path
) -> None:
    """A trained norm is no part of an adapter; with it resumption is exact, without it it is not."""
    folder = random_model("llama")
    settings: dict[str, Any] = {
        "train_norm": True, "max_steps": 4, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2,
        "per_device_train_batch_size": 4,
    }  # fmt: skip
    calls: list[str] = []

    def run(output: Path, with_extras: bool = True, **more: Any) -> dict[str, Tensor]:
        held: dict[str, RecoveryTrainer] = {}

        def save(target: Path) -> None:
            calls.append(f"save {target.name}")
            save_file({"norm": norm_of(held["made"].model).detach()}, target / "extras.safetensors")

        def load(target: Path) -> None:
            calls.append(f"load {target.name} {'after' if held['made'].optimizer else 'before'} the optimizer")
            with torch.no_grad():
                norm_of(held["made"].model).copy_(load_file(target / "extras.safetensors")["norm"])

        options = {
            "extras": Extras(save, load) if with_extras else None,
            "param_groups": lambda model: [{"params": [norm_of(model)], "lr": 0.1}],
        }
        resume = more.pop("resume", None)
        held["made"], saved = trainer(folder, output, texts(), options, **settings, **more)
        held["made"].train(resume_from_checkpoint=resume)
        if with_extras and resume is None:
            assert (output / "checkpoint-2" / "extras.safetensors").is_file()
            assert [at for at, _ in saved] == [2, 4]
        return {name: p.detach().clone() for name, p in held["made"].model.named_parameters() if p.requires_grad}

    whole = run(tmp_path / "a")
    assert calls == ["save checkpoint-2", "save checkpoint-4"]
    resumed = run(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-2"))
    assert calls[2:] == ["load checkpoint-2 before the optimizer", "save checkpoint-4"]
    same(resumed, whole, rtol=0, atol=0)
    lost = run(tmp_path / "c", with_extras=False, resume=str(tmp_path / "a" / "checkpoint-2"))
    assert any(not torch.equal(lost[name], whole[name]) for name in whole)


def test_the_best_checkpoint_is_loaded_with_its_state(random_model: Callable[..., Path], tmp_path: Path) -> None:
    loaded: list[str] = []
    made, _ = trainer(
        random_model("llama"),
        tmp_path,
        texts(),
        {"extras": Extras(lambda folder: None, lambda folder: loaded.append(folder.name))},
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    made.train()
    assert loaded == ["checkpoint-1"], "the measurements are equal: the first is the best"


# Two processes -------------------------------------------------------------------------------------------------------

TWO_PROCESSES = """
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.integrations import test_trl

if __name__ == "__main__":
    folder, output, kind, size = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    found = test_trl.distilled(folder, output, kind, size)
    if torch.distributed.is_initialized():
        everyone = [None, None]
        torch.distributed.all_gather_object(everyone, {n: t for n, t in found.items()})
        assert all(torch.equal(everyone[0][n], everyone[1][n]) for n in found)
    save_file(found, output / f"rank{int(__import__('os').environ.get('RANK', 0))}.safetensors")
"""


def distilled(folder: Path, output: Path, kind: str, size: int) -> dict[str, Tensor]:
    rows = prepare_rows(FORMS["completion"], models.load_tokenizer(str(folder)), arguments(output, max_length=64))
    distillation = online(folder, hidden=0.0)
    if kind == "cache":
        distillation = Distillation(LossWeights(hidden=0.0), TeacherCache.open(folder.parent / "cache"))
    return adapter_after(
        folder, output, rows, {"distillation": distillation, "prepared": True}, max_steps=3, optim="sgd",
        learning_rate=1.0, max_grad_norm=0.0, per_device_train_batch_size=size, max_length=64,
        ddp_find_unused_parameters=False, ddp_broadcast_buffers=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", ["online", "cache"])
def test_two_processes_train_as_one_with_twice_the_batch(
    random_model: Callable[..., Path], tmp_path: Path, run_python: Callable[..., Any], kind: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(random_model("llama"), folder)
    tokenizer = models.load_tokenizer(str(folder))
    rows = prepare_rows(FORMS["completion"], tokenizer, arguments(tmp_path, max_length=64))
    identity = Identity.of(rows, tokenizer, str(folder), precision="float32")
    teacher = OnlineTeacher(models.load_causal_lm(str(folder), device="cpu"))
    build_cache(tmp_path / "cache", rows, teacher, identity, k=16, quiet=True)
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    environment = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    found = {}
    for name, launch, size in (
        ("one", (), 4),
        ("two", ("-m", "torch.distributed.run", "--nproc_per_node", "2"), 2),
    ):
        (tmp_path / name).mkdir()
        run_python(*launch, str(script), str(folder), str(tmp_path / name), kind, str(size), env=environment)
        found[name] = load_file(tmp_path / name / "rank0.safetensors")
    same(found["two"], found["one"], rtol=1e-4, atol=1e-6)
