"""English and code that is present wherever Python is: its language reference and the docstrings of its library.

Two kinds of document:

- one per topic of `pydoc_data.topics` (the text behind `help("...")`);
- one per module of the standard library: a stub of the module, that is every class and function that has a docstring,
  with its signature. Python sources are parsed, never imported; modules written in C are read with `inspect`.

A document belongs to the held-out split by the hash of its name (the topic, or the top-level module), so the split is
the same on every machine and every Python version. A docstring that also occurs in the training split, word for word
or nearly (half of its runs of eight words), is removed from the held-out one.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.machinery
import inspect
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

HELD_OUT_ONE_IN = 16
SHINGLE_WORDS = 8
# Not documentation: tests, vendored installers, bytecode, a duplicate of the grammar in the 2to3 tool, easter eggs.
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "ensurepip",
    "lib2to3",
    "__pycache__",
}
_SKIPPED_MODULES = {"antigravity", "this", "idlelib", "pydoc_data", "__phello__"}


@dataclass(frozen=True)
class Entry:
    """One docstring and the line of code that it documents (empty for a module or a topic)."""

    header: str
    doc: str
    depth: int = 0

    def render(self) -> str:
        if not self.header:
            return self.doc
        pad = "    " * self.depth
        body = "\n".join(f"{pad}    {line}" if line else "" for line in self.doc.splitlines())
        return f'{pad}{self.header}\n{pad}    """{body.strip()}"""'


@dataclass(frozen=True)
class Document:
    """`name` decides the split; `entries` in the order of the source."""

    name: str
    entries: tuple[Entry, ...]

    @property
    def held_out(self) -> bool:
        top = self.name.split(".")[0]
        return int.from_bytes(hashlib.sha256(top.encode()).digest()[:4], "big") % HELD_OUT_ONE_IN == 0

    def render(self) -> str:
        return f"# {self.name}\n\n" + "\n\n".join(entry.render() for entry in self.entries) + "\n"


def topics() -> Iterator[Document]:
    """The text behind `help("...")`, a document a topic."""
    from pydoc_data import topics as found

    for name, text in sorted(found.topics.items()):
        yield Document(f"topic {name}", (Entry("", text.strip()),))


def _signature(node: ast.AST) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    prefix = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{prefix} {node.name}({ast.unparse(node.args)}):"


def _source_entries(node: ast.AST, depth: int = 0) -> Iterator[Entry]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(child)
            if doc and doc.strip():
                yield Entry(_signature(child), doc.strip(), depth)
            if isinstance(child, ast.ClassDef):
                yield from _source_entries(child, depth + 1)


def source_modules() -> Iterator[Document]:
    """The docstrings of the library's modules that are written in Python."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED_FOLDERS & set(parts) or parts[0] in _SKIPPED_MODULES or parts[0].startswith("_sysconfigdata"):
            continue
        if parts[0].startswith(("config-", "lib-")) or parts[-1].startswith("test_"):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        doc = ast.get_docstring(tree)
        entries = ([Entry("", doc.strip())] if doc and doc.strip() else []) + list(_source_entries(tree))
        if entries:
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            yield Document(name, tuple(entries))


def _c_members(owner: ModuleType | type, depth: int = 0) -> Iterator[Entry]:
    for name, member in sorted(vars(owner).items()):
        # Two docstrings stand on nearly every slot wrapper of every type; they would teach only repetition.
        if name.startswith("__") or not callable(member):
            continue
        doc = getattr(member, "__doc__", None)
        if not isinstance(doc, str) or not doc.strip():
            continue
        if inspect.isclass(member):
            if depth == 0 and member.__module__ == getattr(owner, "__name__", None):
                yield Entry(f"class {name}:", inspect.cleandoc(doc), depth)
                yield from _c_members(member, depth + 1)
            continue
        try:
            signature = str(inspect.signature(member)).replace(", /", "").replace("(/", "(")
        except (ValueError, TypeError):
            signature = "(...)"
        yield Entry(f"def {name}{signature}:", inspect.cleandoc(doc), depth)


def c_modules() -> Iterator[Document]:
    """The docstrings of those that are written in C."""
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    folder = Path(sysconfig.get_path("platstdlib")) / "lib-dynload"
    names = set(sys.builtin_module_names)
    names |= {path.name.split(".")[0] for path in folder.glob("*") if path.name.endswith(suffixes)}
    for name in sorted(names):
        if name.startswith(("_test", "xx", "_xx")) or name in {"_tkinter", "_ctypes_test"} | _SKIPPED_MODULES:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(name)
        except Exception:  # an extension whose C library is missing on this machine has no documentation to give
            continue
        doc = inspect.getdoc(module)
        entries = ([Entry("", doc.strip())] if doc and doc.strip() else []) + list(_c_members(module))
        if entries:
            yield Document(name, tuple(entries))


def _shingles(text: str) -> set[int]:
    """Hashes of the runs of `SHINGLE_WORDS` words in `text`; of the whole text where it is shorter."""
    words = text.split()
    last = max(len(words) - SHINGLE_WORDS, 0)
    return {hash(tuple(words[start : start + SHINGLE_WORDS])) for start in range(last + 1)}


def _without(document: Document, seen: set[int]) -> Document:
    """`document` less the entries of which at least half is in `seen`; adds what it keeps to `seen`."""
    kept = []
    for entry in document.entries:
        shingles = _shingles(entry.doc)
        if 2 * len(shingles & seen) < len(shingles):
            seen |= shingles
            kept.append(entry)
    return Document(document.name, tuple(kept))


def build() -> dict[str, list[str]]:
    """The corpus of this interpreter: `{"train": [...], "validation": [...]}`, lists of documents as text."""
    documents = [*topics(), *source_modules(), *c_modules()]
    # Training documents first: what stands in both splits stays in training only.
    documents.sort(key=lambda document: document.held_out)
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    seen: set[int] = set()
    for document in documents:
        kept = _without(document, seen)
        if kept.entries:
            splits["validation" if document.held_out else "train"].append(kept.render())
    return splits
