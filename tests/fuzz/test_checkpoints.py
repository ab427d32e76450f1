"""Damaged checkpoints: what reads the files of packed models, adapters, calibrations, caches and training checkpoints.

Here the layer that reads is called by itself, thousands of times; `test_whole.py` loads models.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from hqqplus import models
from hqqplus.adapters import Fingerprint
from hqqplus.adapters.scales import EXTRAS, add_trainable_scales, load_extras, save_extras
from hqqplus.calibration.calibrate import CalibrationOptions, calibrate
from hqqplus.calibration.store import MANIFEST as SOLUTIONS
from hqqplus.calibration.store import read_solutions, solution_folder
from hqqplus.errors import UserError
from hqqplus.evaluation.table import read_run
from hqqplus.integrations.transformers import HqqPlusConfig, quantize_model
from hqqplus.quantization import QuantPlan, QuantSpec
from hqqplus.recipe import load_recipe
from hqqplus.recovery.checkpoints import MANIFEST as CHECKPOINT
from hqqplus.recovery.checkpoints import checkpoint_folder, find_checkpoint, write_manifest
from hqqplus.recovery.identity import Identity
from hqqplus.recovery.measure import FILE_NAME as MEASUREMENTS
from hqqplus.recovery.measure import Measurement, Notebook
from hqqplus.recovery.teacher import OnlineTeacher
from hqqplus.recovery.teacher_cache import MANIFEST as CACHE
from hqqplus.recovery.teacher_cache import TeacherCache, build_cache
from hqqplus.shards import read_header
from hqqplus.streaming.partial import partial_folder
from hqqplus.untrusted import INDEX, SINGLE, check_adapter_files, check_model_files, indexed_files, weight_files
from tests.fuzz.mutate import mutated, mutated_json, mutated_safetensors
from tests.fuzz.oracle import judged, run, tree


def tiers(fast: int, long: int) -> pytest.MarkDecorator:
    """How many examples in the fast tests, and in the long ones."""
    marks = [pytest.mark.slow, pytest.mark.long]
    return pytest.mark.parametrize("examples", [fast, pytest.param(long, marks=marks)])


def any_json(*values: Any) -> st.SearchStrategy[bytes]:
    """One of `values`, its structure or its bytes damaged."""
    return st.one_of(mutated_json(values), mutated(tuple(json.dumps(value).encode() for value in values)))


# Models --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A packed model in one file, the same in several with an index, and the contents of their files."""
    folder = tmp_path_factory.mktemp("packed")
    model = models.load_causal_lm(str(random_model("llama")), device="cpu", quantization=HqqPlusConfig(2, 32))
    tokenizer = models.load_tokenizer(str(random_model("llama")))
    fingerprint = models.fingerprint_of(model, str(random_model("llama")), None, {})
    for name, size in (("one", "1GB"), ("several", "60KB")):
        model.save_pretrained(folder / name, max_shard_size=size)
        models.write_companions(folder / name, tokenizer, fingerprint)
    return SimpleNamespace(one=folder / "one", several=folder / "several", model=model)


@tiers(60, 1200)
def test_safetensors(packed: SimpleNamespace, tmp_path: Path, examples: int) -> None:
    seeds = [(packed.one / SINGLE).read_bytes()]
    save_file({"a": torch.zeros(2, 3), "b": torch.ones(5, dtype=torch.uint8)}, tmp_path / "small.safetensors")
    seeds.append((tmp_path / "small.safetensors").read_bytes())
    path = tmp_path / "damaged.safetensors"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            header = judged(lambda: read_header(path))
        except SafetensorError:
            return
        for tensor in (header or {}).values():
            assert tensor.start + tensor.size <= len(content)
            assert tensor.read().shape == tensor.shape

    run(examples, st.one_of(*map(mutated_safetensors, seeds)), check)


