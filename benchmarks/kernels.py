"""The kernels on a GPU, each beside its floor: `python benchmarks/kernels.py [--quick] [--only SECTION ...] [--tune]`.

First the card's own ceilings (`gpu.py`: copy bandwidth, bf16 products), then the sections:

    dequantize   W [N, K] to bf16                     floor: (2 + bpw / 8) bytes a weight
    embedding    2048 rows of a table to bf16         the same, of those rows
    matmul       y = x W^T, M rows of x, beside       floor: packed bytes; for M > 16 also 2 M N K operations,
                 F.linear in bf16                     whichever takes longer
    dx           dx = dy W, beside dy @ W in bf16     the same
    lora         PEFT's LoRA layer forward and backward, its bf16 layer beside it: the ratio
    crossovers   the measured row of the table in `hqqplus/kernels/routes.py` (`crossovers.py`)
    beside       matmul beside other libraries (`competitors.py`), one that is missing or fails is named

Each result is compared with the reference before it is timed; one that is wrong or fails is named and not timed. All
figures are seconds of one call, weights in memory and not in the L2. Results are written after each layer. `--quick`
has fewer layers and rows; `--tune` also times other cuts of the kernels; `--smoke` tries the logic on tiny matrices
(with `TRITON_INTERPRET=1` and `--device cpu` the Triton kernels too), its figures mean nothing.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import crossovers
import torch
from competitors import COMPETITORS, Competitor, Layer
from gpu import (
    TOLERANCE,
    Ceilings,
    Results,
    Timer,
    Timing,
    Work,
    alive,
    as_packed,
    check,
    check_rows,
    compile_ahead,
    copies_needed,
    first_line,
    hardware,
    measure_ceilings,
    open_device,
    output_path,
    packed_bytes,
    parser,
    product,
    random_packed,
    reference_dx,
    reference_product,
    tidy,
    versions,
    workers_for,
)
from kernel_tables import table, target_table, targets
from torch import Tensor, nn

from hqqplus.kernels import int8, reference, routes, triton
from hqqplus.kernels.packed import Packed
from hqqplus.quantization import PackedTensor, QuantSpec

LAYERS = {  # [out, in]
    "8B q,o": (4096, 4096),
    "8B k,v": (1024, 4096),
    "8B gate,up": (14336, 4096),
    "8B down": (4096, 14336),
    "70B q,o": (8192, 8192),
    "70B k,v": (1024, 8192),
    "70B gate,up": (28672, 8192),
    "70B down": (8192, 28672),
}
HEADS = {"8B lm_head": (128256, 4096), "70B lm_head": (128256, 8192)}
SPECS = {
    "1-bit g64": QuantSpec(1, 64, metadata_bits=16),
    "1-bit g32": QuantSpec(1, 32, metadata_bits=16),
    "2-bit g64": QuantSpec(2, 64, metadata_bits=16),
    "2-bit g32": QuantSpec(2, 32, metadata_bits=16),
    "preset": QuantSpec(),  # 2-bit g32, 8-bit metadata
}
HEAD_SPECS = {"8-bit g64": QuantSpec(8, 64, metadata_bits=16)}
EMBEDDING_SPECS = {**HEAD_SPECS, "4-bit g64": QuantSpec(4, 64, metadata_bits=16)}
SECTIONS = ("dequantize", "embedding", "matmul", "dx", "lora", "crossovers", "beside")
QUICK_SECONDS = 400.0  # after which --quick begins nothing new: in all it has to end within eight minutes
RANK = 16
BESIDE = ("2-bit g64", "1-bit g64")  # specs that are timed beside other libraries
NOT_INSTALLED = "not installed"
INT8_ROWS = 64
INT8_TOLERANCE = 0.05  # activations of 8 bits a token: about 1 % of what is summed up
COMPETITOR_TOLERANCE = 0.03
BF16 = torch.bfloat16


Section = Callable[["Run", str, tuple[int, int]], None]


@dataclass
class Run:
    """One run: what it measures, on what, and where its results go."""

    device: torch.device
    timer: Timer
    ceilings: Ceilings
    results: Results
    layers: dict[str, tuple[int, int]]
    heads: dict[str, tuple[int, int]]
    rows: tuple[int, ...]
    lora_rows: tuple[int, ...]
    tokens: int = 2048
    specs: dict[str, QuantSpec] = field(default_factory=lambda: SPECS)
    plan: crossovers.Plan = field(default_factory=crossovers.Plan)
    setup_limit: float = 600.0
    setup_seconds: dict[str, float] = field(default_factory=dict)

    def add(
        self, section: str, layer: str, entry: str, timing: Timing, floor: float | None = None, **more: Any
    ) -> None:
        """Keep a row: of `timing` the seconds, or why there are none; with a floor also the share of it."""
        row = {"section": section, "layer": layer, "entry": entry, **more, **timing.row()}
        if floor is not None:
            row["floor"] = floor
            if timing.failed is None:
                row["share"] = floor / timing.seconds
        self.results.data["rows"].append(row)

    def cases(self, section: str, layers: dict[str, tuple[int, int]]) -> Iterator[tuple[str, tuple[int, int]]]:
        """The layers of a section, as long as there is time; after each its table is printed and all is saved."""
        for layer, shape in layers.items():
            if not alive(self.device):
                raise RuntimeError("the device does not answer any more")
            if not self.results.in_time(f"{section}: {layer}"):
                continue
            yield layer, shape
            tidy(self.device)
            rows = [row for row in self.results.data["rows"] if (row["section"], row["layer"]) == (section, layer)]
            if rows:
                print(f"\n{section}, {layer} {list(shape)}\n{table(rows)}", flush=True)
            self.results.save()

    def each(self, section: str, layers: dict[str, tuple[int, int]], measure: Section) -> None:
        """`measure(self, layer, shape)` for each layer; one that fails does not cost the others theirs."""
        for layer, shape in self.cases(section, layers):
            try:
                measure(self, layer, shape)
            except Exception as error:
                self.add(section, layer, "all", Timing(failed=first_line(error)))

    def copies(self, spec: QuantSpec, shape: tuple[int, int]) -> list[Packed]:
        first = as_packed(random_packed(spec, shape, self.device))
        rest = range(copies_needed(packed_bytes(first), self.device) - 1)
        return [first, *(as_packed(random_packed(spec, shape, self.device)) for _ in rest)]

    def matrices(self, shape: tuple[int, int]) -> list[Tensor]:
        """Copies of a random bf16 weight."""
        size = 2 * shape[0] * shape[1]
        return [self.random(*shape) * 0.02 for _ in range(copies_needed(size, self.device))]

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=BF16, device=self.device)


# --- sections -------------------------------------------------------------------------------------------------------


def dequantize(run: Run, layer: str, shape: tuple[int, int]) -> None:
    entries, sizes, notes = {}, {}, {}
    for name, spec in run.specs.items():
        copies = run.copies(spec, shape)
        sizes[name] = packed_bytes(copies[0])
        notes[name] = compared(partial(routes.dequantize, copies[0], BF16), reference.dequantize(copies[0], BF16))
        entries[name] = [partial(routes.dequantize, packed, BF16) for packed in copies]
    timings = measured(run, entries, notes)
    for name, size in sizes.items():
        floor = run.ceilings.decode(size + 2 * shape[0] * shape[1])
        more = {"kernel": ran("dequantize", run.device), "bytes": size, **said(notes[name])}
        run.add("dequantize", layer, "hqqplus", timings[name], floor, spec=name, **more)


def embedding(run: Run, layer: str, shape: tuple[int, int]) -> None:
    for name, spec in EMBEDDING_SPECS.items():
        # Two tables and 16 batches of rows: what is read again is no longer in the L2.
        tables = [as_packed(random_packed(spec, shape, run.device)) for _ in range(2)]
        batches = torch.randint(shape[0], (16, run.tokens), device=run.device).unbind()
        calls = [partial(routes.embedding, batch, table, BF16) for batch in batches for table in tables]
        notes = {name: compared(calls[0], reference.embedding(batches[0], tables[0], BF16))}
        timing = measured(run, {name: calls}, notes)[name]
        floor = run.ceilings.decode(run.tokens * int(packed_bytes(tables[0]) / shape[0] + 2 * shape[1]))
        run.add("embedding", layer, "hqqplus", timing, floor, spec=name, rows=run.tokens, **said(notes[name]))
        del tables, calls


def matmul(run: Run, layer: str, shape: tuple[int, int]) -> None:
    products(run, layer, shape, "matmul", routes.matmul, reference_product, nn.functional.linear)


def dx(run: Run, layer: str, shape: tuple[int, int]) -> None:
    def gradient(dy: Tensor, packed: Packed, bias: None) -> Tensor:
        return routes.matmul_dx(dy, packed)

    products(run, layer, shape, "dx", gradient, reference_dx, torch.mm)


def products(
    run: Run,
    layer: str,
    shape: tuple[int, int],
    section: str,
    kernel: Callable[[Tensor, Packed, None], Tensor],
    right: Callable[[Tensor, Packed], Tensor],
    bf16: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Our product for each number of rows, beside that of a bf16 weight."""
    forward = section == "matmul"
    N, K = shape
    x = run.random(max(run.rows), K if forward else N)
    specs = HEAD_SPECS if layer in run.heads else run.specs
    packed = {name: run.copies(spec, shape) for name, spec in specs.items()}
    weights = run.matrices(shape)
    for M in run.rows:
        calls: dict[tuple[str, str], list[Callable[[], Tensor]]] = {}
        notes: dict[tuple[str, str], Note] = {}
        more: dict[tuple[str, str], dict[str, Any]] = {}
        for name, copies in packed.items():
            key = "hqqplus", name
            calls[key] = [partial(kernel, x[:M], each, None) for each in copies]
            expected = partial(right, packed=copies[0])
            notes[key] = checked(partial(kernel, packed=copies[0], bias=None), x[:M], expected)
            more[key] = {"kernel": served(copies[0], M, run.device) if forward else ran("dense", run.device)}
            if forward and int8.supports(copies[0].spec) and M <= INT8_ROWS:
                key = "hqqplus int8", name
                calls[key] = [partial(product, "int8", x[:M], each) for each in copies]
                notes[key] = checked(partial(product, "int8", packed=copies[0]), x[:M], expected, INT8_TOLERANCE)
        calls["F.linear" if forward else "torch.mm", "bf16"] = [partial(bf16, x[:M], weight) for weight in weights]
        timings = measured(run, calls, notes)
        for key, timing in timings.items():
            entry, name = key
            size = packed_bytes(packed[name][0]) if name in packed else 2 * N * K
            floor = run.ceilings.product(size, M, N, K)
            about = {**more.get(key, {}), **said(notes.get(key))}
            run.add(section, layer, entry, timing, floor, spec=name, rows=M, bytes=size, **about)


