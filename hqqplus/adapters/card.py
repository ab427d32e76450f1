"""The model card of a shipped adapter: a header that the hub understands, figures, samples, recipe, fingerprint."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hqqplus.adapters.licence import UNKNOWN, Licence

if TYPE_CHECKING:
    from hqqplus.adapters.fingerprint import Fingerprint

STAGES = ("parent", "quantized", "recovered")
# Around what is true of an adapter in 8 bits alone.
_EIGHT_BIT = ("<!-- 8 bits -->\n", "<!-- end of 8 bits -->\n\n")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def shared_name(name: str) -> str:
    """What to call model, data or folder `name` to others: its last part where it is a path of this machine."""
    if name.startswith(("/", "~", "\\", "..")) or re.match(r"[A-Za-z]:[\\/]", name):
        return re.split(r"[\\/]", name.rstrip("/\\"))[-1] or name
    return name


def shared_values(values: Any) -> Any:
    """`values`, a recipe, with `shared_name` for every text in it that is a path of this machine."""
    if isinstance(values, Mapping):
        return {key: shared_values(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [shared_values(value) for value in values]
    # A prompt may begin with a slash and is no path for that.
    return shared_name(values) if isinstance(values, str) and len(values) < 1000 and "\n" not in values else values


def is_hub_id(name: str) -> bool:
    """Whether `name` may stand for a model in the header of a card: no folder of this machine, no path."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists() and ":" not in name


def without_eight_bit(card: str) -> str:
    """`card` without what is true of an adapter in 8 bits alone."""
    start, end = (re.escape(mark) for mark in _EIGHT_BIT)
    return re.sub(f"{start}.*?{end}", "", card, flags=re.DOTALL)


def model_card(
    *,
    title: str,
    recipe: Mapping[str, Any],
    report: Any,
    fingerprint: Fingerprint,
    licence: Licence = UNKNOWN,
    adapter_bytes: int | None = None,
    bits: int = 16,
    backbone: bool = False,
    repository: str | None = None,
) -> str:
    """The Markdown card for an adapter.

    Args:
        recipe: of the run, as a dict; paths of this machine in it are reduced to their last part.
        report: what was measured (`evaluation.report.Report`).
        licence: of the base.
        adapter_bytes: of the adapter's weights as they are shipped; those of the report by default.
        bits: 16, or 8 for an adapter in 8 bits (`eight_bit.py`).
        backbone: whether the packed model is in the folder too, as `backbone/`.
        repository: where on the hub it will lie.
    """
    base = shared_name(fingerprint.base)
    parts = [
        _header(base, recipe, report, fingerprint, licence, title),
        f"# {_plain(title)}",
        _lead(base, recipe, report),
        _figures(report),
        _size(report, adapter_bytes, bits),
        _use(base, fingerprint, bits, backbone, repository),
        _samples(report.samples),
        _identity(fingerprint),
        "## Licence\n\n" + licence.sentence(_plain(base)),
        _recipe(recipe),
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def packed_card(fingerprint: Fingerprint) -> str:
    """The Markdown card for a packed model."""
    return _PACKED_CARD.format(what=_plain(fingerprint.describe()))


def _header(
    base: str, recipe: Mapping[str, Any], report: Any, fingerprint: Fingerprint, licence: Licence, title: str
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    on_hub = is_hub_id(base)
    data = recipe.get("data", {})
    named = shared_name(str(data.get("eval_path_or_name") or data.get("path_or_name") or "text"))
    results = None
    if _finite(report.ppl_recovered):
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=named if is_hub_id(named) else "text",
                dataset_name=named,
                metric_type="perplexity",
                metric_value=round(float(report.ppl_recovered), 4),
                metric_name="perplexity",
            )
        ]
    named_values: dict[str, Any] = {**({"base_model_relation": "adapter"} if on_hub else {}), **licence.header()}
    card = ModelCardData(
        library_name="peft",
        base_model=base if on_hub else None,
        pipeline_tag="text-generation",
        tags=["hqqplus", "lora", "quantization", f"{fingerprint.quantization['nbits']}-bit"],
        eval_results=results,
        model_name=_plain(title) if results else None,
        **named_values,
    )
    return f"---\n{card.to_yaml()}\n---"


def _lead(base: str, recipe: Mapping[str, Any], report: Any) -> str:
    quantization = recipe["quantization"]
    group = quantization["group_size"]
    size = "a whole row" if group == -1 else group
    return (
        f"A LoRA adapter that recovers **{_plain(base)}** quantized to **{quantization['nbits']} bits** in groups of "
        f"{size} ({report.bits_per_weight:.2f} bits per weight, metadata included)."
    )


def _figures(report: Any) -> str:
    rows = [("perplexity", *(getattr(report, f"ppl_{stage}") for stage in STAGES))]
    rows += [
        (f"perplexity, {_plain(shared_name(name))}", *(measured.get(stage) for stage in STAGES))
        for name, measured in report.texts.items()
    ]
    lines = ["| | parent | quantized | recovered |", "|---|---|---|---|"]
    lines += ["| " + " | ".join([name, *(_perplexity(value) for value in values)]) + " |" for name, *values in rows]
    lines.append(
        f"| MB | {_megabytes(report.parent_bytes)} | {_megabytes(report.backbone_bytes)} | "
        f"{_megabytes(report.backbone_bytes + report.adapter_bytes)} |"
    )
    evaluation = report.evaluation
    won = ""
    if _finite(report.recovery):
        won = f" {100 * report.recovery:.1f} % of the log-perplexity that quantization had lost is won back."
    return (
        "\n".join(lines) + f"\n\nPerplexity over non-overlapping windows of {evaluation['max_length']} tokens, "
        f"{evaluation['tokens']:,} tokens, BOS before each document, the same code for all three.{won}"
    )


