"""`hqqplus ship`: the folder of a finished run as one to hand on, and on to the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from peft import PeftModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import hqqplus
from hqqplus import HqqPlusConfig, cli, models
from hqqplus.adapters import Fingerprint, eight_bit, hub, ship
from hqqplus.errors import UserError
from hqqplus.files import write_json
from tests.hub_server import TOKEN, Hub
from tests.shipping import recipe, report, ship_random_adapter

IDS = torch.arange(3, 35).view(1, -1)
NAMES = ["README.md", "adapter_config.json", "hqqplus.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def finished(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What a run leaves behind, checkpoints and all, with a parent that is known by its path."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    parent = random_model("llama")
    hqqplus.quantize_folder(str(parent), folder / "base", HqqPlusConfig(nbits=2, group_size=32))
    model = ship_random_adapter(folder / "base", folder / "adapter")
    (folder / "checkpoint-4").mkdir()
    for path in ("checkpoint-4/optimizer.pt", "checkpoint-4/trainer_state.json", "log.jsonl", "adapter/.env"):
        (folder / path).write_text("secret")
    values = recipe(model={"name_or_path": str(parent)}, output_dir=str(folder))
    write_json(folder / "report.json", report(name="tiny", recipe=values).to_json())
    return SimpleNamespace(run=folder, parent=parent, logits=model(IDS).logits, model=model)


@pytest.fixture
def work(finished: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(finished.run, tmp_path / "run"))


def invoke(*arguments: Any) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


# The folder ----------------------------------------------------------------------------------------------------------


def test_the_folder(finished: SimpleNamespace, tmp_path: Path) -> None:
    shipped = ship.ship_run(finished.run, tmp_path / "out")
    assert sorted(shipped.files) == sorted([*NAMES, "adapter_model.safetensors"])
    assert {name: (tmp_path / "out" / name).stat().st_size for name in shipped.files} == shipped.files
    old, new = (load_file(f / "adapter_model.safetensors") for f in (finished.run / "adapter", tmp_path / "out"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert shipped.adapter_bytes == shipped.files["adapter_model.safetensors"]
    assert torch.equal(hqqplus.load(finished.run / "base", tmp_path / "out")(IDS).logits, finished.logits)
    assert torch.equal(hqqplus.load(finished.parent, tmp_path / "out")(IDS).logits, finished.logits)
    models.load_with_tokenizer(finished.run / "base", tmp_path / "out")  # whose digests are checked
    text = (tmp_path / "out" / "README.md").read_text()
    assert ModelCard(text).data.license == "unknown"
    assert shipped.notes == (f"the licence of {finished.parent.name} was not found: the card says so",)
    for path in (tmp_path / "out").rglob("*"):
        content = path.read_text(errors="replace")
        assert str(finished.parent.parent) not in content
        assert "secret" not in content
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        finished.parent.name
    )


def test_8_bits_the_backbone_and_a_name(finished: SimpleNamespace, tmp_path: Path) -> None:
    said = invoke(
        *(
            "ship",
            finished.run,
            "--out",
            tmp_path / "out",
            "--bits",
            8,
            "--backbone",
            "--base",
            "owner/model",
            "--quiet",
        )
    )
    assert f"{tmp_path / 'out'}: an adapter of " in said
    assert " bytes in 8 bits, 14 files" in said
    names = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    packed = [f"backbone/{name}" for name in [*NAMES, "config.json", "generation_config.json", "model.safetensors"]]
    packed.remove("backbone/adapter_config.json")
    assert names == sorted([*NAMES, "adapter_8bit.json", "adapter_8bit.safetensors", *packed])
    logits = hqqplus.load(tmp_path / "out")(IDS).logits  # alone: the packed model is in it
    assert 0 < (logits - finished.logits).abs().max() < 0.1
    data = ModelCard((tmp_path / "out" / "README.md").read_text()).data
    assert data.base_model == "owner/model"
    assert Fingerprint.read(tmp_path / "out" / "backbone").base == "owner/model"  # type: ignore[union-attr]
    said = invoke("ship", tmp_path / "out", "--restore", "--out", tmp_path / "standard")
    assert "a standard PEFT folder in bf16" in said
    peft = PeftModel.from_pretrained(models.load(finished.run / "base"), tmp_path / "standard").eval()
    assert torch.equal(peft(IDS).logits, logits)
    assert "--restore" not in (tmp_path / "standard" / "README.md").read_text()


def test_an_earlier_shipment_is_replaced_and_nothing_else(work: Path, tmp_path: Path) -> None:
    invoke("ship", work, "--bits", 8)
    invoke("ship", work)
    assert sorted(p.name for p in (work / "shipped").iterdir()) == sorted([*NAMES, "adapter_model.safetensors"])
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("precious")
    for out in (tmp_path / "precious", work, work / "adapter", work / "base" / "out", tmp_path):
        with pytest.raises(UserError, match=r"^--out: .*: (exists already|a folder of the run itself)"):
            ship.ship_run(work, out)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "precious"


# What is refused -----------------------------------------------------------------------------------------------------


def add(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(path), **{f"base_model.model.{name}": t for name, t in tensors.items()}}, path)


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("tensors", "config", "named"),
    [
        ({"lm_head.weight": (272, 64)}, {}, r"base_model\.model\.lm_head\.weight \[272, 64\] \(0\.0 MB\)\. "),
        ({"model.embed_tokens.weight": (3000, 64)}, {}, r"embed_tokens\.weight \[3000, 64\] \(0\.4 MB\)\. "),
        ({"model.norm.weight": (64,)}, {}, r"model\.norm\.weight \[64\]"),
        ({"lm_head.weight": (272, 64)}, {"modules_to_save": ["lm_head"]}, r"lm_head\.weight \[272, 64\]"),
        ({"model.layers.0.mlp.up_proj.weight": (96, 64)}, {"modules_to_save": ["up_proj"]}, r"up_proj\.weight"),
        ({"lm_head.bias": (272,)}, {"bias": "all"}, r"lm_head\.bias \[272\]"),
        (
            {f"model.layers.{i}.mlp.up_proj.weight": (96, 64) for i in range(5)},
            {},
            r"layers\.0\.mlp.*layers\.1\.mlp.*layers\.2\.mlp.* and 2 more, 0\.1 MB together",
        ),
    ],
)
def test_what_is_no_adapter(work: Path, tensors: dict[str, Any], config: dict[str, Any], named: str) -> None:
    add(work, **{name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in tensors.items()})
    configure(work, **config)
    with pytest.raises(UserError, match=rf"^adapter: .*: adapter_model.safetensors holds what is no part .*{named}"):
        ship.ship_run(work, work / "shipped")
    assert not (work / "shipped").exists()


def test_trained_norms_and_biases_are_an_adapters_own(work: Path) -> None:
    names = ["model.norm.weight", "model.layers.0.self_attn.q_proj.bias"]
    add(work, **{name: torch.ones(64, dtype=torch.bfloat16) for name in names})
    configure(work, modules_to_save=["norm"], bias="all")
    ship.ship_run(work, work / "shipped", bits=8)
    restored = eight_bit.unpack_state(work / "shipped")
    assert torch.equal(restored["base_model.model.model.norm.weight"], torch.ones(64, dtype=torch.bfloat16))


def test_what_is_too_large(finished: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"is 14,848 bytes in bf16, and --max-mb allows 12,000: --bits 8 makes it 9,184"
    ):
        ship.ship_run(finished.run, tmp_path / "out", max_bytes=12_000)
    with pytest.raises(UserError, match=r"is 9,184 bytes in 8 bits, and --max-mb allows 2,000: lower its rank"):
        ship.ship_run(finished.run, tmp_path / "out", bits=8, max_bytes=2_000)
    assert list(tmp_path.iterdir()) == []


def unfinished(run: Path) -> None:
    (run / "report.json").unlink()


def broken_report(run: Path) -> None:
    (run / "report.json").write_text("{")


def no_adapter(run: Path) -> None:
    shutil.rmtree(run / "adapter")


def no_fingerprint(run: Path) -> None:
    (run / "adapter" / "hqqplus.json").unlink()


def truncated(run: Path) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def not_finite(run: Path) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path)


def a_token(run: Path) -> None:
    values = json.loads((run / "report.json").read_text())
    values["recipe"]["training"]["hub_token"] = "hf_" + "a1B2" * 9
    (run / "report.json").write_text(json.dumps(values))


def a_path(run: Path) -> None:
    values = json.loads((run / "report.json").read_text())
    values["samples"] = [{"prompt": "x", "recovered": f"open({str(run.resolve())!r})"}]
    (run / "report.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (unfinished, r"not the folder of a finished run \(no report\.json\)"),
        (broken_report, r"its report\.json is damaged"),
        (no_adapter, r"not the folder of a finished run \(no adapter/\)"),
        (no_fingerprint, r"not the folder of a finished run \(no hqqplus\.json\)"),
        (truncated, "a weight file is truncated or damaged"),
        (not_finite, "holds NaN or infinite values"),
        (a_token, r"README\.md:\d+: this looks like a token"),
        (a_path, r"README\.md:\d+: a path of this machine"),
    ],
)
def test_runs_that_are_refused(work: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(work)
    with pytest.raises(UserError, match=message) as caught:
        ship.ship_run(work, work / "shipped")
    assert "\n" not in str(caught.value)
    assert not [path for path in work.iterdir() if "shipped" in path.name]


def test_a_backbone_that_is_not_there(work: Path) -> None:
    shutil.rmtree(work / "base")
    with pytest.raises(UserError, match=r"^--backbone: .*: it holds no packed model of this adapter"):
        ship.ship_run(work, work / "shipped", backbone=True)


def test_trained_scales_need_their_backbone(work: Path) -> None:
    values = json.loads((work / "adapter" / "hqqplus.json").read_text())
    (work / "adapter" / "hqqplus.json").write_text(json.dumps({**values, "baked": True}))
    notes = ship.ship_run(work, work / "shipped").notes
    assert any("its scales were trained" in note and "--backbone" in note for note in notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "4"], "--bits: 4 is not one of 16, 8"),
        (["--max-mb", "0"], "--max-mb: 0 is no size"),
        (["--yes"], "--yes: there is nothing to upload without --push REPO_ID"),
        (["--private"], "--private: there is nothing to upload"),
        (["--push", "a b/c"], "--push: Repo id"),
        (["--push", "alone"], "--push: alone: expected OWNER/NAME"),
        (["--restore"], "--restore: name the folder to write with --out"),
        (["--restore", "--push", "a/b", "--out", "x"], "--push: --restore takes none"),
    ],
)
def test_options(finished: SimpleNamespace, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CliRunner().invoke(cli.app, ["ship", str(finished.run), *options], catch_exceptions=False)
    assert not (finished.run / "shipped").exists()


# The hub -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, and a login to it."""
    with Hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


