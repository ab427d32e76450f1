"""wandb: one run of it over all starts of a training, and no waiting for a network that is not there."""

from __future__ import annotations

import contextlib
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from transformers.integrations import WandbCallback

Say = Callable[[str], None]

DEFAULT_PROJECT = "hqqplus"
# Seconds: for the server's first answer, for the run to be known to it, for the last of the data to be sent.
REACH_TIMEOUT, START_TIMEOUT, FINISH_TIMEOUT = 5.0, 30.0, 30.0

# wandb's older names of modes.
_MODES = {"dryrun": "offline", "run": "online"}


@dataclass
class WandbRun:
    """A run of wandb that is started with the training and finished after it. Before `start` nothing is sent but
    the question whether the server answers.

    Whatever fails in it costs the reports, never the training. Environment variables of wandb go before the arguments.

    Args:
        id: of the run; one that exists is continued.
        folder: in which wandb makes its folder `wandb`.
        project, name, config: of the run.
        mode: "online", "offline", "disabled", or None for what wandb is set to.
        say: called with a sentence.
        started: called with the run's id once the run has begun.

    Attributes:
        id: what wandb goes by in the end.
        mode: the one that was settled on: offline, where the server or a key for it is missing.
        callback: for a Trainer; None where wandb is disabled.
    """

    id: str
    folder: Path
    project: str | None = None
    name: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    mode: str | None = None
    say: Say = print
    started: Callable[[str], None] = lambda _: None
    _run: Any = field(default=None, init=False)
    _through: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        # wandb reports how it is used; a run that is reported there is enough.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wanted = wandb_mode(self.mode)
        missing = _what_is_missing() if wanted in ("online", "shared") else None
        self.mode = wanted if missing is None else "offline"
        if missing is not None:
            self.say(f"wandb: {missing}: logging offline; {self.advice}")
        self.callback = GuardedWandb(self) if self.mode != "disabled" else None

    @property
    def advice(self) -> str:
        """What a user does with a run that is only on the disk."""
        folder = os.environ.get("WANDB_DIR") or self.folder
        return f"`wandb sync {folder}/wandb/offline-run-*-{self.id}` later"

    def start(self) -> None:
        """Begin the run, or go on with it. A run that the caller's program has begun itself is used as it is."""
        import wandb

        if wandb.run is None:
            self._begin()
        run: Any = wandb.run
        self.id = run.id
        self.started(self.id)

    def _begin(self) -> None:
        try:
            self._run = self._init(self.mode)
        except Exception as error:
            if self.mode == "offline":
                raise
            self.say(f"wandb: {first_line(error)}: logging offline; {self.advice}")
            # Its service still holds the id for the run that could not be begun.
            _end_service()
            self.mode, self._run = "offline", self._init("offline")

    def ended(self, through: bool) -> None:
        """Note that the training has ended; `through` is whether it has done all of its steps."""
        self._through = through

    def finish(self, error: BaseException | None = None) -> None:
        """End the run, if it was begun here, and wait half a minute at most for what is still to be sent.

        Args:
            error: what ended the training; without one, a training that is not through goes on later.
        """
        run, self._run = self._run, None
        if run is None:
            return
        through = self._through and error is None
        try:
            if not through and (error is None or isinstance(error, KeyboardInterrupt)):
                run.mark_preempting()
            run.finish(exit_code=0 if through else 1)
        except Exception as failure:
            self.say(f"wandb: {first_line(failure)}: its last lines may be missing there")
            # Or it would be waited for, or complained about, when the process ends.
            _end_service()

    def _init(self, mode: Any) -> Any:
        import wandb

        limits = {"init_timeout": START_TIMEOUT, "finish_timeout": FINISH_TIMEOUT}
        fields: Any = wandb.Settings.model_fields
        known: dict[str, Any] = {
            name: value
            for name, value in limits.items()
            if name in fields and not os.environ.get(f"WANDB_{name.upper()}")
        }
        theirs = {"project": "WANDB_PROJECT", "name": "WANDB_NAME", "dir": "WANDB_DIR", "resume": "WANDB_RESUME"}
        ours = {"project": self._project, "name": self.name, "dir": str(self.folder), "resume": "allow"}
        given: dict[str, Any] = {
            key: value for key, value in ours.items() if value and not os.environ.get(theirs[key])
        }
        return wandb.init(id=self.id, mode=mode, config=dict(self.config), settings=wandb.Settings(**known), **given)

    @property
    def _project(self) -> str | None:
        return self.project or _settings().project or DEFAULT_PROJECT


