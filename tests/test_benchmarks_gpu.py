"""The GPU benchmarks without a GPU: floors and sizes by hand, the choice of borders, and each run end to end, tiny."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import types
from collections.abc import Callable
from importlib import import_module, util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hqqplus.kernels import reference
from hqqplus.kernels import triton as backend
from hqqplus.kernels.routes import Crossovers
from hqqplus.quantization import QuantSpec
from hqqplus.quantization.packing import unpack

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))
gpu = import_module("gpu")
competitors = import_module("competitors")
crossovers = import_module("crossovers")
kernel_tables = import_module("kernel_tables")

RunPython = Callable[..., subprocess.CompletedProcess[str]]
CPU = torch.device("cpu")
CEILINGS = gpu.Ceilings(bandwidth=1e12, flops=1e14, launch=1e-6, details={})


def script(name: str) -> Any:
    """The benchmark as a module. Not under its own name: `kernels` is that of a package on PyPI."""
    spec = util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kernels() -> Any:
    return script("kernels")


@pytest.fixture(scope="module")
def model() -> Any:
    return script("model")


# --- floors and sizes -----------------------------------------------------------------------------------------------


def test_floors_by_hand() -> None:
    assert CEILINGS.decode(5_242_880) == pytest.approx(5.24288e-6)
    # 4096 x 4096 at 2-bit g64: 2.5 bits a weight. One row of x: bytes; 16 rows the same; 2048 rows: operations.
    size = 4096 * 4096 * 5 // 16
    assert CEILINGS.product(size, 1, 4096, 4096) == pytest.approx(size / 1e12)
    assert CEILINGS.product(size, 16, 4096, 4096) == pytest.approx(size / 1e12)
    assert CEILINGS.product(size, 2048, 4096, 4096) == pytest.approx(2 * 2048 * 4096 * 4096 / 1e14)
    # 17 rows are few enough for the bytes to take longer still.
    assert CEILINGS.product(size, 17, 4096, 4096) == pytest.approx(max(size / 1e12, 2 * 17 * 4096 * 4096 / 1e14))


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        (QuantSpec(2, 64, metadata_bits=16), 2.5),
        (QuantSpec(1, 64, metadata_bits=16), 1.5),
        (QuantSpec(2, 32, metadata_bits=16), 3.0),
        (QuantSpec(2, 32), 2 + 16 / 32 + 64 / (128 * 32)),
        (QuantSpec(8, 64, metadata_bits=16), 8.5),
    ],
)
def test_random_weights_have_the_size_and_spread_of_real_ones(spec: QuantSpec, bits: float) -> None:
    packed = gpu.as_packed(gpu.random_packed(spec, (256, 512), CPU))
    assert gpu.packed_bytes(packed) == 256 * 512 * bits / 8
    weight = reference.dequantize(packed, torch.float32)
    assert weight.std().item() == pytest.approx(gpu.SIGMA, rel=0.1)
    assert abs(weight.mean().item()) < gpu.SIGMA / 10
    assert unpack(packed.W_q, spec.nbits, packed.layout.plane).unique().numel() == spec.qmax + 1


def test_copies_are_four_times_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "hardware", lambda device: {"l2_bytes": 50 << 20})
    card = types.SimpleNamespace(type="cuda")
    assert gpu.copies_needed(5 << 20, card) == 40
    assert gpu.copies_needed(1 << 30, card) == 2
    assert gpu.copies_needed(1, card) == 512


def test_slices_of_the_reference_are_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in (QuantSpec(2, 32), QuantSpec(2, 32, axis=0)):
        packed = gpu.as_packed(gpu.random_packed(spec, (96, 64), CPU))
        weight = reference.dequantize(packed, torch.float32).double()
        x, dy = torch.randn(5, 64), torch.randn(5, 96)
        slices = gpu._slices
        monkeypatch.setattr(gpu, "_slices", lambda packed, slices=slices: slices(packed, 40))
        torch.testing.assert_close(gpu.reference_product(x, packed), x.double() @ weight.t())
        torch.testing.assert_close(gpu.reference_dx(dy, packed), dy.double() @ weight)
        monkeypatch.undo()


def test_check_refuses_what_is_wrong() -> None:
    x, weight = torch.randn(7, 8), torch.randn(9, 8)

    def right(rows: Tensor) -> Tensor:
        return rows.double() @ weight.double().t()

    assert gpu.check_rows(lambda x: x @ weight.t(), x, right) < 1e-6
    for wrong in (
        lambda x: 1.02 * x @ weight.t(),
        lambda x: x @ weight[:-1].t(),
        lambda x: torch.full((7, 9), torch.nan),
        lambda x: torch.where(torch.arange(7)[:, None] == 6, 0, x @ weight.t()),  # the last row
    ):
        with pytest.raises(gpu.WrongResult):
            gpu.check_rows(wrong, x, right)


def test_timer_names_what_fails_and_times_the_rest() -> None:
    calls = []
    entries = {"good": [lambda: calls.append(1), lambda: calls.append(2)], "bad": [lambda: 1 / 0]}
    timings = gpu.Timer(CPU, rounds=3).measure(entries)
    assert list(timings) == ["good", "bad"]
    assert timings["good"].failed is None
    assert 0 < timings["good"].least <= timings["good"].seconds <= timings["good"].most
    assert calls == [1, 2] * 3
    assert timings["bad"].row() == {"failed": "ZeroDivisionError: division by zero"}


def test_results_are_kept_and_no_more_is_begun_after_the_limit(tmp_path: Path) -> None:
    results = gpu.Results(tmp_path / "r.json", {"rows": [1]}, limit=0.0)
    assert not results.in_time("what takes long")
    results.save()
    kept = json.loads((tmp_path / "r.json").read_text())
    assert kept["rows"] == [1]
    assert not kept["complete"]
    assert kept["left_out"] == ["what takes long"]


# --- the table of crossovers ----------------------------------------------------------------------------------------


def test_borders_are_where_the_lines_cross() -> None:
    """matmul costs 1 + M / 8, gemm 3 + M / 32, dense 7 always: they cross between 16 and 24 rows, and at 128."""
    times = {
        (layer, "spec", rows): {"matmul": 1 + rows / 8, "gemm": 3 + rows / 32, "dense": 7.0}
        for layer in ("a", "b")
        for rows in (4, 8, 16, 24, 64, 96, 192, 256)
    }
    assert crossovers.best_borders(times) == (16, 96)
    assert crossovers.loss(times, crossovers.by_borders(16, 96)) == pytest.approx(0)
    # At the 8 numbers of rows, only 192 and 256 go wrong: gemm takes 9 and 11 there.
    expected = math.exp((math.log(9 / 7) + math.log(11 / 7)) / 8) - 1
    assert crossovers.loss(times, crossovers.by_borders(16, 256)) == pytest.approx(expected)


def test_a_kernel_that_does_not_run_is_not_chosen() -> None:
    times = {("a", "s", rows): {"dense": 5.0, "gemm": 1.0} for rows in (4, 8)} | {("a", "s", 16): {"dense": 5.0}}
    assert crossovers.best_borders(times) == (0, 8)
    assert crossovers.loss(times, crossovers.by_borders(0, 16)) == math.inf
    others = {("a", "s", rows): {"simt": rows, "general": 2.0 + rows / 4, "dense": 6.0} for rows in (1, 2, 4, 8, 32)}
    assert crossovers.best_of_others(others) == (2, 8)


def test_summary_changes_only_what_was_measured() -> None:
    present = Crossovers(few=16, some=64, simt=4, general=8, slice_mib=16)
    sliced = {("a", "s", 1024): {"0": 3.0, "8": 2.0, "32": 2.5}}
    found = crossovers.summary({}, {}, sliced, present, [])
    assert found["row"] == {**found["present"], "slice_mib": 8}
    # 16 MiB were not timed: the next larger slice was.
    assert found["present_loss"]["slice_mib"] == pytest.approx(0.25)
    assert crossovers.paste(90, Crossovers(**found["row"])).startswith("90: Crossovers(few=16, some=64")


# --- targets and tables ---------------------------------------------------------------------------------------------


def test_targets_take_the_worst_case() -> None:
    def row(section: str, seconds: float, entry: str = "hqqplus", **more: Any) -> dict[str, Any]:
        return {"section": section, "entry": entry, "layer": "8B down", "seconds": seconds, "graph": True, **more}

    rows = [
        row("dequantize", 1.0, spec="a", share=0.95),
        row("dequantize", 1.0, spec="b", share=0.91),
        row("matmul", 2.0, spec="2-bit g64", rows=1, share=0.7),
        row("matmul", 1.0, spec="1-bit g64", rows=1, share=0.85),
        row("matmul", 8.0, "F.linear", spec="bf16", rows=1, share=0.9),
        {"section": "matmul", "entry": "hqqplus", "layer": "8B down", "spec": "c", "rows": 1, "failed": "no"},
        row("lora", 1.0, spec="a", rows=8192, adapter="bf16", ratio=1.05),
        row("lora", 1.0, spec="b", rows=8192, adapter="bf16", ratio=1.2),
        row("lora", 1.0, spec="b", rows=8192, adapter="fp32, autocast", ratio=0.9),
    ]
    found = {each["target"]: (each["measured"], each["met"]) for each in kernel_tables.targets(rows)}
    assert found["dequantize, share of the copy bandwidth"] == (0.91, True)
    assert found["matmul, M = 1, share of packed bytes / bandwidth"] == (0.7, False)
    assert found["matmul, M = 16, share of packed bytes / bandwidth"] == (None, None)
    assert found["2-bit g64 4096 x 14336, M = 1, times as fast as F.linear"] == (4.0, False)
    assert found["1-bit g64 4096 x 14336, M = 1, times as fast as F.linear"] == (8.0, True)
    assert found["LoRA layer, M = 8192, time of the bf16 one"] == (1.2, False)
    assert all(each["measured"] is None and each["met"] is None for each in kernel_tables.targets([]))
    assert "not measured" in kernel_tables.target_table(kernel_tables.targets([]))


def test_table_shows_microseconds_shares_and_failures() -> None:
    rows = [
        {"entry": "hqqplus", "spec": "2-bit g64", "rows": 1, "seconds": 2e-6, "share": 0.5, "graph": True},
        {"entry": "hqqplus", "spec": "2-bit g64", "rows": 4, "seconds": 3e-6, "share": 0.25, "graph": False},
        {"entry": "gemlite", "spec": "2-bit g64", "failed": "not installed"},
    ]
    lines = kernel_tables.table(rows).splitlines()
    assert lines[0] == "|  | M = 1 | M = 4 |"
    assert lines[2] == "| hqqplus 2-bit g64 | 2 (50 %) | 3* (25 %) |"
    assert lines[3] == "| gemlite 2-bit g64 | not installed |  |"


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["kernels", "model"])
def test_without_a_card_nothing_is_measured(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    main = request.getfixturevalue(name).main
    for arguments in ([], ["--device", "cpu"], ["--smoke"]):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments, "--output", str(tmp_path / "result.json")])
        with pytest.raises(SystemExit, match="needs a CUDA device") as stopped:
            main()
        assert stopped.value.code != 0
    assert not list(tmp_path.iterdir())


def test_a_smoke_run_writes_no_result_of_its_own() -> None:
    arguments = types.SimpleNamespace(output=None, smoke=True)
    assert gpu.output_path(arguments, "kernels", "NVIDIA H200") is None
    arguments.smoke = False
    assert gpu.output_path(arguments, "kernels", "NVIDIA H200") == BENCHMARKS / "results" / "kernels_nvidia_h200.json"


def test_kernels_end_to_end(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = competitors.COMPETITORS["hqq PYTORCH"]

    def wrong(tensors: list[Any]) -> Any:
        layer = competitors.hqq_pytorch(tensors)
        return competitors.Layer([lambda x: 2 * layer.calls[0](x)], layer.nbytes, layer.expected)

    def failing(tensors: list[Any]) -> Any:
        raise RuntimeError("no kernel image\nis available")

    made = competitors.Competitor
    chosen = {
        "hqq PYTORCH": right,
        "missing": made("hqqplus-no-such-package", "hqqplus_no_such_package", failing),
        "failing": made("torch", "torch", failing),
        "wrong": made("torch", "torch", wrong, own_bits=True),
    }
    monkeypatch.setattr(kernels, "COMPETITORS", chosen)
    output = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--smoke", "--device", "cpu", "--output", str(output)])
    kernels.main()
    result = json.loads(output.read_text())
    assert result["smoke"]
    assert result["complete"]
    assert not result.get("failed")
    assert {row["section"] for row in result["rows"]} == set(kernels.SECTIONS) - {"crossovers"}
    ceilings = result["ceilings"]
    assert ceilings["bytes_per_second"] == max(ceilings["copies"].values()) > 0
    assert ceilings["flops"] == max(ceilings["products"].values()) > 0
    for row in result["rows"]:
        if "failed" in row:
            assert row["entry"] in chosen
            continue
        assert 0 < row["least"] <= row["seconds"] <= row["most"]
        assert not row["graph"]
        if "floor" in row:
            assert row["share"] == pytest.approx(row["floor"] / row["seconds"])
        assert row["entry"] in ("F.linear", "torch.mm") or 0 <= row["error"] < 0.05
    tiny = [row for row in result["rows"] if row["layer"] == "tiny"]
    by_key = {(r["section"], r["entry"], r.get("spec"), r.get("rows"), r.get("adapter")): r for r in tiny}
    # 64 x 512 at 2-bit g64: 64 * 512 * 2.5 / 8 bytes packed, two bytes a weight written.
    dequantize = by_key["dequantize", "hqqplus", "2-bit g64", None, None]
    assert dequantize["bytes"] == 10240
    assert dequantize["floor"] == pytest.approx((10240 + 2 * 64 * 512) / ceilings["bytes_per_second"])
    assert dequantize["same_bits"]
    one, many = (by_key["matmul", "hqqplus", "2-bit g64", M, None] for M in (1, 20))
    assert one["floor"] == pytest.approx(10240 / ceilings["bytes_per_second"])
    operations = 2 * 20 * 64 * 512 / ceilings["flops"]
    assert many["floor"] == pytest.approx(max(10240 / ceilings["bytes_per_second"], operations))
    assert by_key["matmul", "F.linear", "bf16", 1, None]["bytes"] == 2 * 64 * 512
    base = by_key["lora", "PEFT", "bf16", 32, "bf16"]
    ours = by_key["lora", "hqqplus", "2-bit g64", 32, "bf16"]
    assert ours["ratio"] == pytest.approx(ours["seconds"] / base["seconds"])
    said = {(row["entry"], row.get("failed")) for row in result["rows"] if row["section"] == "beside"}
    assert ("missing", "not installed") in said
    assert ("failing", "RuntimeError: no kernel image") in said
    assert any(name == "wrong" and text and text.startswith("WrongResult: relative error") for name, text in said)
    assert ("hqq PYTORCH", None) in said
    assert result["competitors"]["missing"] == "not installed"
    printed = capsys.readouterr().out
    assert "SMOKE" in printed
    assert f"{1e6 * one['seconds']:.4g}* " in printed


@pytest.mark.skipif(not backend.available(), reason="triton is not installed")
def test_kernels_under_the_interpreter(run_python: RunPython, tmp_path: Path) -> None:
    """The Triton kernels, the search for borders, and other cuts."""
    output = tmp_path / "result.json"
    sections = ["matmul", "crossovers"]
    done = run_python(
        "-W", "ignore", "benchmarks/kernels.py", "--smoke", "--device", "cpu", "--tune", "--output", str(output),
        "--only", *sections, env={"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    result = json.loads(output.read_text())
    assert not result.get("failed")
    taken = {row["rows"]: row["kernel"] for row in result["rows"] if row["entry"] == "hqqplus"}
    assert taken == {1: "matmul", 20: "gemm"}
    found = result["crossovers"]
    assert not found["failed"]
    assert set(found["forward"][0]["seconds"]) == {"matmul", "gemm", "dense"}
    assert set(found["others"][0]["seconds"]) == {"simt", "general", "dense"}
    assert set(found["slices"][0]["seconds"]) == {"0", "1"}
    assert all(seconds > 0 for case in found["forward"] for seconds in case["seconds"].values())
    assert found["loss"]["few, some"] <= found["present_loss"]["few, some"]
    assert found["paste"] in done.stdout
    assert Crossovers(**found["row"])
    assert [(each["kernel"], each["rows"]) for each in result["tune"]] == [("matmul", 1), ("gemm", 12)]
    for each in result["tune"]:
        assert each["failed"] == 0
        ratios = [best["ratio"] for best in each["best"]]
        assert len(ratios) == each["tried"] == 2
        assert ratios == sorted(ratios)


def test_compile_work_names_what_does_not_run() -> None:
    spec, shape = QuantSpec(2, 64, metadata_bits=16), (16, 256)
    good = (("route", 1, ()), ("dx", 2, ()), ("dequantize", 1, ()))
    assert gpu.compile_work(gpu.Work(spec, shape, good), "cpu") == []
    failed = gpu.compile_work(gpu.Work(spec, shape, (("nonsense", 3, ()),)), "cpu")
    assert len(failed) == 1
    assert failed[0].startswith("nonsense of 3 rows: ModuleNotFoundError")


def test_model_end_to_end(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(weight: Tensor) -> Any:
        raise ImportError("No module named 'bitsandbytes'")

    monkeypatch.setattr(model, "nf4_linear", missing)
    output = tmp_path / "result.json"
    arguments = ["--smoke", "--device", "cpu", "--no-compile", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["model.py", *arguments])
    model.main()
    result = json.loads(output.read_text())
    assert result["smoke"]
    assert result["complete"]
    rows = {row["mode"]: row for row in result["rows"]}
    assert list(rows) == list(model.MODES)
    assert rows.pop("nf4")["failed"] == "bitsandbytes is not installed"
    # 2 layers of q 64 x 64, k and v 32 x 64, o 64 x 64, gate, up and down 128 x 64; embedding and head 320 x 64.
    linear, table, norms = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64), 320 * 64, 5 * 64 * 2
    assert rows["bf16"]["weight_bytes"] == 2 * (linear + 2 * table) + norms
    assert rows["bf16"]["read_bytes"] == 2 * (linear + table) + norms
    # 8 bits in groups of 64 with 8-bit metadata: 320 groups a table in 3 blocks.
    eight = table + 2 * 320 + 3 * 8
    assert rows["2-bit g64"]["weight_bytes"] == linear * 5 // 16 + 2 * eight + norms
    assert rows["1-bit g64"]["weight_bytes"] == linear * 3 // 16 + 2 * eight + norms
    for row in rows.values():
        step = row["decode"]["graph"]
        assert row["decode"]["error"] < 0.05
        assert step["tokens_per_second"] == pytest.approx(1 / step["seconds"])
        assert row["decode"]["floor"] == pytest.approx(row["read_bytes"] / result["ceilings"]["bytes_per_second"])
        training = row["training"]
        # Rank 16 times (in + out) of each linear layer.
        assert training["trained"] == 2 * 16 * (2 * 128 + 2 * 96 + 3 * 192)
        assert training["tokens_per_second"] == pytest.approx(2 * 16 / training["seconds"])
        assert abs(training["first_loss"] - math.log(320)) < 0.5
        assert training["last_loss"] != training["first_loss"]
    printed = capsys.readouterr().out
    assert "| nf4 | bitsandbytes is not installed |" in printed


def test_decoding_is_the_model_and_compiles_once_for_all_layers(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounter

    llama = model.build(model.configuration(True, 3), "2-bit g64", CPU, 8)
    assert not [name for name, p in llama.named_parameters() if p.is_meta or p.requires_grad]
    assert model.check_decoder(llama) < 0.05
    plain, counter, compiler = model.Decoder(llama, 16), CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, backend=counter, **options))
    compiled = model.Decoder(llama, 16, compiled=True)
    for _ in range(18):  # once around the cache
        torch.testing.assert_close(compiled.step(), plain.step())
    assert counter.frame_count == 1
    # A wrong rotation is seen. With weights as small as those of wide layers, so narrow ones would hardly look back.
    for layer in llama.model.layers:
        layer.input_layernorm.weight.fill_(16)
    assert model.check_decoder(llama) < 0.05
    monkeypatch.setattr(model, "rotated", lambda x, cos, sin: x * cos)
    with pytest.raises(gpu.WrongResult):
        model.check_decoder(llama)


def test_chunked_loss_is_the_loss(model: Any) -> None:
    head, ids = torch.nn.Linear(8, 11, bias=False), torch.randint(11, (2, 7))
    hidden = torch.randn(2, 7, 8, requires_grad=True)
    whole = torch.nn.functional.cross_entropy(head(hidden[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    for chunk in (1, 5, 12, 100):
        loss = model.chunked_loss(hidden, ids, head, chunk)
        torch.testing.assert_close(loss, whole)
        torch.testing.assert_close(*(torch.autograd.grad(x, hidden, retain_graph=True)[0] for x in (loss, whole)))