def test_nothing_is_uploaded_unless_asked_for(finished: SimpleNamespace, tmp_path: Path, server: Hub) -> None:
    said = invoke("ship", finished.run, "--out", tmp_path / "out", "--push", "me/tiny")
    assert "me/tiny (public if it is new):" in said
    size = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert f"{size:,} bytes" in said
    assert said.rstrip().endswith("nothing was uploaded: add --yes to do it")
    assert server.repositories == {}
    assert not [request for request in server.requests if request.startswith("POST")]


def test_an_upload_is_one_commit(finished: SimpleNamespace, tmp_path: Path, server: Hub) -> None:
    server.repositories["me/tiny"] = {
        ".gitattributes": b"x",
        "adapter_8bit.safetensors": b"of before",
        "backbone/model.safetensors": b"of before",
        "notes.md": b"somebody's own",
    }
    said = invoke("ship", finished.run, "--out", tmp_path / "out", "--push", "me/tiny", "--yes")
    assert f"uploaded: {server.url}/me/tiny/commit/" in said
    files = server.repositories["me/tiny"]
    shipped = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert files == {**shipped, ".gitattributes": b"x", "notes.md": b"somebody's own"}
    assert server.commits == 1
    assert "POST /api/validate-yaml" in server.requests
    assert 'snapshot_download("me/tiny")' in files["README.md"].decode()


