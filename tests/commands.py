"""Commands of the documentation, run in this process: most of the time of a small one goes into imports."""

from __future__ import annotations

from collections.abc import Sequence


def verbs() -> frozenset[str]:
    """What `hqqplus` can be told."""
    from typer.main import get_command

    from hqqplus.cli import app

    return frozenset(get_command(app).commands)  # type: ignore[attr-defined]


def run_verb(arguments: Sequence[str]) -> None:
    """`hqqplus ARGUMENTS`, in the current folder.

    Raises:
        AssertionError: with the command, if it fails.
    """
    from typer.main import get_command

    from hqqplus.cli import app

    command = f"hqqplus {' '.join(arguments)}"
    try:
        code = get_command(app).main(list(arguments), standalone_mode=False)
    except Exception as error:
        raise AssertionError(command) from error
    assert code in (None, 0), command
