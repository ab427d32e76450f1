"""Where the bits go: uniform plans beside allocations of the same size with different layer weights, and hybrid plans.

    python benchmarks/allocation.py [--models ...] [--output benchmarks/results/allocation.json]

No data is used for quantizing and nothing is trained. All plans of a model are measured on the same windows, with the
weights that its packed layers stand for put into the full-precision model: what `quantize_model` computes, but each
pair of layer and spec is solved once. Needs `../shared`; `embedded:pydoc` comes with the package.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
MODELS = ["stories260K", "tinystories-656K", "embedded:pydoc"]
# (bits, group size) of the uniform plans; allocations are made for the size of those of `TARGETS`.
UNIFORM = [(bits, group) for bits in (1, 2, 3, 4) for group in (32, 64, 128)]
TARGETS = [(1, 64), (2, 128), (2, 64), (2, 32), (3, 64)]
MAX_LENGTH, MAX_TOKENS = 256, 20000


class Bench:
    """A model, the windows to measure it on, and the layers solved so far."""

    def __init__(self, name: str, metadata_bits: int = 8) -> None:
        import torch

        from hqqplus import models
        from hqqplus.data import load_rows
        from hqqplus.evaluation.perplexity import make_windows

        self.metadata_bits = metadata_bits
        embedded = name.startswith("embedded:")
        path = name if embedded else str(SHARED / "models" / name)
        text = (
            (name, "validation") if embedded else (str(SHARED / "data" / "tinystories" / "validation.jsonl"), "train")
        )
        tokenizer = models.load_tokenizer(path)
        self.windows = make_windows(list(load_rows(*text)["text"]), tokenizer, MAX_LENGTH, MAX_TOKENS)
        self.model = models.load_causal_lm(path, dtype="float32", device="cpu")
        self.solved: dict[tuple[str, Any], torch.Tensor] = {}
        self.parent = self.nll()

    def nll(self) -> float:
        from hqqplus.evaluation.perplexity import perplexity

        return perplexity(self.model, self.windows, 16).nll

    def measure(self, plan: Any) -> dict[str, float]:
        """Bits per weight over the linear layers, megabytes of the whole model, perplexity, and ln of it over the
        parent's."""
        import torch

        from hqqplus.integrations.transformers import plan_of, tied_modules
        from hqqplus.quantization import quantize
        from hqqplus.quantization.allocation import stored_bits

        specs, tied = plan_of(self.model, plan), tied_modules(self.model)
        if tied:
            specs.pop(tied[1], None)
        whole = {name: self.model.get_submodule(name).weight.data for name in specs}
        bits = {name: stored_bits(spec, *whole[name].shape) for name, spec in specs.items()}
        linear = [name for name in specs if isinstance(self.model.get_submodule(name), torch.nn.Linear)]
        try:
            for name, spec in specs.items():
                if (name, spec) not in self.solved:
                    self.solved[name, spec] = quantize(whole[name], spec).dequantize()
                # A tied head is the same parameter.
                self.model.get_submodule(name).weight.data = self.solved[name, spec]
            nll = self.nll()
        finally:
            for name, weight in whole.items():
                self.model.get_submodule(name).weight.data = weight
        rest = sum(p.numel() for p in self.model.parameters()) - sum(weight.numel() for weight in whole.values())
        return {
            "bits_per_weight": sum(bits[name] for name in linear) / sum(whole[name].numel() for name in linear),
            "megabytes": (sum(bits.values()) + 16 * rest) / 8e6,
            "perplexity": math.exp(nll),
            "ln_gap": nll - self.parent,
        }


def layer_weights(bench: Bench) -> dict[str, dict[str, float]]:
    """What a_l is tried: name -> a_l by layer."""
    import torch

    from hqqplus.allocation import prior_weights, probe
    from hqqplus.integrations.transformers import plan_of
    from hqqplus.quantization import QuantPlan

    model = bench.model
    layers = {name: model.get_submodule(name).weight for name in plan_of(model, QuantPlan())}
    boosts = {"down_proj": 2.0, "v_proj": 2.0, ".layers.0.": 2.0}
    vocabulary = model.get_input_embeddings().weight.shape[0]
    others = torch.randint(vocabulary, (8, 64), generator=torch.Generator().manual_seed(1))
    text = torch.stack([window[:64] for window in bench.windows.input_ids if len(window) >= 64][:8])
    return {
        "equal": dict.fromkeys(layers, 1.0),
        "parameters": {name: float(weight.numel()) for name, weight in layers.items()},
        "energy": {name: weight.square().sum().item() for name, weight in layers.items()},
        "boosts": {name: math.prod(b for part, b in boosts.items() if part in name) for name in layers},
        "prior": prior_weights(model),
        "probe": probe(model),
        "probe, other tokens": probe(model, input_ids=others),
        "probe, on the text": probe(model, input_ids=text),
    }


