"""A user's mistake is one sentence and exit code 2: no traceback, nothing written, nothing lost."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import hqqplus
import hqqplus.train
from hqqplus import HqqPlusConfig, cli, models
from hqqplus.adapters import Fingerprint, ship_adapter
from hqqplus.recipe import load_recipe
from hqqplus.recovery.checkpoints import checkpoint_folder, write_manifest

# What transformers and datasets show while they work.
PROGRESS = re.compile(r"\d%\|| examples/s\]")


@pytest.fixture(scope="module")
def made(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A parent, packed to 2 bits and to 4, and an adapter on the first; rows to train on."""
    folder = tmp_path_factory.mktemp("made")
    parent = folder / "parent"
    shutil.copytree(random_model("llama"), parent)
    for bits in (2, 4):
        model = hqqplus.quantize_folder(
            str(parent), folder / f"packed{bits}", HqqPlusConfig(bits, 32, metadata_bits=16)
        )
    model = models.load(folder / "packed2").requires_grad_(False)
    fingerprint = Fingerprint.read(folder / "packed2")
    assert fingerprint is not None
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    tokenizer = models.load_tokenizer(str(parent))
    ship_adapter(get_peft_model(model, config), tokenizer, folder / "adapter", fingerprint, "card")
    rows = [{"text": f"row {i} of the texts to train on"} for i in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SimpleNamespace(
        parent=parent,
        packed2=folder / "packed2",
        packed4=folder / "packed4",
        adapter=folder / "adapter",
        rows=folder / "rows.jsonl",
    )


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a mistake must leave as it was."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.fixture
def refused(
    work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """Run `hqqplus ARGUMENTS` (or, with "-m", `python -m hqqplus.train ARGUMENTS`), which must refuse.

    Returns the lines of its message.
    """

    def run(*arguments: Any, leaves: tuple[str, ...] = ()) -> list[str]:
        before = tree(work)
        capfd.readouterr()
        argv = [str(argument) for argument in arguments]
        if argv[0] == "-m":
            code = hqqplus.train.main(argv[1:])
        else:
            monkeypatch.setattr(sys, "argv", ["hqqplus", *argv])
            with pytest.raises(SystemExit) as stopped:
                cli.main()
            code = stopped.value.code
        assert code == 2
        after = tree(work)
        assert {name: content for name, content in after.items() if name not in leaves} == before
        error = capfd.readouterr().err
        assert "Traceback" not in error
        return [line for line in re.split(r"[\r\n]+", error) if line.strip() and not PROGRESS.search(line)]

    return run


def tree(folder: Path) -> dict[str, bytes | None]:
    """Relative path -> content of everything in `folder`, hidden files and empty folders too."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


@pytest.fixture
def recipe(work: Path, made: SimpleNamespace) -> Callable[..., Path]:
    """Write a recipe that runs, with changes: `recipe(adapter={"r": "many"})`."""

    def write(**changes: dict[str, Any] | Any) -> Path:
        values: dict[str, Any] = {
            "model": {"name_or_path": str(made.parent)},
            "quantization": {"nbits": 2, "group_size": 32, "metadata_bits": 16},
            "adapter": {"r": 2},
            "data": {"path_or_name": str(made.rows), "max_length": 16},
            "training": {"max_steps": 1, "learning_rate": 1e-3, "use_cpu": True},
            "evaluation": {"max_tokens": 40},
            "output_dir": str(work / "out"),
        }
        for name, change in changes.items():
            values[name] = {**values.get(name, {}), **change} if isinstance(change, dict) else change
        (work / "recipe.yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
        return work / "recipe.yaml"

    return write


@pytest.fixture(params=[("-m",), ("train",)], ids=["python -m hqqplus.train", "hqqplus train"])
def entry(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return request.param


# Recipes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"quantisation": {"nbits": 2}}, "quantisation", "did you mean quantization?"),
        ({"adapter": {"rank": 8}}, "adapter.rank", "unknown"),
        ({"adapter": {"r": "many"}}, "adapter.r", "an integer is needed"),
        ({"quantization": {"nbits": 5}}, "quantization.nbits", "1, 2, 3, 4, 8"),
        ({"model": "a/b"}, "model", "a mapping is needed"),
        ({"output_dir": None}, "output_dir", "missing, and it is required"),
        ({"training": {"max_steps": "lots"}}, "training.max_steps", "an integer is needed"),
        ({"training": {"max_step": 10}}, "training.max_step", "did you mean max_steps?"),
    ],
)
def test_recipes(
    recipe: Callable[..., Path],
    refused: Callable[..., list[str]],
    entry: tuple[str, ...],
    changes: dict[str, Any],
    key: str,
    message: str,
) -> None:
    path = recipe(**changes)
    (line,) = refused(*entry, path)
    assert line.startswith(f"{path}:")
    assert f" {key}: " in line
    assert message in line


def test_overrides(recipe: Callable[..., Path], refused: Callable[..., list[str]], entry: tuple[str, ...]) -> None:
    (line,) = refused(*entry, recipe(), "training.max_steps=soon")
    assert "training.max_steps" in line
    assert "integer" in line
    (line,) = refused(*entry, recipe(), "just_a_word")
    assert "just_a_word" in line


def test_no_recipe(work: Path, refused: Callable[..., list[str]], entry: tuple[str, ...]) -> None:
    (line,) = refused(*entry, work / "missing.yaml")
    assert str(work / "missing.yaml") in line


# What a recipe names -------------------------------------------------------------------------------------------------


def test_no_data_file(
    work: Path, recipe: Callable[..., Path], refused: Callable[..., list[str]], entry: tuple[str, ...]
) -> None:
    (line,) = refused(*entry, recipe(data={"path_or_name": str(work / "missing.jsonl")}))
    assert line.startswith(f"data.path_or_name: there is no file or folder '{work / 'missing.jsonl'}'")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is an empty file"),
        ("\n\n", "at least one row is needed"),
        ('{"text": ""}\n' * 3, "one row with text is needed|nothing to measure"),
        ('{"text": "fine"}\n{"text": "cut o', "line 2: not valid JSON"),
        ('{"story": "fine"}\n' * 3, "there is no column 'text'; the columns are 'story'"),
    ],
)
def test_data_without_rows(
    work: Path, recipe: Callable[..., Path], refused: Callable[..., list[str]], content: str, message: str
) -> None:
    (work / "rows.jsonl").write_text(content)
    (line,) = refused("-m", recipe(data={"path_or_name": str(work / "rows.jsonl")}))
    assert re.search(message, line)


def lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def lose_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def be_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def truncate_weights(folder: Path) -> None:
    truncate(folder / "model.safetensors")


def truncate_config(folder: Path) -> None:
    truncate(folder / "config.json")


def lose_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGES = [
    (shutil.rmtree, "no such folder"),
    (be_a_file, "expected a model folder or a hub id, this is a file"),
    (lose_weights, "this folder holds no weights"),
    (lose_config, "this folder holds no model (no config.json)"),
    (truncate_weights, "a weight file is truncated or damaged"),
    (truncate_config, "not a valid JSON file"),
    (lose_a_tensor, "the checkpoint lacks model.norm.weight"),
]
damages = pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])


@damages
@pytest.mark.parametrize("kind", ["parent", "packed2"])
def test_models_of_a_recipe(
    made: SimpleNamespace,
    work: Path,
    recipe: Callable[..., Path],
    refused: Callable[..., list[str]],
    kind: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    folder = copy(getattr(made, kind), work / "model")
    damage(folder)
    changes: dict[str, Any] = {"model": {"name_or_path": str(folder)}, "evaluation": {"parent": kind == "parent"}}
    (line,) = refused("-m", recipe(**changes))
    assert line.startswith(f"model.name_or_path: {folder}: ")
    assert message in line


def test_a_packed_model_that_the_recipe_wants_otherwise(
    made: SimpleNamespace, recipe: Callable[..., Path], refused: Callable[..., list[str]], entry: tuple[str, ...]
) -> None:
    changes = {"model": {"name_or_path": str(made.packed4)}, "evaluation": {"parent": False}}
    (line,) = refused(*entry, recipe(**changes))
    assert line.startswith(f"quantization: {made.packed4} is packed already, to 4 bits in groups of 32")


def test_a_residual_start_without_its_parent(
    made: SimpleNamespace, work: Path, recipe: Callable[..., Path], refused: Callable[..., list[str]]
) -> None:
    packed = copy(made.packed2, work / "packed")
    changes = {"model": {"name_or_path": str(packed)}, "evaluation": {"parent": False}}
    (packed / "hqqplus.json").unlink()
    (line,) = refused("-m", recipe(**changes))
    assert line.startswith("adapter.init: ")
    assert line.endswith("use init: default")
    values = json.loads((made.packed2 / "hqqplus.json").read_text())
    (packed / "hqqplus.json").write_text(json.dumps({**values, "base": str(work / "gone")}))
    (line,) = refused("-m", recipe(**changes))
    assert f"{work / 'gone'}: no such folder" in line


def test_save_to_that_holds_something_else(
    made: SimpleNamespace, work: Path, recipe: Callable[..., Path], refused: Callable[..., list[str]]
) -> None:
    changes: dict[str, Any] = {"evaluation": {"parent": False}, "quantization": {"save_to": str(work / "base")}}
    copy(made.packed4, work / "base")
    (line,) = refused("-m", recipe(**changes))
    assert line.startswith(f"quantization.save_to: {work / 'base'} holds 4-bit g32 of {made.parent} (sha256 ")
    assert "quantization.nbits: 4 (hqqplus.json), 2 (here)" in line
    assert ": name another folder, or say --allow-mismatch" in line

    shutil.rmtree(work / "base")
    copy(made.packed2, work / "base")
    other = copy(made.parent, work / "other")
    (line,) = refused("-m", recipe(model={"name_or_path": str(other)}, **changes))
    assert f"holds 2-bit g32 of {made.parent}" in line

    shutil.rmtree(work / "base")
    (work / "base").mkdir()
    (work / "base" / "thesis.txt").write_text("precious")
    (line,) = refused("-m", recipe(**changes))
    assert "is no packed model: name another folder" in line

    shutil.rmtree(work / "base")
    (work / "base").write_text("precious")
    (line,) = refused("-m", recipe(**changes))
    assert line.startswith("quantization.save_to: ")
    assert "is a file" in line


def test_a_truncated_model_in_save_to(
    made: SimpleNamespace, work: Path, recipe: Callable[..., Path], refused: Callable[..., list[str]]
) -> None:
    truncate_weights(copy(made.packed2, work / "base"))
    changes: dict[str, Any] = {"evaluation": {"parent": False}, "quantization": {"save_to": str(work / "base")}}
    (line,) = refused("-m", recipe(adapter={"init": "default"}, **changes))
    assert f"{work / 'base'}: a weight file is truncated or damaged" in line


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["no_such_proj"], "no_such_proj"),
        (["q_proj", "lm_head"], "LoRA on the output head is not supported"),
        ("lm_head", "LoRA on the output head is not supported"),
    ],
)
def test_target_modules(
    work: Path, recipe: Callable[..., Path], refused: Callable[..., list[str]], targets: Any, message: str
) -> None:
    changes: dict[str, Any] = {"adapter": {"target_modules": targets, "init": "default"}}
    # Measurements are whole, and the next start needs them.
    (line,) = refused("-m", recipe(evaluation={"parent": False}, **changes), leaves=("out", "out/measurements.json"))
    assert line.startswith("adapter.target_modules: ")
    assert message in line


def test_a_checkpoint_of_another_recipe(
    work: Path, recipe: Callable[..., Path], refused: Callable[..., list[str]], entry: tuple[str, ...]
) -> None:
    folder = checkpoint_folder(work / "out", 10)
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"precious")
    older = load_recipe(recipe(adapter={"r": 8}), ["training.learning_rate=0.5"])
    write_manifest(folder, older, 10, 1.0, 100)
    # An older, incomplete one: a run that is refused must not tidy up either.
    checkpoint_folder(work / "out", 5).mkdir()
    (line,) = refused(*entry, recipe())
    assert line.startswith(f"{folder}: this checkpoint was made by another recipe (")
    assert "adapter.r: 8 -> 2" in line
    assert "training.learning_rate: 0.5 -> 0.001" in line
    assert "output_dir" in line


def test_an_output_dir_that_is_a_file(
    work: Path, recipe: Callable[..., Path], refused: Callable[..., list[str]], entry: tuple[str, ...]
) -> None:
    (work / "out").write_text("precious")
    (line,) = refused(*entry, recipe())
    assert line == f"output_dir: {work / 'out'}: {work / 'out'} is a file, a folder is needed"


# The other verbs -----------------------------------------------------------------------------------------------------


@damages
@pytest.mark.parametrize("kind", ["parent", "packed2"])
def test_models_of_the_other_verbs(
    made: SimpleNamespace,
    work: Path,
    refused: Callable[..., list[str]],
    kind: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    folder = copy(getattr(made, kind), work / "model")
    damage(folder)
    runs: list[tuple[Any, ...]] = [("evaluate", folder, made.rows), ("export", folder, work / "out")]
    if kind == "parent":
        runs.append(("quantize", folder, "--out", work / "out"))
    for arguments in runs:
        (line,) = refused(*arguments)
        assert line.startswith(f"model: {folder}: ")
        assert message in line


@pytest.mark.parametrize("verb", ["generate", "export"])
@pytest.mark.parametrize(
    ("base", "says"), [("packed4", "the base is 4-bit g32 (sha256 "), ("other", "the base is 2-bit g32 (sha256 ")]
)
def test_an_adapter_on_another_base(
    made: SimpleNamespace, work: Path, refused: Callable[..., list[str]], verb: str, base: str, says: str
) -> None:
    folder = made.packed4
    if base == "other":
        # The same architecture, bits and groups, and other weights.
        parent = copy(made.parent, work / "parent")
        tensors = {name: -tensor for name, tensor in load_file(parent / "model.safetensors").items()}
        save_file(tensors, parent / "model.safetensors", metadata={"format": "pt"})
        hqqplus.quantize_folder(str(parent), work / "packed", HqqPlusConfig(2, 32, metadata_bits=16))
        folder = work / "packed"
    last = work / "out" if verb == "export" else "a prompt"
    (line,) = refused(verb, folder, last, "--adapter", made.adapter)
    assert line.startswith(f"{made.adapter}: this adapter was trained on 2-bit g32 of {made.parent} (sha256 ")
    assert says in line


def lose_adapter_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def lose_adapter_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def truncate_adapter_weights(folder: Path) -> None:
    truncate(folder / "adapter_model.safetensors")


def truncate_adapter_config(folder: Path) -> None:
    truncate(folder / "adapter_config.json")


def truncate_fingerprint(folder: Path) -> None:
    truncate(folder / "hqqplus.json")


def change_the_rank(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 9}))


def ask_for_no_quantization(folder: Path) -> None:
    values = json.loads((folder / "hqqplus.json").read_text())
    (folder / "hqqplus.json").write_text(json.dumps({**values, "quantization": {"nbits": 9}}))


@pytest.mark.parametrize(
    ("damage", "base", "message"),
    [
        (shutil.rmtree, "packed2", "this folder holds no adapter"),
        (be_a_file, "packed2", "this folder holds no adapter"),
        (lose_adapter_config, "packed2", "this folder holds no adapter (no adapter_config.json)"),
        (lose_adapter_weights, "packed2", "this folder holds no weights (no adapter_model.safetensors)"),
        (truncate_adapter_weights, "packed2", "a weight file is truncated or damaged"),
        (truncate_adapter_config, "packed2", "a JSON file of it is truncated or damaged"),
        (truncate_fingerprint, "packed2", "not a fingerprint of hqqplus"),
        (change_the_rank, "packed2", "size mismatch"),
        (ask_for_no_quantization, "parent", "nbits is 9: it must be one of 1, 2, 3, 4, 8"),
    ],
)
def test_adapters(
    made: SimpleNamespace,
    work: Path,
    refused: Callable[..., list[str]],
    damage: Callable[[Path], None],
    base: str,
    message: str,
) -> None:
    adapter = copy(made.adapter, work / "adapter")
    damage(adapter)
    for arguments in (("generate", getattr(made, base), "x"), ("export", getattr(made, base), work / "out")):
        (line,) = refused(*arguments, "--adapter", adapter)
        assert str(adapter) in line
        assert message in line


def test_an_adapter_alone_that_does_not_know_its_base(
    made: SimpleNamespace, work: Path, refused: Callable[..., list[str]]
) -> None:
    adapter = copy(made.adapter, work / "adapter")
    (adapter / "hqqplus.json").unlink()
    (line,) = refused("generate", adapter, "x")
    assert line == f"{adapter}: this adapter has no hqqplus.json that names its base: give the base and the adapter"


@pytest.mark.parametrize("verb", ["quantize", "export"])
@pytest.mark.parametrize("full", ["folder", "file"])
def test_an_output_that_is_there_already(
    made: SimpleNamespace, work: Path, refused: Callable[..., list[str]], verb: str, full: str
) -> None:
    precious = work / "precious"
    if full == "folder":
        precious.mkdir()
        (precious / "thesis.txt").write_text("precious")
    else:
        precious.write_text("precious")
    model = made.parent if verb == "quantize" else made.packed2
    out = ("--out", precious) if verb == "quantize" else (precious,)
    (line,) = refused(verb, model, *out)
    assert line.startswith(f"{precious}: exists already")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nbits", 5], "nbits is 5: it must be one of 1, 2, 3, 4, 8"),
        (["--group-size", 12], "group_size is 12"),
        (["--axis", 2], "axis is 2"),
        (["--override", "lm_head"], "--override: 'lm_head' is not PATTERN=BITS"),
        (["--override", "=8"], "--override: '=8' is not PATTERN=BITS"),
        (["--override", "lm_head=eight"], "--override: 'lm_head=eight' is not PATTERN=BITS"),
        (["--override", "lm_head=8:"], "--override: 'lm_head=8:' is not PATTERN=BITS"),
        (["--override", "lm_head=7"], "nbits is 7"),
        (["--skip", "*"], "no linear layer to quantize"),
        (["--dtype", "bf16"], "--dtype: 'bf16' is not one of auto, bfloat16, float16, float32"),
        (["--device", "gpu"], "device: 'gpu' is none of torch's"),
        (["--metadata-bits", 4], "metadata_bits is 4: it must be 8 or 16"),
    ],
)
def test_options_of_quantize(
    made: SimpleNamespace, work: Path, refused: Callable[..., list[str]], options: list[Any], message: str
) -> None:
    (line,) = refused("quantize", made.parent, "--out", work / "out", *options)
    assert message in line


def test_packing_what_is_packed(made: SimpleNamespace, work: Path, refused: Callable[..., list[str]]) -> None:
    (line,) = refused("quantize", made.packed2, "--out", work / "out")
    assert line == f"model: {made.packed2}: this model is packed already; quantize its parent"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_packing_what_is_not_finite(
    made: SimpleNamespace, work: Path, refused: Callable[..., list[str]], bad: float
) -> None:
    parent = copy(made.parent, work / "parent")
    tensors = load_file(parent / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
    save_file(tensors, parent / "model.safetensors", metadata={"format": "pt"})
    (line,) = refused("quantize", parent, "--out", work / "out")
    assert line.startswith(f"model: {parent}: model.layers.1.mlp.up_proj.weight: ")
    assert "NaN or infinite" in line


def test_texts_of_evaluate(made: SimpleNamespace, work: Path, refused: Callable[..., list[str]]) -> None:
    (line,) = refused("evaluate", made.packed2, work / "missing.jsonl")
    assert line.startswith("TEXTS: there is no file or folder")
    (line,) = refused("evaluate", made.packed2, made.rows, "--text-field", "txt")
    assert "there is no column 'txt'" in line
    (work / "empty.jsonl").write_text("")
    (line,) = refused("evaluate", made.packed2, work / "empty.jsonl")
    assert "is an empty file" in line


def test_an_empty_prompt(made: SimpleNamespace, refused: Callable[..., list[str]]) -> None:
    (line,) = refused("generate", made.packed2, "")
    assert "an empty prompt" in line


def test_the_dtype_of_an_export(made: SimpleNamespace, work: Path, refused: Callable[..., list[str]]) -> None:
    (line,) = refused("export", made.packed2, work / "out", "--dtype", "float32")
    assert line == "--dtype: 'float32' is not one of bfloat16, float16"


# For real ------------------------------------------------------------------------------------------------------------


def test_a_wrong_recipe_in_a_new_process(recipe: Callable[..., Path], run_python: Callable[..., Any]) -> None:
    path = recipe(adapter={"rank": 8}, training=None)
    for command in (["-m", "hqqplus.train"], ["-m", "hqqplus.cli", "train"], ["-m", "hqqplus.cli", "validate"]):
        result = run_python(*command, str(path), check=False)
        assert result.returncode == 2
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"{path}:")
        assert " adapter.rank: " in line


@pytest.mark.slow
def test_a_truncated_model_in_a_new_process(
    made: SimpleNamespace, work: Path, recipe: Callable[..., Path], run_python: Callable[..., Any]
) -> None:
    folder = copy(made.packed2, work / "packed")
    truncate_weights(folder)
    path = recipe(model={"name_or_path": str(folder)}, evaluation={"parent": False})
    before = tree(work)
    for command in (
        ["-m", "hqqplus.train", path],
        ["-m", "hqqplus.cli", "generate", folder, "x"],
    ):
        result = run_python(*map(str, command), check=False)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        assert result.stderr.splitlines()[-1].endswith("incomplete metadata, file not fully covered)")
        assert tree(work) == before


def test_the_recipe_of_these_tests_is_a_good_one(made: SimpleNamespace, recipe: Callable[..., Path]) -> None:
    """Else they would all be refused for another reason."""
    assert load_recipe(recipe()).model.name_or_path == str(made.parent)
    assert torch.isfinite(models.load(made.packed2, made.adapter)(torch.arange(3, 9).view(1, -1)).logits).all()