def _size(report: Any, adapter_bytes: int | None, bits: int) -> str:
    size = report.adapter_bytes if adapter_bytes is None else adapter_bytes
    kind = "bf16" if bits == 16 else "8 bits"
    return f"The adapter has {report.adapter_parameters:,} parameters: {size:,} bytes in {kind} ({size / 1e6:.1f} MB)."


def _use(base: str, fingerprint: Fingerprint, bits: int, backbone: bool, repository: str | None) -> str:
    folder = f'snapshot_download("{repository}")' if repository else '"THIS_FOLDER"'
    imports = "from huggingface_hub import snapshot_download\n" if repository else ""
    if backbone:
        call = f"model = hqqplus.load({folder})"
        where = "The packed model that it belongs to is in `backbone/`, and is found there."
    elif fingerprint.unrepeatable:
        call = f'model = hqqplus.load("THE_PACKED_FOLDER_THAT_CAME_WITH_IT", adapter={folder})'
        where = (
            f"It belongs to a packed model that no quantizing of {_plain(base)} brings back "
            f"({fingerprint.unrepeatable}): both have to be handed on together."
        )
    else:
        call = f'model = hqqplus.load("{base}", adapter={folder})'
        where = f"{_plain(base)} is quantized while it loads, as `hqqplus.json` says; or name a packed folder of it."
    text = f"""## Use

**Import `hqqplus` first**: transformers alone does not know the packed format, and a packed folder read without it
comes up with random weights.

```python
import hqqplus
{imports}{call}
```

{where} `hqqplus.json` holds the fingerprint of the base: an adapter on any other base is refused. Merging into the
packed base is refused too, because re-quantizing would destroy it; `hqqplus export` writes dequantized weights +
adapter in 16 bits.
"""
    if bits == 8:
        start, end = _EIGHT_BIT
        text += (
            f"\n{start}The weights are in 8 bits (`adapter_8bit.safetensors`), which hqqplus restores to bf16 while "
            "it loads.\nPEFT alone reads the folder that `hqqplus ship THIS_FOLDER --restore --out FOLDER` writes.\n"
            f"{end}"
        )
    return text


def _samples(samples: Iterable[Mapping[str, Any]]) -> str:
    """Prompts, the completions of all stages side by side: tables in HTML, for what a model writes is no Markdown."""
    parts = []
    for sample in samples:
        stages = [stage for stage in STAGES if sample.get(stage) is not None]
        if not stages:
            continue
        head = "".join(f"<th>{stage}</th>" for stage in stages)
        cells = "".join(f"<td><pre>{_quoted(sample[stage])}</pre></td>" for stage in stages)
        parts.append(
            f"<table>\n<tr><th colspan={len(stages)}><pre>{_quoted(sample.get('prompt'))}</pre></th></tr>\n"
            f"<tr>{head}</tr>\n<tr>{cells}</tr>\n</table>"
        )
    return "\n\n".join(["## Samples", "Greedy completions of the same prompts.", *parts]) if parts else ""


def _identity(fingerprint: Fingerprint) -> str:
    rows = [
        ("base", _plain(shared_name(fingerprint.base))),
        ("revision", fingerprint.revision),
        ("contents of the base", fingerprint.parent_digest),
        ("packed weights, sha256", fingerprint.packed_sha256),
        ("solver", fingerprint.solver),
        ("scales", "trained" if fingerprint.baked else "as quantized"),
        ("calibrated by", (fingerprint.calibration or {}).get("method")),
        ("tokenizer", fingerprint.tokenizer),
        ("training data", fingerprint.data),
    ]
    lines = ["| | |", "|---|---|", *(f"| {name} | {_plain(value)} |" for name, value in rows if value is not None)]
    return "## Fingerprint\n\n" + "\n".join(lines)


def _recipe(recipe: Mapping[str, Any]) -> str:
    import yaml

    text = yaml.safe_dump(shared_values(recipe), sort_keys=False, allow_unicode=True)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"## Training\n\n{fence}yaml\n{text}{fence}"


def _perplexity(value: float | None) -> str:
    from hqqplus.evaluation.report import number

    return f"{value:.2f}" if value is not None and _finite(value) and value < 1e5 else number(value)


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f}" if size else "–"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _plain(value: Any) -> str:
    """One line that no reader of Markdown takes for anything else."""
    from hqqplus.evaluation.report import visible

    return " ".join(visible(value).replace("|", "\\|").replace("<", "&lt;").split())


def _quoted(text: Any) -> str:
    """`text` within <pre>, on one line: a blank one would end the table."""
    from hqqplus.evaluation.report import visible

    return html.escape(visible(text), quote=False).replace("\n", "&#10;")


_PACKED_CARD = """---
library_name: hqqplus
---

# {what}

**Import `hqqplus` before loading this folder.** transformers alone does not know the format: it would bring the model
up with random weights and only a warning.

```python
import hqqplus

model = hqqplus.load("THIS_FOLDER")
```
"""
