"""Two processes on the CPU (gloo) train what one process with twice the batch trains: with DDP, and with FSDP2, which
shares the packed model out."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
RUN_EACH = "import sys; from hqqplus.train import main; sys.exit(max(main([path]) for path in sys.argv[1:]))"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
# Sums over the tokens of a batch are made in another order.
TOLERANCE = 1e-5

PLAIN: dict[str, Any] = {}
# All that is trained beside an adapter, and every packed table.
RICH: dict[str, Any] = {
    "recovery": {"loss": "kd", "scales": "bake", "scales_learning_rate": 5e-3},
    "quantization": {"overrides": {"model.embed_tokens": {"nbits": 8}, "lm_head": {"nbits": 8}}},
}


def accelerate(configuration: str) -> tuple[str, ...]:
    path = str(ROOT / "recipes" / "accelerate" / f"{configuration}.yaml")
    return ("-m", "accelerate.commands.launch", "--config_file", path, "--main_process_port", "0")


@pytest.fixture(scope="module")
def recipe(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a recipe of 4 steps whose output goes to a folder of the given name beside it."""
    folder = tmp_path_factory.mktemp("processes")
    # Of all lengths, so that the processes have different numbers of tokens in a step.
    rows = [{"text": " ".join(str((i * k) % 23) for k in range(3 + i % 13))} for i in range(1, 60)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def write(name: str, batch: int, changes: dict[str, Any]) -> Path:
        kind = "rich" if changes else "plain"
        values: dict[str, Any] = {
            "model": {"name_or_path": str(random_model("llama"))},
            "quantization": {"nbits": 2, "group_size": 32, "save_to": str(folder / f"base_{kind}")},
            "adapter": {"r": 4, "init": "default"},
            "data": {"path_or_name": str(folder / "rows.jsonl"), "max_length": 64, "packing": False},
            "training": {
                "max_steps": 4,
                "per_device_train_batch_size": batch,
                "optim": "adamw_torch_fused",
                "learning_rate": 1e-2,
                "eval_steps": 2,
                "save_steps": 2,
                "logging_steps": 1,
            },
            "evaluation": {"max_tokens": 400, "prompts": ["1 2"], "max_new_tokens": 3},
            "output_dir": str(folder / name),
        }
        for section, settings in changes.items():
            values[section] = {**values.get(section, {}), **settings}
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture(scope="module")
def one_process(recipe: Callable[..., Path], run_python: Callable[..., Any]) -> dict[str, Path]:
    """What one process ends with, of both recipes."""
    paths = {"plain": recipe("one_plain", 4, PLAIN), "rich": recipe("one_rich", 4, RICH)}
    run_python("-c", RUN_EACH, *map(str, paths.values()), env=ENVIRONMENT)
    return {name: path.with_suffix("") for name, path in paths.items()}


@pytest.fixture(scope="module")
def with_ddp(
    recipe: Callable[..., Path], one_process: dict[str, Path], run_python: Callable[..., Any]
) -> dict[str, Path]:
    paths = {"plain": recipe("ddp_plain", 2, PLAIN), "rich": recipe("ddp_rich", 2, RICH)}
    done = run_python(
        *TORCHRUN, "--no-python", sys.executable, "-c", RUN_EACH, *map(str, paths.values()), env=ENVIRONMENT
    )
    assert done.stdout.count("hqqplus: adapter in") == 2, "one process speaks, once for each recipe"
    return {name: path.with_suffix("") for name, path in paths.items()}


@pytest.fixture(scope="module")
def with_fsdp(recipe: Callable[..., Path], one_process: dict[str, Path], run_python: Callable[..., Any]) -> Path:
    path = recipe("fsdp_rich", 2, RICH)
    run_python(*accelerate("fsdp2"), "-m", "hqqplus.train", str(path), env={"OMP_NUM_THREADS": "1"})
    return path.with_suffix("")


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def assert_same_training(one: Path, two: Path) -> None:
    ours, theirs = report(two), report(one)
    for curve in ("loss_curve", "ppl_curve"):
        assert len(ours[curve]) == len(theirs[curve]) > 0
        for (step, value), (their_step, their_value) in zip(ours[curve], theirs[curve], strict=True):
            assert step == their_step
            assert value == pytest.approx(their_value, rel=TOLERANCE)
    assert ours["ppl_quantized"] == theirs["ppl_quantized"]
    # The adapter is rounded to 8 bits of mantissa: to one or the other side.
    assert ours["ppl_recovered"] == pytest.approx(theirs["ppl_recovered"], rel=1e-4)
    mine, other = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (two, one))
    assert {name: (t.shape, t.dtype) for name, t in mine.items()} == {n: (t.shape, t.dtype) for n, t in other.items()}
    for name, tensor in mine.items():
        assert (tensor.float() - other[name].float()).abs().max() <= 2**-7 * other[name].float().abs().max(), name


