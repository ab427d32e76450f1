"""Recipes written to a folder, and how they are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from hqqplus.errors import UserError
from hqqplus.recipe import load_recipe

SMALLEST = """\
model:
  name_or_path: some/model
data:
  path_or_name: some/data
output_dir: runs/x
"""


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> list[str]:
    """The lines of the refusal, with the folder of the files left out."""
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


def refused(folder: Path, text: str, *overrides: str) -> list[str]:
    return refusal(write(folder, text), *overrides)


def with_section(section: str, line: str) -> str:
    """The smallest recipe with one more line in a section; that line is line 7, or 3 and 5 in model and data."""
    if f"{section}:\n" in SMALLEST:
        return SMALLEST.replace(f"{section}:\n", f"{section}:\n  {line}\n")
    return f"{SMALLEST}{section}:\n  {line}\n"
