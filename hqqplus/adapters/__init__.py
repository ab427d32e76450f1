"""The LoRA start from the quantization residual, shipping, and the fingerprint of the base."""

from hqqplus.adapters.fingerprint import Fingerprint, check_base, packed_sha256
from hqqplus.adapters.residual import ResidualCollector, apply_residual_start, residual_factors, residuals_from_parent
from hqqplus.adapters.ship import adapter_size, round_adapter, ship_adapter

__all__ = [
    "Fingerprint",
    "ResidualCollector",
    "adapter_size",
    "apply_residual_start",
    "check_base",
    "packed_sha256",
    "residual_factors",
    "residuals_from_parent",
    "round_adapter",
    "ship_adapter",
]
