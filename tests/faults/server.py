"""Runs to be killed, without the ten seconds of imports that each process would begin with.

    python -m tests.faults.server              lines of JSON on stdin, an answer on stdout for each
    python -m tests.faults.server REQUEST      one run, in this process: CUDA cannot be forked

One process imports torch, transformers, trl and hqqplus.train, and forks a child for every run that it is asked for.
The child is a process like any other: it calls `hqqplus.train.main` and may be killed; what it leaves is what is on
the disk. It can be told beforehand where to send itself a signal (`Kill`), and when to note how much memory it uses.

The client is `ForkServer`.
"""

from __future__ import annotations

import functools
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Kill:
    """Where a run sends itself a signal.

    Attributes:
        event: at which change of the run's files: opening one to write, renaming, removing, making a folder, or saving
            tensors. The change itself is not made; of tensors half a file is written. From 1; 0 for none.
        saving: the same, of savings of tensors alone.
        at: "module:name" of a function, or "module:class.name" of a method.
        call: at which call of it, from 1.
        after: when that call returns, and not when it begins.
        signal: what is sent; SIGKILL by default.
    """

    event: int = 0
    saving: int = 0
    at: str = ""
    call: int = 1
    after: bool = False
    signal: int = int(signal.SIGKILL)


# The child -----------------------------------------------------------------------------------------------------------