Note = dict[str, Any] | Timing
"""What a check found: what is known of a result that is right, or why it is not to be timed."""


def checked(
    run: Callable[[Tensor], Tensor], x: Tensor, right: Callable[[Tensor], Tensor], tolerance: float = TOLERANCE
) -> Note:
    """The relative error of `run(x)`."""
    try:
        return {"error": check_rows(run, x, right, tolerance)}
    except Exception as error:
        return Timing(failed=first_line(error))


def compared(run: Callable[[], Tensor], right: Tensor) -> Note:
    """Whether `run()` has the bits of `right`, and its relative error."""
    try:
        found = run()
        return {"error": check(found, right, 1e-3), "same_bits": torch.equal(found, right)}
    except Exception as error:
        return Timing(failed=first_line(error))


def said(note: Note | None) -> dict[str, Any]:
    return note if isinstance(note, dict) else {}


def measured(
    run: Run, calls: dict[Any, list[Callable[[], Any]]], notes: dict[Any, Note], loops: Sequence[Any] = ()
) -> dict[Any, Timing]:
    """Times of what was found right; of the rest what the check said."""
    refused = {key: note for key, note in notes.items() if isinstance(note, Timing)}
    timings = run.timer.measure({key: each for key, each in calls.items() if key not in refused}, loops)
    return {key: refused.get(key) or timings[key] for key in calls}


