"""Distillation inside a TRL trainer: what a loss has to offer, and how it gets to the forward pass of a model."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.utils import ModelOutput
from trl.trainer.utils import maybe_gather_lm_head_ctx


class Loss(Protocol):
    """`hqqplus.recovery.distillation.DistillationLoss`: sums over the positions, but for `loss`."""

    @property
    def loss(self) -> Tensor: ...

    @property
    def kl(self) -> Tensor: ...

    @property
    def ce(self) -> Tensor: ...

    @property
    def hidden(self) -> Tensor: ...

    @property
    def correct(self) -> Tensor: ...

    @property
    def positions(self) -> int: ...


class Distillation(Protocol):
    """What the trainer needs to distil: `hqqplus.recovery.distillation.Distillation`."""

    def collator(self, collate: Callable[[list[Any]], dict[str, Any]]) -> Callable[[list[Any]], dict[str, Any]]: ...

    def targets(self, inputs: dict[str, Any]) -> Any: ...

    def loss(
        self, model: Any, hidden: Tensor, labels: Tensor, targets: Any, num_items: Tensor | int | None
    ) -> Loss: ...


@dataclass(frozen=True, eq=False)
class Request:
    """What goes through the wrappers of a model (DDP, FSDP, PEFT) to its forward pass: opaque to all of them."""

    distillation: Distillation
    targets: Any
    num_items: Tensor | int | None


@dataclass
class DistilledOutput(ModelOutput):
    """`loss`; `sums` [5], detached: kl, ce, hidden and correct summed over the supervised positions, their number."""

    loss: Tensor | None = None
    sums: Tensor | None = None


def add_distillation(model: Any) -> None:
    """Let `model(..., labels=..., distillation=request)` return the loss of the request, and build no logits.

    In the model's own forward pass, as TRL's fused head is: so it runs inside what DDP, FSDP and autocast put around
    it. Called otherwise, the model is what it was.
    """
    without = model.forward

    # The signature stays the class's: `generate` checks its arguments against it.
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, distillation: Request | None = None, **kwargs: Any) -> Any:
        if distillation is None:
            return without(*args, **kwargs)
        labels = kwargs.pop("labels")[:, 1:]
        # Looked up at each call, since FSDP replaces it.
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        # DeepSpeed's ZeRO-3 brings a module's parameters together only where the module itself is called.
        with maybe_gather_lm_head_ctx(*self.get_output_embeddings().parameters()):
            counts = labels != -100
            found = distillation.distillation.loss(
                self, hidden[counts], labels[counts], distillation.targets, distillation.num_items
            )
        parts = [found.kl, found.ce, found.hidden, found.correct]
        sums = torch.stack([*parts, torch.full_like(found.kl, found.positions)]).detach()
        return DistilledOutput(loss=found.loss, sums=sums)

    model.forward = types.MethodType(forward, model)
