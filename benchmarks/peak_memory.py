"""Peak memory of quantizing a model while it loads: `python benchmarks/peak_memory.py [--layers 8] [--hidden 768]`.

Makes a random Llama in bf16, quantizes it to 2 bits in a new process and prints the peak of that process's anonymous
memory over what it had before loading (memory-mapped files are not counted: the system may drop them at any time).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=768)
    args = parser.parse_args()
    for name, size in measure(args.layers, args.hidden).items():
        print(f"{name:24} {size / 2**20:8.1f} MiB")


if __name__ == "__main__":
    main()
