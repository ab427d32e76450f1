"""The parent as a teacher beside the student: in its own precision, or packed to 8 bits; and whether it fits there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from hqqplus.recovery.distillation import FullTargets, Head, supervised

TeacherKind = Literal["online", "8bit", "cache"]
# Of a model in 16 bits, what is left of it with layers of 8 bits in groups of 64 and 8-bit metadata (8.26 bits a
# weight) and the embedding and the head as they were: 0.58 for Llama-3-8B. Larger models have less of those.
_SHARE_8BIT = 0.6
# For activations, gradients, the optimizer and the chunks of the loss, where the caller knows no better.
_RESERVE = 6 * 2**30
# Not for a model: what a trainer takes for itself.
_OWN = ("labels", "num_items_in_batch")


class OnlineTeacher:
    """A full-precision or 8-bit parent that computes its targets when they are needed.

    It is no module, so that no wrapper of the student (DDP, FSDP), optimizer, checkpoint or parameter count sees the
    parent's parameters; every process has one of its own. Nothing random happens in it.

    Attributes:
        model: a transformers causal model, in evaluation mode, without gradients.
    """

    has_hidden = True

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        eight_bit: bool = False,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: torch.device | str | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        where: str = "model.name_or_path",
    ) -> OnlineTeacher:
        """The parent `name`, as `models.load_causal_lm` loads it; with `eight_bit` packed to 8 bits meanwhile.

        Raises:
            UserError: naming `where` and `name`.
        """
        from hqqplus import models
        from hqqplus.integrations.transformers import HqqPlusConfig

        model = models.load_causal_lm(
            name,
            quantization=HqqPlusConfig(8, 64) if eight_bit else None,
            revision=revision,
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            where=where,
        )
        return cls(model)

    @property
    def head(self) -> Head:
        return Head.of(self.model)

    @torch.no_grad()
    def hidden_states(self, inputs: Mapping[str, Any]) -> Tensor:
        """The final hidden states [B, L, d] of a batch as a trainer has it: what the student gets, the parent gets.

        A packed batch without padding says by `position_ids` that start anew where a document does.
        """
        arguments = {name: value for name, value in inputs.items() if name not in _OWN} | {"use_cache": False}
        # Not under the student's autocast: the parent computes in its own precision.
        with torch.autocast(self.model.device.type, enabled=False):
            return self.model.base_model(**arguments).last_hidden_state

    def collator(self, collate: Callable[[list[Any]], dict[str, Any]]) -> Callable[[list[Any]], dict[str, Any]]:
        """`collate` itself: a batch has all that is needed."""
        return collate

    def targets(self, inputs: dict[str, Any]) -> FullTargets:
        """The parent's hidden states [n, d] at the n supervised positions of a batch, row by row, and its head."""
        hidden = self.hidden_states(inputs)[:, :-1]
        return FullTargets(hidden[supervised(inputs["labels"]).to(hidden.device)], self.head)


def pick_teacher(
    parent_bytes: int,
    free_bytes: int,
    *,
    student_bytes: int = 0,
    reserve: int = _RESERVE,
    device_type: str = "cuda",
) -> TeacherKind:
    """Where the targets are to come from: the best that fits.

    Args:
        parent_bytes: of the parent in 16 bits.
        free_bytes: of the device's memory, with neither model on it.
        student_bytes: of the packed student.
        reserve: what training takes beside the two models.
        device_type: a CPU has memory that can be added to and swapped: there it is always "online".

    Returns:
        "online": the parent in 16 bits; "8bit": the parent packed to 8 bits; "cache": neither fits beside the student.
    """
    room = free_bytes - student_bytes - reserve
    if device_type == "cpu" or parent_bytes <= room:
        return "online"
    return "8bit" if _SHARE_8BIT * parent_bytes <= room else "cache"
