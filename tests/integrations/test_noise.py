"""What the entry points leave out, and nothing else."""

from __future__ import annotations

import logging
import warnings

import pytest

from hqqplus.integrations.noise import leave_out


def test_one_warning_and_one_logger() -> None:
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = log.level
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            leave_out()
            warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
            warnings.warn("another thing is deprecated", FutureWarning, stacklevel=1)
        assert [str(warning.message) for warning in caught] == ["another thing is deprecated"]
        assert not log.isEnabledFor(logging.WARNING)
        assert log.isEnabledFor(logging.ERROR)
    finally:
        log.setLevel(level)


def test_a_loaded_model_asks_by_the_old_name(recwarn: pytest.WarningsRecorder) -> None:
    """The message is still the one that is left out, where transformers has it at all."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, vocab_size=8))
    warnings.simplefilter("always")
    leave_out()
    recwarn.clear()
    _ = model.is_gradient_checkpointing
    assert not [warning for warning in recwarn if "is_gradient_checkpointing" in str(warning.message)]
