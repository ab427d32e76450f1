"""Peak memory of quantizing: `python benchmarks/peak_memory.py [--size 100m] [--output FILE]`.

Makes a checkpoint of random Llama weights in bf16, a tensor at a time, in several files, and measures the peak
resident memory (ru_maxrss) of the process `hqqplus quantize` that packs it to 2 bits in groups of 64. `base` is the
same of a process that has imported torch and transformers and done nothing. The peak has to stay below `bound`: the
size of the packed model and 10^9 bytes.

`--loading` measures the other route, transformers loading the model and quantizing meanwhile: the peak of anonymous
memory over what there was before (memory-mapped files are not counted: the system may drop them at any time).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Width, width of the MLP, blocks, heads, key-value heads, vocabulary, files. The first has the form of TinyLlama.
SIZES = {
    "1g": (2048, 5632, 22, 32, 4, 32000, 8),
    "100m": (768, 2048, 12, 12, 4, 16000, 4),
    "50m": (384, 1024, 28, 6, 2, 4000, 8),
    "10m": (384, 1024, 4, 6, 2, 4000, 3),
}
ALLOWED = 10**9

_CHILD = """
import json, sys, threading, time
import torch
import hqqplus
from transformers import AutoModelForCausalLM
from hqqplus.modules import model_bytes

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

torch.set_num_threads(1)
config = hqqplus.HqqPlusConfig(nbits=2, group_size=64)
# Once in small, so that modules and code that are loaded on first use do not count.
AutoModelForCausalLM.from_pretrained(sys.argv[2], quantization_config=config, dtype=torch.bfloat16)
before, peak, running = anonymous(), 0, True

def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch, daemon=True)
thread.start()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config, dtype=torch.bfloat16)
running = False
thread.join()
largest = max(m.in_features * m.out_features for m in model.modules() if isinstance(m, torch.nn.Linear))
print(json.dumps({"peak": peak - before, "packed": model_bytes(model), "largest_weight_float32": 4 * largest}))
"""


def measure(layers: int, hidden: int) -> dict[str, int]:
    """Bytes: `parent` (bf16 on disk), `packed`, `peak` while loading, `largest_weight_float32`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def write(folder: str, layers: int, hidden: int) -> None:
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as small:
        write(folder, layers, hidden)
        write(small, 1, 192)
        parent = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        # glibc keeps small freed blocks in its heap, which hides what is in use; large ones it then gives back.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, folder, small], env=environment, capture_output=True, text=True, check=True
        )
    return {"parent": parent, **json.loads(done.stdout.strip().splitlines()[-1])}


def write_checkpoint(folder: Path, size: str) -> int:
    """Write a random Llama of `SIZES[size]` with the embedded model's tokenizer. Returns the number of its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from hqqplus.embedded import MODEL_DIR
    from hqqplus.shards import SafetensorsWriter

    width, mlp, blocks, heads, kv_heads, vocabulary, files = SIZES[size]
    config = AutoConfig.for_model(
        "llama", hidden_size=width, intermediate_size=mlp, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    total, done = sum(tensor.numel() for tensor in model.state_dict().values()), 0
    # In the order of the model, a new file wherever a further share of the weights is full.
    groups: list[list[str]] = [[] for _ in range(files)]
    for name, tensor in model.state_dict().items():
        groups[min(done * files // total, files - 1)].append(name)
        done += tensor.numel()
    groups = [group for group in groups if group]
    weight_map = {}
    generator = torch.Generator().manual_seed(0)
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        with SafetensorsWriter(folder / file, {name: (shapes[name], torch.bfloat16) for name in group}) as writer:
            for name in group:
                flat = len(shapes[name]) == 1
                tensor = torch.ones(shapes[name]) if flat else torch.randn(shapes[name], generator=generator) * 0.02
                writer.write(name, tensor.to(torch.bfloat16))
        weight_map.update(dict.fromkeys(group, file))
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def peak_of(command: list[str]) -> tuple[int, str]:
    """(peak resident bytes, stdout) of a new process. To be called from a process with few children: the peak is that
    of the largest."""
    code = (
        "import json, resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:], capture_output=True, text=True)\n"
        "sys.stderr.write(done.stderr)\n"
        "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss\n"
        "print(json.dumps([peak, done.stdout])); sys.exit(done.returncode)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    peak, out = json.loads(done.stdout)
    return peak * (1 if sys.platform == "darwin" else 1024), out


def measure_streaming(size: str) -> dict[str, Any]:
    """Bytes: `parent`, `packed`, `peak` and `base` (resident memory, see above), `bound`; and seconds, weights."""
    with tempfile.TemporaryDirectory() as folder:
        parent, output = Path(folder) / "parent", Path(folder) / "packed"
        weights = write_checkpoint(parent, size)
        imports = "import torch, transformers, matplotlib.figure; from transformers import AutoModelForCausalLM"
        base, _ = peak_of([sys.executable, "-c", f"{imports}, AutoTokenizer; import hqqplus.streaming"])
        command = [sys.executable, "-m", "hqqplus.cli", "quantize", str(parent), "--out", str(output)]
        started = time.monotonic()
        peak, out = peak_of(
            [*command, "--nbits", "2", "--group-size", "64", "--metadata-bits", "16", "--device", "cpu", "--json"]
        )
        seconds = time.monotonic() - started
        summary = json.loads(out)
        assert summary["streamed"]
        packed = sum(path.stat().st_size for path in output.glob("*.safetensors"))
        return {
            "size": size,
            "weights": weights,
            "packed_weights": summary["packed_weights"],
            "parent": sum(path.stat().st_size for path in parent.glob("*.safetensors")),
            "packed": packed,
            "peak": peak,
            "base": base,
            "bound": packed + ALLOWED,
            "seconds": seconds,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="100m")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--loading", action="store_true", help="measure the other route, of a small model")
    parser.add_argument("--layers", type=int, default=8, help="with --loading")
    parser.add_argument("--hidden", type=int, default=768, help="with --loading")
    args = parser.parse_args()
    if args.loading:
        for name, size in measure(args.layers, args.hidden).items():
            print(f"{name:24} {size / 2**20:8.1f} MiB")
        return
    result = measure_streaming(args.size)
    for name in ("parent", "packed", "peak", "base", "bound"):
        print(f"{name:24} {result[name] / 1e6:8.1f} MB")
    print(f"{'weights packed':24} {result['packed_weights'] / 1e6:8.1f} M in {result['seconds']:.0f} s")
    if args.output:
        from hqqplus.evaluation.report import environment

        args.output.parent.mkdir(parents=True, exist_ok=True)
        threads = os.environ.get("OMP_NUM_THREADS", "all")
        result["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads, no GPU"
        args.output.write_text(json.dumps({**result, "versions": environment()}, indent=2) + "\n")
    if result["peak"] > result["bound"]:
        sys.exit(f"the peak is above the bound by {(result['peak'] - result['bound']) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
