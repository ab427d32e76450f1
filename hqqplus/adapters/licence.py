"""The licence of a base model, as its own files state it: an adapter is a derived work, and its card has to say so."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqqplus.model_names import resolve_name
from hqqplus.untrusted import read_json

# What the hub takes for `license:` in a card; anything else has to be `other` with a name.
# fmt: off
_OF_THE_HUB = frozenset({
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m",
    "bigscience-bloom-rail-1.0", "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd",
    "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5",
    "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0",
    "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0",
    "cc-by-nc-sa-4.0", "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0",
    "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0",
    "lgpl", "lgpl-2.1", "lgpl-3.0", "isc", "h-research", "intel-research", "lppl-1.3c", "ms-pl", "apple-ascl",
    "apple-amlr", "mpl-2.0", "odc-by", "odbl", "openmdw-1.0", "openrail++", "osl-3.0", "postgresql", "ofl-1.1",
    "ncsa", "unlicense", "zlib", "pddl", "lgpl-lr", "deepfloyd-if-license",
    "fair-noncommercial-research-license", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4",
    "grok2-community", "gemma", "unknown", "other",
})
# fmt: on
# What the first lines of a licence's own text say, the more particular ones first.
_TEXTS = (
    (r"llama (\d(?:\.\d)?) community license", "llama{}"),
    (r"gemma terms of use", "gemma"),
    (r"apache license\W+version 2\.0", "apache-2.0"),
    (r"mit license|permission is hereby granted, free of charge", "mit"),
    (r"gnu affero general public license\W+version 3", "agpl-3.0"),
    (r"gnu lesser general public license\W+version 3", "lgpl-3.0"),
    (r"gnu general public license\W+version 3", "gpl-3.0"),
)
_CARD, _CONFIG = "README.md", "config.json"
_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")
_MOST_BYTES = 2**20


@dataclass(frozen=True)
class Licence:
    """A licence in the words of the hub's cards.

    Attributes:
        identifier: one that the hub knows, "other" or "unknown".
        name, link: of one that the hub does not know.
        source: which file says so; empty where none does.
    """

    identifier: str
    name: str | None = None
    link: str | None = None
    source: str = ""

    def header(self) -> dict[str, str]:
        """Its fields in the header of a card."""
        values = {"license": self.identifier, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in values.items() if value}

    def sentence(self, base: str) -> str:
        """What the card says of it."""
        if self.identifier == "unknown":
            return (
                f"The licence of {base} was not found beside it: look it up before you hand this on. An adapter is "
                "derived from its base, and what the base's licence asks for holds for it too."
            )
        name = self.name if self.identifier == "other" and self.name else self.identifier
        link = f" ({self.link})" if self.link else ""
        return (
            f"{base} is under the licence **{name}**{link}, so says its {self.source}; it holds for the adapter too."
        )


UNKNOWN = Licence("unknown")


def find_licence(base: str, revision: str | None = None, network: bool = False) -> Licence:
    """The licence of model `base`, a folder or a hub id: of its card, of its configuration, or of its licence's text.

    Args:
        network: ask the hub for files that are not on this machine; what it does not give counts as not there.
    """
    for name, path in _found(base, revision, network):
        licence = _of_card(path) if name == _CARD else _of_config(path) if name == _CONFIG else _of_text(path)
        if licence is not None:
            return Licence(licence.identifier, licence.name, licence.link, name)
    return UNKNOWN


def _found(base: str, revision: str | None, network: bool) -> Iterator[tuple[str, Path]]:
    folder = Path(resolve_name(base))
    names = (_CARD, _CONFIG, *_FILES)
    if folder.is_dir():
        paths = [(name, folder / name) for name in names]
        yield from ((name, path) for name, path in paths if path.is_file() and path.stat().st_size <= _MOST_BYTES)
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    for name in names:
        try:
            found = hf_hub_download(base, name, revision=revision, local_files_only=not network)
        except RemoteEntryNotFoundError:
            continue
        except Exception:  # no such name, no network, no access: what is not here is not known then
            network = False
            continue
        yield name, Path(found)


def _of_card(path: Path) -> Licence | None:
    import yaml

    text = path.read_text(encoding="utf-8", errors="replace")
    header = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        values = yaml.safe_load(header[1]) if header else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    return _named(values)


def _of_config(path: Path) -> Licence | None:
    try:
        return _named(read_json(path))
    except (OSError, ValueError):
        return None


def _named(values: Any) -> Licence | None:
    """The licence that a header or a configuration names."""
    if not isinstance(values, dict):
        return None
    said = values.get("license")
    said = said[0] if isinstance(said, list) and said else said
    if not isinstance(said, str) or not said.strip() or len(said) > 100 or said.lower() == "unknown":
        return None
    name, link = (value if isinstance(value := values.get(key), str) else None for key in _NAMES)
    identifier = said.strip().lower()
    if identifier in _OF_THE_HUB:
        return Licence(identifier, name, link)
    return Licence("other", said.strip(), link)


_NAMES = ("license_name", "license_link")


def _of_text(path: Path) -> Licence | None:
    start = " ".join(path.read_text(encoding="utf-8", errors="replace")[:3000].lower().split())
    for pattern, identifier in _TEXTS:
        if found := re.search(pattern, start):
            return Licence(identifier.format(*found.groups()))
    return Licence("other", path.name) if start else None
