"""GPUs: what torch sees of their memory, and the two limits of their roofline as their makers publish them."""

from __future__ import annotations

from dataclasses import dataclass

from hqqplus.errors import UserError

RESERVE = 1.6e9
"""Assumed bytes for CUDA itself, workspaces of libraries, and what the allocator cannot use."""


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: as people call it.
        total: bytes that torch reports as its memory.
        bandwidth: of its memory, in bytes a second.
        flops: of dense 16-bit products with sums in float32, a second.
        bfloat16: whether it computes with it.
    """

    name: str
    total: float
    bandwidth: float
    flops: float
    bfloat16: bool = True

    @property
    def usable(self) -> float:
        """Bytes for tensors: an L4 has 22.05e9."""
        return self.total - RESERVE


_GIB = 2**30
CARDS = (
    Card("T4", 14.56 * _GIB, 320e9, 65e12, bfloat16=False),
    Card("L4", 22.03 * _GIB, 300e9, 121e12),
    Card("A10", 22.19 * _GIB, 600e9, 125e12),
    Card("4090", 23.64 * _GIB, 1008e9, 165e12),
    Card("A100-40", 39.39 * _GIB, 1555e9, 312e12),
    Card("A100-80", 79.15 * _GIB, 2039e9, 312e12),
    Card("H100", 79.10 * _GIB, 3350e9, 989e12),
    Card("H200", 139.72 * _GIB, 4800e9, 989e12),
)


def find_card(name: str) -> Card:
    """The card that is called `name`, in any spelling: `rtx 4090`, `A100 80GB`.

    Raises:
        UserError: if none is, or several are.
    """
    wanted = _plain(name)
    found = [card for card in CARDS if _plain(card.name) == wanted]
    if not found:
        raise UserError(f"--gpu: {name!r} is none of {', '.join(card.name for card in CARDS)}")
    return found[0]


def _plain(name: str) -> str:
    letters = "".join(symbol for symbol in name.lower() if symbol.isalnum())
    for word in ("nvidia", "geforce", "rtx", "tesla", "sxm", "pcie"):
        letters = letters.replace(word, "")
    return letters.removesuffix("gb")
