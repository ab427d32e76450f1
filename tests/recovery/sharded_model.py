"""Run by `torchrun` from `test_processes.py`: trains a packed model with FSDP2, looks at what each process holds."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor

from hqqplus import models
from hqqplus.evaluation.perplexity import Windows, perplexity
from hqqplus.integrations.fsdp import in_lockstep
from hqqplus.integrations.peft import add_gains, norm_modules, train_in_float32, without_adapters
from hqqplus.integrations.transformers import quantize_model
from hqqplus.integrations.trl import RecoveryTrainer, sft_config
from hqqplus.modules import PackedEmbedding, PackedLinear
from hqqplus.modules.sharding import gathered
from hqqplus.quantization import QuantPlan, QuantSpec
from hqqplus.recovery import processes


def main(name: str, output: str) -> None:
    tokenizer = models.load_tokenizer(name)
    plan = QuantPlan(QuantSpec(2, 32), {"model.embed_tokens": {"nbits": 8}})
    base = quantize_model(models.load_causal_lm(name, device="cpu"), plan).requires_grad_(False)
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], modules_to_save=norm_modules(base), task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    add_gains(model)
    train_in_float32(model)
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear | PackedEmbedding)}
    before = {f"{n}.{key}": p.detach().clone() for n, m in packed.items() for key, p in m.packed_parameters().items()}
    windows = Windows((torch.arange(20) % 200, torch.arange(3, 30) % 200))
    quantized = perplexity(base, windows).perplexity

    def look() -> None:
        for layer, module in packed.items():
            for key, parameter in module.packed_parameters().items():
                assert isinstance(parameter, DTensor), f"{layer}.{key} is whole"
                assert parameter.to_local().shape[0] <= -(-parameter.shape[0] // 2), f"{layer}.{key} is whole"
                assert not parameter.requires_grad
                assert not parameter.is_floating_point()
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert isinstance(embedding, PackedEmbedding)
        assert isinstance(head, PackedLinear)
        assert head.W_q is embedding.W_q, "the head has its own tensors"
        # Outside of the forward pass too the head serves its weight.
        assert head.weight.shape == (272, 64)
        with in_lockstep(model), without_adapters(model):
            assert abs(perplexity(model, windows).perplexity / quantized - 1) < 1e-6
        trained.append(next(p for p in model.parameters() if p.requires_grad).to_local().clone())

    settings = {
        "output_dir": output,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "optim": "adamw_torch_fused",
        "save_strategy": "no",
        "report_to": [],
        "max_length": 32,
    }
    processes.check_processes(settings, PartialState(cpu=True))
    trained: list[torch.Tensor] = []
    trainer = RecoveryTrainer(
        model=model,
        args=sft_config(settings, "test"),
        train_dataset=Dataset.from_dict({"text": [f"number {i} comes before {i + 1}" for i in range(16)]}),
        processing_class=tokenizer,
        evaluator=lambda *arguments: perplexity(arguments[0], windows, 2, *arguments[1:]),
        on_checkpoint=lambda *_: None,
        on_sharded=look,
    )
    trainer.train()
    assert len(trained) == 1, "nobody has looked"
    assert not next(p for p in model.parameters() if p.requires_grad).to_local().equal(trained[0])
    after = {f"{n}.{key}": p for n, m in packed.items() for key, p in m.packed_parameters().items()}
    assert all(tensor.equal(before[key]) for key, tensor in gathered(after).items())
    print("every packed tensor is shared out", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1], str(Path(folder) / "out"))