@tiers(80, 1600)
def test_packed_folders(packed: SimpleNamespace, tmp_path: Path, examples: int) -> None:
    config, index, fingerprint = (
        json.loads((packed.several / name).read_text()) for name in ("config.json", INDEX, "hqqplus.json")
    )
    moved = {**config, "transformers_weights": SINGLE}
    files = st.one_of(
        st.tuples(st.just("config.json"), any_json(config, moved)),
        st.tuples(st.just(INDEX), any_json(index)),
        st.tuples(st.just("hqqplus.json"), any_json(fingerprint)),
        st.tuples(st.just(SINGLE), mutated_safetensors((packed.one / SINGLE).read_bytes())),
    )

    def check(example: tuple[str, bytes]) -> None:
        name, content = example
        folder = tmp_path / ("one" if name in (SINGLE, "config.json") else "several")
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        try:
            before = tree(tmp_path)
            judged(lambda: read_folder(folder))
            assert tree(tmp_path) == before
        finally:
            (folder / name).write_bytes(whole)

    for folder in (packed.one, packed.several):
        shutil.copytree(folder, tmp_path / folder.name)
        read_folder(tmp_path / folder.name)
    run(examples, files, check)


def read_folder(folder: Path) -> None:
    """All that is read of a packed folder before transformers reads it."""
    models.check_folder(str(folder), "model")
    check_model_files(folder)
    indexed_files(folder)
    for name in weight_files(folder):
        for tensor in read_header(folder / name).values():
            tensor.read()
    if models.is_packed(str(folder)):
        with models.one_sentence(str(folder), "model"):
            values = json.loads((folder / "config.json").read_text())["quantization_config"]
            HqqPlusConfig(**values).plan()
    fingerprint = Fingerprint.read(folder)
    if fingerprint is not None:
        fingerprint.describe()
        with models.one_sentence(str(folder), "adapter"):
            HqqPlusConfig(**fingerprint.quantization)
    weight = models.parent_weights(str(folder))
    with pytest.raises(UserError):
        weight("no.such.module")


@tiers(40, 800)
def test_adapters(packed: SimpleNamespace, tmp_path: Path, examples: int) -> None:
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "x",
    }
    save_file({"base_model.model.lora_A.weight": torch.zeros(4, 8)}, tmp_path / "adapter_model.safetensors")
    whole = {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": (tmp_path / "adapter_model.safetensors").read_bytes(),
        "hqqplus.json": (packed.one / "hqqplus.json").read_bytes(),
    }
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    files = st.one_of(
        st.tuples(st.just("adapter_config.json"), any_json(config)),
        st.tuples(st.just("hqqplus.json"), any_json(json.loads(whole["hqqplus.json"]))),
        st.tuples(st.just("adapter_model.safetensors"), mutated_safetensors(whole["adapter_model.safetensors"])),
    )

    def read() -> None:
        check_adapter_files(tmp_path)
        fingerprint = Fingerprint.read(tmp_path)
        assert fingerprint is not None
        fingerprint.describe()
        models._packed_beside(tmp_path, fingerprint)

    def check(example: tuple[str, bytes]) -> None:
        name, content = example
        (tmp_path / name).write_bytes(content)
        before = tree(tmp_path)
        try:
            judged(read)
            assert tree(tmp_path) == before
        finally:
            (tmp_path / name).write_bytes(whole[name])

    run(examples, files, check)


@tiers(30, 300)
def test_trained_scales(packed: SimpleNamespace, tmp_path: Path, examples: int) -> None:
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 32, bias=False))
    quantize_model(model, QuantSpec(2, 32))
    add_trainable_scales(model)
    save_extras(model, tmp_path)
    seed = (tmp_path / EXTRAS).read_bytes()

    def check(content: bytes) -> None:
        (tmp_path / EXTRAS).write_bytes(content)
        judged(lambda: load_extras(model, tmp_path))

    run(examples, mutated_safetensors(seed), check)


# What calibrations and teachers leave --------------------------------------------------------------------------------


