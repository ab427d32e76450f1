"""The verbs of `hqqplus`, on a tiny random model."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import hqqplus
from hqqplus import QuantPlan, QuantSpec, cli, models
from hqqplus.adapters import Fingerprint
from hqqplus.calibration.gain import choose_gain
from hqqplus.errors import UserError
from hqqplus.evaluation.divergence import divergence
from hqqplus.evaluation.perplexity import make_windows, perplexity
from hqqplus.evaluation.report import Report
from hqqplus.modules import packed_modules
from tests.shipping import ship_random_adapter

IDS = torch.arange(3, 35).view(1, -1)
TEXTS = ["once upon a time", "there was a model", "of very few bits"]
GROUPS = ("--group-size", 32, "--metadata-bits", 16)
VERBS = (
    "train", "validate", "estimate", "quantize", "convert", "evaluate", "table", "classify", "report", "compare",
    "generate", "chat", "serve", "ship", "export", "env",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def run(*arguments: Any) -> str:
    """stdout of `hqqplus ARGUMENTS`, which must succeed."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise AssertionError(result.output) from result.exception
    assert result.exit_code == 0
    return result.stdout


@pytest.fixture(scope="module")
def made(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A parent, what the command line packed it to, an adapter on that, and texts."""
    folder, parent = tmp_path_factory.mktemp("cli"), random_model("llama")
    said = run("quantize", parent, "--out", folder / "packed", "--nbits", 2, *GROUPS)
    model = ship_random_adapter(folder / "packed", folder / "adapter")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS))
    return SimpleNamespace(
        parent=parent,
        packed=folder / "packed",
        adapter=folder / "adapter",
        texts=folder / "texts.jsonl",
        said=said,
        logits=model(IDS).logits,
    )


# Help ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["quantize", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(run_python: Callable[..., Any], arguments: list[str]) -> None:
    code = (
        "import sys; sys.argv[:] = ['hqqplus', *sys.argv[1:]]\n"
        "from hqqplus import cli\n"
        "try:\n    cli.main()\n"
        "finally:\n    print('HEAVY', sorted({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    )
    output = run_python("-c", code, *arguments).stdout
    assert "Usage: " in output
    assert "HEAVY []" in output


def test_the_module_runs_as_a_command(run_python: Callable[..., Any]) -> None:
    result = run_python("-m", "hqqplus.cli", "nothing", check=False)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "nothing" in result.stderr


def test_every_verb_has_help() -> None:
    overview = run("--help")
    for verb in VERBS:
        assert re.search(rf"^\s+{verb}\s+\S", overview, re.M), verb
        assert "Usage: " in run(verb, "--help")


# quantize ------------------------------------------------------------------------------------------------------------


def test_quantize_says_what_it_wrote(made: SimpleNamespace) -> None:
    *table, last = made.said.splitlines()
    assert re.fullmatch(rf"{made.packed}: 3\.000 bits per weight .*, mean NMSE 0\.\d+, \d+\.\d MB in all", last)
    assert len([line for line in table if re.search(r" model\.layers\.\d\.\S+_proj +2-bit g32 +3\.00 ", line)]) == 14
    model = hqqplus.load(made.packed)
    assert len(packed_modules(model)) == 14
    assert {(m.spec.nbits, m.spec.group_size) for m in packed_modules(model).values()} == {(2, 32)}
    fingerprint = Fingerprint.read(made.packed)
    assert fingerprint is not None
    assert "torch" in fingerprint.versions


def test_the_defaults_are_those_of_the_configuration(made: SimpleNamespace, tmp_path: Path) -> None:
    run("quantize", made.parent, "--out", tmp_path / "out", "--quiet")
    config = hqqplus.load(tmp_path / "out").config.quantization_config
    assert config.to_dict() == hqqplus.HqqPlusConfig().to_dict()


def test_quantize_with_overrides_and_skips(made: SimpleNamespace, tmp_path: Path) -> None:
    run(
        "quantize", made.parent, "--out", tmp_path / "out", "--nbits", 1, "--group-size", 16,
        "--override", "lm_head=8", "--override", "*.down_proj=4:32", "--skip", "*.layers.0.*", "--skip", "o_proj",
    )  # fmt: skip
    specs = {
        name: (m.spec.nbits, m.spec.group_size) for name, m in packed_modules(hqqplus.load(tmp_path / "out")).items()
    }
    layer = "model.layers.1"
    assert specs == {
        **{f"{layer}.self_attn.{name}_proj": (1, 16) for name in "qkv"},
        **{f"{layer}.mlp.{name}_proj": (1, 16) for name in ("gate", "up")},
        f"{layer}.mlp.down_proj": (4, 32),
        "lm_head": (8, 16),
    }


def test_quantize_to_a_size(made: SimpleNamespace, tmp_path: Path) -> None:
    run(
        "quantize",
        made.parent,
        "--out",
        tmp_path / "out",
        "--target-bpw",
        3,
        "--override",
        "*.1.*.q_proj=4:16",
        "--quiet",
    )
    model = hqqplus.load(tmp_path / "out")
    specs = {name: module.spec for name, module in packed_modules(model).items()}
    assert (specs["model.layers.1.self_attn.q_proj"].nbits, specs["model.layers.1.self_attn.q_proj"].group_size) == (
        4,
        16,
    )
    assert len({spec.nbits for spec in specs.values()}) > 1
    rest = [m for name, m in packed_modules(model).items() if not name.endswith("1.self_attn.q_proj")]
    weights = sum(m.in_features * m.out_features for m in rest)
    assert 2.2 < sum(8 * m.packed_bytes for m in rest) / weights <= 3.1  # one layer of the plan is overridden


def test_quantize_with_a_hybrid_plan(made: SimpleNamespace, tmp_path: Path) -> None:
    run(
        "quantize", made.parent, "--out", tmp_path / "out",
        "--embeddings", 8, "--down-proj", 4, "--gain", 0.5, "--quiet",
    )  # fmt: skip
    model = hqqplus.load(tmp_path / "out")
    bits = {name: module.spec.nbits for name, module in packed_modules(model).items()}
    assert bits["model.embed_tokens"] == bits["lm_head"] == 8
    assert {bits[f"model.layers.{i}.mlp.down_proj"] for i in (0, 1)} == {4}
    assert bits["model.layers.0.mlp.up_proj"] == 2
    assert model.config.quantization_config.plan().solver.gain == 0.5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target-bpw", 0.5], r"target_bpw is 0\.5: with these candidates the model takes"),
        (["--embeddings", 3], "embeddings is 3: it must be 8, 4 or None"),
        (["--gain", 2], r"quantize: gain is 2\.0: it must be between 0 and 1"),
        (["--gain", "much"], r"--gain: 'much' is neither a number nor auto"),
        (["--gain", "auto"], r"--gain auto: it needs --calibration-text, some text"),
        (["--calibration-text", "a.txt"], r"--calibration-text: it goes with --gain auto"),
        (
            ["--gain", "auto", "--calibration-text", "no.txt"],
            r"--calibration-text: there is no file or folder 'no\.txt'",
        ),
        (["--lp-norm", 1.5], r"quantize: lp_norm is 1\.5: it must be 2"),
    ],
)
def test_quantize_refuses_bad_plans(made: SimpleNamespace, tmp_path: Path, arguments: list[Any], said: str) -> None:
    arguments = ["quantize", str(made.parent), "--out", str(tmp_path / "out"), *map(str, arguments)]
    with pytest.raises(UserError, match=said):
        CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert not any(tmp_path.iterdir())


def test_quantize_chooses_the_gain(made: SimpleNamespace, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["quantize", made.parent, "--group-size", 64, "--gain", "auto", "--calibration-text", made.texts]
    said = run(*arguments, "--out", tmp_path / "out")
    model, tokenizer = models.load_causal_lm(str(made.parent)), models.load_tokenizer(str(made.parent))
    windows = [torch.tensor([tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]) for text in TEXTS]
    expected = choose_gain(model, QuantPlan(QuantSpec(2, 64)), windows)
    assert said.splitlines()[0] == (
        f"gain {expected.gamma:g}: KL " + ", ".join(f"{kl:.4f} at {gamma:g}" for gamma, kl in expected.kl.items())
    )
    assert hqqplus.load(tmp_path / "out").config.quantization_config.plan().solver.gain == expected.gamma
    capfd.readouterr()
    values = json.loads(run(*arguments, "--out", tmp_path / "json", "--json"))
    assert capfd.readouterr().out == ""
    assert values["gain"] == expected.gamma
    assert {float(gamma): kl for gamma, kl in values["gain_kl"].items()} == pytest.approx(expected.kl, rel=1e-4)
    with pytest.raises(UserError, match=r"^gain: .* has axis 0"):
        CliRunner().invoke(cli.app, [*map(str, arguments), "--out", "out", "--axis", "0"], catch_exceptions=False)


def test_quantize_along_the_output_in_whole_rows(made: SimpleNamespace, tmp_path: Path) -> None:
    run("quantize", made.parent, "--out", tmp_path / "out", "--axis", 0, "--group-size", -1, "--dtype", "bfloat16")
    specs = {module.spec for module in packed_modules(hqqplus.load(tmp_path / "out")).values()}
    assert {(spec.nbits, spec.group_size, spec.axis) for spec in specs} == {(2, -1, 0)}
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.norm.weight"].dtype == torch.bfloat16


def test_quantize_quietly(made: SimpleNamespace, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    said = run("quantize", made.parent, "--out", tmp_path / "out", "--group-size", 64, "--quiet")
    assert re.fullmatch(rf"{tmp_path}/out: 2\.\d+ bits per weight .* MB in all\n", said)
    assert capfd.readouterr() == ("", "")
    specs = {module.spec for module in packed_modules(hqqplus.load(tmp_path / "out")).values()}
    assert {(spec.nbits, spec.group_size, spec.metadata_bits) for spec in specs} == {(2, 64, 8)}


def test_quantize_for_programs(made: SimpleNamespace, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    values = json.loads(run("quantize", made.parent, "--out", tmp_path / "out", *GROUPS, "--json"))
    assert capfd.readouterr() == ("", "")
    fingerprint = Fingerprint.read(tmp_path / "out")
    assert fingerprint is not None
    assert values["output"] == str(tmp_path / "out")
    assert values["packed_sha256"] == fingerprint.packed_sha256
    assert values["packed_layers"] == 14
    assert values["bits_per_weight"] == 3.0
    assert values["total_bytes"] == sum(t.nbytes for t in load_file(tmp_path / "out" / "model.safetensors").values())


def test_quantize_with_no_linear_layer_is_still_json(made: SimpleNamespace, tmp_path: Path) -> None:
    only = ["--override", "embed_tokens=8", "--skip", "*_proj"]
    text = run("quantize", made.parent, "--out", tmp_path / "out", *only, "--json")
    assert json.loads(text)["bits_per_weight"] is None


def test_quantize_fills_an_empty_folder(made: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    run("quantize", made.parent, "--out", tmp_path / "out", *GROUPS)
    assert torch.equal(hqqplus.load(tmp_path / "out")(IDS).logits, hqqplus.load(made.packed)(IDS).logits)


# evaluate and generate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("parent",), ("packed",), ("packed", "adapter"), ("adapter",)], ids=str)
def test_evaluate(made: SimpleNamespace, arguments: tuple[str, ...]) -> None:
    base, *adapter = (getattr(made, name) for name in arguments)
    options = ["--adapter", adapter[0]] if adapter else []
    said = run("evaluate", base, made.texts, "--max-length", 12, "--batch-size", 2, *options)
    tokenizer = models.load_tokenizer(str(made.parent))
    expected = perplexity(hqqplus.load(base, *adapter), make_windows(TEXTS, tokenizer, 12))
    figure = re.fullmatch(rf"perplexity (\d+\.\d{{4}}) \({expected.tokens} tokens, windows of 12\)\n", said)
    assert figure is not None
    # Two windows at a time here, more there: sums in another order.
    assert float(figure[1]) == pytest.approx(expected.perplexity, rel=1e-5)
    assert math.isfinite(expected.perplexity)


def test_evaluate_reads_another_column_and_stops_early(made: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"story": text}) + "\n" for text in TEXTS))
    said = run("evaluate", made.packed, tmp_path / "a.jsonl", "--text-field", "story", "--max-tokens", 10)
    assert re.fullmatch(r"perplexity \d+\.\d{4} \(9 tokens, windows of 1024\)\n", said)


@pytest.mark.parametrize("arguments", [("parent",), ("packed",), ("packed", "adapter")], ids=str)
def test_evaluate_against_the_parent(made: SimpleNamespace, arguments: tuple[str, ...]) -> None:
    base, *adapter = (getattr(made, name) for name in arguments)
    options = ["--adapter", adapter[0]] if adapter else []
    arguments = ("evaluate", base, made.texts, "--max-length", 12, "--against", made.parent, *options)
    windows = make_windows(TEXTS, models.load_tokenizer(str(made.parent)), 12)
    expected = divergence(hqqplus.load(made.parent), hqqplus.load(base, *adapter), windows)
    assert run(*arguments).splitlines() == [
        f"perplexity {expected.model.perplexity:.4f} ({windows.tokens} tokens, windows of 12)",
        f"KL to the parent {expected.kl:.4f} nats a token, agreement {100 * expected.agreement:.2f} %, "
        f"the parent's perplexity {expected.parent.perplexity:.4f}",
    ]
    assert json.loads(run(*arguments, "--json")) == {
        "perplexity": expected.model.perplexity,
        "parent_perplexity": expected.parent.perplexity,
        "kl": expected.kl,
        "agreement": expected.agreement,
        "tokens": windows.tokens,
        "max_length": 12,
    }
    assert (expected.kl == 0) == (base == made.parent)


def test_evaluate_on_tasks(made: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'hqqplus[eval]'")
    from hqqplus.evaluation.tasks import run_tasks

    rows = [{"question": "once", "choices": ["upon", "a time"], "answer": n % 2} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "once",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
    }
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    arguments = ["evaluate", made.packed, "--adapter", made.adapter, "--tasks", "once,", "--include-path", tmp_path]
    model, tokenizer = hqqplus.load(made.packed, made.adapter), models.load_tokenizer(str(made.parent))
    expected = run_tasks(model, tokenizer, ["once"], 2, include_path=tmp_path)
    assert json.loads(run(*arguments, "--limit", 2, "--json")) == expected
    assert expected["tasks"]["once"]["metrics"]["acc"]["value"] == 0.5
    said = run(*arguments, "--limit", 2, made.texts)
    assert said.startswith("perplexity ")
    assert re.search(r"once .* 0 .* 2 .* acc .* 0\.5000 .* ± 0\.5000", said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], r"^evaluate: give TEXTS to measure on, --tasks, or both"),
        (["--against", "parent", "--tasks", "a"], r"^--against: it needs TEXTS"),
        (["texts", "--limit", "3"], r"^--limit, --num-fewshot and --include-path go with --tasks"),
    ],
)
def test_evaluate_refuses_what_says_nothing(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        CliRunner().invoke(cli.app, ["evaluate", "model", *arguments], catch_exceptions=False)


def test_table(tmp_path: Path) -> None:
    for name, bits in (("one", 1), ("two", 2)):
        report = dict.fromkeys([field.name for field in fields(Report)], 3.0)
        recipe = {"model": {"name_or_path": "a/b"}, "quantization": {"nbits": bits, "group_size": 32, "overrides": {}}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps({**report, "recipe": recipe, "samples": []}))
    runs = [tmp_path / "one", tmp_path / "two"]
    lines = run("table", *runs).splitlines()
    assert [line.split(" | ")[:4] for line in lines[2:]] == [["| one", "a/b", "1", "32"], ["| two", "a/b", "2", "32"]]
    assert [row["nbits"] for row in json.loads(run("table", *runs, "--json"))] == [[1], [2]]
    assert [line.split(",")[:3] for line in run("table", *runs, "--csv").splitlines()[1:]] == [
        ["one", "a/b", "1"],
        ["two", "a/b", "2"],
    ]
    for arguments, said in (([tmp_path], r"no report\.json"), ([*runs, "--json", "--csv"], "exclude each other")):
        with pytest.raises(UserError, match=said):
            CliRunner().invoke(cli.app, ["table", *map(str, arguments)], catch_exceptions=False)


@pytest.mark.parametrize("arguments", [("packed",), ("packed", "adapter"), ("adapter",)], ids=str)
def test_generate(made: SimpleNamespace, arguments: tuple[str, ...]) -> None:
    base, *adapter = (getattr(made, name) for name in arguments)
    options = ["--adapter", adapter[0]] if adapter else []
    said = run("generate", base, "once", "of very", "--max-new-tokens", 5, *options)
    tokenizer, model = models.load_tokenizer(str(made.parent)), hqqplus.load(base, *adapter)
    expected = []
    for prompt in ("once", "of very"):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        tokens = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0]
        expected.append(tokenizer.decode(tokens, skip_special_tokens=True))
    assert said == "".join(f"{text}\n" for text in expected)


def test_8_bit_activations(made: SimpleNamespace, tmp_path: Path) -> None:
    run("quantize", made.parent, "--out", tmp_path / "one", "--nbits", 1, *GROUPS, "--quiet")
    lines = {}
    for compute in ("auto", "int8"):
        said = run("evaluate", tmp_path / "one", made.texts, "--max-length", 12, "--compute", compute)
        model = hqqplus.load(tmp_path / "one", compute=compute)
        windows = make_windows(TEXTS, models.load_tokenizer(str(made.parent)), 12)
        assert f"perplexity {perplexity(model, windows).perplexity:.4f} (" in said
        lines[compute] = said
        ids = torch.tensor([models.load_tokenizer(str(made.parent)).encode("once")])
        tokens = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0]
        expected = models.load_tokenizer(str(made.parent)).decode(tokens, skip_special_tokens=True)
        said = run("generate", tmp_path / "one", "once", "--max-new-tokens", 5, "--compute", compute)
        assert said == f"{expected}\n"
    assert lines["auto"] != lines["int8"]
    arguments = ["generate", str(made.packed), "once", "--compute", "int8"]
    with pytest.raises(UserError, match=r"^compute: int8 is for layers of 1 bit"):
        CliRunner().invoke(cli.app, arguments, catch_exceptions=False)


@pytest.mark.parametrize("verb", ["evaluate", "generate"])
def test_the_revision_goes_to_the_model_and_its_tokenizer_only(
    made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str
) -> None:
    asked: list[tuple[str, str, Any]] = []

    def load(name: str, adapter: Any, **arguments: Any) -> Any:
        asked.append(("model", name, arguments["revision"]))
        return AutoModelForCausalLM.from_pretrained(made.packed)

    tokenizer = models.load_tokenizer(str(made.parent))

    def load_tokenizer(name: str, **arguments: Any) -> Any:
        asked.append(("tokenizer", name, arguments["revision"]))
        return tokenizer

    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(models, "load_tokenizer", load_tokenizer)
    text = made.texts if verb == "evaluate" else "once"
    run(verb, "some/model", text, "--revision", "v1")
    run(verb, "some/model", text, "--revision", "v1", "--adapter", made.adapter)
    without = tmp_path / "adapter"
    shutil.copytree(made.adapter, without, ignore=shutil.ignore_patterns("tokenizer*"))
    run(verb, "some/model", text, "--revision", "v1", "--adapter", without)
    model = ("model", "some/model", "v1")
    own = ("tokenizer", "some/model", "v1")
    assert asked == [model, own, model, ("tokenizer", str(made.adapter), None), model, own]


def test_what_does_not_belong_is_refused_or_allowed(made: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copytree(made.adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    other = tmp_path / "other"
    run("quantize", made.parent, "--out", other, "--nbits", 4, *GROUPS, "--quiet")
    verbs = {"evaluate": (made.texts, "--max-length", 12), "generate": ("once", "--max-new-tokens", 2), "export": ()}
    for verb, arguments in verbs.items():
        for base, adapter, said in (
            (made.packed, tmp_path / "adapter", r"chat template: none \(hqqplus\.json\), [0-9a-f]{12} \(here\)"),
            (other, made.adapter, r"quantization\.nbits: 2 \(adapter\), 4 \(here\)"),
        ):
            output = [tmp_path / f"plain_{base.name}"] if verb == "export" else []
            line = [str(part) for part in (verb, base, *output, *arguments, "--adapter", adapter)]
            with pytest.raises(UserError, match=said):
                CliRunner().invoke(cli.app, line, catch_exceptions=False)
            assert not any(path.exists() for path in output)
            run(*line, "--allow-mismatch")
            assert all(path.is_dir() for path in output)


def test_the_distance_to_another_parent_is_refused_or_allowed(made: SimpleNamespace, tmp_path: Path) -> None:
    parent = Path(shutil.copytree(made.parent, tmp_path / "parent"))
    tensors = load_file(parent / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, parent / "model.safetensors", metadata={"format": "pt"})
    line = ["evaluate", str(made.packed), str(made.texts), "--max-length", "12", "--against", str(parent)]
    with pytest.raises(UserError, match=rf"^{made.packed}: {parent} is not its parent: parent: {made.parent} with "):
        CliRunner().invoke(cli.app, line, catch_exceptions=False)
    assert "KL to the parent" in run(*line, "--allow-mismatch")


# export --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_export_and_reload_as_an_ordinary_model(made: SimpleNamespace, tmp_path: Path, dtype: str) -> None:
    said = run("export", made.packed, tmp_path / "plain", "--adapter", made.adapter, "--dtype", dtype)
    first, second = said.splitlines()
    assert first == f"{tmp_path / 'plain'}: an ordinary checkpoint in {dtype}"
    assert re.fullmatch(r"verified: logits differ by \S+ \(root mean square\) .*", second)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert not packed_modules(model)
    assert (model(IDS).logits - made.logits).abs().max() < 0.05
    assert {str(tensor.dtype) for tensor in load_file(tmp_path / "plain" / "model.safetensors").values()} == {
        f"torch.{dtype}"
    }


# validate and env ----------------------------------------------------------------------------------------------------


def recipe(folder: Path, **sections: Any) -> Path:
    values = {"model": {"name_or_path": "a/b"}, "data": {"path_or_name": "rows"}, "output_dir": "out", **sections}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_validate_gives_the_digest_that_overrides_change(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    plain, same, other = (
        run("validate", path, *overrides) for overrides in ([], ["output_dir=elsewhere"], ["adapter.r=3"])
    )
    assert re.fullmatch(rf"{path}: valid \(digest [0-9a-f]{{12}}\)\n", plain)
    assert plain == same != other


def test_validate_says_everything_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, quantization={"nbits": 5, "grup_size": 64}, adapter={"r": "many"})
    monkeypatch.setattr(sys, "argv", ["hqqplus", "validate", str(path)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    assert len(lines) == 3
    for key in ("quantization.nbits", "quantization.grup_size", "adapter.r"):
        assert sum(f" {key}: " in line for line in lines) == 1
    assert all(re.match(rf"{path}:\d+: ", line) for line in lines)


def test_env_lists_versions_and_the_device() -> None:
    said = run("env")
    rows = dict(line.split(maxsplit=1) for line in said.splitlines())
    assert rows["torch"] == torch.__version__
    assert {"transformers", "peft", "trl", "hqqplus"} <= rows.keys()
    device = "cuda:0" if torch.cuda.is_available() else "device"
    assert device in rows


def test_env_shows_which_kernel_serves_what(monkeypatch: pytest.MonkeyPatch) -> None:
    from hqqplus.kernels import routes

    rows = dict(line.strip().split(maxsplit=1) for line in run("env").splitlines())
    assert all(rows[f"sm_{capability}"] == str(row) for capability, row in routes.CROSSOVERS.items())
    monkeypatch.setenv(routes.VARIABLE, "sm_89: some=33")
    routes.for_capability.cache_clear()
    try:
        assert "some=33" in run("env")
        monkeypatch.setenv(routes.VARIABLE, "sm_89: any=33")
        with pytest.raises(UserError, match="'sm_89: NAME=NUMBER"):
            CliRunner().invoke(cli.app, ["env"], catch_exceptions=False)
    finally:
        routes.for_capability.cache_clear()


def test_validate_looks_at_the_data(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Say one", "input": "", "output": "one"}\n' * 4)
    (tmp_path / "r.yaml").write_text(
        f"model: {{name_or_path: embedded:pydoc}}\noutput_dir: {tmp_path}/out\n"
        f"data: {{path_or_name: {tmp_path}/rows.jsonl, alpaca: true, max_length: 8, masked_rows: drop}}\n"
    )
    with pytest.raises(UserError, match="no supervised token"):
        CliRunner().invoke(cli.app, ["validate", str(tmp_path / "r.yaml"), "--data"], catch_exceptions=False)
    said = run("validate", tmp_path / "r.yaml", "--data", "data.max_length=64").splitlines()
    assert said[0] == "hqqplus: no evaluation set named: 1 training rows are held out (data.eval_path_or_name or " + (
        "data.eval_split)"
    )
    assert re.search(r"^3 training rows, \d+ tokens, \d+ of them \(\d+\.\d%\) supervised$", said[2])
    assert said[-1].endswith("[<|bos|>Task:\\nSay one\\n\\nAnswer:\\n]one<|eos|>")
    capfd.readouterr()
    values = json.loads(run("validate", tmp_path / "r.yaml", "--data", "--json", "data.max_length=64"))
    assert values["data"]["rows"] == 3
    assert not (tmp_path / "out").exists()


def test_train_runs_the_recipe_with_its_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hqqplus.train

    ran: list[Any] = []
    monkeypatch.setattr(hqqplus.train, "run", lambda *arguments: ran.append(arguments))
    run("train", recipe(tmp_path), "adapter.r=3", "seed=7")
    run("train", recipe(tmp_path), "--allow-mismatch", "seed=8")
    assert [(one.adapter.r, one.seed, one.model.name_or_path, allowed) for one, allowed in ran] == [
        (3, 7, "a/b", False),
        (16, 8, "a/b", True),
    ]
