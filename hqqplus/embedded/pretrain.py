"""Train the embedded model: `python -m hqqplus.embedded.pretrain OUTPUT_FOLDER`.

A Llama of about 3 M parameters and a byte-level BPE of 2,048 tokens, from scratch, on the training split of
`hqqplus.embedded.corpus`. About an hour on two CPU cores. Writes fp16 weights, tokenizer, `training.json` with
the measured perplexity, and the model card.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hqqplus.embedded.corpus import build

VOCABULARY = 2048
CONTEXT = 512
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"

CARD = """---
license: psf-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [python, documentation, tiny]
---

# pydoc, {parameters:.1f} M parameters

A small Llama that writes like Python's documentation. It is the embedded default of `hqqplus`: something real to
quantize and recover where there is no network. It knows nothing and is good for nothing else.

| | |
|---|---|
| architecture | Llama, {layers} layers, width {hidden}, MLP {intermediate}, {heads} heads, {kv_heads} key-value heads, tied embedding |
| tokenizer | byte-level BPE, {vocabulary} tokens, trained on the same text |
| text | `pydoc_data.topics` and the docstrings of the standard library of Python {python}: {train_documents} documents, {train_tokens:,} tokens |
| training | {steps} steps of {batch} x {context} tokens ({epochs} epochs), AdamW, peak learning rate {learning_rate}, {minutes:.0f} minutes on {threads} CPU threads |
| perplexity, held-out split | **{perplexity:.2f}** per token ({validation_tokens:,} tokens, windows of {context}, BOS before each document) |

The text is Python's own documentation (PSF License Version 2); modules and topics were held out by the hash of their
name. Data builder, split and training script: `hqqplus/embedded/corpus.py` and `hqqplus/embedded/pretrain.py`.
Known limits: it repeats itself, it invents functions, and it has seen no text but documentation.
"""


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    ids: list[int] = []
    for encoded in tokenizer(texts)["input_ids"]:
        ids += [*encoded, tokenizer.eos_token_id]
    return torch.tensor(ids)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood over non-overlapping windows of `CONTEXT` tokens."""
    model.eval()
    total, count = 0.0, 0
    for window in stream.split(CONTEXT):
        if len(window) < 2:
            continue
        log_probabilities = model(input_ids=window[None]).logits[0, :-1].float().log_softmax(-1)
        total -= log_probabilities.gather(-1, window[1:, None]).sum().item()
        count += len(window) - 1
    model.train()
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps (0: by epochs)")
    args = parser.parse_args()

    torch.manual_seed(0)
    splits = build()
    tokenizer = train_tokenizer(splits["train"])
    train, validation = (token_stream(tokenizer, splits[name]) for name in ("train", "validation"))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    windows_per_epoch = len(train) // CONTEXT
    steps = args.steps or args.epochs * windows_per_epoch // args.batch
    print(f"{parameters:,} parameters, {len(train):,} training tokens, {steps} steps", flush=True)

    decayed = [p for p in model.parameters() if p.dim() > 1]
    kept = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
    )
    warmup = min(100, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    generator = torch.Generator().manual_seed(0)
    started, order, curve = time.monotonic(), torch.empty(0, dtype=torch.long), []
    for step in range(steps):
        if len(order) < args.batch:
            # A new random offset each epoch, so that the windows do not always cut at the same places.
            offset = int(torch.randint(CONTEXT, (1,), generator=generator))
            count = (len(train) - offset) // CONTEXT
            order = offset + CONTEXT * torch.randperm(count, generator=generator)
        starts, order = order[: args.batch], order[args.batch :]
        batch = torch.stack([train[start : start + CONTEXT] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == steps - 1:
            curve.append({"step": step, "loss": loss.item(), "validation": perplexity(model, validation)})
            print({**curve[-1], "seconds": round(time.monotonic() - started)}, flush=True)

    model = model.half().float()  # measured as shipped: rounded to fp16
    facts = {
        "parameters": parameters / 1e6,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "vocabulary": VOCABULARY,
        "context": CONTEXT,
        "python": platform.python_version(),
        "train_documents": len(splits["train"]),
        "train_tokens": len(train),
        "validation_tokens": len(validation),
        "steps": steps,
        "batch": args.batch,
        "epochs": args.epochs,
        "learning_rate": args.learning_rate,
        "minutes": (time.monotonic() - started) / 60,
        "threads": torch.get_num_threads(),
        "perplexity": perplexity(model, validation),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    (args.output / "training.json").write_text(json.dumps({**facts, "curve": curve}, indent=2) + "\n")
    (args.output / "README.md").write_text(CARD.format(**facts))
    print(f"held-out perplexity {facts['perplexity']:.2f}; written to {args.output}")


if __name__ == "__main__":
    main()
