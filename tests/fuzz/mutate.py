"""Inputs that are nearly right: a valid file, and what may have happened to it."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

# What readers have stumbled over: numbers at the edge of a type, encodings, nesting, names of other files, tags.
TOKENS: tuple[bytes, ...] = (
    b"\x00", b"\r\n", b"\r", b"\xef\xbb\xbf", b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"\xf4\x90\x80\x80",
    "\u2028\u202e\u0301\ufeff\U0001f600".encode(), b"\\ud800", b"\\u0000", b'"', b"'", b"\\", b"\t", b" ",
    b"-1", b"0", b"9223372036854775808", b"18446744073709551616", b"9" * 40, b"9" * 5000, b"0x" + b"f" * 5000,
    b"1e999", b"-1e400", b"NaN", b"-Infinity", b".inf", b".nan", b"null", b"true", b"0.1", b"1_000", b"~",
    b"[" * 40, b"[" * 3000, b"{" * 3000, b'{"a":' * 3000, b"- " * 3000, b"? " * 500, b"{}", b"[]", b"[[[]]]",
    b"../../etc/passwd", b"/etc/passwd", b"..", b"/dev/zero", b"C:\\x", b"~/x", b"a" * 5000, b",", b":", b": ", b"\n",
    b"&a [*a]", b"*a", b"&a ", b"<<: *a", b"!!python/object/apply:os.system ['true']", b"!!binary ", b"!x ",
    b"%YAML 9.9",
    b"---\n", b"...\n", b"|\n", b">\n", b"# ", b"extends: recipe.yaml\n", b"__metadata__", b"data_offsets",
    b"a: &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
    b"d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e]\n",
)  # fmt: skip


def _nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


# The same for values of JSON.
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 3.5, -0.0, 1e308, float("inf"), float("nan"), 2**31, 2**32, 2**53, 2**63, 2**64,
    10**30, 10**9, 10**12, "", "x", "0", "../x", "../../etc/passwd", "/etc/passwd", "/dev/zero", "..", ".", "a/b",
    "a\\b",
    "model.safetensors", "pytorch_model.bin", "C:\\x", "\x00", "\ud800", "\u202e", "a" * 5000, "kernels-community/x",
    "float64", "int4", "F4", "U8", "auto", [], {}, [None], [0], [[0]], {"": 0}, {"a": {"b": {}}}, [0] * 500,
    [2**40, 2**40], ["x"] * 3, _nested(60), _nested(400),
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """One of `seeds` after one to four accidents with its bytes."""
    content = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 4))):
        content = draw(st.sampled_from(_ACCIDENTS))(draw, content, seeds)
    return content


Accident = Callable[[st.DrawFn, bytes, tuple[bytes, ...]], bytes]


def _cut(draw: st.DrawFn, content: bytes) -> tuple[int, int]:
    """A part of `content`: mostly a short one."""
    start = draw(st.integers(0, len(content)))
    length = draw(st.one_of(st.integers(0, 16), st.integers(0, 4096)))
    return start, min(start + length, len(content))


def _truncate(draw: st.DrawFn, content: bytes, seeds: tuple[bytes, ...]) -> bytes:
    return content[: draw(st.integers(0, len(content)))]


def _flip(draw: st.DrawFn, content: bytes, seeds: tuple[bytes, ...]) -> bytes:
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 8)) if content else 0):
        changed[draw(st.integers(0, len(changed) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)


def _overwrite(draw: st.DrawFn, content: bytes, seeds: tuple[bytes, ...]) -> bytes:
    start, end = _cut(draw, content)
    return content[:start] + draw(st.binary(min_size=end - start, max_size=end - start)) + content[end:]


def _duplicate(draw: st.DrawFn, content: bytes, seeds: tuple[bytes, ...]) -> bytes:
    start, end = _cut(draw, content)
    return content[:end] + content[start:end] * draw(st.integers(1, 20)) + content[end:]


def _delete(draw: st.DrawFn, content: bytes, seeds: tuple[bytes, ...]) -> bytes:
    start, end = _cut(draw, content)
    return content[:start] + content[end:]


def _splice(draw: st.DrawFn, content: bytes, seeds: tuple[bytes, ...]) -> bytes:
    other = draw(st.sampled_from(seeds))
    start, end = _cut(draw, other)
    at = draw(st.integers(0, len(content)))
    return content[:at] + other[start:end] + content[at:]


def _insert(draw: st.DrawFn, content: bytes, seeds: tuple[bytes, ...]) -> bytes:
    at = draw(st.integers(0, len(content)))
    return content[:at] + draw(st.sampled_from(TOKENS)) + content[at:]


def _replace_word(draw: st.DrawFn, content: bytes, seeds: tuple[bytes, ...]) -> bytes:
    """A token in the place of what stands behind a colon, a comma or a bracket."""
    places = [at for at, byte in enumerate(content[:4096]) if byte in b":,[{\n"]
    if not places:
        return content
    start = draw(st.sampled_from(places)) + 1
    end = start
    while end < len(content) and content[end] not in b",]}\n":
        end += 1
    return content[:start] + b" " + draw(st.sampled_from(TOKENS)) + content[end:]


def _recode(draw: st.DrawFn, content: bytes, seeds: tuple[bytes, ...]) -> bytes:
    text = content.decode("utf-8", "replace")
    kind = draw(st.sampled_from(("crlf", "cr", "bom", "utf-16", "utf-32", "latin-1", "upper", "escape")))
    if kind in ("crlf", "cr"):
        return content.replace(b"\n", b"\r\n" if kind == "crlf" else b"\r")
    if kind == "bom":
        return b"\xef\xbb\xbf" + content
    if kind == "upper":
        return text.upper().encode()
    if kind == "escape":
        return text.encode("unicode_escape")
    return text.encode(kind, "replace")


_ACCIDENTS: tuple[Accident, ...] = (
    _truncate, _flip, _flip, _overwrite, _duplicate, _delete, _splice, _insert, _insert, _replace_word, _replace_word,
    _recode,
)  # fmt: skip


@st.composite
def mutated_json(draw: st.DrawFn, values: tuple[Any, ...]) -> bytes:
    """One of `values` as JSON after one to three accidents with its structure; sometimes with its bytes besides."""
    value = copy.deepcopy(draw(st.sampled_from(values)))
    for _ in range(draw(st.integers(1, 3))):
        value = _accident(draw, value)
    try:
        text = json.dumps(value, ensure_ascii=draw(st.booleans()))
    except RecursionError:
        text = "[" * 100_000
    if draw(st.integers(0, 4)) == 0:
        content = text.encode("utf-8", "surrogatepass")
        return draw(mutated((content,)))
    return text.encode("utf-8", "surrogatepass")


def _accident(draw: st.DrawFn, value: Any) -> Any:
    """`value` with something in it replaced, removed, renamed, doubled or moved."""
    places = list(_places(value))
    if not places:
        return _odd(draw)
    holder, key = draw(st.sampled_from(places))
    kind = draw(st.sampled_from(("replace", "replace", "replace", "remove", "rename", "swap", "add", "nudge")))
    old = holder[key]
    if kind == "replace":
        holder[key] = _odd(draw)
    elif kind == "remove":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        name = draw(st.sampled_from(("", "x", f"{key}x", "\x00", "../x", "a" * 300, *map(str, holder))))
        holder[name] = holder.pop(key)
    elif kind == "swap":
        other, name = draw(st.sampled_from(places))
        if name in other if isinstance(other, dict) else name < len(other):
            holder[key] = copy.deepcopy(other[name])
    elif kind == "add" and isinstance(holder, list):
        holder.insert(key, _odd(draw))
    elif kind == "add":
        name = draw(st.sampled_from(("x", "", "auto_map", "transformers_weights", "quantization_config")))
        holder[name] = _odd(draw)
    elif kind == "nudge" and isinstance(old, int | float) and not isinstance(old, bool):
        holder[key] = draw(st.sampled_from((old + 1, old - 1, -old, old * 2, old * 1024, old * 10**9)))
    return value


def _odd(draw: st.DrawFn) -> Any:
    return copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))


def _places(value: Any) -> Any:
    """(holder, key or index) of all that is in `value`."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield value, key
        yield from _places(inner)


@st.composite
def mutated_safetensors(draw: st.DrawFn, seed: bytes) -> bytes:
    """A safetensors file after an accident with its bytes, its header, the header's length, or its data."""
    length = struct.unpack("<Q", seed[:8])[0]
    header, data = seed[8 : 8 + length], seed[8 + length :]
    kind = draw(st.sampled_from(("bytes", "header bytes", "header", "header", "length", "data")))
    if kind == "bytes":
        return draw(mutated((seed,)))
    if kind == "length":
        near = st.integers(-9, 9).map(lambda step: max(0, length + step))
        wild = st.sampled_from((0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, len(seed), len(seed) - 8, 100_000_000))
        return struct.pack("<Q", draw(st.one_of(near, wild))) + header + data
    if kind == "data":
        start, end = _cut(draw, data)
        return (
            seed[: 8 + length]
            + data[:start]
            + draw(st.sampled_from((b"", b"\x00" * (end - start), data[:1])))
            + data[end:]
        )
    changed = draw(mutated((header,)) if kind == "header bytes" else mutated_json((json.loads(header),)))
    return struct.pack("<Q", len(changed)) + changed + data
