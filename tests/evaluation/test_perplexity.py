"""Perplexity against its definition, and the windows against theirs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hqqplus.evaluation.perplexity as module
from hqqplus.errors import UserError
from hqqplus.evaluation.mode import evaluating
from hqqplus.evaluation.perplexity import PerplexityResult, Windows, make_windows, perplexity, recovery


class Letters:
    """A tokenizer with one token a letter, 1 = BOS and 2 = EOS where it has them; "^" is written out BOS."""

    def __init__(self, bos: bool = True, eos: bool = True) -> None:
        self.bos_token_id, self.eos_token_id = (1 if bos else None), (2 if eos else None)
        self.calls = 0

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        self.calls += 1
        return {"input_ids": [1 if letter == "^" else ord(letter) - ord("a") + 10 for letter in text]}


def ids(windows: Windows) -> list[list[int]]:
    return [window.tolist() for window in windows.input_ids]


def test_bos_stands_in_front_of_each_document() -> None:
    windows = make_windows(["abc", "de"], Letters(), 4)
    assert ids(windows) == [[1, 10, 11, 12], [1, 13, 14]]
    assert windows.tokens == 5
    assert all(window.dtype == torch.long for window in windows.input_ids)


def test_documents_without_bos_are_joined_by_eos() -> None:
    assert ids(make_windows(["ab", "", "c"], Letters(bos=False), 8, join=True)) == [[10, 11, 2, 12]]
    assert ids(make_windows(["ab", "c"], Letters(bos=False, eos=False), 8, join=True)) == [[10, 11, 12]]


def test_a_document_that_brings_its_bos_gets_no_second() -> None:
    assert ids(make_windows(["^ab", "cd"], Letters(), 8)) == [[1, 10, 11], [1, 12, 13]]


def test_a_last_window_of_one_token_is_dropped() -> None:
    assert ids(make_windows(["abcd"], Letters(), 4)) == [[1, 10, 11, 12]]
    assert ids(make_windows(["abcde"], Letters(), 4)) == [[1, 10, 11, 12], [13, 14]]


def test_documents_by_themselves() -> None:
    assert ids(make_windows(["abcd", "e"], Letters(), 3)) == [[1, 10, 11], [12, 13], [1, 14]]
    assert ids(make_windows(["ab", "cd"], Letters(bos=False), 4)) == [[10, 11], [12, 13]]
    assert ids(make_windows(["ab", "cd"], Letters(), 4, max_tokens=5)) == [[1, 10, 11], [1, 12]]


def test_max_tokens_bounds_the_stream_and_the_work() -> None:
    tokenizer = Letters()
    windows = make_windows(["abc"] * 100, tokenizer, 4, max_tokens=6)
    assert ids(windows) == [[1, 10, 11, 12], [1, 10]]
    assert tokenizer.calls == 2


@pytest.mark.parametrize(("texts", "max_length", "max_tokens"), [([], 8, None), (["", ""], 8, None), (["ab"], 8, 1)])
def test_nothing_to_measure(texts: list[str], max_length: int, max_tokens: int | None) -> None:
    with pytest.raises(UserError, match=r"^wiki: nothing to measure: .* at least 2 are needed$"):
        make_windows(texts, Letters(), max_length, max_tokens, "wiki")


def test_a_window_must_hold_two_tokens() -> None:
    with pytest.raises(UserError, match="max_length must be 2 or more"):
        make_windows(["ab"], Letters(), 1)


@given(
    texts=st.lists(st.text("abcdef", max_size=9), max_size=6),
    max_length=st.integers(2, 7),
    max_tokens=st.none() | st.integers(0, 40),
    bos=st.booleans(),
)
def test_windows_are_the_stream_cut(texts: list[str], max_length: int, max_tokens: int | None, bos: bool) -> None:
    stream: list[int] = []
    for text in filter(None, texts):
        stream += [1] if bos else [2] if stream else []
        stream += [ord(letter) - ord("a") + 10 for letter in text]
    stream = stream[:max_tokens]
    expected = [stream[start : start + max_length] for start in range(0, len(stream), max_length)]
    expected = [window for window in expected if len(window) > 1]
    if not expected:
        with pytest.raises(UserError):
            make_windows(texts, Letters(bos), max_length, max_tokens, join=True)
        return
    windows = make_windows(texts, Letters(bos), max_length, max_tokens, join=True)
    assert ids(windows) == expected
    assert windows.tokens == sum(len(window) - 1 for window in expected)


# --- perplexity ------------------------------------------------------------------------------------------------------

VOCABULARY = 97


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention_dropout=0.5,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).float().eval()


@pytest.fixture(scope="module")
def windows() -> Windows:
    generator = torch.Generator().manual_seed(1)
    stream = torch.randint(VOCABULARY, (7 * 16 + 5,), generator=generator)
    return Windows(tuple(stream.split(16)))


def by_definition(model: nn.Module, windows: Windows) -> PerplexityResult:
    total, count = 0.0, 0
    double = model.double()
    with torch.no_grad():
        for window in windows.input_ids:
            log_p = double(input_ids=window[None]).logits[0].log_softmax(-1)
            for position in range(1, len(window)):
                total -= log_p[position - 1, window[position]].item()
                count += 1
    model.float()
    return PerplexityResult(math.exp(total / count), total / count, count)


def test_perplexity_is_its_definition(model: nn.Module, windows: Windows) -> None:
    expected = by_definition(model, windows)
    got = perplexity(model, windows)
    assert got.tokens == expected.tokens == windows.tokens == 7 * 15 + 4
    assert got.nll == pytest.approx(expected.nll, rel=1e-6)
    assert got.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    assert got.perplexity == math.exp(got.nll)


def test_the_sum_over_windows_is_the_whole(model: nn.Module, windows: Windows) -> None:
    parts = [perplexity(model, Windows((window,))) for window in windows.input_ids]
    total = sum(part.nll * part.tokens for part in parts)
    assert perplexity(model, windows).nll == pytest.approx(total / windows.tokens, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_the_batch_size_changes_nothing(model: nn.Module, windows: Windows, batch_size: int) -> None:
    assert perplexity(model, windows, batch_size).nll == pytest.approx(perplexity(model, windows, 4).nll, rel=1e-6)


@pytest.mark.parametrize("elements", [1, VOCABULARY * 5, 10**9])
def test_the_chunk_changes_nothing(
    model: nn.Module, windows: Windows, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = perplexity(model, windows)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", elements)
    assert perplexity(model, windows).nll == pytest.approx(expected.nll, rel=1e-7)


class Fixed(nn.Module):
    """The same logits everywhere; notes the shapes and the options it was called with."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits, requires_grad=False)
        self.calls: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        assert not use_cache
        assert not torch.is_grad_enabled()
        assert not self.training
        self.calls.append(tuple(input_ids.shape))
        return type("Output", (), {"logits": self.logits.expand(*input_ids.shape, -1)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_uniform_logits_of_any_type_give_the_size_of_the_vocabulary(dtype: torch.dtype, windows: Windows) -> None:
    result = perplexity(Fixed(torch.full((VOCABULARY,), 3.0, dtype=dtype)), windows)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-6)


def test_logits_that_break_down_are_reported_not_raised(windows: Windows) -> None:
    impossible = torch.full((VOCABULARY,), -1e30)
    impossible[0] = 1e30
    only = Windows((torch.tensor([1, 2, 3]),))
    assert perplexity(Fixed(impossible), only).perplexity == math.inf
    assert math.isnan(perplexity(Fixed(torch.full((VOCABULARY,), math.nan)), windows).perplexity)


def test_windows_of_any_length_are_batched_with_little_padding() -> None:
    lengths = [3, 16, 7, 16, 5, 16, 4]
    windows = Windows(tuple(torch.arange(length) for length in lengths))
    fixed = Fixed(torch.zeros(VOCABULARY))
    result = perplexity(fixed, windows, batch_size=4)
    assert fixed.calls == [(4, 16), (3, 5)]
    assert result.tokens == sum(lengths) - len(lengths)


def test_padding_changes_nothing(model: nn.Module) -> None:
    windows = Windows(tuple(torch.randint(0, VOCABULARY, (length,)) for length in (9, 2, 16, 5)))
    padded, alone = perplexity(model, windows, 4), perplexity(model, windows, 1)
    assert padded.nll == pytest.approx(alone.nll, rel=1e-6)


@pytest.mark.parametrize("processes", [2, 3, 5, 11])
def test_shares_add_up_to_the_whole(model: nn.Module, windows: Windows, processes: int) -> None:
    shares: list[Tensor] = []

    def keep(sums: Tensor) -> Tensor:
        assert sums.dtype == torch.float64
        assert sums.shape == (2,)
        shares.append(sums)
        return sums

    for rank in range(processes):
        perplexity(model, windows, 2, rank, processes, keep)
    joined = perplexity(model, windows, 2, 0, processes, lambda _: torch.stack(shares).sum(0))
    alone = perplexity(model, windows, 2)
    assert joined.tokens == alone.tokens
    assert joined.nll == pytest.approx(alone.nll, rel=1e-6)


@given(count=st.integers(1, 20), last=st.integers(2, 4), processes=st.integers(1, 5), batch_size=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_every_process_calls_the_model_equally_often(count: int, last: int, processes: int, batch_size: int) -> None:
    windows = Windows((*(torch.ones(4, dtype=torch.long) for _ in range(count)), torch.ones(last, dtype=torch.long)))
    calls, tokens = set(), 0
    for rank in range(processes):
        fixed = Fixed(torch.zeros(VOCABULARY))
        tokens += perplexity(fixed, windows, batch_size, rank, processes).tokens
        calls.add(len(fixed.calls))
    assert len(calls) == 1
    assert tokens == windows.tokens


def test_it_leaves_no_trace(model: nn.Module, windows: Windows) -> None:
    model.train()
    model.model.layers[0].eval()
    flags = {name: part.training for name, part in model.named_modules()}
    state = torch.get_rng_state()
    first = perplexity(model, windows)
    assert {name: part.training for name, part in model.named_modules()} == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert perplexity(model, windows) == first  # dropout was off
    assert torch.is_grad_enabled()
    model.eval()
    assert perplexity(model, windows) == first
    assert not model.training


def test_the_flags_come_back_after_an_error(model: nn.Module) -> None:
    def fail() -> None:
        with evaluating(model):
            assert not any(part.training for part in model.modules())
            raise RuntimeError("boom")

    model.train()
    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert all(part.training for part in model.modules())
    model.eval()


def test_an_adapted_model_is_measured_with_its_adapter(model: nn.Module, windows: Windows) -> None:
    peft = pytest.importorskip("peft", exc_type=ImportError)
    import copy

    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    plain = perplexity(model, windows)
    assert perplexity(adapted, windows) == plain  # LoRA starts at zero
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    changed = perplexity(adapted, windows)
    assert changed != plain
    assert changed.nll == pytest.approx(by_definition(adapted.eval(), windows).nll, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"process_index": 2, "num_processes": 2},
        {"process_index": -1},
    ],
)
def test_bad_arguments(windows: Windows, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="perplexity"):
        perplexity(Fixed(torch.zeros(VOCABULARY)), windows, **options)
    with pytest.raises(ValueError, match="no windows"):
        perplexity(Fixed(torch.zeros(VOCABULARY)), Windows(()))


