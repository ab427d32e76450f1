"""Writing files so that a reader, or a crash, never meets half of one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hqqplus.errors import UserError

# What errno says, in words, where a disk takes no more: full, quota used up, file too large for it.
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is too large for it",
}

# What torch.save says where the system takes no more bytes: it names its own line, and no number.
_TORCH_WRITER = "inline_container.cc"

# The names that `replacing`, `replacing_folder` and `move_folder` make up.
_TEMPORARY = re.compile(r"\..+\.\d+\.(tmp(\.[^.]+)?|old)")


def check_output(path: str | Path, where: str) -> None:
    """Refuse, before hours of work, a folder that could not be written after them.

    Raises:
        UserError: if `path` or a folder above it is a file, or may not be written to.
    """
    above = _existing(path)
    if not above.is_dir():
        raise UserError(f"{where}: {path}: {above} is a file, a folder is needed")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{where}: {path}: {above} may not be written to")


def _existing(path: str | Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    above = Path(path).absolute()
    while not above.exists():
        above = above.parent
    return above


def check_space(path: str | Path, needed: int, where: str) -> None:
    """Refuse, before hours of work, what would not fit on the disk of `path`. `needed` is in bytes.

    Raises:
        UserError: with the bytes that are needed and those that are free.
    """
    free = shutil.disk_usage(_existing(path)).free
    if needed > free:
        raise UserError(f"{where}: {path}: {needed:,} bytes are needed on that disk, {free:,} are free")


@contextmanager
def full_disk(path: str | Path, where: str, advice: str = "make room and run it again") -> Iterator[None]:
    """Turn what a full disk raises into a `UserError` of one sentence; other errors pass.

    Raises:
        UserError: as said.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        # safetensors reports the system's errors as a text of its own.
        text = next((t for n, t in _FULL.items() if number == n or f"(os error {n})" in str(error)), None)
        if text is None and _TORCH_WRITER in str(error):
            text = "a file could not be written whole"
        if text is None:
            raise
        free = shutil.disk_usage(_existing(path)).free
        raise UserError(f"{where}: {path}: {text} ({free:,} bytes are free): {advice}") from error


def write_text(path: str | Path, text: str) -> None:
    """Write `text` under a temporary name beside `path`, then rename."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON under a temporary name, then rename."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write a file to; renamed to `path` on success, removed on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: writers such as matplotlib choose the format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` to fill; renamed to `path` on success (replacing it), removed on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        move_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: str | Path, recursive: bool = False) -> None:
    """Remove from `folder` what writers of this module left under temporary names when they were killed.

    Nobody else may be writing there.
    """
    folder = Path(folder)
    for path in sorted(folder.rglob(".*") if recursive else folder.glob(".*")):
        if not _TEMPORARY.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def move_folder(source: Path, target: Path) -> None:
    """Rename folder `source` to `target` on the same disk; what stood at `target` goes only once that is done."""
    if not target.exists():
        os.replace(source, target)
        return
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    os.replace(target, old)
    try:
        os.replace(source, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old) if old.is_dir() else old.unlink()


def sync(path: str | Path, recursive: bool = True) -> None:
    """Have the system write folder `path` to the disk: its entries, and all that is below it if `recursive`."""
    path = Path(path)
    below = sorted(path.rglob("*")) if recursive else []
    for entry in (*below, path):
        try:
            handle = os.open(entry, os.O_RDONLY)
        except OSError:
            continue  # Windows opens no folders
        try:
            os.fsync(handle)
        except OSError as error:
            # Some file systems refuse it for folders. A disk that failed says so by another number.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
                raise
        finally:
            os.close(handle)


def sha256_of_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def made_folder(path: str | Path) -> Iterator[None]:
    """Make folder `path` and those above it; what was made here and is empty in the end goes again."""
    path = Path(path).absolute()
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):
            for folder in new:
                folder.rmdir()


# Folders that are held, as file descriptors.
_held: set[int] = set()


def _let_go() -> None:
    """In a process that was forked off: a data loader's worker, which outlives its parent by seconds, would hold the
    folder against the next start."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked_folder(path: str | Path, where: str) -> Iterator[None]:
    """Hold `path`, a folder, for this process alone; the system lets go of it when the process ends, however it ends.

    What processes that were killed left in it under temporary names is removed.

    Raises:
        UserError: if another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    _held.add(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{where}: {path}: another process is at work there") from None
        except OSError:
            pass  # a file system without locks
        remove_leftovers(path, recursive=True)
        yield
    finally:
        if handle in _held:
            _held.remove(handle)
            os.close(handle)
