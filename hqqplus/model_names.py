"""What the name of a model leads to (a folder, the embedded model, a hub id), and what is said of a bad one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hqqplus.embedded import MODEL_DIR, MODEL_NAME
from hqqplus.errors import NotStreamable, UserError
from hqqplus.untrusted import check_model_files


def resolve_name(name: str) -> str:
    """`embedded:pydoc` -> its folder, `~` -> the home folder; every other name as it is."""
    return str(MODEL_DIR) if name == MODEL_NAME else os.path.expanduser(name)


def check_folder(name: str, where: str) -> None:
    """Refuse what is meant as a local model folder but is none.

    Raises:
        UserError: if the path does not exist, lacks `config.json` or weights, or has files that cannot be what they
            should be (`untrusted.check_model_files`).
    """
    path = Path(resolve_name(name))
    if not is_local(name, where):
        return
    if not (path / "config.json").is_file():
        raise UserError(f"{where}: {name}: this folder holds no model (no config.json)")
    with one_sentence(name, where):
        check_model_files(path)


def is_local(name: str, where: str) -> bool:
    """Whether `name` is a folder; False for what can only be a hub id."""
    path = Path(resolve_name(name))
    if path.is_dir():
        return True
    if path.exists():
        raise UserError(f"{where}: {name}: expected a model folder or a hub id, this is a file")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{where}: {name}: no such folder")
    return False


@contextmanager
def one_sentence(name: str, where: str) -> Iterator[None]:
    """Turn what transformers raises for a bad checkpoint into a `UserError` of one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except NotStreamable:
        raise
    except UserError as error:
        raise UserError(f"{where}: {name}: {error}") from None
    except SafetensorError as error:
        raise UserError(f"{where}: {name}: a weight file is truncated or damaged ({_first_line(error)})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: {name}: a JSON file of it is truncated or damaged ({_first_line(error)})") from None
    except (OSError, ImportError, LookupError, ValueError, TypeError, RuntimeError) as error:
        # "Unrecognized model", "... does not recognize this architecture", a refused remote-code model, tensors of
        # another shape, no memory left
        raise UserError(f"{where}: {name}: {_first_line(error)}") from error
    except Exception as error:
        # Whatever else libraries raise that took a file for what it said it was: tokenizers a bare Exception.
        said = f"{type(error).__name__}: {_first_line(error)}"
        raise UserError(f"{where}: {name}: it cannot be read ({said})") from error


def _first_line(error: Exception) -> str:
    """What an error says, in one line."""
    first, *rest = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    if first.endswith(":") and rest:
        first = f"{first} {rest[0]}"
    return first if len(first) <= 1000 else f"{first[:997]}..."