def allocations(bench: Bench) -> list[dict[str, Any]]:
    from hqqplus.allocation import layer_errors
    from hqqplus.quantization import QuantPlan, QuantSpec

    rows = []
    sizes = {}
    specs = [QuantSpec(*case, metadata_bits=bench.metadata_bits) for case in UNIFORM]
    for spec in specs:
        row = bench.measure(QuantPlan(spec))
        sizes[spec.nbits, spec.group_size] = row["bits_per_weight"]
        rows.append({"plan": "uniform", "name": f"{spec.nbits}-bit g{spec.group_size}", **row})
    errors = layer_errors(bench.model, specs)
    for name, weights in layer_weights(bench).items():
        for bits, group in TARGETS:
            row = bench.measure(errors.plan_for(sizes[bits, group], weights))
            rows.append({"plan": "allocated", "name": name, "size_of": f"{bits}-bit g{group}", **row})
    return rows


def hybrids(bench: Bench) -> list[dict[str, Any]]:
    """Parts at more bits, each beside the allocation (probe) of the same size."""
    from hqqplus.allocation import hybrid_plan, layer_errors, probe
    from hqqplus.quantization import QuantSpec

    specs = [QuantSpec(*case, metadata_bits=bench.metadata_bits) for case in UNIFORM]
    errors, weights = layer_errors(bench.model, specs), probe(bench.model)
    rows = []
    for arguments in (
        {},
        {"embeddings": 8},
        {"embeddings": 4},
        {"edge_blocks": 3},
        {"down_proj": 3},
        {"down_proj": 4},
        {"edge_blocks": 3, "down_proj": 3},
    ):
        plan = hybrid_plan(bench.model, specs[UNIFORM.index((2, 64))], **{"embeddings": None, **arguments})
        row = bench.measure(plan)
        name = ", ".join(f"{key} {value}" for key, value in arguments.items()) or "nothing raised"
        rows.append({"plan": "hybrid", "name": name, **row})
        if "embeddings" not in arguments:
            rows.append(
                {"plan": "same size", "name": name, **bench.measure(errors.plan_for(row["bits_per_weight"], weights))}
            )
    plan = hybrid_plan(bench.model, errors.plan_for(2.5, weights), embeddings=8)
    rows.append({"plan": "hybrid", "name": "allocated 2.5, embeddings 8", **bench.measure(plan)})
    return rows


def tables(result: dict[str, Any]) -> str:
    """The rows of all models as Markdown."""
    lines = []
    for model, entry in result["models"].items():
        rows = entry["rows"]
        cases = [f"{bits}-bit g{group}" for bits, group in TARGETS]
        uniform = {row["name"]: row for row in rows if row["plan"] == "uniform"}
        lines += [f"**{model}**, parent {entry['parent']:.2f}; perplexity at the size of ...", ""]
        heads = [f"{case} ({uniform[case]['bits_per_weight']:.2f})" for case in cases]
        lines += ["| layer weights | " + " | ".join(heads) + " |", "|---" * (len(cases) + 1) + "|"]
        lines.append("| (uniform) | " + " | ".join(f"{uniform[case]['perplexity']:.2f}" for case in cases) + " |")
        for name in dict.fromkeys(row["name"] for row in rows if row["plan"] == "allocated"):
            found = {row["size_of"]: row["perplexity"] for row in rows if row["name"] == name and "size_of" in row}
            lines.append(f"| {name} | " + " | ".join(f"{found[case]:.2f}" for case in cases) + " |")
        lines += [
            "",
            "| 2-bit g64 and | bits per weight | MB | perplexity | allocated, same size |",
            "|---|---|---|---|---|",
        ]
        same = {row["name"]: row["perplexity"] for row in rows if row["plan"] == "same size"}
        for row in (row for row in rows if row["plan"] == "hybrid"):
            beside = f"{same[row['name']]:.2f}" if row["name"] in same else ""
            sizes = f"{row['bits_per_weight']:.2f} | {row['megabytes']:.2f}"
            lines.append(f"| {row['name']} | {sizes} | {row['perplexity']:.2f} | {beside} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--metadata-bits", type=int, default=8)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    import torch

    from hqqplus.evaluation.report import environment

    measured = {}
    for name in args.models:
        bench = Bench(name, args.metadata_bits)
        rows = [*allocations(bench), *hybrids(bench)]
        measured[name] = {"parent": math.exp(bench.parent), "tokens": bench.windows.tokens, "rows": rows}
    result = {
        "metadata_bits": args.metadata_bits,
        "models": measured,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, no GPU",
        "versions": environment(),
    }
    print(tables(result))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
