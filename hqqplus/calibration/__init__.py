"""Calibration: activation statistics, and layers solved and reconstructed from them block by block."""
