"""A whole model on a GPU: `python benchmarks/model.py [--quick] [--modes MODE ...] [--layers N]`.

A Llama of Llama-3-8B's shapes with random weights, made layer by layer on the card (no checkpoint is needed, and none
of the packed layers is quantized from anything). Of each mode

    bf16        everything in bf16
    nf4         linear layers in bitsandbytes' NF4 (double-quantized), embedding and head in bf16, as QLoRA has it
    2-bit g64, 1-bit g64, preset (2-bit g32, 8-bit metadata)
                ours; embedding and head in `--embeddings` bits (default 8)

are measured

    resident    bytes of all weights, counted; on a GPU also what the allocator holds more than before
    decode      tokens a second of one sequence: one step (all layers, head, arg max) over a static cache, captured
                in a CUDA graph; as it stands, and with `torch.compile` of the decoder layer. The floor is weights
                read / copy bandwidth. The step is written out here, on the model's own modules, because it has to be
                captured whatever transformers does in its own; its logits are compared with the model's first.
    training    LoRA of rank 16 on all linear layers, bf16 autocast, gradient checkpointing, 8 x 1024 tokens, AdamW
                (paged, 8-bit, where bitsandbytes is installed): tokens a second and the peak of allocated memory. The
                loss is computed over chunks of tokens in all modes alike: logits of 8 x 1024 tokens are 4 GB in fp32.

`--layers N` shrinks the model for a small card: figures are of the N layers, nothing is extrapolated.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import markdown
from competitors import nf4_bytes, nf4_linear
from gpu import (
    Ceilings,
    Results,
    Timer,
    alive,
    check,
    first_line,
    hardware,
    measure_ceilings,
    nbytes,
    open_device,
    output_path,
    parser,
    random_packed,
    tidy,
    versions,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hqqplus.modules import PackedEmbedding, PackedLinear
from hqqplus.quantization import QuantSpec

BF16 = torch.bfloat16
LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
TINY = {
    **LLAMA_3_8B,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
SPECS = {
    "2-bit g64": QuantSpec(2, 64, metadata_bits=16),
    "1-bit g64": QuantSpec(1, 64, metadata_bits=16),
    "preset": QuantSpec(),
}
MODES = ("bf16", "nf4", *SPECS)
RANK = 16
# Of logits: sixteen-bit noise of 32 layers of random weights stays far below, a wrong rotation or mask is above 0.5.
LOGITS_TOLERANCE = 0.15


# --- the model ------------------------------------------------------------------------------------------------------


def configuration(tiny: bool, layers: int | None) -> Any:
    from transformers import LlamaConfig

    sizes = dict(TINY if tiny else LLAMA_3_8B)
    sizes["num_hidden_layers"] = layers or sizes["num_hidden_layers"]
    return LlamaConfig(**sizes, tie_word_embeddings=False, attn_implementation="sdpa")


def build(config: Any, mode: str, device: torch.device, embedding_bits: int) -> Any:
    """The model with random weights on `device`; at no time is there more of it in full than one layer."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            inside = name.startswith("model.layers.")
            model.set_submodule(name, made(module, mode, inside, device, embedding_bits))
        elif getattr(module, "weight", None) is not None:  # a norm
            module.weight = nn.Parameter(torch.ones_like(module.weight, dtype=BF16, device=device))
    # What is no parameter is computed from the configuration, which the meta device does not do.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.requires_grad_(False).eval()


