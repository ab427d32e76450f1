"""Recovery of a packed model: set-up, measurements, checkpoints."""
