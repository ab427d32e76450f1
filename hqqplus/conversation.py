"""A chat: its turns, what the model answers to them piece by piece, and the terminal that it is held in."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

import torch

from hqqplus.errors import UserError
from hqqplus.evaluation.mode import evaluating
from hqqplus.generation import TextPieces, context_length, in_place, new_text
from hqqplus.integrations.kv_cache import can_be_cut, cut
from hqqplus.prompts import encode_messages

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

HELP = (
    "/exit ends the chat (so does the end of input), /reset starts anew, /system TEXT sets what the model is told "
    "beforehand, Ctrl-C stops an answer, // begins a line with a slash"
)


@dataclass(frozen=True)
class Answer:
    """One answer, and what it took."""

    text: str
    tokens: int
    """The stop token counts."""
    finish_reason: str
    """`stop`, `length` (the limit on an answer), `context` (the model's own) or `interrupted`."""
    read: int
    """Tokens of the prompt that went through the model."""
    kept: int
    """Tokens of the prompt whose keys and values were still there."""
    seconds_to_first: float
    seconds_after: float
    """From the first token to the last."""

    def __str__(self) -> str:
        kept = f" (and {self.kept} kept)" if self.kept else ""
        read = f"{self.read} tokens read{kept} in {self.seconds_to_first:.2f} s"
        # The first token belongs to the reading of the prompt.
        rate = f", {(self.tokens - 1) / self.seconds_after:.1f} tokens/s" if self.seconds_after > 0 else ""
        return f"{self.tokens} tokens{rate}; {read}"


class Conversation:
    """The turns of a chat, and the model that answers.

    Keys and values of the turns are kept from one answer to the next, as far as the tokens are the same ones, where
    the model has nothing but full attention and the cache is not quantized; all else is read anew.

    Args:
        config: how answers are drawn (`generation.chat_config`), and in what the cache is kept.
        plain: no chat template: what is said and what is answered is one text, each thing said on a new line.
        system: the first message.

    Raises:
        UserError: without a chat template, unless `plain`; with a system message and `plain`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        config: GenerationConfig,
        plain: bool = False,
        system: str | None = None,
    ) -> None:
        if not plain and not tokenizer.chat_template:
            raise UserError(
                "chat: the tokenizer has no chat template: name one by --chat-template FILE, or have the model "
                "continue what you write by --plain"
            )
        self._model, self._tokenizer, self._config, self._plain = model, tokenizer, config, plain
        self._system: str | None = None
        self._context = context_length(model)
        self.messages: list[dict[str, str]] = []
        """What was said so far, the system's message included."""
        self._cache: Any = None
        self._cached: list[int] = []
        self.set_system(system)

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.messages = self.messages[: self._system is not None]

    def set_system(self, text: str | None) -> None:
        """Put `text` in front of all turns in the place of the system message that was there; None for none."""
        if text is not None and self._plain:
            raise UserError("chat: a system message needs a chat template, and --plain uses none")
        turns = self.messages[self._system is not None :]
        self._system = text
        self.messages = ([] if text is None else [{"role": "system", "content": text}]) + turns

    def say(self, text: str, write: Callable[[str], None]) -> Answer:
        """Have the model answer `text`; `write` takes the answer piece by piece.

        A KeyboardInterrupt ends the answer: what there is of it counts as said. Where anything else goes wrong,
        nothing was said.

        Raises:
            UserError: if the chat template refuses the turn, or the model cannot read as much.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._encode(messages)
        room = self._room(ids)
        limit = min(room, self._config.max_new_tokens)
        kept = self._keep(ids)
        arguments: dict[str, Any] = {"past_key_values": self._cache} if kept else {}
        self._cache, self._cached = None, []  # until this went well: it may be left half written
        pieces = TextPieces(self._tokenizer, write)
        started = time.perf_counter()
        interrupted = False
        try:
            with evaluating(self._model), torch.no_grad(), in_place(self._model, self._config):
                ids_tensor = torch.tensor([ids], device=self._model.device)
                output = self._model.generate(
                    input_ids=ids_tensor,
                    attention_mask=torch.ones_like(ids_tensor),
                    max_new_tokens=limit,
                    streamer=pieces,
                    return_dict_in_generate=True,
                    **arguments,
                )
            cache = output.past_key_values
            if can_be_cut(cache):
                self._cache, self._cached = cache, pieces.ids[: cache.get_seq_length()]
        except KeyboardInterrupt:
            interrupted = True
        written = pieces.ids[len(ids) :]
        answer = new_text(self._tokenizer, [*ids, *written], len(ids))
        if answer or not interrupted:
            self.messages = [*messages, {"role": "assistant", "content": answer}]
        reason = "stop"
        if interrupted:
            reason = "interrupted"
        elif not written or written[-1] not in (self._config.eos_token_id or []):
            reason = "context" if limit == room else "length"
        first, last = pieces.first_at or time.perf_counter(), pieces.last_at or 0.0
        after = max(0.0, last - first)
        return Answer(answer, len(written), reason, len(ids) - kept, kept, first - started, after)

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        if not self._plain:
            return encode_messages(self._tokenizer, messages, "chat")
        text = ""
        for message in messages:
            line_break = "\n" if text and message["role"] == "user" and not text.endswith("\n") else ""
            text += line_break + message["content"]
        ids = list(self._tokenizer(text)["input_ids"])
        if not ids:
            raise UserError("chat: there is nothing to continue in that")
        return ids

    def _room(self, ids: list[int]) -> int:
        """How many tokens may follow on `ids`."""
        if self._context is None:
            return sys.maxsize
        room = self._context - len(ids)
        if room < 1:
            raise UserError(
                f"chat: that makes {len(ids)} tokens, and the model reads {self._context}: say less, or start anew "
                "by /reset"
            )
        return room

    def _keep(self, ids: list[int]) -> int:
        """Cut the kept keys and values to what `ids` begins with; how many tokens that is."""
        if self._cache is None:
            return 0
        # The last token is read in any case: what follows on it is asked for.
        most = min(len(ids) - 1, len(self._cached))
        same = next((at for at in range(most) if ids[at] != self._cached[at]), most)
        if same:
            cut(self._cache, same)
        return same


def converse(
    conversation: Conversation,
    read: Callable[[], str | None],
    write: Callable[[str], None],
    note: Callable[[str], None],
    figures: Callable[[str], None] | None = None,
) -> None:
    """Hold a chat until `/exit` or the end of input.

    Args:
        read: the next line, without its end; None at the end of input.
        write: takes the pieces of an answer, and a line break after it.
        note: takes a line about the chat, such as what was wrong.
        figures: takes a line after every answer on what it took; without it `note` does.
    """
    while (line := read()) is not None:
        try:
            if not line.strip():
                continue
            if line.startswith("/") and not line.startswith("//"):
                command, _, rest = line.strip().partition(" ")
                if command in ("/exit", "/quit"):
                    return
                note(_obey(conversation, command, rest.strip()))
                continue
            answer = conversation.say(line.removeprefix("/") if line.startswith("//") else line, write)
        except UserError as error:
            note(str(error))
            continue
        write("\n")
        (figures or note)(str(answer))
        if answer.finish_reason == "context":
            note("the model's context is full: /reset starts anew")
        elif answer.finish_reason == "length":
            note("cut off by --max-new-tokens")
        elif answer.finish_reason == "interrupted":
            note("stopped")


def _obey(conversation: Conversation, command: str, rest: str) -> str:
    if command == "/reset":
        conversation.reset()
        return "the turns are forgotten"
    if command == "/system":
        conversation.set_system(rest or None)
        return "the system message is set" if rest else "there is no system message now"
    if command == "/help":
        return HELP
    return f"there is no {command}: {HELP}"


def lines_of(source: TextIO, note: Callable[[str], None]) -> Callable[[], str | None]:
    """The `read` of `converse`: with a prompt and line editing at a terminal, else line by line.

    Ctrl-C at the prompt of a terminal empties the line.

    Raises:
        UserError: (the reader) if the input is not text.
    """
    terminal = source.isatty()
    if terminal:
        import contextlib

        with contextlib.suppress(ImportError):  # Windows
            import readline  # noqa: F401  (its import is what gives `input` its history)

    def read() -> str | None:
        while True:
            try:
                if terminal:
                    return input("> ")
                line = source.readline()
                return line.rstrip("\r\n") if line else None
            except EOFError:
                note("")  # the prompt's line is still open
                return None
            except UnicodeDecodeError:
                raise UserError("chat: the input is not text in UTF-8") from None
            except KeyboardInterrupt:
                if not terminal:
                    raise
                note("\n(/exit or Ctrl-D ends the chat)")

    return read


# Everything that a terminal would take for a command, but line breaks and tabs.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def writer_to(target: TextIO) -> Callable[[str], None]:
    """The `write` of `converse`: at once, and without what would command a terminal."""
    terminal = target.isatty()

    def write(text: str) -> None:
        target.write(_CONTROL.sub("", text) if terminal else text)
        target.flush()

    return write
