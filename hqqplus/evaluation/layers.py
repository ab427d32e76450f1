"""What quantization did to each layer: `layers.json` for programs, `layers.md` and `nmse.png` for people."""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hqqplus.evaluation.report import _FAINT, _INK, _inline, _plain, markdown_table
from hqqplus.files import replacing, write_json, write_text
from hqqplus.modules import PackedEmbedding, packed_modules
from hqqplus.quantization.statistics import OUTLIER_DEVIATIONS, ExpertStatistics, LayerStatistics, layer_statistics
from hqqplus.untrusted import read_json

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn

    from hqqplus.quantization import PackedTensor

FILE_NAME = "layers.json"

# Rows that a terminal still shows at once.
_MOST_ROWS = 40
_WORST = 5
_COLORS = (
    "#1d4ed8", "#ea580c", "#15803d", "#c026d3", "#78350f", "#0891b2", "#dc2626", "#84a500", "#111827", "#8b93a1",
)  # fmt: skip
_MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class Layer:
    """One packed layer of a model: its dotted name, and whether it is an embedding (else it is linear, or a projection
    of all experts of a mixture)."""

    name: str
    embedding: bool
    statistics: LayerStatistics

    @property
    def kind(self) -> str:
        """`q_proj`, `down_proj`, `lm_head`: the last word of the name, which layers of many blocks have in common."""
        return next((word for word in reversed(self.name.split(".")) if not word.isdigit()), self.name)


