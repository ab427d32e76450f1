"""Activation statistics, and layers reconstructed from them block by block."""
