"""8-bit activations on one-bit layers (`compute="int8"`): what they cost in quality, and what in time.

    python benchmarks/int8.py [--steps 200] [--output benchmarks/results/int8.json]
    python benchmarks/int8.py --gpu        on a CUDA device: times alone, into benchmarks/results/int8_gpu.json

Quality (needs `../shared`). Each real model at 1 bit in groups of 32, as it is quantized and after `--steps` steps of
LoRA: perplexity on the same windows by both routes, mean KL divergence of the 8-bit route's next token from the 16-bit
route's, and how often both put the same token first; also with 8 bits in the down projections alone and in all others
alone. Both routes read the same packed model and adapter.

Time. The int8 op beside the 16-bit op and `F.linear` on this machine's processor, in turns in one run.

Instructions. The Triton kernel compiled for sm_89 and sm_90, its loop counted; beside it the same loop with dp4a (four
products of bytes at a time) in the place of turned words, AND and popcount. No GPU is needed for that, and nothing is
timed. BOUNDS are computed: instructions over the rate of their unit, bytes over the bandwidth, neither reached fully.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common  # first: it keeps Hugging Face off the network
import torch
import yaml

from hqqplus.kernels import int8, ops
from hqqplus.kernels.packed import Packed
from hqqplus.kernels.triton import available
from hqqplus.quantization import QuantSpec

if available():
    import triton
    import triton.language as tl

    from hqqplus.kernels.triton import bitserial
    from hqqplus.kernels.triton.metadata import from_words, load_maps, load_words

RESULTS = Path(__file__).parent / "results"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SPEC = QuantSpec(1, 64)
SHAPE = (4096, 4096)
# SMs, GHz under load, GB/s; results a cycle and SM of the units that the kernels use most.
GPUS = {"L4": (89, 58, 1.5, 300), "H200": (90, 132, 1.755, 4800)}
POPCOUNTS, PRODUCTS, ISSUED = 16, 64, 128  # dp4a is assumed to run at the rate of integer multiplication


# --- quality --------------------------------------------------------------------------------------------------------


def recipe_dict(name: str, steps: int, folder: str) -> dict[str, Any]:
    stories = common.SHARED / "data" / "tinystories"
    return {
        "model": {"name_or_path": str(common.SHARED / "models" / name)},
        "quantization": {"nbits": 1, "group_size": 32, "save_to": f"{folder}/base"},
        "adapter": {"r": 8, "lora_alpha": 16, "target_modules": PROJECTIONS, "init": "residual"},
        "data": {
            "path_or_name": str(stories / "train_v2.jsonl"),
            "eval_path_or_name": str(stories / "validation.jsonl"),
            "max_length": 256,
        },
        "training": {
            "max_steps": steps,
            "per_device_train_batch_size": 8,
            "learning_rate": 2e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 10,
            "logging_steps": 50,
            "save_strategy": "no",
            "optim": "adamw_torch",
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        },
        "evaluation": {"max_tokens": 2000, "parent": False},
        "output_dir": f"{folder}/run",
    }


def quality(name: str, steps: int) -> list[dict[str, Any]]:
    import hqqplus
    from hqqplus.recipe import load_recipe
    from hqqplus.train import run

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe_dict(name, steps, folder)))
        run(load_recipe(path))
        parent, tokenizer = common.load_parent(name)
        windows = common.windows(tokenizer, 20_000)
        parent_perplexity = common.perplexity(parent, windows)
        for stage, adapter in (("quantized", None), (f"after {steps} steps", f"{folder}/run/adapter")):
            model = hqqplus.load(f"{folder}/base", adapter, device="cpu", compute="int8")
            rows += _compare(model, windows, {"model": name, "stage": stage, "parent": parent_perplexity})
    return rows


def _compare(model: Any, windows: Any, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Both routes of one model; the 8-bit one in all layers, in the down projections, in all others."""
    from hqqplus.modules import PackedLinear

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    parts: dict[str, Callable[[str], bool]] = {
        "all": lambda name: True,
        "down_proj": lambda name: "down_proj" in name,
        "all others": lambda name: "down_proj" not in name,
    }
    with _routed(layers, lambda name: False):
        exact, reference = common.perplexity(model, windows), _log_probabilities(model, windows)
    rows = []
    for part, chosen in parts.items():
        with _routed(layers, chosen):
            perplexity, logs = common.perplexity(model, windows), _log_probabilities(model, windows)
        pairs = list(zip(reference, logs, strict=True))
        places = sum(len(expected) for expected in reference)
        kl = sum(float((a.exp() * (a - b)).sum()) for a, b in pairs) / places
        same = sum(int((a.argmax(1) == b.argmax(1)).sum()) for a, b in pairs) / places
        rows.append(
            {**row, "int8": part, "perplexity_16": exact, "perplexity_8": perplexity, "kl": kl, "same_first": same}
        )
        print(
            f"{row['model']:18} {row['stage']:16} int8 in {part:10}  perplexity {exact:9.4f} -> {perplexity:9.4f} "
            f"({100 * (perplexity / exact - 1):+.3f} %)  KL {kl:.2e}  same first token {100 * same:.2f} %"
        )
    return rows


