"""What libraries say that no user of ours can act on, and what they would report of him: left out by the entry points,
which own their process."""

from __future__ import annotations

import logging
import os
import warnings


def leave_out() -> None:
    """Silence the warnings that peft and bitsandbytes cause in every run, and what the hub and datasets would count;
    nothing is imported for it."""
    for name, value in (("HF_HUB_DISABLE_TELEMETRY", "1"), ("HF_UPDATE_DOWNLOAD_COUNTS", "0")):
        os.environ.setdefault(name, value)
    # peft and trl ask transformers 5.2x by a name that it will drop.
    warnings.filterwarnings("ignore", message=".(is_)?gradient_checkpointing. is deprecated", category=FutureWarning)
    # An optional kernel from the hub, for 4-bit layers on a CPU, which nothing here uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
