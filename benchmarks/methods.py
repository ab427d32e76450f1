"""One real model at 16, 8, 4, 3, 2 and 1 bits, by bitsandbytes NF4, PyPI hqq and hqqplus, without recovery.

    python benchmarks/methods.py [--model tinystories-656K] [--output benchmarks/results/methods.json]

For each: bits per weight of the quantized layers with everything that is stored counted, bytes of all files of the
saved model, seconds to load it, perplexity on the validation stories, and the drop against the parent,
ln(perplexity / parent's). Only the linear layers are quantized, the embedding and the head stay as they are, by each
method alike, in bfloat16. Everything is saved to disk and loaded back before it is measured. NF4 and hqqplus load by
transformers; hqq, which transformers 5 cannot load, is saved as its own tensors, loaded by a loop and dequantized.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import MODELS, SHARED, layers, load_parent, markdown, perplexity, windows, write_result
from safetensors.torch import load_file, save_file
from torch import nn

HQQPLUS = [(8, 64), (4, 64), (3, 64), (2, 32), (2, 64), (1, 32), (1, 64)]
HQQ = [(8, 64), (4, 64), (3, 64), (2, 64), (1, 64)]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def full_precision(parent: Path, folder: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(parent, dtype=torch.bfloat16).save_pretrained(folder)
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {"model": model, "seconds": time.perf_counter() - started, "bits_per_weight": 16.0}


def nf4(parent: Path, folder: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(parent, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seconds = time.perf_counter() - started
    stored = load_file(folder / "model.safetensors")
    names = list(layers(model))
    own = sum(
        8 * tensor.numel() * tensor.element_size()
        for key, tensor in stored.items()
        if any(key.startswith(f"{name}.weight") for name in names)
    )
    weights = sum(m.in_features * m.out_features for m in layers(model).values())
    return {"model": model, "seconds": seconds, "bits_per_weight": own / weights}


def hqqplus(parent: Path, folder: Path, nbits: int, group: int, metadata_bits: int) -> dict[str, Any]:
    from hqqplus import HqqPlusConfig, load
    from hqqplus.modules import bits_per_weight
    from hqqplus.streaming import quantize_folder

    config = HqqPlusConfig(nbits, group, metadata_bits=metadata_bits)
    quantize_folder(str(parent), folder / "packed", config, dtype="bfloat16")
    started = time.perf_counter()
    model = load(folder / "packed", dtype="float32", device="cpu")
    seconds = time.perf_counter() - started
    return {
        "model": model,
        "seconds": seconds,
        "bits_per_weight": bits_per_weight(model),
        "bytes": size_of(folder / "packed"),
    }


def hqq(parent: Path, folder: Path, nbits: int, group: int) -> dict[str, Any]:
    """hqq's packed tensors and float16 metadata in a safetensors file, with the rest of the model in bfloat16."""
    from hqq.core.quantize import Quantizer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    tensors: dict[str, torch.Tensor] = {}
    metas: dict[str, dict[str, Any]] = {}
    bits = weights = 0
    for name, module in layers(model).items():
        weight = module.weight.data
        padded = nn.functional.pad(weight, (0, -weight.shape[1] % group)).clone()
        packed, meta = Quantizer.quantize(
            padded, nbits=nbits, group_size=group, axis=1, device="cpu", compute_dtype=torch.float32
        )
        tensors[f"{name}.W_q"] = packed
        tensors[f"{name}.scale"], tensors[f"{name}.zero"] = meta["scale"].half(), meta["zero"].half()
        metas[name] = {key: value for key, value in meta.items() if key not in ("scale", "zero")}
        bits += sum(
            8 * tensors[f"{name}.{k}"].numel() * tensors[f"{name}.{k}"].element_size()
            for k in ("W_q", "scale", "zero")
        )
        weights += weight.numel()
    quantized = set(layers(model))
    rest = {k: v for k, v in model.state_dict().items() if k.removesuffix(".weight") not in quantized}
    seen: set[int] = set()
    for key, tensor in rest.items():
        if tensor.data_ptr() not in seen:  # tied weights once
            seen.add(tensor.data_ptr())
            tensors[key] = tensor.to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "model.safetensors")
    started = time.perf_counter()
    stored = load_file(folder / "model.safetensors")
    for name, module in layers(model).items():
        meta = {**metas[name], "scale": stored[f"{name}.scale"].float(), "zero": stored[f"{name}.zero"].float()}
        module.weight.data = Quantizer.dequantize(stored[f"{name}.W_q"], meta).float()[:, : module.in_features]
    return {"model": model, "seconds": time.perf_counter() - started, "bits_per_weight": bits / weights}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODELS[0], help=f"in ../shared/models: {', '.join(MODELS)}")
    parser.add_argument("--max-tokens", type=int, default=40_000)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    parent = SHARED / "models" / args.model
    reference, tokenizer = load_parent(args.model)
    at = windows(tokenizer, args.max_tokens)
    ppl_parent = perplexity(reference, at)
    cases: list[tuple[str, Any]] = [("16 bits", lambda folder: full_precision(parent, folder))]
    cases.append(("bitsandbytes NF4, double quantization", lambda folder: nf4(parent, folder)))
    for nbits, group in HQQ:
        cases.append((f"hqq {nbits}-bit g{group}", lambda folder, b=nbits, g=group: hqq(parent, folder, b, g)))
    for nbits, group in HQQPLUS:
        for metadata in (16, 8) if nbits < 4 else (16,):
            cases.append(
                (
                    f"hqqplus {nbits}-bit g{group}, {metadata}-bit metadata",
                    lambda folder, b=nbits, g=group, m=metadata: hqqplus(parent, folder, b, g, m),
                )
            )
    rows = []
    for name, make in cases:
        with tempfile.TemporaryDirectory() as temporary:
            made = make(Path(temporary))
            ppl = perplexity(made["model"], at)
            row = {
                "method": name,
                "bits_per_weight": made["bits_per_weight"],
                "bytes": made.get("bytes") or size_of(Path(temporary)),
                "seconds_load": made["seconds"],
                "perplexity": ppl,
                "drop": math.log(ppl / ppl_parent),
            }
        rows.append(row)
        print(f"{name:40} {row['bits_per_weight']:6.3f} bpw {row['bytes']:9,} bytes  PPL {ppl:.2f}", flush=True)
    print()
    print(
        markdown(
            ["method", "bits per weight", "bytes on disk", "load, s", "perplexity", "ln drop"],
            [
                [
                    r["method"],
                    f"{r['bits_per_weight']:.3f}",
                    f"{r['bytes']:,}",
                    f"{r['seconds_load']:.2f}",
                    f"{r['perplexity']:.2f}",
                    f"{r['drop']:.3f}",
                ]
                for r in rows
            ],
        )
    )
    write_result(args.output, {"model": args.model, "parent": ppl_parent, "rows": rows}, "hqq", "bitsandbytes")


if __name__ == "__main__":
    main()
