"""What is estimated against what is there: bytes of small models on a CPU, and on a GPU where there is one."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hqqplus.allocation import decoder_blocks
from hqqplus.digests import weight_files
from hqqplus.estimation.estimate import Estimate, estimate
from hqqplus.estimation.optimizers import state_bytes
from hqqplus.estimation.parts import byte_size
from hqqplus.estimation.passes import Passes, Shape, Sizes, cross_entropy, distillation, run_passes
from hqqplus.integrations.bare import bare_model, checkpoint_blocks, read_configuration, use_fused_loss
from hqqplus.integrations.transformers import HqqPlusConfig
from hqqplus.models import load_causal_lm
from hqqplus.recipe import Recipe, load_recipe
from hqqplus.recovery import trainables
from hqqplus.recovery.distillation import Distillation, FullTargets, Head, LossWeights
from hqqplus.shards import read_header
from hqqplus.streaming import quantize_checkpoint
from tests.conftest import load_benchmark
from tests.recipes import write

WITHIN = 0.1
RECIPE = """\
model:
  name_or_path: {model}
  dtype: float32
quantization:
  nbits: 2
  overrides:
    model.embed_tokens: {{ nbits: 8, group_size: 64 }}
adapter:
  r: 8
  init: default
recovery:
  scales: {scales}
data:
  path_or_name: embedded:pydoc
  max_length: 96
  packing: false
training:
  bf16: false
  per_device_train_batch_size: 2
  optim: adamw_torch