def made(module: Any, mode: str, inside: bool, device: torch.device, embedding_bits: int) -> nn.Module:
    """What stands in the place of a linear layer or embedding on the meta device; `inside` the decoder or not."""
    linear = isinstance(module, nn.Linear)
    shape: Any = tuple(module.weight.shape)
    if mode in SPECS and (inside or embedding_bits < 16):
        spec = SPECS[mode] if inside else QuantSpec(embedding_bits, 64)
        sizes = (shape[1], shape[0], False) if linear else shape
        packed = (PackedLinear if linear else PackedEmbedding)(*sizes, spec, BF16, device="meta")
        packed.set_packed(random_packed(spec, shape, device))
        return packed
    weight = torch.empty(shape, dtype=BF16, device=device).normal_(0, 0.02)
    if mode == "nf4" and inside:
        return nf4_linear(weight)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the weights of `module`, all that is stored for them."""
    total = 0
    for part in module.modules():
        if hasattr(getattr(part, "weight", None), "quant_state") and not isinstance(part, PackedLinear):
            total += nf4_bytes(part)
        else:
            total += nbytes(part.parameters(recurse=False))
    return total


def read_bytes(model: Any) -> int:
    """Bytes that one step of decoding has to read: all weights but the embedding, of which it takes a row."""
    return weight_bytes(model) - weight_bytes(model.model.embed_tokens)


# --- decoding -------------------------------------------------------------------------------------------------------


class Decoder:
    """Decodes one token after the other over a static cache of `length` places; every step is the same work.

    Attributes:
        ids: [batch, 1] the token that goes in next.
        position: [1] where; after the last place it begins again.
    """

    def __init__(self, model: Any, length: int, batch: int = 1, compiled: bool = False) -> None:
        config, device = model.config, model.model.norm.weight.device
        self.model, self.length = model, length
        head_dim = config.hidden_size // config.num_attention_heads
        cache = batch, config.num_key_value_heads, length, head_dim
        self.caches = [
            tuple(torch.zeros(cache, dtype=BF16, device=device) for _ in range(2)) for _ in model.model.layers
        ]
        self.places = torch.arange(length, device=device)
        one = torch.empty(1, 1, dtype=BF16, device=device)
        cos, sin = model.model.rotary_emb(one, self.places[None])  # [1, length, head_dim]
        self.cos, self.sin = cos[0], sin[0]
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.block: Callable[..., Tensor] = torch.compile(block, fullgraph=True, dynamic=False) if compiled else block

    @torch.no_grad()
    def step(self) -> Tensor:
        """The logits [batch, vocabulary] after one more token; the likeliest one goes in next."""
        inner = self.model.model
        h = inner.embed_tokens(self.ids)
        cos, sin = self.cos.index_select(0, self.position), self.sin.index_select(0, self.position)  # [1, head_dim]
        mask = (self.places <= self.position)[None, None, None]  # [1, 1, 1, length]
        for layer, (keys, values) in zip(inner.layers, self.caches, strict=True):
            h = self.block(layer, h, cos, sin, keys, values, mask, self.position)
        logits = self.model.lm_head(inner.norm(h))[:, -1]
        self.ids.copy_(logits.argmax(-1, keepdim=True))
        self.position.add_(1).remainder_(self.length)
        return logits


def block(
    layer: Any, h: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, mask: Tensor, position: Tensor
) -> Tensor:
    """One decoder layer for one new token of each sequence: h [batch, 1, hidden] -> the same."""
    attention, head_dim = layer.self_attn, keys.shape[-1]
    normed = layer.input_layernorm(h)
    q, k, v = (
        part(normed).view(h.shape[0], 1, -1, head_dim).transpose(1, 2)  # [batch, heads, 1, head_dim]
        for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    keys.index_copy_(2, position, rotated(k, cos, sin))
    values.index_copy_(2, position, v)
    # The query heads that share a key head are rows of one product: no key is repeated.
    shared = rotated(q, cos, sin).reshape(h.shape[0], keys.shape[1], -1, head_dim)
    rows = mask.expand(h.shape[0], 1, shared.shape[2], -1)
    mixed = functional.scaled_dot_product_attention(shared, keys, values, attn_mask=rows)
    h = h + attention.o_proj(mixed.reshape(h.shape[0], 1, -1))
    normed, mlp = layer.post_attention_layernorm(h), layer.mlp
    return h + mlp.down_proj(functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


@torch.no_grad()
def check_decoder(model: Any, tokens: int = 8) -> float:
    """The relative error of the logits of some steps against those of the model's own forward pass."""
    decoder = Decoder(model, 16)
    ids = torch.randint(model.config.vocab_size, (1, tokens), device=decoder.ids.device)
    found = []
    for token in ids[0]:
        decoder.ids.fill_(token)
        found.append(decoder.step())
    return check(torch.cat(found), model(input_ids=ids, use_cache=False).logits[0], LOGITS_TOLERANCE)