_CHANGES = frozenset(
    {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree"}
)
# Their last argument is the descriptor of the folder that the path is relative to, or -1.
_RELATIVE = frozenset({"os.remove", "os.mkdir", "os.rmdir"})
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Events:
    """Counts the changes that this process makes to what is below `folder`, and may send it a signal at one of them.

    Python announces its own changes (audit events), Rust and C++ do not: the two functions by which tensors get to the
    disk are counted by wrapping them.
    """

    def __init__(self, folder: str, kill: Kill) -> None:
        self.seen: list[str] = []
        self._savings, self._folder, self._kill = 0, folder, kill

    def install(self) -> None:
        import safetensors.torch
        import torch

        sys.addaudithook(self._announced)
        torch.save = self._wrapped(torch.save, place=1, write=self._half_of_torch(torch.save))
        save_file: Any = safetensors.torch.save_file
        wrapped = self._wrapped(save_file, place=1, write=self._half_of_safetensors)
        # Some have imported it by its name.
        for module in list(sys.modules.values()):
            if getattr(module, "save_file", None) is save_file:
                module.save_file = wrapped  # type: ignore[attr-defined]

    def _announced(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & _WRITES:
                return
        elif event in _CHANGES:
            path = arguments[0]
        else:
            return
        if not isinstance(path, str | bytes | os.PathLike):
            return
        handle = arguments[-1]
        if event in _RELATIVE and isinstance(handle, int) and handle >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{handle}"), os.fsdecode(path))
        # What is there is not made, what is not there is not removed.
        if event != "open" and os.path.lexists(path) == (event == "os.mkdir"):
            return
        if os.path.abspath(os.fsdecode(path)).startswith(self._folder):
            self._met(event)

    def _wrapped(self, save: Any, place: int, write: Callable[..., None]) -> Any:
        @functools.wraps(save)
        def saving(*args: Any, **kwargs: Any) -> Any:
            path = args[place] if len(args) > place else kwargs.get("filename", kwargs.get("f"))
            if isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(self._folder):
                self._met("save", lambda: write(args[0], path))
            return save(*args, **kwargs)

        return saving

    @staticmethod
    def _half_of_torch(save: Any) -> Callable[..., None]:
        def write(value: Any, path: Any) -> None:
            whole = io.BytesIO()
            save(value, whole)
            Path(path).write_bytes(whole.getvalue()[: whole.tell() // 2])

        return write

    @staticmethod
    def _half_of_safetensors(tensors: Any, path: Any) -> None:
        from safetensors.torch import save

        whole = save(tensors)
        Path(path).write_bytes(whole[: len(whole) // 2])

    def _met(self, event: str, first: Callable[[], None] | None = None) -> None:
        self.seen.append(f"{event}: {_where()}")
        self._savings += first is not None
        if len(self.seen) == self._kill.event or (first is not None and self._savings == self._kill.saving):
            if first is not None:
                first()
            os.kill(os.getpid(), self._kill.signal)


def _where() -> str:
    """The lines of hqqplus that are being executed, the innermost first."""
    frame, lines = sys._getframe(1), []
    while frame is not None:
        _, inside, path = frame.f_code.co_filename.rpartition(f"{os.sep}hqqplus{os.sep}")
        if inside:
            lines.append(f"{path}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(lines)


def _install(kill: Kill) -> None:
    """Have the function that `kill.at` names send the signal at its call of that number."""
    owner, name = _found(kill.at)
    function, calls = getattr(owner, name), 0

    @functools.wraps(function)
    def met(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        own = calls == kill.call
        if own and not kill.after:
            os.kill(os.getpid(), kill.signal)
        result = function(*args, **kwargs)
        if own and kill.after:
            os.kill(os.getpid(), kill.signal)
        return result

    setattr(owner, name, met)


def _note_memory(name: str, path: Path) -> None:
    """After each call of the function `name`, add a line to `path`: resident bytes, and open file descriptors."""
    owner, attribute = _found(name)
    function = getattr(owner, attribute)

    @functools.wraps(function)
    def noting(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        with path.open("a") as file:
            file.write(f"{resident} {len(os.listdir('/proc/self/fd'))}\n")
        return result

    setattr(owner, attribute, noting)


def _found(name: str) -> tuple[Any, str]:
    """What holds the function that "module:class.name" names, and its name there."""
    module, _, path = name.partition(":")
    *owners, attribute = path.split(".")
    return functools.reduce(getattr, owners, importlib.import_module(module)), attribute


def _child(request: dict[str, Any]) -> int:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)
    os.close(0)  # the server's requests are not the run's
    import datasets

    import hqqplus.train

    os.environ.update(request["environment"])
    # Nothing that another run prepared may be found again.
    datasets.config.HF_DATASETS_CACHE = request["cache"]
    kill = Kill(**request["kill"])
    events = Events(request["folder"], kill)
    if kill.at:
        _install(kill)
    if request["probe"]:
        _note_memory(request["probe"], Path(request["log"]).with_suffix(".probe"))
    events.install()
    code = hqqplus.train.main(request["arguments"])
    Path(request["log"]).with_suffix(".changes").write_text(json.dumps(events.seen))
    return code


def _fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = _child(request)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _note_all_progress() -> None:
    """What is noted every twenty seconds is noted at once: in runs this small nothing would be there to go on with."""
    from hqqplus.recovery import teacher_cache
    from hqqplus.streaming import partial

    defaults: Any = teacher_cache.build_cache.__kwdefaults__
    defaults.update(block_tokens=128, note_seconds=0.0)
    partial._NOTE_SECONDS = 0.0


def main() -> None:
    """Serve until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What a library prints is no answer.
    import torch

    torch.set_num_threads(1)
    for name in (
        "bitsandbytes",
        "datasets",
        "matplotlib.backends.backend_agg",
        "hqqplus.adapters.bake",
        "hqqplus.adapters.card",
        "hqqplus.evaluation.report",
        "hqqplus.integrations.trl",
        "hqqplus.recovery.backbone",
        "hqqplus.recovery.teaching",
        "hqqplus.recovery.trainables",
        "hqqplus.train",
        "trl",
    ):
        importlib.import_module(name)
    _note_all_progress()
    while line := sys.stdin.readline():
        request = json.loads(line)
        answer = _exit_code(request["wait"]) if "wait" in request else _fork(request)
        print(answer, file=answers, flush=True)


# The client ----------------------------------------------------------------------------------------------------------


class Run:
    """A run that was started.

    Attributes:
        pid: of its process, which exists until `wait` returns.
        log: what it prints.
        seconds: that it took.
    """

    def __init__(self, server: ForkServer, pid: int, log: Path) -> None:
        self._server, self.pid, self.log = server, pid, log
        self.seconds, self._started = 0.0, time.monotonic()

    def wait(self) -> int:
        """Its exit code; minus the number of the signal that killed it."""
        code = self._server.ask({"wait": self.pid})
        self.seconds = time.monotonic() - self._started
        return code

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def memory(self) -> list[tuple[int, int]]:
        """Resident bytes and open file descriptors, as they were noted."""
        lines = self.log.with_suffix(".probe").read_text().splitlines()
        return [(int(size), int(files)) for size, files in map(str.split, lines)]

    @property
    def changes(self) -> list[str]:
        """The changes of files that it made, once it is through: what was done, and by which lines."""
        found: list[str] = json.loads(self.log.with_suffix(".changes").read_text())
        return found


def request_of(
    arguments: list[str],
    folder: Path,
    log: Path,
    kill: Kill | None = None,
    environment: dict[str, str] | None = None,
    probe: str = "",
) -> dict[str, Any]:
    """What the server is asked for, with the arguments of `ForkServer.start`."""
    return {
        "arguments": arguments,
        "folder": str(folder),
        "log": str(log),
        "cache": str(folder / "datasets"),
        "kill": asdict(kill or Kill()),
        "environment": environment or {},
        "probe": probe,
    }


class ForkServer:
    """The client's end of `python -m tests.faults.server`."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "disabled",
            "CUDA_VISIBLE_DEVICES": "",  # a process that uses CUDA cannot be forked
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, request: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the server has died"
        return int(answer)

    def start(
        self,
        arguments: list[str],
        folder: Path,
        log: Path,
        kill: Kill | None = None,
        environment: dict[str, str] | None = None,
        probe: str = "",
    ) -> Run:
        """Start `hqqplus.train.main(arguments)`.

        Args:
            folder: whose changes are counted; the cache of `datasets` is put in it.
            log: where its output goes.
            probe: "module:name" of a function; memory is noted after each call of it.
        """
        request = request_of(arguments, folder, log, kill, environment, probe)
        return Run(self, self.ask(request), log)


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(_child(json.loads(sys.argv[1])))
    main()