class GuardedWandb(WandbCallback):
    """transformers' own callback on a `WandbRun`; where wandb fails, it says so once, and is silent from then on."""

    def __init__(self, run: WandbRun) -> None:
        super().__init__()
        self._of = run
        self._gone = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._try(self._of.start)
            self._try(super().on_train_begin, args, state, control, model=model, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        self._try(super().on_log, args, state, control, model=model, logs=logs, **kwargs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._try(super().on_save, args, state, control, **kwargs)

    def on_train_end(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        self._of.ended(state.global_step >= state.max_steps)
        self._try(super().on_train_end, args, state, control, model=model, processing_class=processing_class, **kwargs)

    def _try(self, call: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if self._gone:
            return
        try:
            call(*args, **kwargs)
        except Exception as error:
            self._gone = True
            self._of.say(f"wandb: {first_line(error)}: nothing more is reported to it")


def wandb_mode(asked: str | None) -> str:
    """The mode that wandb is to run in: of `WANDB_MODE`, else `asked`, else of wandb's settings files."""
    mode = os.environ.get("WANDB_MODE") or asked or _settings().mode
    return _MODES.get(mode, mode)


def _what_is_missing() -> str | None:
    """Why nothing could be sent to wandb's server, in a few words; None where all is there."""
    settings = _settings()
    host = urlsplit(settings.base_url).netloc
    if not _has_key(settings):
        return f"no API key for {host} (`wandb login` asks for it)"
    proxies = {name: proxy for name in ("http", "https") if (proxy := getattr(settings, f"{name}_proxy", None))}
    return None if reachable(settings.base_url, REACH_TIMEOUT, proxies) else f"no connection to {host}"


def _settings() -> Any:
    """wandb's settings from the environment and its files. No service is started, nothing is sent."""
    from wandb.sdk import wandb_setup

    return wandb_setup.singleton().settings


def _has_key(settings: Any) -> bool:
    """Whether wandb would find a key without asking for it: a prompt in the middle of a run is as good as a hang."""
    if settings.api_key or os.environ.get("WANDB_API_KEY") or getattr(settings, "identity_token_file", None):
        return True
    try:
        from wandb.sdk.lib.wbauth import read_netrc_auth
    except ImportError:
        return True  # A wandb that keeps it elsewhere looks for itself.
    try:
        return read_netrc_auth(host=settings.base_url) is not None
    except Exception:  # a key that cannot be one
        return False


def reachable(url: str, timeout: float, proxies: Mapping[str, str] | None = None) -> bool:
    """Whether a server answers at `url`, with anything, within `timeout` seconds, all told.

    Args:
        proxies: scheme -> proxy, over those of the environment.
    """
    answered = threading.Event()

    def ask() -> None:
        handler = urllib.request.ProxyHandler({**urllib.request.getproxies(), **(proxies or {})})
        try:
            urllib.request.build_opener(handler).open(url, timeout=timeout).close()
        except urllib.error.HTTPError:
            pass  # It is there.
        except (OSError, ValueError) as error:
            # One who cannot show a certificate that we know is there too: wandb has its own say about that.
            if "CERTIFICATE_VERIFY_FAILED" not in str(error):
                return
        answered.set()

    # In a thread, because looking up a name knows no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return answered.is_set()


def _end_service() -> None:
    """Stop wandb's own process, in whatever state it is."""
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
