"""Checkpoints that somebody else packed, as packed folders of ours: the same weights, not quantized again."""

from hqqplus.conversion.convert import Converted, convert_checkpoint
from hqqplus.conversion.layouts import KNOWN_LAYOUTS

__all__ = ["KNOWN_LAYOUTS", "Converted", "convert_checkpoint"]
