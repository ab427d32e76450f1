"""`docs/`: the site builds without a warning, its links lead somewhere, its commands and its Python run."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from hqqplus.classify import ClassificationRecipe
from hqqplus.recipe_reference import CLASSIFICATION, MEANINGS, keys, markdown
from tests.commands import run_verb, verbs
from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TROUBLES = DOCS / "troubleshooting.md"


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_every_key_of_a_recipe_has_its_meaning() -> None:
    assert {key for key, _ in keys()} == set(MEANINGS)
    theirs = {key for key, _ in keys(ClassificationRecipe)}
    assert theirs <= set(MEANINGS) | set(CLASSIFICATION)
    assert set(CLASSIFICATION) <= theirs


def test_the_reference_is_the_schema() -> None:
    """`python -m hqqplus.recipe_reference > docs/recipes.md` makes it anew."""
    assert (DOCS / "recipes.md").read_text(encoding="utf-8") == markdown()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_files_and_recipes_that_a_page_names_are_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:hqqplus|benchmarks|recipes|tests|notebooks)/[\w/.]+\.\w+)`", text):
        assert (ROOT / name).exists(), f"{path.name}: {name}"
    for name in re.findall(r"\| `((?:triton/)?\w+\.py)` \|", text):
        assert (ROOT / "hqqplus" / "kernels" / name).exists(), f"{path.name}: {name}"
    for name in re.findall(r"(?<![\w/])(recipes/[\w/]+\.yaml)", text):
        assert (ROOT / name).exists(), f"{path.name}: {name}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_yaml_of_a_page_is_good(path: Path, tmp_path: Path) -> None:
    """A recipe in the documentation is a part of one: laid over the embedded recipe it is valid."""
    from hqqplus.recipe import load_recipe

    for index, block in enumerate(blocks(path, "yaml")):
        recipe = tmp_path / f"{index}.yaml"
        head = "" if "extends:" in block else f"extends: {ROOT / 'recipes' / 'embedded_2bit.yaml'}\n"
        recipe.write_text(head + block.replace("extends: recipes/", f"extends: {ROOT}/recipes/"))
        load_recipe(recipe)


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "py")], ids=lambda path: path.stem)
def test_python_that_is_not_run_is_python(path: Path) -> None:
    """It needs other packages, or weights; its imports from here must lead somewhere."""
    import importlib

    for block in blocks(path, "py"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("hqqplus"):
                assert all(hasattr(importlib.import_module(str(node.module)), alias.name) for alias in node.names)


def test_tables_are_those_of_the_results() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import tables
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    found = [table for path in PAGES for table in tables._TABLE.finditer(path.read_text(encoding="utf-8"))]
    assert found
    for table in found:
        body = table[0].removeprefix(table[1]).removesuffix(table[3])
        assert body.strip() == tables.render(table[2]).strip(), table[2]


# Data ----------------------------------------------------------------------------------------------------------------

ROWS = re.compile(r"^```json\n(.*?)^```\n\n```yaml\n(.*?)^```", re.DOTALL | re.MULTILINE)


def test_rows_of_the_data_page_go_with_their_keys(tmp_path: Path) -> None:
    """Each form of rows is shown, with three lines that the recipe beside them reads."""
    from hqqplus.data import load_rows
    from hqqplus.models import load_tokenizer
    from hqqplus.recipe import load_recipe
    from hqqplus.recovery.setup import form_of

    tokenizer = load_tokenizer("embedded:pydoc")
    pairs = ROWS.findall((DOCS / "data.md").read_text(encoding="utf-8"))
    shown = set()
    for index, (rows, keys_of_recipe) in enumerate(pairs):
        recipe, lines = tmp_path / f"{index}.yaml", tmp_path / f"{index}.jsonl"
        recipe.write_text(f"extends: {ROOT / 'recipes' / 'embedded_2bit.yaml'}\n" + keys_of_recipe)
        lines.write_text(rows)
        form = form_of(load_recipe(recipe))
        plain, simple = form.plain(load_rows(str(lines)), tokenizer)
        assert len(simple.to_sft(plain, tokenizer.eos_token)) == len(rows.splitlines()) == 3
        shown |= {name for name, value in vars(form).items() if value}
    assert shown == {"text_field", "prompt", "completion", "messages", "alpaca", "sharegpt"}


# Messages ------------------------------------------------------------------------------------------------------------


def _text(node: ast.AST) -> str | None:
    """A string of the source, what is filled in as NUL; None for what is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)  # type: ignore[misc]
    return None


