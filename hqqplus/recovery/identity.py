"""What a cache of a teacher was made of: rows, tokenizer, parent."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hqqplus.digests import checkpoint_digest, digest_of
from hqqplus.recovery.rows import Survey


@dataclass(frozen=True)
class Identity:
    """What the contents of a cache depend on.

    Attributes:
        data, tokenizer, parent: digests of the rows, the vocabulary, and config and weights of the parent.
        precision: in which the parent was computed, such as "bfloat16" or "8bit".
        name, revision: of the parent, for a reader; a copy of it in another folder is the same parent.
    """

    data: str
    tokenizer: str
    parent: str
    precision: str
    name: str = field(compare=False)
    revision: str | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls,
        rows: Any,
        tokenizer: Any,
        name: str,
        *,
        precision: str,
        revision: str | None = None,
        trust_remote_code: bool = False,
        where: str = "model.name_or_path",
    ) -> Identity:
        """Of prepared training `rows`, their tokenizer, and the parent `name`, a folder or a hub id.

        Raises:
            UserError: if there is no such parent.
        """
        folder, commit = _parent_folder(name, revision, trust_remote_code, where)
        vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False).encode()
        return cls(
            data=Survey.of(rows).digest,
            tokenizer=digest_of([vocabulary]),
            parent=checkpoint_digest(folder),
            precision=precision,
            name=name,
            revision=commit or revision,
        )

    def differences(self, other: Identity) -> list[str]:
        """What `other` has that differs, in words."""
        found = [text for name, text in _DIFFERENCES.items() if getattr(self, name) != getattr(other, name)]
        if self.parent != other.parent:
            found.append(f"another parent ({other.name}, here {self.name})")
        if self.precision != other.precision:
            found.append(f"another precision of the parent ({other.precision}, here {self.precision})")
        return found


_DIFFERENCES = {"data": "other training rows", "tokenizer": "another tokenizer"}


def _parent_folder(name: str, revision: str | None, trust_remote_code: bool, where: str) -> tuple[Path, str | None]:
    from hqqplus import models
    from hqqplus.streaming.checkpoint import fetch

    if models.is_local(name, where):
        models.check_folder(name, where)
        return Path(models.resolve_name(name)), None
    with models.one_sentence(name, where):
        folder, _, commit = fetch(name, revision, trust_remote_code, where)
    return folder, commit
