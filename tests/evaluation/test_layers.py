"""The table of the layers: whole in the files, short on the terminal."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hqqplus.evaluation.layers import Layer, Layers, print_layers, totals_sentence, write_layers
from hqqplus.quantization.statistics import LayerStatistics

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def statistics(nmse: float = 0.1, shape: tuple[int, int] = (64, 64), **changes: Any) -> LayerStatistics:
    values = {"nbits": 2, "group_size": 64, "axis": 1, "metadata_bits": 16, "bits_per_weight": 2.5}
    values |= {"kurtosis": 0.5, "outlier_share": 1e-5, **changes}
    return LayerStatistics(shape=shape, nmse=nmse, **values)


def model(blocks: int, kinds: tuple[str, ...] = KINDS) -> Layers:
    """`blocks` blocks, each worse than the one before, and an 8-bit embedding in front."""
    rows = [Layer("model.embed_tokens", True, statistics(2e-5, (512, 64), nbits=8, bits_per_weight=8.5))]
    for block in range(blocks):
        for index, kind in enumerate(kinds):
            error = 0.09 + 0.001 * block + 0.0001 * index
            rows.append(Layer(f"model.layers.{block}.{kind}", False, statistics(error)))
    return Layers("some/model, 2-bit g64", tuple(rows), 123_456_789)


def printed(layers: Layers, width: int = 80) -> str:
    file = io.StringIO()
    print_layers(layers, Console(file=file, width=width))
    return file.getvalue()


def test_totals_are_weighted_by_weights() -> None:
    layers = Layers(
        "m",
        (
            Layer("embed", True, statistics(0.5, (100, 10), bits_per_weight=8.5)),
            Layer("a", False, statistics(0.1, (10, 30), bits_per_weight=2.5)),
            Layer("b", False, statistics(0.2, (10, 10), bits_per_weight=4.5)),
        ),
        1000,
    )
    assert layers.weights == 1400
    assert layers.bits_per_weight == pytest.approx((2.5 * 300 + 4.5 * 100) / 400)  # without the embedding
    assert layers.nmse == pytest.approx((0.5 * 1000 + 0.1 * 300 + 0.2 * 100) / 1400)
    assert layers.totals() == {
        "packed_layers": 3,
        "packed_weights": 1400,
        "bits_per_weight": layers.bits_per_weight,
        "nmse": layers.nmse,
        "total_bytes": 1000,
    }
    assert (
        totals_sentence(layers) == "3.000 bits per weight in the packed linear layers, mean NMSE 0.393, 0.0 MB in all"
    )
    alone = Layers("m", layers.layers[:1], 1_234_000_000)
    assert math.isnan(alone.bits_per_weight)
    assert totals_sentence(alone) == "no packed linear layer, mean NMSE 0.5, 1,234.0 MB in all"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.self_attn.q_proj", "q_proj"),
        ("lm_head", "lm_head"),
        ("h.3.experts.17", "experts"),
        ("0.1", "0.1"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert Layer(name, False, statistics()).kind == kind


def test_a_small_model_has_a_row_for_each_layer() -> None:
    text = printed(model(4))
    lines = text.splitlines()
    assert len(lines) <= 20
    assert all(len(line) <= 80 for line in lines)
    for layer in model(4).layers:
        (line,) = [line for line in lines if f" {layer.name} " in line]
        assert f"{layer.statistics.nmse:.3g}" in line
    assert "8-bit g64" in text


def test_a_large_model_has_a_row_for_each_kind_and_names_the_worst() -> None:
    text = printed(model(100), width=120)
    lines = text.splitlines()
    assert len(lines) <= 15
    (row,) = [line for line in lines if line.split()[:1] == ["down_proj"]]
    assert row.split() == ["down_proj", "100", "2.500", "0.0902", "0.14", "0.189", "model.layers.99.mlp.down_proj"]
    worst = text[text.index("largest NMSE: ") :]
    assert "model.layers.99.mlp.down_proj 0.189, model.layers.99.self_attn.o_proj 0.189" in worst
    assert "embed_tokens" not in worst


def test_many_kinds_are_cut_on_the_terminal_and_whole_on_the_page(tmp_path: Path) -> None:
    layers = model(2, tuple(f"kind_{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(60)))
    lines = printed(layers, width=120).splitlines()
    assert len(lines) <= 46
    assert any("further kinds" in line for line in lines)
    assert sum("kind_" in line and "model.layers" in line for line in lines[:-3]) < 40
    write_layers(layers, tmp_path)
    page = (tmp_path / "layers.md").read_text(encoding="utf-8")
    assert all(f"| {layer.name} |" in page for layer in layers.layers)


def test_the_files(tmp_path: Path) -> None:
    layers = model(43, tuple(f"{kind}" for kind in (*KINDS, "a", "b", "c", "d")))
    assert len(layers.layers) > 300
    write_layers(layers, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["layers.json", "layers.md", "nmse.png"]
    values = json.loads((tmp_path / "new" / "layers.json").read_text())
    assert values["title"] == layers.title
    assert values["total_bytes"] == 123_456_789
    assert [row["name"] for row in values["layers"]] == [layer.name for layer in layers.layers]
    assert values["layers"][3] == {
        "name": "model.layers.0.mlp.down_proj",
        "kind": "down_proj",
        "embedding": False,
        "shape": [64, 64],
        "nbits": 2,
        "group_size": 64,
        "axis": 1,
        "metadata_bits": 16,
        "nmse": pytest.approx(0.0902),
        "bits_per_weight": 2.5,
        "kurtosis": 0.5,
        "outlier_share": 1e-5,
    }
    page = (tmp_path / "new" / "layers.md").read_text(encoding="utf-8")
    assert page.startswith("# some/model, 2-bit g64: layers\n")
    assert page.count("\n| model.layers.") == 301
    assert "![NMSE of each layer, one colour for each kind](nmse.png)" in page
    write_layers(layers, tmp_path / "again")
    assert (tmp_path / "new" / "nmse.png").read_bytes() == (tmp_path / "again" / "nmse.png").read_bytes()


@pytest.mark.parametrize("nmse", [0.0, math.nan, math.inf])
def test_figures_that_are_none(tmp_path: Path, nmse: float) -> None:
    rows = (
        Layer("a", False, statistics(nmse, kurtosis=math.nan, group_size=-1)),
        Layer("$b|_c$", False, statistics()),
    )
    for layers in (Layers("m $x$", rows, 1), Layers("m", rows[:1], 1), Layers("m", (), 1)):
        write_layers(layers, tmp_path)
        assert "NaN" not in (tmp_path / "layers.json").read_text()
        assert "Infinity" not in (tmp_path / "layers.json").read_text()
        json.loads((tmp_path / "layers.json").read_text())
        assert printed(layers)
    assert printed(Layers("m", rows * 30, 1))


def test_the_axis_of_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From zero, so that heights compare and an 8-bit head does not matter; logarithmic where many would lie there."""
    from matplotlib.axes import Axes

    scales: list[str] = []
    real = Axes.set_xlabel

    def remember(self: Axes, *args: Any, **kwargs: Any) -> Any:
        scales.append(self.get_yscale())
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Axes, "set_xlabel", remember)
    write_layers(model(10), tmp_path)
    mixed = [Layer(f"l.{i}.up", False, statistics(0.34 if i % 2 else 0.007)) for i in range(20)]
    write_layers(Layers("mixed", tuple(mixed), 1), tmp_path)
    assert scales == ["linear", "log"]