output_dir: runs/x
"""
LiveBytes: Any = load_benchmark("lora_memory").LiveBytes


@pytest.fixture(scope="module", params=["frozen", "bake"])
def recipe(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, random_model: Callable[..., Path]
) -> Recipe:
    text = RECIPE.format(scales=request.param, model=random_model("llama"))
    return load_recipe(write(tmp_path_factory.mktemp("recipe"), text))


@pytest.fixture(scope="module")
def estimated(recipe: Recipe) -> Estimate:
    return estimate(recipe, context=50)


@pytest.fixture(scope="module")
def adapted(recipe: Recipe) -> Any:
    """The model of the recipe, really loaded, quantized and with its adapter."""
    return _adapted(recipe, recipe.model.name_or_path)


def _adapted(recipe: Recipe, name: str, device: str = "cpu") -> Any:
    config = HqqPlusConfig.from_plan(recipe.quantization.plan())
    model = load_causal_lm(name, quantization=config, dtype=recipe.model.dtype, device=device).requires_grad_(False)
    model = trainables.add_adapter(model, recipe)
    trainables.train_scales(model, recipe)
    return model.train()


def _passes(
    recipe: Recipe, training: Shape, loss: Any = cross_entropy, config: Any = None, context: int = 40
) -> Passes:
    config = config or read_configuration(recipe.model.name_or_path)
    parent = bare_model(config, None, torch.float32)
    with torch.device("meta"):
        bare = trainables.add_adapter(bare_model(config, recipe.quantization.plan(), torch.float32), recipe)
        trainables.train_scales(bare, recipe)
    sizes = Sizes(training, Shape(2, 32), Shape(1, context), checkpointing=False)
    return run_passes(bare, decoder_blocks(parent), sizes, loss)


# Weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["bake"], indirect=True)
def test_packed_folder(recipe: Recipe, estimated: Estimate, tmp_path: Path) -> None:
    made = quantize_checkpoint(
        recipe.model.name_or_path, tmp_path / "packed", HqqPlusConfig.from_plan(recipe.quantization.plan()), quiet=True
    )
    files = [made.folder / name for name in weight_files(made.folder)]
    # Names and shapes at the head of a file are most of so small a one.
    there = sum(t.size for file in files for t in read_header(file).values())
    assert there < sum(file.stat().st_size for file in files)
    assert estimated.disk["packed"] == 0  # the recipe saves none
    on_disk = estimated.bits_per_parameter * estimated.parameters / 8
    assert on_disk == pytest.approx(there, rel=WITHIN)
    blocks = [layer.statistics for layer in made.layers.layers if not layer.embedding]
    bits = sum(s.bits_per_weight * s.weights for s in blocks) / sum(s.weights for s in blocks)
    assert estimated.bits_per_weight == pytest.approx(bits)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["bake"], indirect=True)
def test_loaded_weights(recipe: Recipe, estimated: Estimate, adapted: Any) -> None:
    step = estimated.training
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert step.trained == sum(map(byte_size, trained))
    assert sum(estimated.backbone.values()) + step.trained == sum(map(byte_size, adapted.parameters()))
    parent = load_causal_lm(recipe.model.name_or_path, dtype="float32")
    assert estimated.parent == sum(map(byte_size, parent.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["bake"], indirect=True)
def test_adapter_file(estimated: Estimate, adapted: Any, tmp_path: Path) -> None:
    state = {name: p.to(torch.bfloat16) for name, p in adapted.state_dict().items() if "lora_" in name}
    adapted.save_pretrained(tmp_path, state_dict=state, save_embedding_layers=False)
    size = sum(tensor.size for tensor in read_header(tmp_path / "adapter_model.safetensors").values())
    assert estimated.training.adapter_shipped == size
    assert estimated.disk["adapter"] == estimated.training.adapter_shipped


@pytest.mark.parametrize("recipe", ["bake"], indirect=True)
@pytest.mark.parametrize("name", ["adamw_torch", "paged_adamw_8bit", "lion_8bit", "adafactor", "sgd"])
def test_optimizer_state(name: str, adapted: Any, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    trained = [torch.nn.Parameter(torch.randn_like(p)) for p in adapted.parameters() if p.requires_grad]
    arguments = TrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True, report_to="none")
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = kind(trained, **settings)
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.dim()]
    there = sum({t.untyped_storage().data_ptr(): byte_size(t) for t in tensors}.values())
    assert state_bytes(name, [tuple(p.shape) for p in trained]) == pytest.approx(there, rel=WITHIN)


# Activations ---------------------------------------------------------------------------------------------------------


def _hidden(model: Any, batch: int, length: int) -> Tensor:
    ids = torch.randint(272, (batch, length))
    hidden: Tensor = model.get_base_model().base_model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


@pytest.mark.slow
def test_activations(recipe: Recipe, adapted: Any) -> None:
    """What a forward pass keeps and what a whole step with a distillation holds at most, with checkpointing or not."""
    batch, length = (2, 96) if recipe.recovery.scales == "frozen" else (3, 40)
    passes = _passes(recipe, Shape(batch, length), distillation(LossWeights(), None))
    model = adapted.get_base_model()
    try:
        checkpoint_blocks(model, False)
        assert passes.step.kept == pytest.approx(_saved(adapted, batch, length), rel=WITHIN)
        assert passes.step.peak == pytest.approx(_most(adapted, batch, length), rel=WITHIN)
        checkpoint_blocks(model, True)
        assert passes.other_step.kept == pytest.approx(_kept(adapted, batch, length), rel=WITHIN)
        assert passes.other_step.peak == pytest.approx(_most(adapted, batch, length), rel=WITHIN)
    finally:
        checkpoint_blocks(model, False)
    assert passes.other_step.kept < passes.step.kept / 3


def _saved(adapted: Any, batch: int, length: int) -> int:
    """Bytes of the storages that autograd saves in a forward pass."""
    known = {t.untyped_storage().data_ptr() for t in (*adapted.parameters(), *adapted.buffers())}
    saved: dict[int, int] = {}

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        hidden = _hidden(adapted, batch, length)
    found = sum(saved.values())
    del hidden
    return found


def _kept(adapted: Any, batch: int, length: int) -> int:
    """Bytes that live after a forward pass: what a checkpointed block begins with is not saved by autograd."""
    gc.collect()
    with LiveBytes(*adapted.parameters(), *adapted.buffers()) as live:
        hidden = _hidden(adapted, batch, length)
        gc.collect()
        kept: int = live.now()
        del hidden
    return kept


def _most(adapted: Any, batch: int, length: int) -> int:
    model, weights = adapted.get_base_model(), LossWeights()
    labels = torch.randint(272, (batch * length,))
    with torch.no_grad():
        targets = FullTargets(torch.randn(batch * length, model.config.hidden_size), Head.of(model))

    class Teacher:
        has_hidden = True

    trained = [p for p in adapted.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    known = (*adapted.parameters(), *adapted.buffers(), targets.head.weight, *(p.grad for p in trained))
    gc.collect()
    with LiveBytes(*known) as live:
        hidden = _hidden(adapted, batch, length)
        found = Distillation(weights, Teacher()).loss(model, hidden.flatten(0, 1), labels, targets, None)  # type: ignore[arg-type]
        found.loss.backward()
        most: int = live.peak
    return most


# Generation ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("mistral", {"sliding_window": 16, "num_key_value_heads": 1}), ("gemma2", {"sliding_window": 16})],
)
def test_cache(kind: str, settings: dict[str, Any], tmp_path: Path, random_model: Callable[..., Path]) -> None:
    """The cache of a real generation: with shared heads, with windows, with blocks of both kinds."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind,
        vocab_size=272,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=4,
        head_dim=24,
        **{"num_key_value_heads": 2, **settings},
    )
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.randint(272, (1, 40))
    made = model.generate(ids, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
    there = sum(byte_size(layer.keys) + byte_size(layer.values) for layer in made.past_key_values.layers)
    recipe = load_recipe(write(tmp_path, RECIPE.format(scales="frozen", model="some/model")))
    passes = _passes(recipe, Shape(1, 8), config=config, context=40)
    assert passes.cache == pytest.approx(there, rel=WITHIN)
    assert passes.generation > passes.cache


# A card --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_most_on_a_card(tmp_path: Path, checkpointing: bool) -> None:
    """A step of a model large enough for its activations to count, in bfloat16, beside what is allocated before it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    whole: Any = LlamaForCausalLM(config)
    whole.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    text = (
        RECIPE.format(scales="frozen")
        .replace("dtype: float32", "dtype: bfloat16")
        .replace("bf16: false", "bf16: true")
    )
    settings = ["data.max_length=1024", "training.optim=adamw_torch_fused"]
    settings += [f"training.gradient_checkpointing={str(checkpointing).lower()}"]
    recipe = load_recipe(write(tmp_path, text), settings)
    step = estimate(recipe, context=64).training
    estimated = step.activations + step.workspace
    model = _adapted(recipe, str(tmp_path / "model"), "cuda")
    base = model.get_base_model()
    use_fused_loss(base)
    checkpoint_blocks(base, checkpointing)
    ids = torch.randint(8192, (2, 1024), device="cuda")
    for warm in (True, False):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = -model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True).log_probs.sum()
        loss.backward()
        del loss
        if not warm:  # kernels are compiled, and cuBLAS has its workspace
            assert estimated == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=WITHIN)
