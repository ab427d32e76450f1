"""Damaged checkpoints as a user meets them: whole models loaded, and the command line."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

import hqqplus
from hqqplus import cli, models
from hqqplus.adapters import Fingerprint, ship_adapter
from hqqplus.errors import UserError
from hqqplus.integrations.transformers import HqqPlusConfig
from hqqplus.untrusted import SINGLE
from tests.fuzz.mutate import mutated, mutated_json, mutated_safetensors
from tests.fuzz.oracle import check_sentence, judged, run, tree


@pytest.fixture(scope="module")
def made(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A packed model and an adapter on it."""
    folder = tmp_path_factory.mktemp("made")
    model = models.load_causal_lm(str(random_model("llama")), device="cpu", quantization=HqqPlusConfig(2, 32))
    tokenizer = models.load_tokenizer(str(random_model("llama")))
    model.save_pretrained(folder / "base")
    models.write_companions(folder / "base", tokenizer, models.fingerprint_of(model, str(folder / "parent"), None, {}))
    fingerprint = Fingerprint.read(folder / "base")
    assert fingerprint is not None
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = models.load(folder / "base").requires_grad_(False)
    ship_adapter(get_peft_model(model, config), tokenizer, folder / "adapter", fingerprint, "card")
    return SimpleNamespace(base=folder / "base", adapter=folder / "adapter")


def damaged(folder: Path, weights: str) -> st.SearchStrategy[tuple[str, bytes]]:
    """(name, content) of a file of `folder` after an accident."""
    names = [path.name for path in sorted(folder.iterdir()) if path.suffix == ".json"]
    texts = st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), any_json(folder / name)))
    return st.one_of(texts, texts, st.tuples(st.just(weights), mutated_safetensors((folder / weights).read_bytes())))


def any_json(path: Path) -> st.SearchStrategy[bytes]:
    return st.one_of(mutated_json((json.loads(path.read_text()),)), mutated((path.read_bytes(),)))


tiers = pytest.mark.parametrize("examples", [15, pytest.param(400, marks=[pytest.mark.slow, pytest.mark.long])])


@tiers
def test_packed_models(made: SimpleNamespace, tmp_path: Path, examples: int) -> None:
    base = tmp_path / "base"
    shutil.copytree(made.base, base)

    def check(example: tuple[str, bytes]) -> None:
        name, content = example
        (base / name).write_bytes(content)
        before = tree(tmp_path)
        try:
            judged(lambda: (hqqplus.load(base, device="cpu"), models.load_tokenizer(str(base))))
            assert tree(tmp_path) == before
        finally:
            shutil.copy(made.base / name, base / name)

    run(examples, damaged(made.base, SINGLE), check)


@tiers
def test_adapters(made: SimpleNamespace, tmp_path: Path, examples: int) -> None:
    shutil.copytree(made.base, tmp_path / "base")
    adapter = tmp_path / "adapter"
    shutil.copytree(made.adapter, adapter)

    def check(example: tuple[str, bytes]) -> None:
        name, content = example
        (adapter / name).write_bytes(content)
        before = tree(tmp_path)
        try:
            judged(lambda: hqqplus.load(adapter, device="cpu"))
            assert tree(tmp_path) == before
        finally:
            shutil.copy(made.adapter / name, adapter / name)

    assert judged(lambda: hqqplus.load(adapter, device="cpu")) is not None
    run(examples, damaged(made.adapter, "adapter_model.safetensors"), check)


@pytest.mark.parametrize("examples", [10, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.long])])
def test_the_command_line(
    made: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    examples: int,
) -> None:
    """`hqqplus VERB` ends with 0, or with 2 and a sentence; what it would have written is not there then."""
    base, recipe = tmp_path / "base", tmp_path / "recipe.yaml"
    shutil.copytree(made.base, base)
    (tmp_path / "text.txt").write_text("Some text to measure on. " * 4)
    text = b"model: {name_or_path: x}\ndata: {path_or_name: y}\noutput_dir: z\nadapter: {r: 4}\n"
    packed = damaged(made.base, SINGLE).map(lambda file: (base / file[0], file[1]))
    files = st.one_of(packed, mutated((text,)).map(lambda content: (recipe, content)))
    verbs = st.sampled_from(("evaluate", "export", "validate"))

    def check(example: tuple[str, tuple[Path, bytes]]) -> None:
        verb, (path, content) = example
        recipe.write_bytes(text)
        path.write_bytes(content)
        out = tmp_path / "out"
        rest: list[Any] = {
            "evaluate": [base, tmp_path / "text.txt", "--max-length", "16", "--max-tokens", "32", "--device", "cpu"],
            "export": [base, out],
            "validate": [recipe],
        }[verb]
        before = tree(tmp_path)
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["hqqplus", verb, *map(str, rest)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = stopped.code
        error = capfd.readouterr().err
        assert code in (0, None, 2), error
        assert "Traceback" not in error
        if code == 2:
            check_sentence("\n".join(line for line in error.splitlines() if line.strip()))
            assert tree(tmp_path) == before
        shutil.rmtree(out, ignore_errors=True)
        if path != recipe:
            shutil.copy(made.base / path.name, path)

    run(examples, st.tuples(verbs, files), check)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, and the checkpoint has"),
        ({"hidden_size": 10**7}, "config.json describes a model of "),
        ({"vocab_size": 10**9}, "config.json describes a model of "),
        ({"transformers_weights": "../other/model.safetensors"}, "is not the name of a file in its folder"),
    ],
)
def test_a_configuration_that_asks_for_too_much(
    made: SimpleNamespace, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    """Refused before anything of that size is made: gigabytes, or a thousand million layers."""
    shutil.copytree(made.base, tmp_path / "base")
    config = json.loads((made.base / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=f"^model: {tmp_path / 'base'}: .*{says}"):
        hqqplus.load(tmp_path / "base", device="cpu")