def decode(model: Any, timer: Timer, ceilings: Ceilings, read: int, length: int, compiled: bool) -> dict[str, Any]:
    """Tokens a second over a cache of `length` places; `read` bytes have to be read for each."""
    result: dict[str, Any] = {"cache": length, "error": check_decoder(model), "floor": ceilings.decode(read)}
    steps: dict[str, list[Callable[[], Tensor]]] = {}
    for name in ("graph", "graph, compiled") if compiled else ("graph",):
        step = Decoder(model, length, compiled="compiled" in name).step
        try:
            step()  # compiles
            steps[name] = [step]
        except Exception as error:
            result[name] = {"failed": first_line(error)}
    for name, timing in timer.measure(steps).items():
        result[name] = timing.row()
        if timing.failed is None:
            result[name] |= {"tokens_per_second": 1 / timing.seconds, "share": result["floor"] / timing.seconds}
    return result


# --- training -------------------------------------------------------------------------------------------------------


def train(model: Any, batch: int, length: int, steps: int, chunk: int) -> dict[str, Any]:
    """Tokens a second and peak memory of LoRA training; `model` is not to be used afterwards."""
    from peft import LoraConfig, get_peft_model

    import hqqplus  # noqa: F401  # registers the packed layers with PEFT

    device = model.model.norm.weight.device
    vocabulary = model.config.vocab_size
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, lora).train()
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    optimizer, name = make_optimizer(trained, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    times, losses = [], []
    for _ in range(WARM_UP + steps):
        ids = torch.randint(vocabulary, (batch, length), device=device)
        started = clock(device)
        with torch.autocast(device.type, BF16):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            loss = chunked_loss(hidden, ids, model.lm_head, chunk)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(clock(device) - started)
        losses.append(loss.item())
    if not all(torch.isfinite(torch.tensor(losses))):
        raise RuntimeError(f"the loss is not finite: {losses}")
    seconds = sorted(times[WARM_UP:])[steps // 2]
    return {
        "batch": batch,
        "length": length,
        "steps": steps,
        "rank": RANK,
        "optimizer": name,
        "trained": sum(parameter.numel() for parameter in trained),
        "seconds": seconds,
        "least": min(times[WARM_UP:]),
        "most": max(times[WARM_UP:]),
        "tokens_per_second": batch * length / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "before_bytes": before,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


WARM_UP = 2


def clock(device: torch.device) -> float:
    """Seconds, when all work so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def make_optimizer(parameters: Sequence[nn.Parameter], device: torch.device) -> tuple[Any, str]:
    if device.type == "cuda":
        try:
            from bitsandbytes.optim import PagedAdamW8bit

            return PagedAdamW8bit(parameters, lr=1e-4), "paged_adamw_8bit"
        except Exception as error:  # not installed, or not for this CUDA
            warnings.warn(f"no paged 8-bit AdamW: {first_line(error)}", stacklevel=2)
    return torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda"), "adamw_torch"


def chunked_loss(hidden: Tensor, ids: Tensor, head: nn.Module, chunk: int) -> Tensor:
    """The mean of -ln p of each next token: logits of `chunk` tokens at a time, made anew for the backward pass."""

    def part(h: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(head(h).float(), labels, reduction="sum")

    h, labels = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    parts = zip(h.split(chunk), labels.split(chunk), strict=True)
    return sum((checkpoint(part, *each, use_reentrant=False) for each in parts), hidden.new_zeros(())) / len(labels)


# --- the run --------------------------------------------------------------------------------------------------------


def measure(mode: str, arguments: Any, device: torch.device, timer: Timer, ceilings: Ceilings) -> dict[str, Any]:
    """One mode. What fails is named, and the rest measured."""
    result: dict[str, Any] = {"mode": mode}
    tidy(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    try:
        model = build(configuration(arguments.smoke, arguments.layers), mode, device, arguments.embeddings)
    except Exception as error:
        missing = isinstance(error, ImportError) and mode == "nf4"
        return {**result, "failed": "bitsandbytes is not installed" if missing else first_line(error)}
    result["weight_bytes"] = weight_bytes(model)
    result["read_bytes"] = read = read_bytes(model)
    result["allocated_bytes"] = torch.cuda.memory_allocated(device) - before if device.type == "cuda" else None
    sizes = (2, 16, 2, 8) if arguments.smoke else (8, 1024, 3 if arguments.quick else 10, 2048)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "decode": functools.partial(
            decode, model, timer, ceilings, read, 16 if arguments.smoke else 1024, not arguments.no_compile
        ),
        "training": functools.partial(train, model, *sizes),
    }
    for name, part in parts.items():
        try:
            result[name] = part()
        except Exception as error:
            result[name] = {"failed": first_line(error)}
    return result


def table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["", "resident, GB", "decode, tokens/s", "compiled", "training, tokens/s", "peak, GB"]
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append([row["mode"], row["failed"], "", "", "", ""])
            continue
        decoding, training = row["decode"], row["training"]
        steps = [rate(decoding if "failed" in decoding else decoding.get(n)) for n in ("graph", "graph, compiled")]
        peak = training.get("peak_bytes")
        resident = f"{(row['allocated_bytes'] or row['weight_bytes']) / 1e9:.3g}"
        lines.append([row["mode"], resident, *steps, rate(training), "" if peak is None else f"{peak / 1e9:.3g}"])
    return markdown(header, lines)


def rate(part: dict[str, Any] | None) -> str:
    if part is None:
        return ""
    if "failed" in part:
        return part["failed"]
    share = f" ({100 * part['share']:.0f} %)" if "share" in part else ""
    return f"{part['tokens_per_second']:.4g}{share}{'' if part.get('graph', True) else '*'}"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--modes", nargs="+", choices=MODES, default=MODES, metavar="MODE")
    options.add_argument("--layers", type=int, help="decoder layers, for small cards; default 32")
    options.add_argument("--embeddings", type=int, choices=(4, 8, 16), default=8, help="bits of ours; default 8")
    options.add_argument("--no-compile", action="store_true", help="decode without torch.compile only")
    arguments = options.parse_args()
    device = open_device(arguments)
    torch.manual_seed(0)
    card = hardware(device)
    config = configuration(arguments.smoke, arguments.layers)
    start = {
        "benchmark": "model",
        "smoke": arguments.smoke,
        "quick": arguments.quick,
        "device": card,
        "versions": versions("triton"),
        "model": {name: getattr(config, name) for name in LLAMA_3_8B if name != "rope_parameters"},
        "embeddings": arguments.embeddings,
        "rows": [],
    }
    results = Results(output_path(arguments, "model", card["name"]), start, arguments.seconds)
    timer = Timer(device, 1 if device.type == "cpu" else 7)
    ceilings = measure_ceilings(timer, arguments.smoke)
    results.data["ceilings"] = ceilings.row()
    if arguments.smoke:
        print("SMOKE: no figure below means anything")
    print(
        f"{card['name']}: copy {ceilings.bandwidth / 1e9:.4g} GB/s, bf16 product {ceilings.flops / 1e12:.4g} TFLOP/s"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for mode in arguments.modes:
            if not alive(device):
                results.data["failed"] = "the device does not answer any more"
                break
            if results.in_time(mode):
                results.data["rows"].append(measure(mode, arguments, device, timer, ceilings))
                print(results.data["rows"][-1], flush=True)
                results.save()
        # That a kernel fell back to the reference is a warning.
        results.data["warnings"] = sorted(
            {first_line(w.message) for w in caught if issubclass(w.category, UserWarning)}
        )
    results.finish()
    print(f"\nshare of the floor in brackets; * without a CUDA graph\n{table(results.data['rows'])}")
    for line in [*results.data["warnings"], *(f"left out: {what}" for what in results.data["left_out"])]:
        print(line)


if __name__ == "__main__":
    main()
