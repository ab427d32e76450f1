"""Recipe files as plain values that remember where they were written, and the words for what is wrong with them.

Knows YAML, `extends` and `key=value`; knows nothing of what a recipe may contain. Values are read by YAML 1.2's rules,
which are what people mean: `1e-4` is a number and `no` is a word, where PyYAML's YAML 1.1 has a string and a boolean.
"""

from __future__ import annotations

import difflib
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Key = tuple[str | int, ...]
"""Where a value stands in a recipe: `("training", "optim")`, `("evaluation", "prompts", 0)`."""

COMMAND_LINE = "command line"

# A recipe is written by hand: what is above these limits is no recipe, and would cost minutes and gigabytes to refuse
# in detail. A plan that names each layer of a model of 70 B parameters has some 6,000 values in 50 KB.
MAX_BYTES = 2**20
MAX_VALUES = 50_000
MAX_DEPTH = 32
MAX_EXTENDS = 16
MAX_DIGITS = 1000  # Python takes hours to convert numbers with very many, or refuses to


@dataclass(frozen=True, order=True)
class Position:
    """A line of a file; a problem of a whole file has line 0, one of the command line has no file to open."""

    from_command_line: bool
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong with a recipe, to be printed as one line."""

    where: Position
    key: str
    what: str

    def __str__(self) -> str:
        key = self.key if len(self.key) <= 200 else f"{self.key[:197]}..."
        text = ": ".join(part for part in (str(self.where), key, self.what) if part)
        # One problem, one line, whatever stands in the keys of the file.
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@dataclass
class Document:
    """What one or several files say: the merged values, the place that set each of them, and all that is wrong.

    `unread` are the keys whose values could not be read and stand as None; it holds `()` where that is a whole file.
    """

    values: dict[str, Any]
    where: dict[Key, Position]
    problems: list[Problem] = field(default_factory=list)
    unread: set[Key] = field(default_factory=set)

    def position(self, key: Key) -> Position:
        """The place that set `key`, or for a key that nobody set, the nearest thing around it."""
        while key not in self.where:
            key = key[:-1]
        return self.where[key]

    def report(self, key: Key, what: str) -> None:
        self.problems.append(Problem(self.position(key), dotted(key), what))


def read(path: str | Path, overrides: Sequence[str] = ()) -> Document:
    """Read a recipe file, the files that it extends, and `key=value` strings over them.

    Never raises for what is wrong with the input: everything that is stands in the document's `problems`. That
    includes what is too much of it: a file of more than `MAX_BYTES`, more than `MAX_VALUES` values once its aliases
    are written out, nesting deeper than `MAX_DEPTH`, more than `MAX_EXTENDS` files that extend one another.
    """
    document = _read_chain(str(path), chain=())
    for text in overrides:
        _override(document, text)
    return document


# Files --------------------------------------------------------------------------------------------------------------


def _read_chain(path: str, chain: tuple[str, ...]) -> Document:
    """The document of `path` with what it extends below it. `chain`: the files that led here."""
    document = _read_file(path)
    if "extends" not in document.values:
        return document
    base = document.values.pop("extends")
    if not isinstance(base, str) or not base:
        what = f"{_found(base)}; the path of another recipe, relative to this one, is needed"
        return _cannot_extend(document, what)
    if (refusal := _no_path(base)) is not None:
        return _cannot_extend(document, refusal)
    base_path = os.path.normpath(os.path.join(os.path.dirname(path), base))
    chain = (*chain, path)
    if len(chain) >= MAX_EXTENDS:
        return _cannot_extend(document, f"{base}: this would be file {len(chain) + 1}; at most {MAX_EXTENDS} are read")
    seen = [os.path.realpath(file) for file in chain]
    if os.path.realpath(base_path) in seen:
        return _cannot_extend(document, f"a recipe cannot extend itself: {' -> '.join((*chain, base_path))}")
    if not os.path.isfile(base_path):
        return _cannot_extend(document, f"{base_path}: {_no_such_file(base_path)}")
    below = _read_chain(base_path, chain)
    _merge(below, document)
    return below


def _cannot_extend(document: Document, what: str) -> Document:
    document.report(("extends",), what)
    document.unread.add(())  # What the other file would have said is not known.
    return document


def _read_file(path: str) -> Document:
    document = Document({}, {(): Position(False, path, 1)})

    def unreadable(what: str, line: int = 0) -> Document:
        document.problems.append(Problem(Position(False, path, line), "", what))
        document.unread.add(())
        return document

    if (what := _no_path(path)) is not None:
        return unreadable(what)
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            return unreadable(f"not a recipe: it is larger than {MAX_BYTES // 2**20} MiB")
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        return unreadable(_no_such_file(path))
    except UnicodeDecodeError:
        return unreadable("not a YAML file: it is not text in UTF-8")
    except IsADirectoryError:
        return unreadable("a folder; a YAML file is needed")
    except OSError as error:
        return unreadable(f"cannot be read: {error.strerror or error}")
    try:
        node = _compose(text)
        if node is None:
            return unreadable("empty; a recipe is a mapping of sections, and model, data and output_dir are required")
        values = _construct(node, (), document)
    except yaml.YAMLError as error:
        what, line = _syntax(error, text)
        return unreadable(what, line)
    if not isinstance(values, dict):
        return unreadable(f"{_found(values)}; a mapping of sections is needed", node.start_mark.line + 1)
    document.values = values
    # What is missing altogether has no line of its own: it is reported at the file's first.
    document.where[()] = Position(False, path, 1)
    return document


def _no_path(path: str) -> str | None:
    """Why the system could not even be asked for `path`."""
    try:
        if b"\0" not in os.fsencode(path):
            return None
    except UnicodeEncodeError:
        pass
    return f"{shown(path)} is not the name of a file: it has characters that no file can have"


def _no_such_file(path: str) -> str:
    folder, name = os.path.split(path)
    try:
        names = [other for other in os.listdir(folder or ".") if other.endswith((".yaml", ".yml"))]
    except OSError:
        names = []
    return f"no such file{did_you_mean(name, sorted(names))}"


def _merge(base: Document, over: Document, key: Key = ()) -> None:
    """Lay `over` on `base`: mappings merge, anything else is replaced."""
    if not key:
        base.problems += over.problems
        base.unread |= over.unread
        base.where[()] = over.where[()]
    into, values = _at(base.values, key), _at(over.values, key)
    for name, value in values.items():
        here = (*key, name)
        old = into.get(name, _MISSING)
        if isinstance(old, dict) and value is None and not key:
            continue  # A section's heading with nothing under it says nothing.
        # Moved to the end: of two patterns in `quantization.overrides` the later one wins, and that is the child's.
        into.pop(name, None)
        if isinstance(old, dict) and isinstance(value, dict):
            into[name] = old
            base.where[here] = over.where[here]
            _merge(base, over, here)
        else:
            into[name] = value
            if old is not _MISSING:
                for gone in _places(old, here):
                    base.where.pop(gone, None)
            base.where.update({k: over.where[k] for k in _places(value, here) if k in over.where})


_MISSING = object()


def _places(value: Any, key: Key) -> Iterator[Key]:
    """The keys of a plain value that stands at `key`: its own, and those of all that is in it."""
    yield key
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in inner:
        yield from _places(item, (*key, name))


def _at(values: Any, key: Key) -> Any:
    for part in key:
        values = values[part]
    return values


# The command line ---------------------------------------------------------------------------------------------------


def _override(document: Document, text: str) -> None:
    """Set one `key=value`. An assignment replaces: `quantization.overrides={}` drops those of the file."""
    here = Position(True, COMMAND_LINE, 0)
    name, equals, value_text = text.partition("=")
    name = name.strip()
    key: Key = tuple(name.split("."))

    def report(what: str) -> None:
        document.problems.append(Problem(here, name, what))

    if not equals or not all(key):
        what = f"{shown(text)} is not of the form key=value (training.max_steps=10)"
        document.problems.append(Problem(here, "", what))
        return
    if len(key) > MAX_DEPTH:
        report(f"nested deeper than {MAX_DEPTH} levels")
        return
    if key == ("extends",):
        report("belongs in a recipe file")
        return
    # The value is read as a document of its own, whose places are then all the command line.
    scratch = Document({}, {(): here})
    try:
        node = _compose(value_text)
        value = None if node is None else _construct(node, (), scratch)
    except yaml.YAMLError as error:
        report(_syntax(error, value_text)[0])
        return
    for problem in scratch.problems:
        report(f"{problem.key}: {problem.what}" if problem.key else problem.what)
    document.unread |= {(*key, *inner) for inner in scratch.unread}
    into = document.values
    for depth, part in enumerate(key[:-1], start=1):
        inner = into.get(str(part))
        if inner is None:
            inner = into[str(part)] = {}
            document.where[key[:depth]] = here
        elif not isinstance(inner, dict):
            report(f"{dotted(key[:depth])} is {shown(inner)}, not a mapping")
            return
        into = inner
    for gone in _places(into.pop(str(key[-1]), None), key):
        document.where.pop(gone, None)
    into[str(key[-1])] = value
    document.where.update({(*key, *k): here for k in scratch.where})


# YAML ---------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Composes nodes, within limits; scalars are resolved by YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (as the base class declares it)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth, self._values = self._depth + 1, self._values + 1
        if self._depth > MAX_DEPTH or self._values > MAX_VALUES:
            raise _too_much(self._depth, self.peek_event().start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        self._depth -= 1
        return node


class _TooMuch(yaml.MarkedYAMLError):
    """Valid YAML, and no recipe."""


def _too_much(depth: int, mark: yaml.Mark) -> _TooMuch:
    if depth > MAX_DEPTH:
        return _TooMuch(problem=f"it is nested deeper than {MAX_DEPTH} levels", problem_mark=mark)
    return _TooMuch(problem=f"it has more than {MAX_VALUES:,} values", problem_mark=mark)


_NULL, _BOOL, _INT, _FLOAT, _STR = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str"))
_MAPPING, _SEQUENCE = "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"
_PATTERNS = {
    _NULL: (r"(?:~|null|Null|NULL|)\Z", "~nN\0"),
    _BOOL: (r"(?:true|True|TRUE|false|False|FALSE)\Z", "tTfF"),
    _INT: (r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z", "-+0123456789"),
    _FLOAT: (
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z",
        "-+.0123456789",
    ),
}
for _tag, (_pattern, _first) in _PATTERNS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), ["" if c == "\0" else c for c in _first])


def _compose(text: str) -> yaml.Node | None:
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def _construct(
    node: yaml.Node,
    key: Key,
    document: Document,
    around: tuple[yaml.Node, ...] = (),
    count: Iterator[int] | None = None,
) -> Any:
    """The plain value of a node. Places go into `document.where`, a key's own line for what a mapping holds.

    Raises:
        yaml.YAMLError: if aliases multiply it beyond the limits; `count` counts the values so far.
    """
    count = count or itertools.count(1)
    if next(count) > MAX_VALUES or len(around) >= MAX_DEPTH:
        raise _too_much(len(around) + 1, node.start_mark)

    def report(at: yaml.Node, what: str) -> None:
        document.problems.append(Problem(position(at), dotted(key), what))
        document.unread.add(key)

    def position(at: yaml.Node) -> Position:
        file = document.where[()]
        return file if file.from_command_line else Position(False, file.file, at.start_mark.line + 1)

    if node in around:
        report(node, "an alias that contains itself")
        return None
    around = (*around, node)
    document.where.setdefault(key, position(node))
    if isinstance(node, yaml.MappingNode) and node.tag == _MAPPING:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            # A key is its own text, so that a pattern such as `0` or a word such as `no` needs no quotes.
            if not isinstance(key_node, yaml.ScalarNode):
                report(key_node, "a key that is a list or a mapping; a name is needed")
                continue
            name, inner = key_node.value, (*key, key_node.value)
            if name == "<<" and not key_node.style:
                report(key_node, "YAML's merge keys (<<) are not read; `extends` is")
            elif name in values:
                place = position(key_node)
                first = "" if place.from_command_line else f" (first on line {lines[name]})"
                document.problems.append(Problem(place, dotted(inner), f"given twice{first}"))
            else:
                document.where[inner] = position(key_node)
                lines[name] = key_node.start_mark.line + 1
                values[name] = _construct(value_node, inner, document, around, count)
        return values
    if isinstance(node, yaml.SequenceNode) and node.tag == _SEQUENCE:
        return [_construct(item, (*key, index), document, around, count) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        try:
            return _scalar(node)
        except OverflowError:
            report(node, f"{shown(node.value)} is too large a number")
            return None
        except ValueError:
            report(node, f"{shown(node.value)} cannot be read as {_tag_name(node.tag)}")
            return None
    report(node, f"the tag {_tag_name(node.tag)} is not read")
    return None


def _scalar(node: yaml.ScalarNode) -> Any:
    text: str = node.value
    if node.tag == _STR:
        return text
    pattern, _ = _PATTERNS.get(node.tag, (r"(?!)", ""))
    if not re.match(pattern, text) and not (node.tag == _FLOAT and re.match(_PATTERNS[_INT][0], text)):
        raise ValueError
    if node.tag == _NULL:
        return None
    if node.tag == _BOOL:
        return text.lower() == "true"
    if len(text) > MAX_DIGITS:
        raise OverflowError
    if node.tag == _INT:
        # Base 0 would refuse the leading zeros that YAML 1.2 allows.
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    return float(re.sub(r"\.(?=(?:inf|nan)\Z)", "", text.lower()))


def _tag_name(tag: str) -> str:
    name = "!!" + tag.removeprefix("tag:yaml.org,2002:") if tag.startswith("tag:yaml.org,2002:") else tag
    return name if len(name) <= 60 else f"{name[:57]}..."


def _syntax(error: yaml.YAMLError, text: str) -> tuple[str, int]:
    """What is wrong with YAML, on one line, and its line in `text`."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        said = [part for part in (error.problem, error.context) if part]
        kind = "too much for a recipe" if isinstance(error, _TooMuch) else "not valid YAML"
        return f"{kind}: {' '.join(' '.join(said).split())}", mark.line + 1 if mark else 0
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, int(error.position)) + 1
        return f"not valid YAML: the character {chr(int(error.character))!a} is not allowed", line
    return f"not valid YAML: {' '.join(str(error).split())}", 0


