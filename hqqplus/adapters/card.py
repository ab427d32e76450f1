"""The model card of a shipped adapter."""

from __future__ import annotations

from typing import Any

_CARD = """---
library_name: peft
base_model: {base}
tags: [hqqplus, lora, quantization, {nbits}-bit]
---

# {title}

A LoRA adapter that recovers **{base}** quantized to **{nbits} bits** in groups of {group} ({bpw:.2f} bits per weight,
metadata included).

| | parent | quantized | recovered |
|---|---|---|---|
| perplexity | {parent} | {quantized} | {recovered} |

Perplexity over non-overlapping windows of {max_length} tokens, {tokens:,} tokens, BOS before each document, the same
code for all three. The adapter has {parameters:,} parameters ({megabytes:.1f} MB in bf16).

## Use

**Import `hqqplus` first**: transformers alone does not know the packed format, and a packed folder read without it
comes up with random weights.

```python
import hqqplus

model = hqqplus.load("{load_from}", adapter="THIS_FOLDER")
```

`hqqplus.json` holds the fingerprint of the base: an adapter on any other base is refused. Merging into the packed
base is refused too, because re-quantizing would destroy it; `hqqplus export` writes dequantized weights + adapter in
16 bits.

## Training

```yaml
{recipe}```
"""


def model_card(*, title: str, recipe: dict[str, Any], report: Any, base: str, packed: bool = False) -> str:
    """The Markdown card for an adapter on `base`, from its recipe (as a dict) and `report`
    (`evaluation.report.Report`). `packed`: only the packed base will do, no quantizing of `base` brings it back."""
    import yaml

    quantization = recipe["quantization"]
    group = quantization["group_size"]
    return _CARD.format(
        title=title,
        base=base,
        load_from="THE_PACKED_FOLDER_THAT_CAME_WITH_IT" if packed else base,
        nbits=quantization["nbits"],
        group="a whole row" if group == -1 else group,
        bpw=report.bits_per_weight,
        parent="-" if report.ppl_parent is None else f"{report.ppl_parent:.2f}",
        quantized=f"{report.ppl_quantized:.2f}",
        recovered=f"{report.ppl_recovered:.2f}",
        max_length=report.evaluation["max_length"],
        tokens=report.evaluation["tokens"],
        parameters=report.adapter_parameters,
        megabytes=report.adapter_bytes / 1e6,
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
    )