@tiers(50, 600)
def test_solutions(random_model: Callable[..., Path], tmp_path: Path, examples: int) -> None:
    """The folder of a calibration, as what is read and as work to be continued."""
    model = models.load_causal_lm(str(random_model("llama")), device="cpu", dtype=torch.float32)
    tokens = torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(0))
    skip = ("k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
    whole = tmp_path / "whole"
    options = CalibrationOptions("importance", 1)
    calibrate(model, QuantPlan(QuantSpec(2, 32), skip=skip), tokens, options, whole, device="cpu", quiet=True)
    manifest = json.loads((whole / SOLUTIONS).read_text())
    (block, *_) = sorted(whole.glob("*.safetensors"))
    folder = tmp_path / "damaged"
    files = st.one_of(
        st.tuples(st.just(SOLUTIONS), any_json(manifest)),
        st.tuples(st.just(SOLUTIONS), mutated_json((manifest["blocks"],)).map(lambda b: _with_blocks(manifest, b))),
        st.tuples(st.just(block.name), mutated_safetensors(block.read_bytes())),
    )

    def read() -> None:
        solutions, reports = read_solutions(folder)
        assert solutions.digest
        for name in solutions.tensors:
            judged(lambda name=name: solutions.tensors[name])
        for report in reports:
            report.to_json()

    def go_on() -> None:
        with solution_folder(folder, manifest["settings"]) as found:
            found.finished(list(manifest["blocks"]))

    def check(example: tuple[str, bytes]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        name, content = example
        (folder / name).write_bytes(content)
        before = tree(folder)
        judged(read)
        assert tree(folder) == before
        judged(go_on)

    run(examples, files, check)


def _with_blocks(manifest: dict[str, Any], blocks: bytes) -> bytes:
    head = json.dumps({key: value for key, value in manifest.items() if key != "blocks"})
    return head[:-1].encode() + b', "blocks": ' + blocks + b"}"


@tiers(40, 500)
def test_teacher_caches(random_model: Callable[..., Path], tmp_path: Path, examples: int) -> None:
    teacher = OnlineTeacher(models.load_causal_lm(str(random_model("llama")), device="cpu"))
    rows = Dataset.from_list(
        [{"input_ids": list(range(5, 5 + n)), "labels": list(range(5, 5 + n))} for n in (3, 7, 9)]
    )
    identity = Identity("rows", "tokenizer", "parent", "float32", "name")
    build_cache(tmp_path / "cache", rows, teacher, identity, k=4, quiet=True)
    folder, names = tmp_path / "cache", ("keys.bin", "ends.bin", "ids.bin", "logprobs.bin")
    whole = {name: (folder / name).read_bytes() for name in (CACHE, *names)}
    files = st.one_of(
        st.tuples(st.just(CACHE), any_json(json.loads(whole[CACHE]))),
        st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), mutated((whole[name],)))),
    )

    def read() -> None:
        for verify in (True, False):
            cache = TeacherCache.open(folder, verify=verify)
            for row in rows:
                cache.lookup(row)

    def check(example: tuple[str, bytes]) -> None:
        name, content = example
        (folder / name).write_bytes(content)
        before = tree(folder)
        try:
            judged(read)
            assert tree(folder) == before
        finally:
            (folder / name).write_bytes(whole[name])

    read()
    run(examples, files, check)