# Words --------------------------------------------------------------------------------------------------------------


def dotted(key: Iterable[str | int]) -> str:
    """`training.optim`, `evaluation.prompts[0]`, `quantization.overrides["*.down_proj"].nbits`."""
    text = ""
    for part in key:
        if isinstance(part, str) and re.fullmatch(r"[\w-]+", part):
            text += f".{part}" if text else part
        else:
            text += f"[{part}]" if isinstance(part, int) else f'["{part}"]'
    return text


def shown(value: Any) -> str:
    """A value as a recipe writes it, shortened."""
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, (list, tuple)):
        text = f"[{', '.join(map(shown, value))}]"
    else:
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _found(value: Any) -> str:
    if value is None:
        return "nothing is given"
    if isinstance(value, dict):
        return "a mapping is given"
    kinds = {bool: "a boolean", int: "an integer", float: "a float", str: "a string", list: "a list", tuple: "a list"}
    return f"{shown(value)} is {kinds.get(type(value), type(value).__name__)}"


def wrong_type(value: Any, needed: str) -> str:
    """What to say of a value of the wrong type: `1.5 is a float; an integer is needed`."""
    hint = ""
    if isinstance(value, str) and needed.startswith(("an integer", "a number", "true or false")):
        if any(re.match(_PATTERNS[tag][0], value) for tag in (_INT, _FLOAT, _BOOL)):
            hint = ", so leave the quotes away"
    elif isinstance(value, (bool, int, float)) and needed.startswith("a string"):
        hint = ", so put it in quotes"
    if isinstance(value, float) and not math.isfinite(value) and "number" in needed:
        return f"{shown(value)} is not finite; {needed} is needed"
    return f"{_found(value)}; {needed} is needed{hint}"


