"""Files from elsewhere: where they may lead, what is never run; and that the package itself runs nothing."""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file

import hqqplus
from hqqplus import HqqPlusConfig, models
from hqqplus.calibration.store import MANIFEST, read_solutions
from hqqplus.data import load_rows
from hqqplus.data_stream import stream_rows
from hqqplus.errors import UserError
from hqqplus.recipe import load_recipe
from hqqplus.untrusted import (
    INDEX,
    SINGLE,
    arrow_fault,
    check_adapter_files,
    check_link,
    check_model_files,
    indexed_files,
    inside,
    read_json,
    weight_files,
)
from tests.conftest import ROOT

# Text ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff{}", "not text in UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"{", "Expecting"),
        (b"9" * 5000, "4300 digits"),
        (b'["\\ud800"]', "half a character"),
    ],
)
def test_json_that_is_none(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_json(tmp_path / "a.json")


def test_json_without_an_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it is larger than 64 MiB"):
        read_json("/dev/zero")
    (tmp_path / "a.json").write_text('["\\ud83d\\ude00"]')
    assert read_json(tmp_path / "a.json") == ["😀"]


# Paths ---------------------------------------------------------------------------------------------------------------

OUTSIDE = [
    "../x", "../../etc/passwd", "/etc/passwd", "a/../../x", "a/..", "..", ".", "", "a\\b", "C:\\x", "C:x", "a\0b",
    "a\nb", None, 3, ["a"],
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_names_that_lead_out(tmp_path: Path, name: Any) -> None:
    with pytest.raises(UserError, match=r"^m\.json: .* is not the name of a file in its folder$"):
        inside(tmp_path, name, "m.json")


def test_names_that_stay(tmp_path: Path) -> None:
    assert inside(tmp_path, "a.bin", "m.json") == tmp_path / "a.bin"
    assert inside(tmp_path, "a/b.bin", "m.json") == tmp_path / "a" / "b.bin"


def test_links(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (folder / "real").write_text("x")
    (folder / "within").symlink_to("real")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "dangling").symlink_to("../nowhere")
    (folder / "sub" / "up").symlink_to("../../secret")
    (folder / "elsewhere").symlink_to(tmp_path)
    (tmp_path / "alias").symlink_to(folder)
    (tmp_path / "folder-too").mkdir()
    (tmp_path / "folder-too" / "x").write_text("x")
    (folder / "sibling").symlink_to(tmp_path / "folder-too" / "x")
    for start in (folder, tmp_path / "alias"):
        assert inside(start, "within", "m") == start / "within"
        check_link(start, start / "real")
        for name in ("out", "dangling", "sub/up", "elsewhere/secret", "sibling"):
            with pytest.raises(UserError, match=f"^{name} is a link that leads out of its folder, to {tmp_path}"):
                inside(start, name, "m")


def test_the_cache_of_the_hub_is_made_of_links(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "hash").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/hash")
    check_link(snapshot, snapshot / "config.json")
    (repository / "refs").write_text("x")
    (snapshot / "other").symlink_to("../../refs")
    with pytest.raises(UserError, match="leads out of its folder"):
        check_link(snapshot, snapshot / "other")


@pytest.fixture(scope="module")
def packed(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("packed")
    hqqplus.quantize_folder(str(random_model("llama")), folder / "one", HqqPlusConfig(2, 32))
    models.load(folder / "one").save_pretrained(folder / "several", max_shard_size="60KB")
    return SimpleNamespace(one=folder / "one", several=folder / "several")


def refuses(folder: Path, says: str) -> None:
    """Both what reads the layout and what loads the model refuse `folder`, in one sentence."""
    with pytest.raises(UserError, match=says) as refused:
        check_model_files(folder)
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match=says) as refused:
        hqqplus.load(folder, device="cpu")
    assert str(refused.value).startswith(f"model: {folder}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name", ["../one/model.safetensors", "/etc/passwd", "sub/model.safetensors", "x.bin", 3, None]
)
def test_an_index_that_names_other_files(packed: SimpleNamespace, tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "several"
    shutil.copytree(packed.several, folder)
    shutil.copytree(packed.one, tmp_path / "one")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (folder / INDEX).write_text(json.dumps(index))
    refuses(folder, r"is not the name of a safetensors file beside it")
    with pytest.raises(UserError):
        indexed_files(folder)


@pytest.mark.parametrize("name", ["../one/model.safetensors", "/etc/x.safetensors"])
def test_a_configuration_that_names_other_files(packed: SimpleNamespace, tmp_path: Path, name: str) -> None:
    shutil.copytree(packed.one, tmp_path / "one")
    shutil.copytree(packed.one, tmp_path / "other")
    config = json.loads((packed.one / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
    refuses(tmp_path / "other", "transformers_weights: .* is not the name of a file in its folder")


@pytest.mark.parametrize("file", [SINGLE, "config.json", "hqqplus.json", "tokenizer.json"])
def test_models_with_links_out_of_their_folder(packed: SimpleNamespace, tmp_path: Path, file: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(packed.one, folder)
    shutil.move(folder / file, tmp_path / file)
    (folder / file).symlink_to(tmp_path / file)
    refuses(folder, f"{file} is a link that leads out of its folder")
    with pytest.raises(UserError, match="leads out of its folder"):
        models.load_tokenizer(str(folder))


def test_a_manifest_that_names_other_files(tmp_path: Path) -> None:
    block = {"file": "../../secret", "sha256": "0", "specs": {}}
    report = {"name": "b", "losses": {}, "start": "s", "curve": [1.0], "loss": 1.0, "seconds": 1.0, "layers": {}}
    manifest = {"format": 1, "complete": True, "settings": {}, "blocks": {"b": {**block, "report": report}}}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"'\.\./\.\./secret' is not the name of a file in its folder$"):
        read_solutions(tmp_path)


# What is never run ---------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_pickled_weights_of_a_model(random_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(random_model("llama"), folder)
    state = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    torch.save({**state, "x": Bomb(tmp_path / "exploded")}, folder / "pytorch_model.bin")
    refuses(folder, r"no \*\.safetensors; pytorch_model\.bin is a pickle, which may run code")
    assert not (tmp_path / "exploded").exists()


def test_pickled_weights_of_an_adapter(packed: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": "x"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"x": Bomb(tmp_path / "exploded")}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.bin is a pickle, which may run code"):
        check_adapter_files(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"^adapter: .*adapter_model\.bin is a pickle, which may run code"):
        hqqplus.load(packed.one, tmp_path / "adapter", device="cpu")
    assert not (tmp_path / "exploded").exists()


def test_pickles_beside_safetensors_are_left_alone(packed: SimpleNamespace, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(packed.one, folder)
    torch.save({"x": Bomb(tmp_path / "exploded")}, folder / "pytorch_model.bin")
    torch.save({"x": Bomb(tmp_path / "exploded")}, folder / "training_args.bin")
    assert weight_files(folder) == [SINGLE]
    hqqplus.load(folder, device="cpu")
    assert not (tmp_path / "exploded").exists()


def test_code_that_comes_with_a_model(random_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(random_model("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="not_known", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'exploded')!r})\n")
    with pytest.raises(UserError, match="contains custom code"):
        hqqplus.load(folder, device="cpu")
    models.load_tokenizer(str(folder))  # which needs none of it
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_of_others(packed: SimpleNamespace, tmp_path: Path, name: str) -> None:
    """transformers takes the name of a repository on the hub for an implementation, and runs what is in it."""
    shutil.copytree(packed.one, tmp_path / "model")
    config = json.loads((packed.one / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, name: "someone/kernel@main"}))
    refuses(tmp_path / "model", f"config.json: {name} is 'someone/kernel@main': code of others")


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir [exploded]", "!!python/name:os.mkdir", "!!python/module:os", "!x {}"]
)
def test_tags_of_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tag: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{name_or_path: x}}\ndata: {{path_or_name: y}}\noutput_dir: {tag}\n"
    )
    with pytest.raises(
        UserError, match=r"^recipe\.yaml:3: output_dir: (the tag \S+ is not read|'' cannot be read as \S+)$"
    ):
        load_recipe("recipe.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


# Data that ends the process ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "content", "says"),
    [
        (".jsonl", b"null\n", "line 1: expected one JSON object {...} a line, got null"),
        (".jsonl", b'\xef\xbb\xbf null \n{"text": "a"}\n', "line 1: expected"),
        (".jsonl", b'{"text": "a"}\n' * 3 + b'null{"text": "a"}\n', "line 4: expected"),
        (".json", b'[{"text": "a"}, null]', "item 2: expected an object {...}"),
        (".json", b'[NaN, {"text": "a"}]', "item 1: expected an object {...}"),
        (".json", b'[{"text": "a"}, -Infinity]', "item 2: expected an object {...}"),
        (".json", b'[nan, {"text": "a"}]', "not valid JSON"),
        (".jsonl", b'{"text": "a"}\nInfinity\n', "line 2: expected one JSON object {...} a line, got Infinity"),
        (".json", b'[\n  null,\n  {"text": "a"}\n]', "item 1: expected"),
        (".jsonl", b'{"text": ' + b"[" * 20_000 + b"]" * 20_000 + b"}\n", "line 1: nested deeper than 200 levels"),
        (".json", b'{"a":\n' * 20_000 + b"0" + b"}" * 20_000, "nested deeper than 200 levels"),
        (".json", b"[" * 20_000 + b"]" * 20_000, "nested deeper than 200 levels"),
    ],
)
def test_data_that_arrow_cannot_bear(tmp_path: Path, suffix: str, content: bytes, says: str) -> None:
    """A null as the first row, or thousands of levels: pyarrow crashes on them, so they are refused beforehand."""
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"^data\.path_or_name: '.*', ") as refused:
        load_rows(str(path))
    assert says in str(refused.value)
    (tmp_path / "folder").mkdir()
    shutil.move(path, tmp_path / "folder")
    with pytest.raises(UserError, match=r"^data\.path_or_name: '.*', "):
        load_rows(str(tmp_path / "folder"))


def test_lines_that_are_cut_short(tmp_path: Path) -> None:
    """Brackets that are never closed are no nesting."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' + '{"text": {"a"\n' * 400)
    with pytest.raises(UserError, match="line 2: not valid JSON"):
        load_rows(str(tmp_path / "rows.jsonl"))


def test_streams(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('null\n{"text": "a"}\n')
    with pytest.raises(UserError, match=r"line 1: expected one JSON object \{\.\.\.\} a line, got null"):
        stream_rows(str(tmp_path / "rows.jsonl"))


@pytest.mark.xfail(
    Version(datasets.__version__) < Version("5.2"),
    reason="older datasets make a broken array of the list in the last row, which is refused",
    strict=True,
)
def test_data_with_brackets_and_nulls_in_it(tmp_path: Path) -> None:
    """Text may hold any number of brackets, and rows may hold nulls."""
    rows = [{"text": "[" * 5000 + '"' + "{" * 5000}, {"text": None}, {"text": "null"}, {"text": "\\[", "a": [None, 1]}]
    for suffix, content in ((".jsonl", "\n".join(map(json.dumps, rows))), (".json", json.dumps(rows))):
        path = tmp_path / f"rows{suffix}"
        path.write_text(content)
        assert arrow_fault(path) is None
        assert load_rows(str(path))["text"] == [row["text"] for row in rows]


def test_an_object_over_many_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"text": "a", "b": [None, None, True], "c": {"d": None}}, indent=1))
    assert arrow_fault(path) is None


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    """Arrow takes it for text, and Python stumbles over it later."""
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xc1\xbc"}\n')
    with pytest.raises(UserError, match=r"^data\.path_or_name: '.*', byte 28: not UTF-8$"):
        load_rows(str(tmp_path / "rows.jsonl"))


# The package itself --------------------------------------------------------------------------------------------------

# Calls that can run what they are given, or read pickles.
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load",
    "marshal.loads", "shelve.open", "dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads", "joblib.load",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "np.load",
    "numpy.load", "torch.jit.load", "torch.hub.load",
    "torch.package.PackageImporter", "runpy.run_path",
    "runpy.run_module",
}  # fmt: skip
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
# What is allowed, and why.
EXCEPTIONS: dict[tuple[str, str], str] = {}


def calls() -> Iterator[tuple[Path, ast.Call, str]]:
    """Every call in the package, and the dotted name of what is called."""
    for path in sorted((ROOT / "hqqplus").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield path, node, ast.unparse(node.func)


def places(found: list[tuple[Path, ast.AST]]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}" for path, node in found]


def test_nothing_is_unpickled_or_evaluated() -> None:
    found = [
        (path, call)
        for path, call, name in calls()
        if name in FORBIDDEN and (path.relative_to(ROOT).as_posix(), name) not in EXCEPTIONS
    ]
    assert places(found) == []
    for path in sorted((ROOT / "hqqplus").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & MODULES, f"{path}:{node.lineno}"


def test_torch_load_reads_tensors_only() -> None:
    found = [
        (path, call)
        for path, call, name in calls()
        if name == "torch.load"
        and not any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in call.keywords)
    ]
    assert places(found) == []


def test_no_shell() -> None:
    found = [
        (path, call)
        for path, call, _ in calls()
        if any(k.arg == "shell" and getattr(k.value, "value", None) is not False for k in call.keywords)
    ]
    assert places(found) == []


def test_code_of_others_is_run_only_where_it_is_asked_for() -> None:
    """Every `trust_remote_code` is False by default, or hands on what its caller was given."""
    for path in sorted((ROOT / "hqqplus").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                spec = node.args
                named = [*spec.posonlyargs, *spec.args]
                pairs = [*zip(named[len(named) - len(spec.defaults) :], spec.defaults, strict=True)]
                pairs += [*zip(spec.kwonlyargs, spec.kw_defaults, strict=True)]
                defaults = {argument.arg: value for argument, value in pairs}
                default = defaults.get("trust_remote_code")
                assert default is None or getattr(default, "value", None) is False, where
            elif isinstance(node, ast.AnnAssign) and getattr(node.target, "id", None) == "trust_remote_code":
                assert node.value is not None, where
                assert getattr(node.value, "value", None) is False, where
            elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_all_kernels"):
                assert getattr(node.value, "value", None) is not True, where
    signature = load_recipe(ROOT / "recipes" / "embedded_2bit.yaml")
    assert signature.model.trust_remote_code is False


def test_models_are_read_from_safetensors_only() -> None:
    for path, call, name in calls():
        if name.startswith("AutoModel") and name.endswith("from_pretrained"):
            given = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
            assert given.get("use_safetensors") is True, f"{path}:{call.lineno}"


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth"])
def test_the_trainer_resumes_from_tensors_only(name: str) -> None:
    """What transformers reads of a checkpoint, it reads with weights_only."""
    import transformers.trainer as trainer

    tree = ast.parse(Path(str(trainer.__file__)).read_text(encoding="utf-8"))
    loads = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"]
    constants = {"optimizer.pt": "OPTIMIZER_NAME", "scheduler.pt": "SCHEDULER_NAME", "scaler.pt": "SCALER_NAME"}
    own = [n for n in loads if constants.get(name, "rng_file") in ast.unparse(n.args[0])]
    assert own
    for call in loads:
        assert any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in call.keywords)
    assert not any(isinstance(n, ast.Call) and ast.unparse(n.func) in FORBIDDEN for n in ast.walk(tree))
    assert "training_args.bin" not in {ast.unparse(n.args[0]) for n in loads if n.args}
