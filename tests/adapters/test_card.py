"""The model card: its header as the hub reads it, its figures, and that nothing in it is a path of this machine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from hqqplus.adapters.card import is_hub_id, model_card, shared_name, without_eight_bit
from hqqplus.adapters.fingerprint import Fingerprint
from hqqplus.adapters.licence import UNKNOWN, Licence, find_licence
from tests.shipping import recipe, report


def fingerprint(**changes: Any) -> Fingerprint:
    values: dict[str, Any] = {
        "base": "meta-llama/Meta-Llama-3-8B",
        "revision": "abc",
        "packed_sha256": "ab" * 32,
        "quantization": {"nbits": 2, "group_size": 64},
        "parent_digest": "cd" * 16,
        "solver": 1,
    }
    return Fingerprint(**{**values, **changes})


def card(**changes: Any) -> str:
    values: dict[str, Any] = {
        "title": "run adapter",
        "recipe": recipe(),
        "report": report(),
        "fingerprint": fingerprint(),
        "licence": Licence("llama3", source="README.md"),
    }
    return model_card(**{**values, **changes})


def test_the_header_is_what_the_hub_reads() -> None:
    data = ModelCard(card()).data
    assert data.library_name == "peft"
    assert data.base_model == "meta-llama/Meta-Llama-3-8B"
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert data.license == "llama3"
    assert {"hqqplus", "lora", "2-bit"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.task_type) == ("perplexity", 9.1235, "text-generation")
    assert data.model_name == "run adapter"


def test_what_it_says() -> None:
    text = card()
    assert "| perplexity | 6.14 | 1234.50 | 9.12 |" in text
    assert "| perplexity, c4 | 8.00 | – | 12.00 |" in text
    assert "| MB | 16,000.0 | 2,400.0 | 2,456.1 |" in text
    assert "92.5 % of the log-perplexity" in text
    assert "28,049,408 parameters: 56,098,816 bytes in bf16 (56.1 MB)" in text
    assert f"| packed weights, sha256 | {'ab' * 32} |" in text
    assert "under the licence **llama3**" in text
    assert 'model = hqqplus.load("meta-llama/Meta-Llama-3-8B", adapter="THIS_FOLDER")' in text
    body = text.split("## Training")[1]
    assert yaml.safe_load(body.split("```")[1].removeprefix("yaml\n"))["quantization"]["nbits"] == 2


def test_samples_stay_samples() -> None:
    """What a model writes ends no table and starts no Markdown."""
    text = card()
    table = text[text.index("<table>") : text.index("</table>")]
    assert "\n\n" not in table
    assert "a &lt;b&gt; | `c`&#10;&#10;# no heading" in table
    assert table.count("</pre>") == 4
    assert "<td><pre>p&#10;&#10;p</pre></td><td><pre>&lt;/pre&gt;</pre></td><td><pre>r</pre></td>" in table
    assert "## Samples" not in card(report=report(samples=[]))
    lone = card(report=report(samples=[{"prompt": "x", "parent": None, "quantized": "q", "recovered": "r"}]))
    assert "<th colspan=2>" in lone


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_figures_that_are_none(bad: float | None) -> None:
    values = {"ppl_parent": None, "ppl_quantized": bad, "ppl_recovered": bad, "recovery": None}
    data = ModelCard(card(report=report(**values))).data
    assert data.eval_results is None
    assert "model-index" not in data.to_dict()


def test_where_the_packed_model_is() -> None:
    trained = fingerprint(baked=True)
    assert 'load("THE_PACKED_FOLDER_THAT_CAME_WITH_IT", adapter="THIS_FOLDER")' in card(fingerprint=trained)
    assert "its scales were trained" in card(fingerprint=trained)
    assert 'model = hqqplus.load("THIS_FOLDER")' in card(fingerprint=trained, backbone=True)
    lines = card(backbone=True, repository="me/x").split("```python\n")[1].split("```")[0].strip().splitlines()
    assert lines == [
        "import hqqplus",
        "from huggingface_hub import snapshot_download",
        'model = hqqplus.load(snapshot_download("me/x"))',
    ]


def test_8_bits_are_taken_out_again() -> None:
    text = card(bits=8, adapter_bytes=29_802_496)
    assert "29,802,496 bytes in 8 bits (29.8 MB)" in text
    assert "--restore" in text
    restored = without_eight_bit(text)
    assert "--restore" not in restored
    assert "## Samples" in restored
    assert without_eight_bit(card()) == card()


def test_no_path_of_this_machine(tmp_path: Path) -> None:
    home = str(Path.home() / "secret" / "llama")
    values = recipe(model={"name_or_path": home}, output_dir=str(tmp_path / "out"))
    values["data"] = {**values["data"], "path_or_name": str(tmp_path / "mine.jsonl")}
    text = card(recipe=values, fingerprint=fingerprint(base=home))
    assert str(Path.home() / "secret") not in text
    assert str(tmp_path) not in text
    assert "recovers **llama** quantized" in text
    assert "mine.jsonl" in text
    for name, shared in {
        "/a/b/c/": "c",
        "~/x": "x",
        "../shared/y": "y",
        "C:\\models\\z": "z",
        "a/b": "a/b",
        "runs/x": "runs/x",
        "embedded:pydoc": "embedded:pydoc",
    }.items():
        assert shared_name(name) == shared


def test_what_is_no_name_of_a_hub_is_no_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("embedded:pydoc", "/a/b:c", "folder", "a b"):
        assert not is_hub_id(shared_name(name))
        assert "base_model" not in ModelCard(card(fingerprint=fingerprint(base=name))).data.to_dict()
    assert is_hub_id("gpt2")


# Licences ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("README.md", "---\nlicense: Apache-2.0\n---\n# x", Licence("apache-2.0", source="README.md")),
        ("README.md", "---\nlicense: psf-2.0\n---\n", Licence("other", "psf-2.0", source="README.md")),
        (
            "README.md",
            "---\nlicense: other\nlicense_name: qwen\nlicense_link: https://x\n---\n",
            Licence("other", "qwen", "https://x", "README.md"),
        ),
        ("config.json", '{"license": "mit"}', Licence("mit", source="config.json")),
        ("LICENSE", "META LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n...", Licence("llama3.1", source="LICENSE")),
        ("LICENSE", "   Apache License\n   Version 2.0, January 2004", Licence("apache-2.0", source="LICENSE")),
        ("LICENSE.txt", "Permission is hereby granted, free of charge,", Licence("mit", source="LICENSE.txt")),
        ("LICENSE", "Do as you like.", Licence("other", "LICENSE", source="LICENSE")),
        ("README.md", "no header", UNKNOWN),
        ("README.md", "---\nlicense: [\n---\n", UNKNOWN),
        ("README.md", "---\nlicense: unknown\n---\n", UNKNOWN),
        ("config.json", "{", UNKNOWN),
        ("LICENSE", "", UNKNOWN),
    ],
)
def test_the_licence_of_a_folder(tmp_path: Path, name: str, content: str, expected: Licence) -> None:
    (tmp_path / name).write_text(content)
    found = find_licence(str(tmp_path))
    assert found == expected
    header = ModelCard(card(licence=found)).data.to_dict()
    assert header["license"] == expected.identifier
    assert header.get("license_name") == expected.name


def test_the_licence_of_the_embedded_model_and_of_one_that_is_not_here() -> None:
    assert find_licence("embedded:pydoc") == Licence("other", "psf-2.0", source="README.md")
    assert find_licence("some/model") == find_licence("some/model", network=True) == UNKNOWN
    assert "was not found beside it: look it up" in card(licence=UNKNOWN)
