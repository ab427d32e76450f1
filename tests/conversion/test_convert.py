"""Whole folders: converted, loaded, continued after a kill, trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import hqqplus
from hqqplus import cli, models
from hqqplus.adapters import Fingerprint
from hqqplus.conversion import Converted, convert_checkpoint
from hqqplus.errors import UserError
from hqqplus.modules import PackedEmbedding, packed_modules
from hqqplus.shards import SafetensorsWriter
from tests.conversion import published as make
from tests.conversion.published import Published, publish
from tests.streaming.checkpoints import IDS, same_tensors, tensors

OFFLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Published:
    """GPTQ, 2 bits, of a model with biases, in three files that cut its layers in two."""
    made = publish(random_model("qwen2"), tmp_path_factory.mktemp("gptq"), make.gptq(2, 32), make.gptq_config(2, 32))
    names = sorted(made.tensors, key=lambda name: (name.rpartition(".")[2], name))
    files = {name: f"model-{1 + 3 * place // len(names):05}-of-00003.safetensors" for place, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: made.tensors[name] for name in names if files[name] == file}, made.folder / file)
    (made.folder / "model.safetensors").unlink()
    (made.folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return made


@pytest.fixture(scope="module")
def converted(source: Published, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return convert_checkpoint(str(source.folder), tmp_path_factory.mktemp("out") / "packed", quiet=True)


def weights_of(folder: Path) -> dict[str, Tensor]:
    model = hqqplus.load(folder, dtype="checkpoint", device="cpu")
    return {name: layer.dequantize(torch.float32) for name, layer in packed_modules(model).items()}


def test_every_weight_is_there(source: Published, converted: Converted) -> None:
    found = weights_of(converted.folder)
    assert found.keys() == source.weights.keys()
    for name, weight in source.weights.items():
        assert torch.equal(found[name].double(), weight), name
    assert (converted.exact, converted.largest_error) == (14, (0.0, ""))
    assert converted.describe() == "GPTQ, version 1: 14 layers, 3.000 bits per weight, every weight as in the source"
    assert converted.layers.nmse == 0


def test_the_rest_is_copied(source: Published, converted: Converted) -> None:
    stored = tensors(converted.folder)
    rest = {name: t for name, t in source.tensors.items() if name.rpartition(".")[0] not in source.weights}
    rest |= {name: t for name, t in source.tensors.items() if name.endswith("bias")}
    for name, tensor in rest.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(stored[name], tensor), name
    config = json.loads((converted.folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "hqqplus"
    assert config["quantization_config"]["metadata_dtype"] == "float16"
    assert config["dtype"] == "float16"
    assert {"tokenizer.json", "generation_config.json", "layers.json", "README.md"} <= {
        path.name for path in converted.folder.iterdir()
    }


def test_it_says_where_it_comes_from(source: Published, converted: Converted) -> None:
    noted = Fingerprint.read(converted.folder)
    assert noted is not None
    assert noted == converted.fingerprint
    assert (noted.base, noted.solver, noted.converted) == (str(source.folder), None, "GPTQ, version 1")
    assert "packed itself" in noted.unrepeatable
    assert "converted (GPTQ, version 1)" in noted.describe()
    assert noted.parent_digest == models.content_digest(str(source.folder))


def wrote_of(path: Path, names: list[str]) -> list[str]:
    return [name for name in load_file(path) if name in names]


def test_interrupted_it_goes_on(
    source: Published, converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at any write, started again: the same bytes, and what was finished is not written again."""
    output, writes, whole = tmp_path / "packed", [0], SafetensorsWriter.write
    wrote: list[str] = []

    def write(self: SafetensorsWriter, name: str, tensor: Tensor) -> None:
        writes[0] += 1
        if writes[0] in (9, 40):
            raise KeyboardInterrupt
        whole(self, name, tensor)
        wrote.append(name)

    monkeypatch.setattr(SafetensorsWriter, "write", write)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(str(source.folder), output, quiet=True)
    wrote.clear()
    made = convert_checkpoint(str(source.folder), output, quiet=True)
    same_tensors(output, converted.folder)
    assert made.fingerprint == converted.fingerprint
    assert not (tmp_path / "packed.partial").exists()
    assert len(made.kept) == 1
    assert wrote
    assert not wrote_of(output / made.kept[0], wrote)


