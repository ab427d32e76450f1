"""The parent beside the student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hqqplus import models
from hqqplus.modules import PackedLinear, model_bytes
from hqqplus.recovery.teacher import OnlineTeacher, pick_teacher

GIB = 2**30


@pytest.fixture(scope="module")
def folder(random_model: Callable[..., Path]) -> str:
    return str(random_model("llama"))


def test_targets_are_the_parents_own_logits_at_the_supervised_positions(folder: str) -> None:
    teacher = OnlineTeacher(models.load_causal_lm(folder, device="cpu"))
    examples = [{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]}, {"input_ids": [9, 8, 7]}]
    batch = DataCollatorForLanguageModeling(pad_token_id=0)(examples)
    targets = teacher.targets(batch)
    found = targets.head.logits(targets.hidden)
    with torch.no_grad():
        logits = teacher.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(found, torch.cat([logits[0, 1:4], logits[1, :2]]), rtol=1e-5, atol=1e-6)
    assert not targets.hidden.requires_grad
    assert set(batch) == {"input_ids", "labels", "attention_mask"}, "the batch is the student's still"


def test_targets_of_a_packed_row_are_those_of_its_documents(folder: str) -> None:
    teacher = OnlineTeacher(models.load_causal_lm(folder, device="cpu"))
    made = torch.Generator().manual_seed(0)
    documents = [torch.randint(5, 250, (n,), generator=made).tolist() for n in (7, 1, 12)]
    packed = [
        {"input_ids": documents[0] + documents[1], "seq_lengths": [7, 1]},
        {"input_ids": documents[2], "seq_lengths": [12]},
    ]
    together = teacher.targets(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(packed))
    apart = [
        teacher.targets(DataCollatorForLanguageModeling(pad_token_id=0)([{"input_ids": ids}])).hidden
        for ids in documents
    ]
    assert together.hidden.shape[0] == 6 + 0 + 11
    torch.testing.assert_close(together.hidden, torch.cat(apart), rtol=1e-5, atol=1e-5)


def test_eight_bits_are_near_and_small_and_ours(folder: str) -> None:
    plain, packed = (OnlineTeacher.load(folder, eight_bit=eight, device="cpu") for eight in (False, True))
    assert any(isinstance(module, PackedLinear) for module in packed.model.modules())
    assert model_bytes(packed.model) < model_bytes(plain.model)
    batch: dict[str, Any] = {"input_ids": torch.arange(5, 60)[None], "labels": torch.arange(5, 60)[None]}
    targets = [teacher.targets(batch) for teacher in (plain, packed)]
    log_p, log_q = (t.head.logits(t.hidden).log_softmax(-1) for t in targets)
    assert 0 <= float((log_p.exp() * (log_p - log_q)).sum(-1).mean()) < 1e-4


def test_it_is_frozen_evaluated_and_in_nobodys_module_tree(folder: str) -> None:
    teacher = OnlineTeacher(models.load_causal_lm(folder, device="cpu").train())
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not isinstance(teacher, torch.nn.Module)
    batch = {"input_ids": torch.arange(5, 20)[None], "labels": torch.arange(5, 20)[None]}
    before = torch.get_rng_state()
    plain = teacher.targets(dict(batch)).hidden
    assert torch.equal(before, torch.get_rng_state())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher.targets(dict(batch)).hidden, plain), "the student's autocast is not the parent's"


def test_the_best_that_fits() -> None:
    llama_8b = 16 * GIB
    student = 3 * GIB
    assert pick_teacher(llama_8b, 80 * GIB, student_bytes=student) == "online"
    # 24 GB card, 22 GiB of them free: 16 + 3 + reserve are too much, 9.6 + 3 + reserve are not.
    assert pick_teacher(llama_8b, 22 * GIB, student_bytes=student) == "8bit"
    assert pick_teacher(llama_8b, 16 * GIB, student_bytes=student) == "cache"
    assert pick_teacher(llama_8b, 25 * GIB, student_bytes=student) == "online", "just fits"
    assert pick_teacher(llama_8b, 25 * GIB - 1, student_bytes=student) == "8bit"
    assert pick_teacher(llama_8b, 25 * GIB - 1, student_bytes=student, reserve=0) == "online"
    assert pick_teacher(10**15, 0, device_type="cpu") == "online"