def test_on_real_weights_and_text(shared: Path, tinystories: Path) -> None:
    """The model's perplexity on the first stories, document by document, against the plain formula."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / "stories260K"
    tokenizer, llama = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    with open(tinystories / "validation.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(12), strict=False)]
    windows = make_windows(texts, tokenizer, 512)
    assert all(window[0] == tokenizer.bos_token_id for window in windows.input_ids)
    result = perplexity(llama, windows)
    assert result.nll == pytest.approx(by_definition(llama.eval(), windows).nll, rel=1e-5)
    assert 3.0 < result.perplexity < 3.8
    stream = make_windows(texts, tokenizer, 512, join=True)
    assert sum(map(len, stream.input_ids)) == sum(map(len, windows.input_ids))


# --- recovery --------------------------------------------------------------------------------------------------------


def test_recovery_of_the_published_example() -> None:
    assert recovery(4.16, 33.0, 5.14) == pytest.approx(1 - math.log(5.14 / 4.16) / math.log(33 / 4.16))
    assert recovery(10.0, 100.0, 100.0) == pytest.approx(0.0)
    assert recovery(10.0, 100.0, 10.0) == 1.0
    assert recovery(10.0, 100.0, 1000.0) == pytest.approx(-1.0)
    assert recovery(10.0, 100.0, 1.0) == pytest.approx(2.0)


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, 0.0, -1.0])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_recovery_is_undefined_without_three_real_perplexities(bad: float | None, place: int) -> None:
    values: list[float | None] = [4.0, 40.0, 8.0]
    values[place] = bad
    assert recovery(*values) is None


def test_recovery_is_undefined_where_nothing_was_lost() -> None:
    assert recovery(4.0, 4.0, 3.0) is None
    assert recovery(4.0, 3.9, 3.0) is None


@given(parent=st.floats(1, 1e300), lost=st.floats(1e-3, 1e3), share=st.floats(-0.9, 0.9), factor=st.floats(0.5, 2.0))
def test_recovery_does_not_depend_on_the_unit(parent: float, lost: float, share: float, factor: float) -> None:
    """Per token or per byte: a power of all three perplexities leaves it as it is."""
    logs = math.log(parent), math.log(parent) + lost, math.log(parent) + lost * (1 - share)
    if max(logs) * max(factor, 1) > 700:
        return
    assert recovery(*map(math.exp, logs)) == pytest.approx(share, abs=1e-6 + 1e-10 / lost)
    assert recovery(*(math.exp(factor * log) for log in logs)) == pytest.approx(share, abs=1e-6 + 1e-10 / lost)
