"""What an adapter in 8 bits costs: perplexity and KL beside the same adapter in bf16, and bytes.

    python benchmarks/adapter_bits.py [--run RUN] [--output benchmarks/results/adapter_bits.json]

Without `--run` it runs `recipes/embedded_2bit.yaml` first (some minutes). The finished run is shipped in both forms by
the code of `hqqplus ship`; each folder is loaded and measured on the evaluation set of the run: perplexity, mean KL
divergence of the next token from that of the bf16 adapter, and how often both put the same token first. Beside them
stands the packed model without an adapter. Sizes of an 8B are sums over the shapes that PEFT gives its adapter.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import common  # first: it keeps Hugging Face off the network
import torch

RECIPE = common.ROOT / "recipes" / "embedded_2bit.yaml"
LLAMA_8B = common.ROOT / "recipes" / "llama3_8b_2bit.yaml"


def evaluation_windows(recipe: Any, tokenizer: Any) -> Any:
    """The windows that the run was measured on."""
    from hqqplus.evaluation.perplexity import make_windows
    from hqqplus.recovery import setup

    data = setup.load_data(recipe, tokenizer, lambda text: None)
    texts = data.texts[setup.EVALUATION_SET]
    return make_windows(
        texts, tokenizer, recipe.data.max_length, recipe.evaluation.max_tokens, "eval", join=recipe.evaluation.join
    )


@torch.no_grad()
def log_probabilities(model: Any, windows: Any) -> list[torch.Tensor]:
    """Of the next token after each place of each window: [places, vocabulary], float64."""
    return [model(ids[None]).logits[0].double().log_softmax(1) for ids in windows.input_ids]


def quality(run: Path, recipe: Any, folder: Path) -> list[dict[str, Any]]:
    import hqqplus
    from hqqplus import models
    from hqqplus.adapters import eight_bit
    from hqqplus.adapters.ship import ship_run

    base = next(run / name for name in models.PACKED_FOLDERS if models.is_packed(str(run / name)))
    windows = evaluation_windows(recipe, models.load_tokenizer(str(base)))
    rows: list[dict[str, Any]] = []
    reference: list[torch.Tensor] = []
    for kind, bits in (("none", 0), ("bf16", 16), ("8 bits", 8)):
        adapter, size = None, 0
        if bits:
            shipped = ship_run(run, folder / f"shipped_{bits}", bits=bits)
            adapter, size = shipped.folder, shipped.adapter_bytes
        model = hqqplus.load(base, adapter, device="cpu")
        row: dict[str, Any] = {"adapter": kind, "file_bytes": size, "perplexity": common.perplexity(model, windows)}
        if bits:
            logs = log_probabilities(model, windows)
            reference = reference or logs
            places = sum(map(len, logs))
            pairs = list(zip(reference, logs, strict=True))
            row["kl_from_bf16"] = sum(float((a.exp() * (a - b)).sum()) for a, b in pairs) / places
            row["same_first"] = sum(int((a.argmax(1) == b.argmax(1)).sum()) for a, b in pairs) / places
        rows.append(row)
        print(row, flush=True)
    states = []
    for bits in (16, 8):
        with eight_bit.standard(folder / f"shipped_{bits}") as standard:
            from safetensors.torch import load_file

            states.append(load_file(standard / eight_bit.STANDARD))
    errors = [float((states[1][n].float() - t.float()).norm() / t.float().norm()) for n, t in states[0].items()]
    rows[-1]["relative_error"] = {"mean": sum(errors) / len(errors), "largest": max(errors)}
    return rows


def llama_8b() -> dict[str, int]:
    """Bytes of the adapter of Llama-3-8B by the shipped recipe, from shapes alone."""
    from hqqplus.adapters import eight_bit
    from hqqplus.recipe import load_recipe

    shapes = eight_b_shapes(load_recipe(str(LLAMA_8B)))
    parameters = sum(rows * columns for rows, columns in shapes.values())
    return {"parameters": parameters, "bf16": 2 * parameters, "8 bits": eight_bit.stored_bytes(shapes)}


def eight_b_shapes(recipe: Any) -> dict[str, tuple[int, int]]:
    """Name -> shape of the LoRA tensors that `recipe` gives to a Llama of the sizes of Llama-3-8B."""
    from peft import get_peft_model_state_dict
    from transformers import AutoConfig, AutoModelForCausalLM

    from hqqplus.integrations.transformers import HqqPlusConfig, HqqPlusQuantizer
    from hqqplus.recovery import trainables

    config = AutoConfig.for_model(
        "llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    packed = HqqPlusConfig.from_plan(recipe.quantization.plan())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        quantizer = HqqPlusQuantizer(packed, pre_quantized=True)
        quantizer._process_model_before_weight_loading(model, dtype=torch.bfloat16)
        model = trainables.add_adapter(model, recipe)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: (tensor.shape[0], tensor.shape[1]) for name, tensor in state.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="output folder of a finished run")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    from hqqplus.recipe import load_recipe
    from hqqplus.train import run

    with tempfile.TemporaryDirectory() as folder:
        places = [f"output_dir={folder}/run", f"quantization.save_to={folder}/base"]
        recipe = load_recipe(str(RECIPE), places)
        if args.run is None:
            run(recipe)
        rows = quality(args.run or Path(folder) / "run", recipe, Path(folder))
    result = {"recipe": RECIPE.name, "rows": rows, "llama_3_8b_bytes": llama_8b()}
    print(result["llama_3_8b_bytes"])
    common.write_result(args.output, result)


if __name__ == "__main__":
    main()