@contextlib.contextmanager
def _routed(layers: dict[str, Any], chosen: Callable[[str], bool]) -> Iterator[None]:
    """8-bit activations in the `chosen` layers; an error if one of them did not take them, or another one did."""
    taken: set[str] = set()
    hooks = []
    for name, layer in layers.items():
        layer.compute = "int8" if chosen(name) else "auto"

        def look(layer: Any, *_: Any, name: str = name) -> None:
            if layer.takes_int8():
                taken.add(name)

        hooks.append(layer.register_forward_hook(look))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if taken != {name for name in layers if chosen(name)}:
        raise RuntimeError(f"8-bit activations were taken by {sorted(taken)}")


@torch.no_grad()
def _log_probabilities(model: Any, windows: Any, count: int = 40) -> list[torch.Tensor]:
    """Of the next token after each place of the first windows: [places, vocabulary], float64."""
    return [model(ids[None]).logits[0].double().log_softmax(1) for ids in windows.input_ids[:count]]


# --- time -----------------------------------------------------------------------------------------------------------


def random_packed(spec: QuantSpec, shape: tuple[int, int], device: str) -> Packed:
    from hqqplus.quantization import quantize
    from hqqplus.quantization.metadata import metadata_views

    torch.manual_seed(0)
    stored = quantize(0.02 * torch.randn(shape, device=device), spec)
    metadata = metadata_views(stored.scale, stored.offset, stored.blocks, spec.metadata_dtype)
    return Packed(stored.W_q, *metadata, spec, shape)


def op_arguments(packed: Packed) -> tuple[Any, ...]:
    spec = packed.spec
    return *packed[:4], spec.nbits, spec.group_size, spec.axis, *packed.shape


def cpu_times(repeats: int) -> list[dict[str, Any]]:
    rows = []
    packed = random_packed(SPEC, SHAPE, "cpu")
    arguments = op_arguments(packed)
    weight = ops.dequantize(*arguments, torch.float32)
    for tokens in (1, 4, 16, 256):
        for dtype in (torch.float32, torch.bfloat16):
            x, w = torch.randn(tokens, SHAPE[1]).to(dtype), weight.to(dtype)
            routes: dict[str, Callable[[], Any]] = {
                "int8": lambda x=x: int8.matmul_int8(x, *arguments),
                "16-bit": lambda x=x: ops.matmul(x, *arguments),
                "linear": lambda x=x, w=w: torch.nn.functional.linear(x, w),
            }
            common.timed(routes, 2)
            seconds = {name: took for name, (_, took) in common.timed(routes, repeats).items()}
            rows.append({"tokens": tokens, "dtype": str(dtype)[6:], "milliseconds": _milliseconds(seconds)})
            print(
                f"CPU, {SHAPE[0]} x {SHAPE[1]}, M = {tokens:3}, {rows[-1]['dtype']:8}  "
                + ", ".join(f"{name} {1000 * took:8.2f} ms" for name, took in seconds.items())
                + f"; int8 takes {seconds['int8'] / seconds['16-bit']:.2f} of the 16-bit route"
            )
    return rows


def _milliseconds(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(1000 * took, 3) for name, took in seconds.items()}


