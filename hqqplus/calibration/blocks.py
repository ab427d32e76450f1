"""Running a causal language model one decoder block at a time: `Blocks`, and the activations between two blocks.

What a block takes beside its hidden states (position embeddings, masks; in Gemma they differ by block) is the model's
own business. To learn it, every block is replaced for a moment by a recorder that hands its hidden states on unchanged
and keeps the other arguments, and the model is run: no real block computes. What reaches the first recorder are the
embedded tokens. From then on each block can be run alone, on any hidden states of the same shape.

That holds for a model whose blocks follow one another and take nothing that depends on the tokens but the hidden
states. Both are checked in the same run, and a model that is otherwise is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqqplus.allocation import decoder_blocks
from hqqplus.errors import UserError
from hqqplus.evaluation.mode import evaluating

_HIDDEN = "hidden_states"


@dataclass(frozen=True)
class Call:
    """What a block takes beside its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device) -> Call:
        return Call(*_map_tensors((self.args, self.kwargs), lambda tensor: tensor.to(device)))


class Blocks:
    """The decoder blocks of a transformers causal language model, each run alone.

    The model stays where it is (on the CPU); a block is on `device` while it is `placed`.

    Attributes:
        names: the blocks by name, first to last.
        device: where they compute.

    Raises:
        UserError: if the model has no list of blocks, or keeps them on several devices.
    """

    def __init__(self, model: Any, device: torch.device | str = "cpu") -> None:
        self.model, self.device = model, torch.device(device)
        self.names = decoder_blocks(model)
        self._calls: dict[int, list[Call]] = {}  # number of samples -> the call of each block, on the device
        self._tuples = False  # whether blocks return tuples
        if any(parameter.is_meta for parameter in model.parameters()):
            raise UserError(f"{type(model).__name__} has weights that are not in memory: load it on the CPU")

    def block(self, index: int) -> nn.Module:
        """Block number `index`."""
        return self.model.get_submodule(self.names[index])

    @torch.no_grad()
    def embed(self, input_ids: Tensor, store: Path | None = None, batch_size: int = 8) -> Tensor:
        """The hidden states that reach the first block: `input_ids` [samples, length] -> [samples, length, width].

        They are on the CPU in the model's dtype: in memory, or, with `store`, in a file made in that folder that is
        gone as soon as nothing refers to the tensor any more. It also settles what the blocks take (`run`).

        Raises:
            UserError: if the blocks cannot be run one by one.
            OSError: if the disk of `store` is too small.
        """
        samples, length = input_ids.shape
        self._calls, self._input_ids = {}, input_ids[:1]
        # Other tokens must lead to the same arguments.
        _, calls = self._record(input_ids[:1].flip(1))
        self._calls[1] = [call.to(self.device) for call in calls]
        self._check_calls(self._record(input_ids[:1])[1])
        hidden: Tensor | None = None
        for start in range(0, samples, batch_size):
            batch, calls = self._record(input_ids[start : start + batch_size])
            if len(batch) not in self._calls:
                self._calls[len(batch)] = [call.to(self.device) for call in calls]
            self._check_calls(calls, len(batch))
            if hidden is None:
                hidden = new_activations((samples, length, batch.shape[-1]), batch.dtype, store)
            hidden[start : start + len(batch)] = batch
        assert hidden is not None
        return hidden

    def _check_calls(self, calls: list[Call], samples: int = 1) -> None:
        known = self._calls[samples]
        if not all(_alike(call.to(self.device), other) for call, other in zip(calls, known, strict=True)):
            raise self._refused("takes arguments that depend on the tokens")

    def run(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The output of block `index` on `hidden` [samples, length, width], which is on the device, as the block is.

        Args:
            weights: name of a parameter within the block -> what to use in its place; gradients flow into it.
        """
        block, call = self.block(index), self._call(index, len(hidden))
        arguments = (hidden, *call.args)
        if weights:
            output = torch.func.functional_call(block, dict(weights), arguments, call.kwargs)
        else:
            output = block(*arguments, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def placed(self, index: int) -> Iterator[nn.Module]:
        """Block `index` on the device, in evaluation mode and frozen; afterwards it is as and where it was."""
        block = self.block(index)
        home = {name: tensor.data for name, tensor in _tensors(block)}
        wanted = [(parameter, parameter.requires_grad) for parameter in block.parameters()]
        try:
            with evaluating(block):
                for _, tensor in _tensors(block):
                    tensor.data = tensor.data.to(self.device)
                block.requires_grad_(False)
                yield block
        finally:
            # The tensors that it had, not copies of what is on the device.
            for name, tensor in _tensors(block):
                tensor.data = home[name]
            for parameter, gradient in wanted:
                parameter.requires_grad_(gradient)

    @torch.no_grad()
    def advance(
        self, index: int, hidden: Tensor, batch_size: int, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Replace `hidden` [samples, length, width] by the outputs of block `index`, which is placed."""
        for start in range(0, len(hidden), batch_size):
            batch = hidden[start : start + batch_size].to(self.device)
            hidden[start : start + batch_size] = self.run(index, batch, weights).to(hidden.device)

    def _call(self, index: int, samples: int) -> Call:
        if samples not in self._calls:
            _, calls = self._record(self._input_ids.expand(samples, -1))
            self._calls[samples] = [call.to(self.device) for call in calls]
        return self._calls[samples][index]

    def _record(self, input_ids: Tensor) -> tuple[Tensor, list[Call]]:
        """`input_ids` [samples, length] -> what reaches the first block, and what each one takes beside it."""
        if self._calls:
            return self._run_recorders(input_ids, self._tuples)
        # Whether blocks return hidden states, or a tuple that begins with them, is for the model to know: with the
        # wrong one it takes the first sample for all of them, or fails.
        failures: list[Exception] = []
        for self._tuples in (False, True):
            try:
                return self._run_recorders(input_ids, self._tuples)
            except (UserError, RuntimeError, TypeError, AttributeError, IndexError) as error:
                failures.append(error)
        raise next((error for error in failures if isinstance(error, UserError)), failures[0])

    def _run_recorders(self, input_ids: Tensor, tuples: bool) -> tuple[Tensor, list[Call]]:
        recorders = [_Recorder(self.block(index), tuples) for index in range(len(self.names))]
        home = next(self.model.get_input_embeddings().parameters()).device
        for name, recorder in zip(self.names, recorders, strict=True):
            self.model.set_submodule(name, recorder)
        try:
            with evaluating(self.model), torch.no_grad():
                self.model.base_model(input_ids=input_ids.to(home), use_cache=False)
        finally:
            for name, recorder in zip(self.names, recorders, strict=True):
                self.model.set_submodule(name, recorder.block)
        if any(recorder.call is None for recorder in recorders):
            raise self._refused("is not run in the order of their list, each of them once")
        first = recorders[0].hidden
        # Nobody writes into what a recorder hands on, so the next one receives that very tensor.
        if first is None or any(recorder.hidden is not first for recorder in recorders):
            raise self._refused("does not take just what the one before it returned")
        calls = [recorder.call for recorder in recorders if recorder.call is not None]
        for call in calls:
            self._check_arguments(call)
        return first, calls

    def _check_arguments(self, call: Call) -> None:
        """Refuse what blocks could use to pass something on beside the hidden states, such as a cache."""
        for entry in (*call.args, *call.kwargs.values()):
            for single in entry if isinstance(entry, tuple | list) else (entry,):
                if not (single is None or isinstance(single, Tensor | bool | int | float | str)):
                    raise self._refused(f"takes a {type(single).__name__}")

    def _refused(self, what: str) -> UserError:
        name = type(self.model).__name__
        return UserError(f"calibration: {name} cannot be run block by block: a block of it {what}")


def new_activations(shape: tuple[int, ...], dtype: torch.dtype, store: Path | None = None) -> Tensor:
    """An empty tensor on the CPU: in memory, or mapped from a file in folder `store`.

    The file has no name any more once it is mapped: nothing is left of it, however the process ends.

    Raises:
        OSError: if the disk is too small.
    """
    if store is None:
        return torch.empty(shape, dtype=dtype)
    store.mkdir(parents=True, exist_ok=True)
    path = store / f".activations.{os.getpid()}.raw"
    try:
        with open(path, "wb") as file:
            # All of it now: a disk that is full when a mapped page is written ends the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, prod(shape) * dtype.itemsize)
            else:
                file.truncate(prod(shape) * dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=prod(shape), dtype=dtype).view(shape)
    finally:
        path.unlink(missing_ok=True)


class _Recorder(nn.Module):
    """Stands in the place of a block: hands its hidden states on and keeps what else it was given."""

    block: nn.Module

    def __init__(self, block: nn.Module, tuples: bool) -> None:
        super().__init__()
        self.tuples = tuples
        # No submodule: the model's own code shall not find its modules twice.
        object.__setattr__(self, "block", block)
        self.call: Call | None = None
        self.hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = kwargs.pop(_HIDDEN) if _HIDDEN in kwargs else args[0]
        rest = args if len(args) == 0 or args[0] is not hidden else args[1:]
        # A second call leaves its mark: the hidden states of the first are lost.
        self.hidden = hidden if self.call is None else None
        self.call = Call(rest, kwargs)
        return (hidden,) if self.tuples else hidden

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)  # models ask a block for its kind of attention


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _map_tensors(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_tensors(entry, change) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_map_tensors(entry, change) for entry in value)
    return value


def _alike(one: Call, other: Call) -> bool:
    if len(one.args) != len(other.args) or one.kwargs.keys() != other.kwargs.keys():
        return False
    pairs = [*zip(one.args, other.args, strict=True), *((one.kwargs[key], other.kwargs[key]) for key in one.kwargs)]
    return all(_equal(a, b) for a, b in pairs)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)