def assert_equal(one: Path, two: Path, *files: str) -> None:
    for key in ("loss_curve", "ppl_curve", "ppl_quantized", "ppl_recovered", "samples"):
        assert report(one)[key] == report(two)[key], key
    for file in files:
        mine, other = load_file(one / file), load_file(two / file)
        assert mine.keys() == other.keys()
        assert all(tensor.equal(other[name]) for name, tensor in mine.items()), file


def interrupted_after_two_steps(finished: Path, copy: Path) -> None:
    """What a run that was killed after its first checkpoint has left behind."""
    copy.mkdir()
    shutil.copytree(finished / "checkpoint-2", copy / "checkpoint-2")


@pytest.mark.parametrize("kind", ["plain", "rich"])
def test_two_processes_train_what_one_does(kind: str, one_process: dict[str, Path], with_ddp: dict[str, Path]) -> None:
    assert_same_training(one_process[kind], with_ddp[kind])
    files = json.loads((with_ddp[kind] / "checkpoint-4" / "hqqplus_checkpoint.json").read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= set(files)


def test_two_processes_continue_as_if_nothing_had_happened(
    recipe: Callable[..., Path], with_ddp: dict[str, Path], run_python: Callable[..., Any]
) -> None:
    path = recipe("ddp_again", 2, PLAIN)
    interrupted_after_two_steps(with_ddp["plain"], path.with_suffix(""))
    # Without ACCELERATE_USE_CPU, as the file's comment has it.
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = run_python(*accelerate("cpu_2"), "-m", "hqqplus.train", str(path), env=environment)
    assert done.stdout.count("hqqplus: continuing from") == 1
    assert_equal(path.with_suffix(""), with_ddp["plain"], "adapter/adapter_model.safetensors")


def test_fsdp2_trains_what_one_process_does(one_process: dict[str, Path], with_fsdp: Path) -> None:
    assert_same_training(one_process["rich"], with_fsdp)
    baked, other = (
        load_file(folder / "backbone" / "model.safetensors") for folder in (with_fsdp, one_process["rich"])
    )
    assert {name: (t.shape, t.dtype) for name, t in baked.items()} == {n: (t.shape, t.dtype) for n, t in other.items()}
    codes = [name for name in baked if name.endswith("W_q")]
    assert codes
    assert all(baked[name].equal(other[name]) for name in codes)
    # The checkpoint holds the adapter alone, and nothing of the packed model.
    saved = load_file(with_fsdp / "checkpoint-4" / "adapter_model.safetensors")
    assert saved.keys() == load_file(with_fsdp / "adapter" / "adapter_model.safetensors").keys()


def test_what_fsdp2_ships_can_be_loaded(with_fsdp: Path) -> None:
    import hqqplus
    from hqqplus import models
    from hqqplus.evaluation.perplexity import make_windows, perplexity

    model = hqqplus.load(with_fsdp / "adapter")
    rows = [json.loads(line)["text"] for line in (with_fsdp.parent / "rows.jsonl").read_text().splitlines()]
    tokenizer = models.load_tokenizer(str(with_fsdp / "adapter"))
    measured = report(with_fsdp)
    # Any text will do to see that it is the trained model and no other.
    windows = make_windows(rows, tokenizer, 64, 400)
    assert perplexity(model, windows).perplexity < measured["ppl_quantized"] / 1.05


def test_fsdp2_continues_as_if_nothing_had_happened(
    recipe: Callable[..., Path], with_fsdp: Path, run_python: Callable[..., Any]
) -> None:
    path = recipe("fsdp_again", 2, RICH)
    interrupted_after_two_steps(with_fsdp, path.with_suffix(""))
    done = run_python(*accelerate("fsdp2"), "-m", "hqqplus.train", str(path), env={"OMP_NUM_THREADS": "1"})
    assert done.stdout.count("hqqplus: continuing from") == 1
    files = ("adapter/adapter_model.safetensors", "backbone/model.safetensors")
    assert_equal(path.with_suffix(""), with_fsdp, *files)


def test_fsdp2_holds_a_share_of_everything_packed(
    random_model: Callable[..., Path], run_python: Callable[..., Any]
) -> None:
    """With a tied head on a packed embedding, gains and norms; see `sharded_model.py`."""
    script = str(Path(__file__).with_name("sharded_model.py"))
    options = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    options |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    environment = {
        **ENVIRONMENT,
        **options,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = run_python(*TORCHRUN, script, str(random_model("llama", tied=True)), env=environment)
    assert done.stdout.count("every packed tensor is shared out") == 2, done.stdout + done.stderr