def gpu_times() -> list[dict[str, Any]]:
    """Medians, with the L2 cache flushed before each call."""
    rows = []
    for shape in ((4096, 4096), (4096, 14336), (14336, 4096)):
        for group in (32, 64, 128):
            packed = random_packed(SPEC.replace(group_size=group), shape, "cuda")
            arguments = op_arguments(packed)
            weight = ops.dequantize(*arguments, torch.bfloat16)
            for tokens in (1, 2, 4, 8, 16):
                x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.bfloat16)
                routes: dict[str, Callable[[], Any]] = {
                    "int8": lambda x=x, a=arguments: int8.matmul_int8(x, *a),
                    "16-bit": lambda x=x, a=arguments: ops.matmul(x, *a),
                    "linear": lambda x=x, w=weight: torch.nn.functional.linear(x, w),
                }
                if not bitserial.supports(x, packed):
                    raise RuntimeError(f"{packed.spec} of {shape} does not take the kernel")
                took = {n: triton.testing.do_bench(route, return_mode="median") for n, route in routes.items()}
                rows.append({"shape": shape, "group_size": group, "tokens": tokens, "milliseconds": took})
                print(f"{shape} g{group} M={tokens}: " + ", ".join(f"{n} {1000 * t:.1f} us" for n, t in took.items()))
    return rows


# --- instructions ---------------------------------------------------------------------------------------------------