def not_one_of(value: Any, allowed: Sequence[Any]) -> str:
    """What to say of a value outside a fixed set: the set, and the member that was probably meant."""
    options = [str(option) if isinstance(option, str) else shown(option) for option in allowed]
    return f"{shown(value)} is not one of {', '.join(options)}{did_you_mean(value, options)}"


def unknown(name: str, allowed: Sequence[str]) -> str:
    """What to say of an unknown key: what is allowed, and the name that was probably meant."""
    return f"unknown key{did_you_mean(name, allowed)} (allowed: {', '.join(allowed)})"


def did_you_mean(value: Any, options: Iterable[str]) -> str:
    """`; did you mean ...?`, or nothing where no option is close."""
    close = _closest(value, options) if isinstance(value, str) else None
    return f"; did you mean {close}?" if close else ""


def _closest(value: str, options: Iterable[str]) -> str | None:
    # The commonest slips (case, dashes, bf16 for bfloat16) are far apart to difflib.
    by_plain = {_plain(option): option for option in options}
    close = difflib.get_close_matches(_plain(value), by_plain, n=1)
    return by_plain[close[0]] if close else None


def _plain(name: str) -> str:
    return re.sub(r"^(b?)f(?:p|loat)?(?=\d)", r"\1float", name.lower().replace("-", "_"))