@tiers(30, 200)
def test_unfinished_teacher_caches(random_model: Callable[..., Path], tmp_path: Path, examples: int) -> None:
    teacher = OnlineTeacher(models.load_causal_lm(str(random_model("llama")), device="cpu"))
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}])
    identity = Identity("rows", "tokenizer", "parent", "float32", "name")
    settings = {"k": 4, "vocabulary": teacher.head.weight.shape[0], "block_tokens": 2**16, "batch_tokens": 2**13}
    noted = {"format": 1, "identity": vars(identity), "settings": settings, "seen": 0, "tokens": 0, "positions": 0}
    noted["sizes"] = dict.fromkeys(("keys.bin", "ends.bin", "ids.bin", "logprobs.bin"), 0)

    def check(content: bytes) -> None:
        for name in ("cache", "cache.partial"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        (tmp_path / "cache.partial").mkdir()
        for name in noted["sizes"]:
            (tmp_path / "cache.partial" / name).touch()
        (tmp_path / "cache.partial" / "progress.json").write_bytes(content)
        judged(lambda: build_cache(tmp_path / "cache", rows, teacher, identity, k=4, quiet=True))

    run(examples, any_json(noted), check)


# What a run leaves ---------------------------------------------------------------------------------------------------


@tiers(60, 600)
def test_training_checkpoints(tmp_path: Path, examples: int) -> None:
    (tmp_path / "recipe.yaml").write_text("model: {name_or_path: x}\ndata: {path_or_name: y}\noutput_dir: z\n")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    output = tmp_path / "out"
    folder = checkpoint_folder(output, 10)
    (folder / "sub").mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "sub" / "state.json").write_text("{}")
    write_manifest(folder, recipe, 10, 1.0, 100)
    whole = (folder / CHECKPOINT).read_bytes()
    assert find_checkpoint(output, recipe).folder == folder

    def check(content: bytes) -> None:
        (folder / CHECKPOINT).write_bytes(content)
        before = tree(output)
        found = judged(lambda: find_checkpoint(output, recipe))
        assert tree(output) == before
        if found is not None and found.folder is not None:
            assert isinstance(found.manifest.step, int)

    run(examples, any_json(json.loads(whole)), check)


@tiers(20, 200)
def test_notes_of_a_run(tmp_path: Path, examples: int) -> None:
    notes = Notebook(tmp_path, writes=True)
    measured = Measurement({"test": 3.0}, ["sample"], 100)
    notes.recall("parent", {"a": 1}, lambda: measured)
    whole = (tmp_path / MEASUREMENTS).read_bytes()

    def check(content: bytes) -> None:
        (tmp_path / MEASUREMENTS).write_bytes(content)
        found = Notebook(tmp_path, writes=False).recall("parent", {"a": 1}, lambda: measured)
        assert isinstance(found, Measurement)

    run(examples, any_json(json.loads(whole)), check)


@tiers(20, 200)
def test_unfinished_quantizations(tmp_path: Path, examples: int) -> None:
    settings, source = {"quantization": {"nbits": 2}}, {"commit": None}
    statistics = {"nmse": 0.1, "shape": [2, 3]}
    noted = {"format": 1, "settings": settings, "source": source, "files": {"a": 1}, "current": "b", "tensors": ["c"]}
    noted["layers"] = {"d": statistics}
    partial = tmp_path / "out.partial"

    def read() -> None:
        with partial_folder(tmp_path / "out", settings, source) as found:
            found.finished({"a": {}, "b": {}}, {"a": {}, "b": {"c": "d"}})

    def check(content: bytes) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        (partial / "progress.json").write_bytes(content)
        judged(read)

    run(examples, any_json(noted, {**noted, "layers": {}}), check)


@tiers(20, 200)
def test_reports(tmp_path: Path, examples: int) -> None:
    report = {
        "name": "run", "bits_per_weight": 2.5, "adapter_bytes": 10, "ppl_parent": 1.0, "ppl_quantized": 2.0,
        "ppl_recovered": 1.5, "samples": {"a": {"parent": "b", "recovered": "c"}},
        "recipe": {"model": {"name_or_path": "x"}, "quantization": {"nbits": 2, "group_size": 32, "overrides": {}}},
    }  # fmt: skip
    fingerprint = {"base": "x", "packed_sha256": "0", "quantization": {"nbits": 2, "group_size": 32, "overrides": []}}
    (tmp_path / "adapter").mkdir()
    files = st.one_of(
        st.tuples(st.just("report.json"), any_json(report)),
        st.tuples(st.just("adapter/hqqplus.json"), any_json(fingerprint)),
    )

    def check(example: tuple[str, bytes]) -> None:
        (tmp_path / "report.json").write_text(json.dumps(report))
        (tmp_path / "adapter" / "hqqplus.json").write_text(json.dumps(fingerprint))
        (tmp_path / example[0]).write_bytes(example[1])
        judged(lambda: read_run(tmp_path))

    run(examples, files, check)