def _plain(text: str) -> str:
    return " ".join(text.split())


@cache
def _strings() -> tuple[frozenset[str], frozenset[str]]:
    """All strings of the package, and those that are errors of users."""
    strings, errors = set(), set()
    for path in (ROOT / "hqqplus").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = _text(node)
            if text and " " in text:
                strings.add(_plain(text))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError" and node.args:
                errors.add(_plain(_text(node.args[0]) or ""))
    return frozenset(strings), frozenset(errors)


def _says(text: str, message: str) -> bool:
    """Whether `message` of the page, with … for what is filled in, can be `text`, with NUL there: its fixed words in
    their order."""
    place = 0
    for part in _plain(message).split("…"):
        place = text.find(part.strip("\0"), place)
        if place < 0:
            return False
        place += len(part)
    return True


def _messages() -> list[str]:
    found = re.findall(r"^- (`+) ?(.+?) ?\1$", TROUBLES.read_text(encoding="utf-8"), re.MULTILINE)
    return [message for _, message in found]


def test_each_message_of_the_troubleshooting_page_is_in_the_code() -> None:
    strings, _ = _strings()
    lost = [message for message in _messages() if not any(_says(text, message) for text in strings)]
    assert not lost, lost
    vague = [message for message in _messages() if len(re.findall("[a-zA-Z]", message)) < 12]
    assert not vague, vague


def test_nearly_all_errors_are_on_the_troubleshooting_page() -> None:
    """A new one belongs there, with what to do. Left out are those with hardly a word of their own."""
    _, errors = _strings()
    messages = _messages()
    told = {text for text in errors if len(re.findall("[a-zA-Z]", text)) >= 16}
    lacking = sorted(text.replace("\0", "…") for text in told if not any(_says(text, message) for message in messages))
    assert len(told) > 250
    assert len(lacking) <= len(told) / 20, "\n".join(lacking)


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    """With every warning an error: dead links and anchors, pages that the navigation lacks."""
    pytest.importorskip("material", reason="needs the docs extra")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for path in PAGES:
        page = (tmp_path / "site" / f"{path.stem}.html").read_text(encoding="utf-8")
        # The pages read without a network.
        assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=\"https?://(?!127)", page), path.name


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "python")], ids=lambda path: path.stem)
def test_the_python_of_a_page_runs(path: Path, tmp_path: Path) -> None:
    """One block after the other, in one interpreter and an empty folder."""
    code = "\n".join(blocks(path, "python"))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


# What makes a training run short: two steps without a calibration.
SHORT = ["training.max_steps=2", "evaluation.max_tokens=500", "evaluation.max_new_tokens=8", "calibration.method=none"]
# They need a GPU, the hub, an account, or do not end by themselves.
ELSEWHERE = re.compile(r"accelerate launch|llama|meta-|Qwen|mistral|hqqplus serve|--push")
# The page whose commands make what those of the others use comes first.
COMMANDS = sorted((path for path in PAGES if blocks(path, "bash")), key=lambda path: path.stem != "tutorial")


@pytest.mark.slow
def test_the_commands_of_all_pages_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, in one folder and each of them once, all but what cannot run here: that must at least name verbs
    that there are."""
    there = verbs()
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    done: set[str] = set()
    for path in COMMANDS:
        for line in "".join(blocks(path, "bash")).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words or " ".join(words) in done:
                continue
            done.add(" ".join(words))
            if words[0] == "hqqplus":
                assert words[1] in there, f"{path.name}: {line}"
            if ELSEWHERE.search(line):
                continue
            assert words[0] == "hqqplus", f"{path.name}: {line}: run it, or add it to ELSEWHERE"
            run_verb([*words[1:], *(SHORT if words[1] == "train" else [])])
    assert {"hqqplus train recipes/embedded_2bit.yaml", "hqqplus ship runs/embedded_2bit --backbone"} <= done
    assert (tmp_path / "runs" / "exported" / "config.json").exists()