def test_a_beginning_of_something_else_is_not_continued(converted: Converted, tmp_path: Path) -> None:
    (tmp_path / "packed.partial").mkdir()
    (tmp_path / "packed.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="in the way"):
        convert_checkpoint(converted.fingerprint.base, tmp_path / "packed", quiet=True)
    with pytest.raises(UserError, match="packed by hqqplus already"):
        convert_checkpoint(str(converted.folder), tmp_path / "other", quiet=True)


def test_embeddings_that_are_packed_and_tied(random_model: Callable[..., Path], tmp_path: Path) -> None:
    """MLX packs all of a model; a tied head stays the embedding's."""
    settings = {"group_size": 32, "bits": 1}
    source = publish(
        random_model("llama", True),
        tmp_path / "source",
        make.mlx(1, 32, binary=True),
        settings,
        only=lambda name: not name.endswith("norm"),
    )
    source.config["quantization"] = settings
    source.write()
    made = convert_checkpoint(str(source.folder), tmp_path / "packed", quiet=True)
    model = hqqplus.load(tmp_path / "packed", device="cpu")
    embedding = model.model.embed_tokens
    assert isinstance(embedding, PackedEmbedding)
    assert model.lm_head.W_q is embedding.W_q
    for name, weight in source.weights.items():
        assert torch.equal(model.get_submodule(name).dequantize(torch.float32).double(), weight), name
    assert made.layers.bits_per_weight == 2.0
    assert "quantization" not in json.loads((tmp_path / "packed" / "config.json").read_text())
    assert torch.isfinite(model(IDS).logits).all()


# BitNet's own class --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bitnet(tmp_path_factory: pytest.TempPathFactory, random_model: Callable[..., Path]) -> Published:
    from transformers import BitNetConfig, BitNetForCausalLM

    folder = tmp_path_factory.mktemp("bitnet")
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    tokens: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    BitNetForCausalLM(
        BitNetConfig(vocab_size=272, num_key_value_heads=2, max_position_embeddings=64, **sizes, **tokens)
    ).save_pretrained(folder / "parent")
    for path in random_model("llama").glob("tokenizer*"):
        shutil.copy(path, folder / "parent")
    return publish(folder / "parent", folder / "source", make.bitnet(False), OFFLINE, torch.bfloat16)


@pytest.mark.xfail(
    Version(transformers.__version__) < Version("5.11"),
    reason="transformers 5.10 multiplies by BitNet's packed bytes as they are",
    strict=True,
)
def test_what_the_rounding_of_activations_makes(bitnet: Published, tmp_path: Path) -> None:
    """Weights are the same, inputs are not: put transformers' rounding before ours, and the two models agree."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.bitnet import ActQuant

    made = convert_checkpoint(str(bitnet.folder), tmp_path / "packed", quiet=True)
    assert (made.exact, len(made.remarks)) == (14, 1)
    assert "to 8 bits" in made.remarks[0]
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        theirs = torch.nn.Module.float(AutoModelForCausalLM.from_pretrained(bitnet.folder, dtype=torch.bfloat16))
        ours = hqqplus.load(tmp_path / "packed", device="cpu", dtype="float32")
        assert type(ours) is type(theirs)
        wanted = theirs(IDS).logits
        unrounded = ours(IDS).logits
        for layer in packed_modules(ours).values():
            layer.register_forward_pre_hook(lambda module, args: (ActQuant.apply(args[0]), *args[1:]))
        rounded = ours(IDS).logits
    size = wanted.square().mean().sqrt()
    torch.testing.assert_close(rounded, wanted, rtol=0, atol=float(size) * 1e-4)
    difference = float((unrounded - wanted).square().mean().sqrt() / size)
    assert 1e-3 < difference < 0.05


# Training ------------------------------------------------------------------------------------------------------------


def rounded_to_nearest(weights: dict[str, Tensor], group: int) -> Callable[..., Any]:
    """GPTQ's format, version 1, of real weights: the grid from the least to the largest of a group."""

    def pack(name: str, shape: tuple[int, int]) -> Any:
        weight = weights[f"{name}.weight"].float().unflatten(1, (-1, group))
        low, high = weight.amin(-1).clamp_max(-1e-6), weight.amax(-1).clamp_min(1e-6)
        scale = ((high - low) / 3).half()
        zero = (-low / scale).round().clamp(1, 3)
        codes = ((weight / scale.unsqueeze(-1)).round() + zero.unsqueeze(-1)).clamp(0, 3).flatten(1).long()
        columns = [make.words(row, 2) for row in codes.tolist()]
        zeros = [make.words(row, 2) for row in (zero.t().long() - 1).tolist()]
        made = {
            "qweight": make.int32(columns).t().contiguous(),
            "qzeros": make.int32(zeros),
            "scales": scale.t().contiguous(),
        }
        spread = [t.double().repeat_interleave(group, 1) for t in (scale, zero)]
        return made, spread[0] * (codes - spread[1])

    return pack


@pytest.mark.slow
def test_lora_on_a_converted_model(tmp_path: Path) -> None:
    """Those who own a packed model train on it: the loss falls, and the adapter finds its base again."""
    from hqqplus.recipe import load_recipe
    from hqqplus.train import run

    parent = Path(models.resolve_name("embedded:pydoc"))
    source = publish(
        parent, tmp_path / "source", rounded_to_nearest(load_file(parent / "model.safetensors"), 64),
        make.gptq_config(2, 64),
    )  # fmt: skip
    packed = tmp_path / "packed"
    made = convert_checkpoint(str(source.folder), packed, quiet=True)
    assert made.exact == len(source.weights)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""\
model:
  name_or_path: {packed}
adapter: {{r: 8, init: default}}
data: {{path_or_name: "embedded:pydoc", split: train, eval_split: validation, max_length: 128, packing: true}}
training:
  {{max_steps: 16, per_device_train_batch_size: 4, learning_rate: 2.0e-3, bf16: false, gradient_checkpointing: false,
   save_steps: 16, logging_steps: 4}}
evaluation: {{max_tokens: 1000, prompts: []}}
output_dir: {tmp_path / "run"}
""")
    with pytest.raises(UserError, match=r"adapter.init: .* was converted"):
        run(load_recipe(recipe, ["adapter.init=residual"]))
    report = run(load_recipe(recipe, []))
    losses = [value for _, value in report.loss_curve]
    assert losses[-1] < losses[0] - 0.05
    assert report.ppl_recovered < 0.96 * report.ppl_quantized
    assert report.ppl_parent is None
    adapter = tmp_path / "run" / "adapter"
    noted = Fingerprint.read(adapter)
    assert noted is not None
    assert (noted.base, noted.converted) == (str(source.folder), "GPTQ, version 1")
    assert torch.isfinite(hqqplus.load(packed, adapter, device="cpu")(IDS).logits).all()
    with pytest.raises(UserError, match="name the packed folder that came with it"):
        hqqplus.load(adapter, device="cpu")
    with pytest.raises(UserError, match="no quantizing of embedded:pydoc brings back"):
        hqqplus.load("embedded:pydoc", adapter, device="cpu")


# The command ---------------------------------------------------------------------------------------------------------


def test_command(source: Published, converted: Converted, tmp_path: Path) -> None:
    arguments = ["convert", str(source.folder), "--out", str(tmp_path / "packed")]
    result = CliRunner().invoke(cli.app, [*arguments, "--json"], catch_exceptions=False)
    said = json.loads(result.stdout)
    assert (said["layout"], said["exact_layers"], said["largest_error"]) == ("GPTQ, version 1", 14, 0.0)
    same_tensors(tmp_path / "packed", converted.folder)
    with pytest.raises(UserError, match="exists already and is not empty"):
        CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    with pytest.raises(UserError, match=r"is not packed: what can be read is GPTQ .*hqqplus quantize"):
        convert_checkpoint("embedded:pydoc", tmp_path / "x", quiet=True)
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "x.partial").exists()
