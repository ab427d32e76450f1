"""Quantizing a checkpoint on the disk, a layer at a time, and going on after a kill."""

from hqqplus.streaming.quantize import Quantized, quantize_checkpoint, quantize_folder

__all__ = ["Quantized", "quantize_checkpoint", "quantize_folder"]