def test_a_new_repository_is_as_private_as_asked(finished: SimpleNamespace, tmp_path: Path, server: Hub) -> None:
    shipped = ship.ship_run(finished.run, tmp_path / "out")
    hub.push(hub.plan_push("me/hidden", shipped.folder, private=True))
    hub.push(hub.plan_push("me/open", shipped.folder))
    assert server.private == {"me/hidden": True, "me/open": False}


@pytest.mark.parametrize("status", [403, 500])
def test_a_commit_that_fails_changes_nothing(
    finished: SimpleNamespace, tmp_path: Path, server: Hub, status: int
) -> None:
    server.repositories["me/tiny"] = {"adapter_model.safetensors": b"of before"}
    server.failing = status
    shipped = ship.ship_run(finished.run, tmp_path / "out")
    with pytest.raises(UserError, match=r"^--push: me/tiny: .*\(nothing was uploaded\)$") as caught:
        hub.push(hub.plan_push("me/tiny", shipped.folder))
    assert "\n" not in str(caught.value)
    assert server.repositories["me/tiny"] == {"adapter_model.safetensors": b"of before"}


@pytest.mark.parametrize("problem", ["no login", "a wrong login", "no network", "offline"])
def test_without_a_network_or_a_login(
    finished: SimpleNamespace, tmp_path: Path, server: Hub, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    shipped = ship.ship_run(finished.run, tmp_path / "out")
    if problem == "no login":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    elif problem == "a wrong login":
        monkeypatch.setenv("HF_TOKEN", "hf_other")
    elif problem == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    expected = {
        "no login": "there is no login on this machine",
        "a wrong login": "the hub does not take this login",
        "no network": "the hub cannot be reached",
        "offline": "HF_HUB_OFFLINE keeps everything off the network",
    }[problem]
    with pytest.raises(UserError, match=rf"^--push: me/tiny: {expected}.*\(nothing was uploaded\)") as caught:
        hub.push(hub.plan_push("me/tiny", shipped.folder))
    assert "\n" not in str(caught.value)
    assert server.repositories == {}


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "checkpoint-4/adapter_model.safetensors", "trainer_state.json", ".env", "run.log"]
)
def test_what_training_leaves_behind_is_never_uploaded(finished: SimpleNamespace, tmp_path: Path, name: str) -> None:
    shipped = ship.ship_run(finished.run, tmp_path / "out")
    path = shipped.folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("x")
    with pytest.raises(UserError, match="this is no part of a shipped adapter: it is not uploaded"):
        hub.plan_push("me/tiny", shipped.folder)
