"""A small classification task that is present wherever Python is: where does this paragraph of documentation stand?

Three labels: `language` (the language reference), `library` (docstrings of modules written in Python), `extension` (of
those written in C). Headers and signatures are left out, so the words alone have to tell. The split is the corpus's.
"""

from __future__ import annotations

from collections.abc import Iterator

from hqqplus.embedded.corpus import Document, c_modules, source_modules, topics

DATA_NAME = "embedded:pydoc-kinds"
LABELS = ("language", "library", "extension")
SHORTEST = 12  # words of a paragraph


def build() -> dict[str, list[dict[str, str]]]:
    """`{"train": [...], "validation": [...]}`, rows with `text` and `label`; no text stands twice."""
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    seen: set[str] = set()
    for label, documents in zip(LABELS, (topics(), source_modules(), c_modules()), strict=True):
        # Training documents first: what stands in both splits stays in training only.
        for document in sorted(documents, key=lambda document: document.held_out):
            for text in _paragraphs(document):
                if text not in seen:
                    seen.add(text)
                    splits["validation" if document.held_out else "train"].append({"text": text, "label": label})
    return splits


def _paragraphs(document: Document) -> Iterator[str]:
    for entry in document.entries:
        for paragraph in entry.doc.split("\n\n"):
            words = paragraph.split()
            if len(words) >= SHORTEST:
                yield " ".join(words)
