"""What a run was trained on so far: data that has changed since cannot continue it exactly.

A checkpoint says how many batches were seen, not which. Of other rows, so many are others: the run would go on, and
end elsewhere, without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import IterableDataset

from hqqplus.data_stream import local_files
from hqqplus.digests import digest_of, file_digest
from hqqplus.errors import UserError
from hqqplus.files import write_json
from hqqplus.recipe import Recipe
from hqqplus.recovery.rows import Row

FILE_NAME = "data.json"
# Of the prepared rows, so many are compared: from all over a data set, of a stream the first.
_ROWS, _STREAMED_ROWS = 1000, 100
_WAYS_OUT = (
    "a run continues exactly with the same data alone: put it back, or give the run another output_dir to start anew"
)


class Sources:
    """The data of the run in `output_dir`, noted in the file `data.json` there.

    Args:
        resumed: the run continues from a checkpoint: what is noted must hold. Else it is noted anew.
        writes: this process writes the note.
    """

    def __init__(self, output_dir: str | Path, resumed: bool, writes: bool) -> None:
        self.path, self.writes = Path(output_dir) / FILE_NAME, writes
        self._noted: dict[str, Any] = self._read() if resumed else {}

    def check_files(self, recipe: Recipe) -> None:
        """Compare the data files of `recipe` on this machine, or note them. Nothing is known of a hub's here.

        Raises:
            UserError: if one is not what it was, or has vanished.
        """
        found: dict[str, Any] = {}
        for where, name in _named(recipe).items():
            root = Path(name).expanduser().absolute()
            files = {
                path.relative_to(root).as_posix() if path != root else path.name: path for path in local_files(name)
            }
            before = self._noted.get(where)
            # The recipe may name something else by now, where that does not decide the weights.
            same = isinstance(before, Mapping) and before.get("name") == name
            if same and before is not None:
                for gone in set(before["files"]) - {short for short, path in files.items() if path.is_file()}:
                    raise UserError(
                        f"{where}: {gone} of '{name}', with which this run began, has vanished; {_WAYS_OUT}"
                    )
            digests = {short: file_digest(path) for short, path in files.items() if path.is_file()}
            if same and before is not None:
                for short, digest in digests.items():
                    if before["files"].get(short) != digest:
                        what = "has changed since" if short in before["files"] else "was not there when"
                        raise UserError(f"{where}: {short} of '{name}' {what} this run began; {_WAYS_OUT}")
            if digests:
                found[where] = {"name": name, "files": digests}
        self._note(found)

    def check_rows(self, rows: Any) -> None:
        """Compare the prepared `rows`, a data set or a stream, or note them: tokens, labels, order.

        So data on a hub that was changed, and other versions of what prepares rows, are found out too.

        Raises:
            UserError: if they are not what they were.
        """
        if isinstance(rows, IterableDataset):
            sample, count = islice(iter(rows), _STREAMED_ROWS), "a stream"
        else:
            sample, count = rows.select(range(0, len(rows), max(1, len(rows) // _ROWS))), str(len(rows))
        found = digest_of([count.encode(), *(Row.of(row).key for row in sample)])
        if self._noted.get("rows", found) != found:
            raise UserError(f"data: the training rows are not those with which this run began; {_WAYS_OUT}")
        self._note({"rows": found})

    def _note(self, found: Mapping[str, Any]) -> None:
        self._noted = {**self._noted, **found}
        if self.writes:
            write_json(self.path, self._noted)

    def _read(self) -> dict[str, Any]:
        try:
            noted = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}  # of a run that noted nothing
        return noted if isinstance(noted, dict) else {}


def _named(recipe: Recipe) -> dict[str, str]:
    """Key of the recipe -> the data that it names."""
    named = {"data.path_or_name": recipe.data.path_or_name}
    if recipe.data.eval_path_or_name is not None:
        named["data.eval_path_or_name"] = recipe.data.eval_path_or_name
    return named | {f"evaluation.texts.{name}": path for name, path in recipe.evaluation.texts.items()}
