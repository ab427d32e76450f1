"""Leave nothing in the notebooks but what was written: no outputs, no counts of execution, no metadata of an editor.

python notebooks/strip.py             all that lie beside this file
python notebooks/strip.py A.ipynb B.ipynb
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat

HERE = Path(__file__).resolve().parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
KEPT = ("accelerator", "colab")
"""What Colab reads from the metadata of a notebook: the machine to choose."""


def stripped(text: str) -> str:
    """The notebook `text` (of any format 4) without what running and editing leave in it."""
    notebook = nbformat.reads(text, as_version=4)
    notebook.metadata = {"kernelspec": KERNEL} | {
        key: notebook.metadata[key] for key in KEPT if key in notebook.metadata
    }
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return nbformat.writes(notebook).rstrip("\n") + "\n"


def main() -> None:
    for path in [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        if (clean := stripped(text)) != text:
            path.write_text(clean, encoding="utf-8")
            print(f"stripped {path}")


if __name__ == "__main__":
    main()
