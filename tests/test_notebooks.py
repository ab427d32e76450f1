"""The notebooks: as they are kept, and executed end to end on a CPU in their small size."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.conftest import ROOT

NOTEBOOKS = ROOT / "notebooks"
NAMES = ("quickstart_colab_l4", "anatomy_of_1bit")
KERNEL = "hqqplus-test"
CELL_SECONDS = 1800  # a cell that hangs ends the test; far above what a slow machine takes

Executed = Callable[[str], tuple[Path, dict[str, str], dict[str, int]]]


def read(name: str) -> Any:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)


def code_cells(name: str) -> list[Any]:
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def test_these_are_all_of_them() -> None:
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_is_valid_and_stripped(name: str, run_python: Callable[..., Any], tmp_path: Path) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    assert set(notebook.metadata) <= {"kernelspec", "accelerator", "colab"}
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    for cell in notebook.cells:
        assert not cell.metadata
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    # The script leaves it alone, and takes away what running it would have added.
    kept = (NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata["collapsed"] = True
        if cell.cell_type == "code":
            cell.execution_count = 3
            cell.outputs = [nbformat.v4.new_output("stream", text="4\n")]
    used = tmp_path / "used.ipynb"
    nbformat.write(notebook, used)
    assert used.read_text(encoding="utf-8") != kept
    run_python("notebooks/strip.py", str(used))
    assert used.read_text(encoding="utf-8") == kept


@pytest.mark.parametrize("name", NAMES)
def test_form(name: str) -> None:
    cells = read(name).cells
    code = code_cells(name)
    assert len(code) < 12
    assert len({cell.id for cell in cells}) == len(cells)
    # The story: it begins with prose, and no more than two cells of code (settings, and what comes first) go without.
    kinds = "".join(cell.cell_type[0] for cell in cells)
    assert kinds.startswith("mc")
    assert "ccc" not in kinds
    assert [cell.id for cell in code if '"pip", "install"' in cell.source or "-m pip install" in cell.source] == [
        "install"
    ]
    assert 'os.environ.get("HQQPLUS_TINY") == "1"' in code[0].source
    assert sum(cell.source.count('get("HQQPLUS_TINY")') for cell in code) == 1
    text = "\n".join(cell.source for cell in cells)
    assert not re.search(r"(?<![\w.:/])/(?:home|root|work|tmp|Users|content|usr)/", text), "a path of some machine"


def test_files_that_they_name_are_there() -> None:
    for name in NAMES:
        text = "\n".join(cell.source for cell in read(name).cells)
        for file in re.findall(r"`((?:notebooks|benchmarks|recipes)/[\w/.]+\.\w+)`", text):
            assert (ROOT / file).is_file(), file
    assert (ROOT / "recipes" / "llama3_8b_2bit.yaml").is_file()
    assert "llama3_8b_2bit" in code_cells("quickstart_colab_l4")[0].source


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Executed:
    """Execute a notebook in its small size, by this interpreter, in a folder of its own: (that folder, what each cell
    has printed, how many pictures it has shown)."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    home = tmp_path_factory.mktemp("jupyter")
    spec = home / "kernels" / KERNEL
    spec.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": command, "display_name": KERNEL, "language": "python"}))

    def execute(name: str) -> tuple[Path, dict[str, str], dict[str, int]]:
        folder = tmp_path_factory.mktemp(name)
        notebook = read(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("JUPYTER_DATA_DIR", str(home))
            patch.setenv("JUPYTER_RUNTIME_DIR", str(home / "runtime"))
            patch.setenv("IPYTHONDIR", str(home / "ipython"))
            patch.setenv("MPLCONFIGDIR", os.environ.get("MPLCONFIGDIR", str(home / "matplotlib")))
            patch.setenv("HQQPLUS_TINY", "1")
            # What it prints is not to depend on where the tests run.
            patch.delenv("MPLBACKEND", raising=False)
            patch.delenv("HQQPLUS_REPOSITORY", raising=False)
            client = nbclient.NotebookClient(
                notebook,
                timeout=CELL_SECONDS,
                kernel_name=KERNEL,
                resources={"metadata": {"path": str(folder)}},
            )
            client.execute()
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        printed = {
            cell.id: "".join(output.text for output in cell.outputs if output.output_type == "stream") for cell in code
        }
        pictures = {cell.id: sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in code}
        return folder, printed, pictures

    return execute


@pytest.mark.slow
def test_quickstart(executed: Executed) -> None:
    folder, printed, pictures = executed("quickstart_colab_l4")
    run = folder / "runs" / "quickstart_embedded_2bit"
    assert "backbone" in printed["estimate"]
    assert "L4" in printed["estimate"]
    assert "bits per weight" in printed["quantize"]

    # Killed after the first checkpoint, before the end; continued from there, and not begun anew.
    assert "ended with -9; there is checkpoint-" in printed["train"]
    assert not (set(re.findall(r"step (\d+) of 6", printed["train"])) & {"6"})
    killed = int(re.findall(r"checkpoint-(\d+)", printed["train"])[-1])
    assert f"continuing from runs/quickstart_embedded_2bit/checkpoint-{killed}" in printed["resume"]
    steps = [int(step) for step in re.findall(r"step (\d+) of 6: loss", printed["resume"])]
    assert steps == list(range(killed + 1, 7))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 7))
    # Bars are for terminals.
    assert "\x1b" not in printed["train"] + printed["resume"]

    report = json.loads((run / "report.json").read_text())
    assert report["ppl_parent"] < report["ppl_recovered"] < report["ppl_quantized"]
    assert f"{report['bits_per_weight']:.2f} bits per weight" in printed["report"]
    assert (run / "report.html").is_file()
    assert printed["chat"].count("tokens/s") == 2  # two turns
    shipped = run / "shipped"
    for file in ("adapter_model.safetensors", "README.md", "backbone/model.safetensors"):
        assert (shipped / file).is_file(), file
    # What was shipped, loaded from Python, says what the chat said.
    answer = printed["chat"].split("\n", 2)[2]
    said = next(line.strip() for line in answer.splitlines() if line.startswith(" "))
    assert f"Return a {said}" in printed["load"]
    assert {cell: count for cell, count in pictures.items() if count} == {"quantize": 1, "watch": 1, "resume": 1}