def served(packed: Packed, rows: int, device: torch.device) -> str:
    """What `routes.py` takes for a forward product."""
    backend = routes._backend(packed, BF16)
    return backend if backend != "triton" else ran(routes.forward_kernel(packed, rows, BF16, device), device)


def ran(kernel: str, device: torch.device) -> str:
    """The kernel's name; with a word where it could not run and was replaced."""
    return f"{kernel}, fell back to the reference" if (kernel, device) in routes._broken else kernel


def lora(run: Run, layer: str, shape: tuple[int, int]) -> None:
    """Forward and backward of a LoRA layer; its adapter in bf16, and in fp32 under autocast as PEFT makes it."""
    specs: dict[str, QuantSpec | None] = {"bf16": None, **run.specs}
    for autocast in (False, True):
        layers = {name: lora_layers(run, shape, spec, autocast) for name, spec in specs.items()}
        for M in run.lora_rows:
            x, dy = run.random(M, shape[1]).requires_grad_(), run.random(M, shape[0])
            calls, notes = {}, {}
            for name, two in layers.items():
                calls[name] = [partial(forward_backward, each, x, dy, autocast) for each in two]
                try:
                    notes[name] = {"error": lora_error(two[0], x, dy, autocast)}
                except Exception as error:
                    notes[name] = Timing(failed=first_line(error))
            timings = measured(run, calls, notes)
            for name, timing in timings.items():
                more = {"adapter": "fp32, autocast" if autocast else "bf16", **said(notes[name])}
                if name != "bf16" and timing.failed is None and timings["bf16"].failed is None:
                    more["ratio"] = timing.seconds / timings["bf16"].seconds
                run.add("lora", layer, "PEFT" if name == "bf16" else "hqqplus", timing, spec=name, rows=M, **more)
        del layers, calls
        tidy(run.device)