if available():

    @triton.jit
    def _dp4a(codes, x, total):
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, total], dtype=tl.int32, is_pure=True, pack=1
        )

    @triton.jit
    def dp4a_kernel(
        bytes_ptr, sums_ptr, steps_ptr, words_ptr, scale_ptr, offset_ptr, maps_ptr, bias_ptr, y_ptr,
        M, N, octets, groups,
        GROUP: tl.constexpr, HAS_BLOCKS: tl.constexpr, HAS_BIAS: tl.constexpr, RUN: tl.constexpr, EVEN: tl.constexpr,
        ROWS_X: tl.constexpr, ROWS_W: tl.constexpr, LANES: tl.constexpr
    ):  # fmt: skip
        """`bitserial_kernel` with products of bytes instead, for counting: bytes [M, tiles, 8 groups, 8 words, lanes]
        hold four activations each. Whole tiles only."""
        m = tl.program_id(0) * ROWS_X + tl.arange(0, ROWS_X)
        n = tl.program_id(1) * ROWS_W + tl.arange(0, ROWS_W)
        lane = tl.arange(0, LANES)
        tiles = tl.cdiv(octets, LANES)
        row = tl.minimum(m, M - 1)[:, None, None].to(tl.int64)
        total = tl.zeros((ROWS_X, ROWS_W, LANES), tl.float32)
        for tile in range(0, tiles):
            octet = tile * LANES + lane
            words = words_ptr + (n[:, None].to(tl.int64) * octets + octet[None, :]) * 8
            w0, w1, w2, w3 = bitserial._four_words(words, None)
            w4, w5, w6, w7 = bitserial._four_words(words + 4, None)
            codes = (w0, w1, w2, w3, w4, w5, w6, w7)
            entry = n[:, None] * groups + (octet // (GROUP // 32) * 8)[None, :]
            scales = load_words(scale_ptr, entry, None, 8, RUN)
            offsets = load_words(offset_ptr, entry, None, 8, RUN)
            maps = load_maps(maps_ptr, entry, None, 8, RUN, HAS_BLOCKS)
            four = bytes_ptr + (row * tiles + tile) * (8 * 8 * LANES) + lane[None, None, :]
            sums = sums_ptr + (row * tiles + tile) * (8 * LANES) + lane[None, None, :]
            for i in tl.static_range(8):
                product = tl.zeros((ROWS_X, ROWS_W, LANES), tl.int32)
                for w in tl.static_range(8):
                    bits = (codes[w] >> i) & 0x01010101
                    x = tl.load(four + (i * 8 + w) * LANES)
                    bits, x = tl.broadcast(bits[None, :, :], x)
                    product = _dp4a(bits, x, product)
                scale, offset = from_words(scales, offsets, maps, scale_ptr, maps_ptr, i, RUN, 1, HAS_BLOCKS)
                zero_term = offset[None, :, :] * tl.load(sums + i * LANES).to(tl.float32)
                total += scale[None, :, :] * product.to(tl.float32) + zero_term
        y = tl.sum(total, 2) * tl.load(steps_ptr + m, mask=m < M, other=0)[:, None]
        tl.store(y_ptr + m[:, None].to(tl.int64) * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=m[:, None] < M)


def instructions() -> list[dict[str, Any]]:
    """Instructions of the loop for a weight and a row of x."""
    rows = []
    for name, (capability, units, clock, bandwidth) in GPUS.items():
        for group, tokens in ((32, 1), (64, 1), (64, 2), (64, 4), (128, 1)):
            for kernel in (bitserial.bitserial_kernel, dp4a_kernel):
                row = {"gpu": name, "sm": capability, "group_size": group, "tokens": tokens, "kernel": kernel.__name__}
                counted, rate = _count(kernel, group, tokens, capability)
                spec = QuantSpec(1, group, metadata_bits=16)
                stored = spec.bits_per_weight(*SHAPE) / 8
                bounds = {
                    "unit": rate * units * clock / 1000 / tokens,
                    "issue": ISSUED / counted["instructions"] * units * clock / 1000 / tokens,
                    "memory": bandwidth / stored / 1000,
                }
                rows.append({**row, **counted, "bounds_T_weights_per_s": bounds})
                print(
                    f"sm_{capability} g{group:3} M = {tokens} {kernel.__name__:17} {counted['instructions']:.2f} a "
                    f"weight and row, {counted['registers']:3} registers, {counted['spills']} spills; "
                    f"BOUNDS on the {name}, "
                    + ", ".join(f"{what} {value:.1f}" for what, value in bounds.items())
                    + " T weights/s"
                )
    return rows


def _count(kernel: Any, group: int, tokens: int, capability: int) -> tuple[dict[str, Any], float]:
    """(counts, weights and rows that the busiest unit of an SM does in a cycle) of a layer of `SHAPE`."""
    import sass_tools

    spec = QuantSpec(1, group, metadata_bits=16)
    layout = spec.layout(*SHAPE)
    W_q = torch.empty(layout.rows, layout.padded // 8, dtype=torch.uint8, device="meta")
    scale, offset = (torch.empty(layout.rows, layout.groups, dtype=torch.float16, device="meta") for _ in range(2))
    packed = Packed(W_q, scale, offset, None, spec, SHAPE)
    sliced = bitserial.empty_slices(tokens, packed, "meta")
    y = torch.empty(tokens, SHAPE[0], dtype=torch.bfloat16, device="meta")
    call = bitserial.product_call(sliced, packed, None, y)
    compiled = sass_tools.compile_call(kernel, call.arguments, call.constants, bitserial.OPTIONS, capability)
    code = sass_tools.inspect(compiled)
    first, last = max(code.loops, key=lambda loop: loop[1] - loop[0])
    weights = call.constants["ROWS_W"] * call.constants["LANES"] * 256 / (32 * bitserial.OPTIONS["num_warps"])
    weights *= call.constants["ROWS_X"]
    counts = {name: sum(code.counts(name).values()) for name in ("POPC", "IDP", "LOP3", "IMAD", "SHF", "LDG")}
    if max(counts["POPC"], counts["IDP"]) != weights / 4:
        raise RuntimeError(f"{counts} for {weights} weights: they must be counted anew")
    rate = 4 * (POPCOUNTS if counts["POPC"] else PRODUCTS)
    return {
        "instructions": round((last + 1 - first) / weights, 3),
        "registers": code.registers,
        "spills": code.spills,
        **counts,
    }, rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="time the kernel on a CUDA device, and nothing else")
    parser.add_argument("--steps", type=int, default=200, help="of LoRA, before the quality is measured again")
    parser.add_argument("--repeats", type=int, default=15, help="of each timing on the CPU")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    if args.gpu:
        if not torch.cuda.is_available():
            raise SystemExit("--gpu times a kernel on a CUDA device, and there is none here")
        from hqqplus.evaluation.report import environment

        result = {"rows": gpu_times(), "hardware": torch.cuda.get_device_name(), "versions": environment()}
        result["versions"]["triton"] = triton.__version__
        (RESULTS / "int8_gpu.json").write_text(json.dumps(result, indent=1) + "\n")
        return
    os.environ.setdefault("WANDB_MODE", "disabled")
    found: dict[str, Any] = {"settings": {"steps": args.steps, "repeats": args.repeats}}
    if available():
        found["instructions"] = instructions()
    found["cpu"] = cpu_times(args.repeats)
    found["quality"] = [row for name in common.MODELS for row in quality(name, args.steps)]
    common.write_result(args.output, found, *(["triton"] if available() else []))


if __name__ == "__main__":
    main()
