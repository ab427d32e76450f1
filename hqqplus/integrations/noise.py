"""What libraries say that no user of ours can act on: left out by the entry points, which own their process."""

from __future__ import annotations

import logging
import warnings


def leave_out() -> None:
    """Silence the warnings that peft and bitsandbytes cause in every run; nothing is imported for it."""
    # peft and trl ask transformers 5.2x by a name that it will drop.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing. is deprecated", category=FutureWarning)
    # An optional kernel from the hub, for 4-bit layers on a CPU, which nothing here uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