@dataclass(frozen=True)
class Layers:
    """The packed layers of a model, in its order, and what all of it takes.

    Attributes:
        title: of the page and the picture.
        layers: the embedding among them where it is packed; a head on the embedding's own tensors is left out.
        total_bytes: of all tensors as stored, the unpacked ones too.
    """

    title: str
    layers: tuple[Layer, ...]
    total_bytes: int

    @property
    def weights(self) -> int:
        """Weights that were packed."""
        return sum(layer.statistics.weights for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for the packed linear layers and experts, metadata included, over their weights; NaN without."""
        linears = [layer.statistics for layer in self.layers if not layer.embedding]
        weights = sum(s.weights for s in linears)
        return sum(s.bits_per_weight * s.weights for s in linears) / weights if weights else math.nan

    @property
    def nmse(self) -> float:
        """The mean NMSE of a weight: that of each layer, weighted by its number of weights."""
        return sum(layer.statistics.nmse * layer.statistics.weights for layer in self.layers) / max(self.weights, 1)

    @classmethod
    def from_json(cls, values: Any) -> Layers:
        """What `to_json` gave, after a way through JSON; its nulls come back as not-a-number.

        Raises:
            TypeError, KeyError: if a field is missing, unknown or of another type.
        """
        if not isinstance(values, dict) or not isinstance(values["layers"], list):
            raise TypeError("an object with a list of layers is needed")
        title, size = values["title"], values["total_bytes"]
        if not isinstance(title, str) or isinstance(size, bool) or not isinstance(size, int):
            raise TypeError("the title is a string, and total_bytes a whole number")
        return cls(title, tuple(_layer(row) for row in values["layers"]), size)

    def to_json(self) -> dict[str, Any]:
        """As JSON has it: not-a-number and infinity become null."""
        rows = [
            {"name": layer.name, "kind": layer.kind, "embedding": layer.embedding, **layer.statistics.to_dict()}
            for layer in self.layers
        ]
        return _plain({"title": self.title, **self.totals(), "layers": rows})

    def totals(self) -> dict[str, Any]:
        """The figures of the whole model, as JSON has them; bytes are of everything stored."""
        totals = {
            "packed_layers": len(self.layers),
            "packed_weights": self.weights,
            "bits_per_weight": self.bits_per_weight,
            "nmse": self.nmse,
            "total_bytes": self.total_bytes,
        }
        return _plain(totals)

    def by_kind(self) -> dict[str, list[Layer]]:
        """Kind -> its layers, kinds in the order in which they first come."""
        kinds: dict[str, list[Layer]] = {}
        for layer in self.layers:
            kinds.setdefault(layer.kind, []).append(layer)
        return kinds

    def worst(self, count: int = _WORST) -> list[Layer]:
        """The layers of the largest NMSE, the largest first."""
        return sorted(self.layers, key=lambda layer: -_rank(layer.statistics.nmse))[:count]


class LayerCollector:
    """Compares every weight with what it is packed to, while it observes.

    collector = LayerCollector()
    with observe_packing(collector):
        model = AutoModelForCausalLM.from_pretrained(id, quantization_config=...)
    """

    def __init__(self) -> None:
        self.statistics: dict[str, LayerStatistics] = {}
        self._experts = ExpertStatistics()

    def __call__(self, name: str, weight: Tensor, packed: PackedTensor) -> None:
        self.statistics[name] = layer_statistics(weight, packed)

    def expert(self, name: str, index: int, weight: Tensor, packed: PackedTensor) -> None:
        if index == 0:
            self._experts = ExpertStatistics()
        self._experts.add(weight, packed)
        self.statistics[name] = self._experts.together()

    def layers(self, title: str, model: nn.Module, total_bytes: int) -> Layers:
        """The layers of `model`, which was packed meanwhile, in its order."""
        found = tuple(
            Layer(name, isinstance(module, PackedEmbedding), self.statistics[name])
            for name, module in packed_modules(model).items()
            if name in self.statistics
        )
        return Layers(title, found, total_bytes)


def read_layers(folder: str | Path) -> Layers | None:
    """The layers that `layers.json` in `folder` tells of; None where there is none that can be read."""
    try:
        return Layers.from_json(read_json(Path(folder) / FILE_NAME))
    except (OSError, ValueError, TypeError, LookupError, OverflowError):
        return None


def write_layers(layers: Layers, folder: str | Path) -> None:
    """Write `nmse.png`, `layers.json` and `layers.md` to `folder` (made if needed), each whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    _draw(layers, folder / "nmse.png")
    write_json(folder / FILE_NAME, layers.to_json())
    # Last: the page shows the picture.
    write_text(folder / "layers.md", _page(layers))


def print_layers(layers: Layers, console: Console | None = None) -> None:
    """The layers on the terminal (or on `console`): each by itself, or, where these are many, each kind of them."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    many = len(layers.layers) > _MOST_ROWS
    rows = _kind_rows(layers) if many else _short_rows(layers)
    # Few lines between columns: with whole names it has to fit into 80 columns.
    table = Table(
        title=Text(_inline(layers.title), style="bold"), title_justify="left", box=box.SIMPLE_HEAD, padding=0
    )
    for index, title in enumerate(rows[0]):
        name = index == 0 or title == "worst"
        table.add_column(f" {title}", justify="left" if name else "right", overflow="fold")
    for row in rows[1:]:
        table.add_row(*(Text(f" {cell}") for cell in row))
    console.print(table)
    if many:
        worst = ", ".join(f"{layer.name} {_figure(layer.statistics.nmse)}" for layer in layers.worst())
        console.print(Text(f"largest NMSE: {worst}"))


def _layer(row: Any) -> Layer:
    if not isinstance(row, dict):
        raise TypeError("a layer is an object")
    values = {name: row[name] for name in (field.name for field in dataclasses.fields(LayerStatistics))}
    # What JSON has no number for.
    unknown = {name: math.nan for name in ("nmse", "bits_per_weight", "kurtosis") if values[name] is None}
    name, embedding, numbers = row["name"], row["embedding"], {**values, **unknown}
    if not isinstance(name, str) or not isinstance(embedding, bool) or not isinstance(numbers["shape"], list):
        raise TypeError("a layer has a name, a shape, and is an embedding or none")
    return Layer(name, embedding, LayerStatistics.from_dict(numbers))


# --- tables ----------------------------------------------------------------------------------------------------------


def _figure(value: float) -> str:
    """Three digits, small numbers too."""
    if math.isnan(value):
        return "–"
    return f"{value:.3g}" if math.isfinite(value) else "∞"


def _short_rows(layers: Layers) -> list[list[str]]:
    """A row for each layer, for a terminal."""
    rows = [["layer", "packed to", "bpw", "NMSE", "kurtosis", "outliers"]]
    for layer in layers.layers:
        s = layer.statistics
        group = "row" if s.group_size == -1 else s.group_size
        figures = map(_figure, (s.nmse, s.kurtosis, s.outlier_share))
        rows.append([layer.name, f"{s.nbits}-bit g{group}", f"{s.bits_per_weight:.2f}", *figures])
    return rows


def _rows(layers: Layers) -> list[list[str]]:
    rows = [["layer", "shape", "bits", "group", "axis", "bits per weight", "NMSE", "kurtosis", "outliers"]]
    for layer in layers.layers:
        s = layer.statistics
        rows.append(
            [
                layer.name,
                " x ".join(map(str, s.shape)),
                str(s.nbits),
                "row" if s.group_size == -1 else str(s.group_size),
                str(s.axis),
                f"{s.bits_per_weight:.3f}",
                _figure(s.nmse),
                _figure(s.kurtosis),
                _figure(s.outlier_share),
            ]
        )
    return rows


def _kind_rows(layers: Layers, most: int = _MOST_ROWS - 2) -> list[list[str]]:
    """A row for each kind; beyond `most` kinds, those with the fewest weights share one."""
    kinds = layers.by_kind()
    if len(kinds) > most:
        large = sorted(kinds, key=lambda kind: -sum(layer.statistics.weights for layer in kinds[kind]))[: most - 1]
        rest = [layer for kind, members in kinds.items() if kind not in large for layer in members]
        further = f"{len(kinds) - len(large)} further kinds"
        kinds = {**{kind: members for kind, members in kinds.items() if kind in large}, further: rest}
    rows = [["kind", "layers", "bpw", "least NMSE", "median", "most", "worst"]]
    for kind, members in kinds.items():
        errors = sorted(_rank(layer.statistics.nmse) for layer in members)
        weights = sum(layer.statistics.weights for layer in members)
        bits = sum(layer.statistics.bits_per_weight * layer.statistics.weights for layer in members) / weights
        worst = max(members, key=lambda layer: _rank(layer.statistics.nmse))
        middle = statistics.median(errors)
        rows.append(
            [kind, str(len(members)), f"{bits:.3f}", *map(_figure, (errors[0], middle, errors[-1])), worst.name]
        )
    return rows


def _rank(error: float) -> float:
    """An error to sort by: not-a-number is the worst."""
    return math.inf if math.isnan(error) else error


def totals_sentence(layers: Layers) -> str:
    """`2.500 bits per weight in the packed layers, NMSE 0.101, 1234.5 MB in all`."""
    bits = "no packed linear layer" if math.isnan(layers.bits_per_weight) else (
        f"{layers.bits_per_weight:.3f} bits per weight in the packed linear layers"
    )  # fmt: skip
    return f"{bits}, mean NMSE {_figure(layers.nmse)}, {layers.total_bytes / 1e6:,.1f} MB in all"


def _page(layers: Layers) -> str:
    parts = [
        f"# {_inline(layers.title)}: layers",
        f"In all: {totals_sentence(layers)}.",
        "NMSE is ||W − Q||² / ||W||², its mean is over all packed weights. Bits per weight count everything stored "
        "for a layer. Kurtosis is the excess one of the original weights, 0 for Gaussian ones; outliers are the share "
        f"of them {OUTLIER_DEVIATIONS} standard deviations from their mean or further.",
        "![NMSE of each layer, one colour for each kind](nmse.png)",
        "## Kinds",
        markdown_table(_kind_rows(layers)),
        "## Layers",
        markdown_table(_rows(layers)),
    ]
    return "\n\n".join(parts) + "\n"


# --- the picture -----------------------------------------------------------------------------------------------------


def _draw(layers: Layers, path: Path) -> None:
    """NMSE over the place in the model; one colour and one marker for each kind, a thin line through its layers."""
    # The object API: no pyplot, hence no global figures and no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator, NullLocator

    figure = Figure(figsize=(11, 4.6), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    # A dollar sign would start a formula.
    title = f"NMSE by layer: {_inline(layers.title)}".replace("\\|", "|").replace("$", r"\$")
    axes.set_title(title, loc="left", fontsize=11, color=_INK, pad=10)
    place = {layer.name: index for index, layer in enumerate(layers.layers)}
    shown = []
    for index, (kind, members) in enumerate(layers.by_kind().items()):
        points = [(place[layer.name], layer.statistics.nmse) for layer in members]
        points = [(x, y) for x, y in points if math.isfinite(y) and y > 0]
        if not points:
            continue
        shown += [y for _, y in points]
        size = 4.5 if len(layers.layers) <= 100 else 3
        axes.plot(
            *zip(*points, strict=True),
            color=_COLORS[index % len(_COLORS)],
            # Kinds of the same colour differ in their marker.
            marker=_MARKERS[index // len(_COLORS) % len(_MARKERS)],
            markersize=size,
            linewidth=0.7,
            label=kind.replace("$", r"\$"),
        )
    if shown:
        # From zero, unless that presses many to the ground; an 8-bit head among 2-bit layers may lie there.
        if sum(error < max(shown) / 10 for error in shown) > len(shown) / 10:
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(0, 1.08 * max(shown))
        columns = 1 + (len(axes.get_lines()) - 1) // 20
        axes.legend(
            loc="center left", bbox_to_anchor=(1.01, 0.5), ncols=columns, fontsize=9, frameon=False, labelcolor=_INK
        )
    else:
        axes.text(0.5, 0.5, "no layer has an error", transform=axes.transAxes, ha="center", color=_INK)
    axes.set_xlabel("layer, in the order of the model", fontsize=9.5, color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.grid(axis="y", color=_FAINT, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_FAINT)
    axes.tick_params(color=_FAINT, labelcolor=_INK, labelsize=9)
    with replacing(path) as temporary:
        # Without the version of matplotlib in it, the same figures give the same file.
        figure.savefig(temporary, metadata={"Software": None})