def lora_layers(run: Run, shape: tuple[int, int], spec: QuantSpec | None, autocast: bool) -> list[Any]:
    """Two LoRA layers of PEFT over a packed weight, or without `spec` over a bf16 one."""
    from peft import LoraConfig, get_peft_model

    import hqqplus  # noqa: F401  # registers the packed layer with PEFT
    from hqqplus.modules import PackedLinear

    out_features, in_features = shape
    layers = []
    for _ in range(2):
        if spec is None:
            base: nn.Linear = nn.Linear(in_features, out_features, bias=False, device=run.device, dtype=BF16)
            nn.init.normal_(base.weight, std=0.02)
        else:
            base = PackedLinear(in_features, out_features, False, spec, BF16, device="meta")
            base.set_packed(random_packed(spec, shape, run.device))
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], init_lora_weights=False)
        model = get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=autocast)
        layer = model.base_model.model[0].to(run.device)
        for weight in adapter(layer):
            weight.data = weight.data.to(torch.float32 if autocast else BF16)
        layers.append(layer)
    return layers


def adapter(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def forward_backward(layer: Any, x: Tensor, dy: Tensor, autocast: bool) -> tuple[Tensor, ...]:
    """y, and the gradients of x, A and B."""
    # Without its cache, which would outlive the capture of a graph.
    with torch.autocast(x.device.type, BF16, enabled=autocast, cache_enabled=False):
        y = layer(x)
    return y, *torch.autograd.grad(y, [x, *adapter(layer)], dy)


def lora_error(layer: Any, x: Tensor, dy: Tensor, autocast: bool) -> float:
    """The largest relative error of y (of some rows), dx (the same), dA and dB, against float64."""
    y, gradient, da, db = forward_backward(layer, x, dy, autocast)
    a, b = (weight.detach().double() for weight in adapter(layer))
    s = layer.scaling["default"]
    rows = torch.linspace(0, x.shape[0] - 1, min(x.shape[0], 64), device=x.device).round().long()
    some, some_dy = x.detach()[rows], dy[rows]
    base = layer.get_base_layer()
    if hasattr(base, "packed"):
        packed = as_packed(base.packed())
        product_y, product_dx = reference_product(some, packed), reference_dx(some_dy, packed)
    else:
        weight = base.weight.detach().double()
        product_y, product_dx = some.double() @ weight.t(), some_dy.double() @ weight
    whole_x, whole_dy = x.detach().double(), dy.double()
    errors = [
        check(y[rows], product_y + s * (some.double() @ a.t()) @ b.t()),
        check(gradient[rows], product_dx + s * (some_dy.double() @ b) @ a),
        check(da, s * (whole_dy @ b).t() @ whole_x),
        check(db, s * whole_dy.t() @ (whole_x @ a.t())),
    ]
    return max(errors)


def search_crossovers(run: Run) -> None:
    capability = run.results.data["device"].get("capability", 0)
    if run.device.type != "cuda" and not triton.interpreted():
        run.results.data["crossovers"] = {"failed": "the Triton kernels do not run here"}
        return
    present = routes.crossovers(run.device)
    found: dict[str, Any] = {}
    for found in crossovers.search(run.timer, run.cases("crossovers", run.layers), present, run.plan):
        row = routes.Crossovers(**found["row"])
        run.results.data["crossovers"] = {"paste": crossovers.paste(capability, row), **found}
        run.results.save()
    if found:
        found = run.results.data["crossovers"]
        print(f"\nmeasured   {found['paste']}   costs {costs(found['loss'])}")
        print(f"present    {present}   costs {costs(found['present_loss'])}", *found["failed"], sep="\n")


def costs(loss: dict[str, float | None]) -> str:
    """What a row of the table costs beside the best choice in each case."""
    return ", ".join(f"{what}: {'?' if cost is None else f'{100 * cost:.1f} %'}" for what, cost in loss.items())


def beside(run: Run, layer: str, shape: tuple[int, int]) -> None:
    """Other libraries and ours, in turns."""
    N, K = shape
    x = run.random(max(run.rows), K)
    calls: dict[tuple[str, str], list[Callable[[Tensor], Tensor]]] = {}
    sizes: dict[tuple[str, str], int] = {}
    right: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {}
    calls["F.linear", "bf16"] = [partial(nn.functional.linear, weight=weight) for weight in run.matrices(shape)]
    sizes["F.linear", "bf16"] = 2 * N * K
    for spec in (name for name in BESIDE if name in run.specs):
        first = random_packed(run.specs[spec], shape, run.device)
        rest = range(copies_needed(packed_bytes(as_packed(first)), run.device) - 1)
        tensors = [first, *(random_packed(run.specs[spec], shape, run.device) for _ in rest)]
        ours = [as_packed(tensor) for tensor in tensors]
        calls["hqqplus", spec] = [partial(product, "route", packed=packed) for packed in ours]
        sizes["hqqplus", spec] = packed_bytes(ours[0])
        right["hqqplus", spec] = partial(reference_product, packed=ours[0])
        for name, competitor in COMPETITORS.items():
            key = name, "NF4" if competitor.own_bits else spec
            if key in calls:
                continue
            built = build(run, competitor, tensors, name)
            if isinstance(built, Timing):
                run.add("beside", layer, name, built, spec=key[1])
            else:
                calls[key], sizes[key], right[key] = built.calls, built.nbytes, built.expected
    loops = [key for key in calls if key[0] in COMPETITORS and not COMPETITORS[key[0]].graph]
    for M in run.rows:
        notes = {key: checked(calls[key][0], x[:M], right[key], COMPETITOR_TOLERANCE) for key in right}
        with_x = {key: [partial(call, x[:M]) for call in each] for key, each in calls.items()}
        for key, timing in measured(run, with_x, notes, loops).items():
            floor = run.ceilings.product(sizes[key], M, N, K)
            more = said(notes.get(key))
            run.add("beside", layer, key[0], timing, floor, spec=key[1], rows=M, bytes=sizes[key], **more)


def build(run: Run, competitor: Competitor, tensors: list[PackedTensor], name: str) -> Layer | Timing:
    """The competitor's layer, or why there is none. What compiles for minutes is not asked for ever more layers."""
    if competitor.version() is None:
        return Timing(failed=NOT_INSTALLED)
    spent = run.setup_seconds.get(name, 0.0)
    if spent > run.setup_limit:
        return Timing(failed=f"left out: its layers took {spent:.0f} s to set up so far")
    started = time.monotonic()
    try:
        layer = competitor.build(tensors)
        for M in run.rows:  # what is compiled or tuned by the number of rows
            layer.calls[0](run.random(M, tensors[0].shape[1]))
        return layer
    except Exception as error:
        return Timing(failed=first_line(error))
    finally:
        run.setup_seconds[name] = spent + time.monotonic() - started


# --- the run --------------------------------------------------------------------------------------------------------


MEASURES: dict[str, Section] = {
    "dequantize": dequantize,
    "embedding": embedding,
    "matmul": matmul,
    "dx": dx,
    "lora": lora,
    "beside": beside,
}


def works(run: Run, sections: Sequence[str]) -> list[Work]:
    """Kernels to be compiled ahead."""
    made: list[Work] = []
    everything = {**dict.fromkeys(run.layers.values(), run.specs), **dict.fromkeys(run.heads.values(), HEAD_SPECS)}
    for shape, specs in everything.items() if set(sections) - {"crossovers", "embedding"} else ():
        for spec in specs.values():
            kernels = [("dequantize", 1, ()), ("dx", 64, ())]
            # Beyond the last crossover M is only cuBLAS's.
            kernels += [("route", M, ()) for M in run.rows if M <= 1024]
            kernels += [("int8", M, ()) for M in run.rows if M <= INT8_ROWS and int8.supports(spec)]
            made.append(Work(spec, shape, tuple(kernels)))
    if "crossovers" in sections:
        made += crossovers.works(run.layers, run.plan)
    return made


def settings(smoke: bool, quick: bool) -> dict[str, Any]:
    """What is measured: all, less, or next to nothing."""
    if smoke:
        specs = {name: SPECS[name] for name in ("2-bit g64", "1-bit g64")}
        small = {"2-bit g64": SPECS["2-bit g64"]}
        plan = crossovers.Plan(small, {"2-bit g8": crossovers.OTHERS["2-bit g8"]}, (4, 20), (1,), (0, 1), (32,))
        layers, heads = {"tiny": (64, 512)}, {"tiny table": (80, 64)}
        return {
            "layers": layers, "heads": heads, "rows": (1, 20), "lora_rows": (32,), "tokens": 8, "specs": specs,
            "plan": plan,
        }  # fmt: skip
    rows = (1, 4, 16, 64, 256, 1024, 2048, 8192)
    if quick:
        layers = {name: LAYERS[name] for name in ("8B q,o", "8B down")}
        plan = crossovers.Plan(grid=(8, 16, 32, 64, 128, 256), other_grid=(1, 4, 16, 64), slice_rows=(1024, 4096))
        return {
            "layers": layers, "heads": {"8B lm_head": HEADS["8B lm_head"]}, "rows": rows, "lora_rows": (2048, 8192),
            "plan": plan, "setup_limit": 45.0,
        }  # fmt: skip
    return {"layers": LAYERS, "heads": HEADS, "rows": rows, "lora_rows": (1024, 2048, 4096, 8192)}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION")
    options.add_argument("--tune", action="store_true", help="time other cuts of the kernels")
    options.add_argument("--rounds", type=int, default=7)
    arguments = options.parse_args()
    if arguments.quick and arguments.seconds is None:
        arguments.seconds = QUICK_SECONDS
    device = open_device(arguments)
    torch.manual_seed(0)
    card = hardware(device)
    found = {name: competitor.version() or NOT_INSTALLED for name, competitor in COMPETITORS.items()}
    start = {
        "benchmark": "kernels",
        "smoke": arguments.smoke,
        "quick": arguments.quick,
        "device": card,
        "versions": versions("triton", *{competitor.package for competitor in COMPETITORS.values()}),
        "competitors": found,
        "rows": [],
    }
    results = Results(output_path(arguments, "kernels", card["name"]), start, arguments.seconds)
    timer = Timer(device, 1 if device.type == "cpu" else arguments.rounds)
    ceilings = measure_ceilings(timer, arguments.smoke)
    results.data["ceilings"] = ceilings.row()
    run = Run(device, timer, ceilings, results, **settings(arguments.smoke, arguments.quick))
    if arguments.smoke:
        print("SMOKE: no figure below means anything")
    print(
        f"{card['name']}: copy {ceilings.bandwidth / 1e9:.4g} GB/s, bf16 product {ceilings.flops / 1e12:.4g} TFLOP/s, "
    )
    print(f"a launch {1e6 * ceilings.launch:.2g} us; * without a CUDA graph; competitors: {found}", flush=True)
    measure(run, arguments)


def measure(run: Run, arguments: Any) -> None:
    data = run.results.data
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ahead = works(run, arguments.only)
        tuned = {name: crossovers.SPECS[name] for name in run.plan.specs} if arguments.tune else {}
        ahead += crossovers.tune_works(run.layers, tuned, arguments.smoke)
        data["compiling"] = compile_ahead(ahead, run.device, workers_for(run.device), 120 if arguments.quick else 600)
        for name in arguments.only:
            try:
                if name == "crossovers":
                    search_crossovers(run)
                else:
                    chosen = {"matmul": {**run.layers, **run.heads}, "embedding": run.heads}
                    run.each(name, chosen.get(name, run.layers), MEASURES[name])
            except Exception as error:  # a section that fails must not cost the others theirs
                data.setdefault("failed", {})[name] = first_line(error)
                print(f"\n{name} failed: {first_line(error)}", flush=True)
        if arguments.tune:
            data["tune"] = []
            for found in crossovers.tune(run.timer, run.layers, tuned, arguments.smoke):
                data["tune"].append(found)
                print(found, flush=True)
                run.results.save()
        # That a kernel fell back to the reference is a warning.
        data["warnings"] = sorted({first_line(w.message) for w in caught if issubclass(w.category, UserWarning)})
    data["targets"] = targets(data["rows"])
    run.results.finish()
    print(f"\n{target_table(data['targets'])}")
    for line in [*data["warnings"], *data["compiling"], *(f"left out: {what}" for what in data["left_out"])]:
        print(line)


if __name__ == "__main__":
    main()