@pytest.mark.slow
def test_anatomy(executed: Executed) -> None:
    folder, printed, pictures = executed("anatomy_of_1bit")
    table = dict(re.findall(r"^  (\S.*?)  +(\d\.\d+)  ", printed["solvers"], re.MULTILINE))
    errors = {name: float(value) for name, value in table.items()}
    assert errors["zeros"] == 1
    assert errors["min-max, zero moved"] > 1
    if "the package hqq" in errors:
        assert errors["the package hqq"] == pytest.approx(errors["min-max, zero moved"], abs=2e-3)
    # The optimum from a few lines, and the solver's, whose numbers are rounded to 16 bits.
    assert errors["best two levels, from above"] == pytest.approx(0.34, abs=0.01)
    assert errors["least squares of hqqplus"] == pytest.approx(errors["best two levels, from above"], abs=1e-3)

    pairs = re.findall(r"groups of +\d+: (\S+) -> (\S+)", printed["sizes"])
    assert len(pairs) == 12
    assert all(float(better) < float(worse) for worse, better in pairs)
    assert "1 bit, groups of 8: 5.00 bits per weight" in printed["bits"]
    worst, best = (
        [float(x) for x in re.findall(r"\d\.\d+", part)]
        for part in printed["real"].rpartition("min-max ")[2].split("least squares")
    )
    assert min(worst) > 1 > 0.4 > max(best)
    assert "rank 8 holds" in printed["spectrum"]

    said = dict(re.findall(r"^(\S.*?)  +([\d.,e+]+)$", printed["perplexity"], re.MULTILINE))
    found = {name: float(value.replace(",", "")) for name, value in said.items()}
    order = ["parent", "+ residual, rank 32", "+ residual, rank 8", "least squares", "min-max, zero moved", "zeros"]
    assert sorted(found, key=found.__getitem__) == order
    drawn = ("group", "sizes", "bits", "real", "spectrum", "perplexity")
    assert {cell: count for cell, count in pictures.items() if count} == dict.fromkeys(drawn, 1)
    assert not any(folder.iterdir())  # it writes nothing
