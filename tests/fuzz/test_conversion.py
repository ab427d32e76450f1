"""Damaged checkpoints of other libraries: what reads them before a byte is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

from hqqplus.conversion.convert import _plan, read_plan
from hqqplus.shards import read_header
from tests.conversion import published as make
from tests.conversion.published import Published, publish
from tests.fuzz.mutate import mutated_json, mutated_safetensors
from tests.fuzz.oracle import judged, run, tree

KINDS = {
    "gptq": (make.gptq(2, 32), make.gptq_config(2, 32, dynamic={"x": {}})),
    "bitnet": (make.bitnet(False), {"quant_method": "bitnet", "linear_class": "autobitlinear"}),
    "mlx": (make.mlx(1, 32, binary=True), {"bits": 1, "group_size": 32}),
    "binary": (make.signs(32, "uint8"), {"quant_method": "binary", "group_size": 32}),
}


@pytest.fixture(scope="module")
def sources(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Published]:
    folder = tmp_path_factory.mktemp("published")
    found = {
        kind: publish(random_model("llama"), folder / kind, *case, only=lambda name: name.endswith("0.mlp.up_proj"))
        for kind, case in KINDS.items()
    }
    for source in found.values():
        read_plan(str(source.folder))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("examples", [8, pytest.param(400, marks=[pytest.mark.slow, pytest.mark.long])])
def test_sources(sources: dict[str, Published], tmp_path: Path, kind: str, examples: int) -> None:
    source = sources[kind]
    folder = tmp_path / "source"
    shutil.copytree(source.folder, folder)
    settings = [{**source.config, "quantization_config": values} for _, values in KINDS.values()]
    files = st.one_of(
        st.tuples(st.just("config.json"), mutated_json(tuple(settings)).filter(_is_small)),
        st.tuples(st.just("config.json"), _settings(source.config)),
        st.tuples(st.just("model.safetensors"), mutated_safetensors((folder / "model.safetensors").read_bytes())),
    )

    def check(example: tuple[str, bytes]) -> None:
        name, content = example
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        try:
            before = tree(tmp_path)
            judged(lambda: read_all(folder))
            assert tree(tmp_path) == before
        finally:
            (folder / name).write_bytes(whole)

    run(examples, files, check)


def _settings(config: dict[str, object]) -> st.SearchStrategy[bytes]:
    """The model as it is, its quantization settings damaged."""
    values = mutated_json(tuple(values for _, values in KINDS.values()))
    return values.map(lambda text: json.dumps(config).encode().replace(
        json.dumps(config["quantization_config"]).encode(), text))  # fmt: skip


def _is_small(content: bytes) -> bool:
    """Models whose sizes are damaged are what `test_whole.py` is about: making one takes long."""
    return len(content) < 20_000


def read_all(folder: Path) -> None:
    read_plan(str(folder))
    headers = {"model.safetensors": read_header(folder / "model.safetensors")}
    layout = _plan(folder, headers, False).layout
    for layer in layout.specs:
        codes = layout.codes(layer)
        assert codes.dtype == torch.uint8
        assert int(codes.max()) <= layout.largest_of(layer)
