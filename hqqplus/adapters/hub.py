"""A shipped folder on the Hugging Face hub: what would be uploaded, and the upload, in one commit or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hqqplus.adapters.ship import BACKBONE, files_in
from hqqplus.errors import UserError

# What an earlier shipment may have left there under other names; a loader would take it before the new one.
_REPLACED = ("adapter_model.", "adapter_8bit.", f"{BACKBONE}/")
# What training leaves behind. A shipped folder has none of it: this is the second lock on the door.
_NEVER = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".log", ".jsonl", ".env")
_NEVER_PARTS = ("checkpoint", "optimizer", "scheduler", "rng_state", "trainer_state", "wandb", "token_cache")


@dataclass(frozen=True)
class Push:
    """What is to be uploaded.

    Attributes:
        repository: OWNER/NAME.
        folder: the files lie there; `files` names them, relative to it, with their sizes in bytes.
        private: whether a new repository is private.
    """

    repository: str
    folder: Path
    files: Mapping[str, int]
    private: bool = False

    def describe(self) -> str:
        """A line for the repository, one for each file, one for the sum."""
        width = max(len(name) for name in self.files)
        lines = [f"{self.repository} ({'private' if self.private else 'public'} if it is new):"]
        lines += [f"  {name:<{width}}  {size:>15,} bytes" for name, size in self.files.items()]
        return "\n".join([*lines, f"  {len(self.files)} files, {sum(self.files.values()) / 1e6:.1f} MB"])


def check_repository(name: str) -> None:
    """Refuse what can be no name of a repository.

    Raises:
        UserError: with the reason.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push: {str(error).splitlines()[0]}") from None
    if "/" not in name:
        raise UserError(f"--push: {name}: expected OWNER/NAME, which is what the card tells others to load")


def plan_push(repository: str, folder: str | Path, private: bool = False) -> Push:
    """What uploading shipped folder `folder` would mean; nothing is sent.

    Raises:
        UserError: if the name can be none, or a file is there that must not leave this machine.
    """
    check_repository(repository)
    folder = Path(folder)
    files = files_in(folder)
    for name in files:
        parts = [part.lower() for part in Path(name).parts]
        hidden = any(part.startswith(".") for part in parts)
        if hidden or name.lower().endswith(_NEVER) or any(part.startswith(_NEVER_PARTS) for part in parts):
            raise UserError(f"--push: {folder / name}: this is no part of a shipped adapter: it is not uploaded")
    return Push(repository, folder, files, private)


def push(planned: Push) -> str:
    """Upload what was planned, as one commit, and return where it is.

    Files of earlier shipments that a loader would take before the new ones are deleted in the same commit.

    Raises:
        UserError: without a network or a login, or if the hub refuses; then nothing was changed there, but that a new
            repository may be empty.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with _one_sentence(planned.repository, "nothing was uploaded"):
        api.whoami()
        created = not api.repo_exists(planned.repository)
        repository = api.create_repo(planned.repository, private=planned.private, exist_ok=True).repo_id
    left = "nothing was uploaded" + ("; the repository was made and is empty" if created else "")
    with _one_sentence(planned.repository, left):
        there = [] if created else api.list_repo_files(repository)
        add = [CommitOperationAdd(name, planned.folder / name) for name in planned.files]
        delete = [
            CommitOperationDelete(name)
            for name in there
            if name.startswith(_REPLACED) and name not in planned.files and name != ".gitattributes"
        ]
        commit = api.create_commit(repository, [*delete, *add], commit_message="Ship an adapter made by hqqplus")
    return str(commit.commit_url)


@contextmanager
def _one_sentence(repository: str, left: str) -> Iterator[None]:
    """Turn what the hub's library raises into a `UserError` of one sentence that says what is `left`."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    head = f"--push: {repository}"
    try:
        yield
    except LocalTokenNotFoundError:
        raise UserError(f"{head}: there is no login on this machine ({left}): run `hf auth login`") from None
    except OfflineModeIsEnabled:
        raise UserError(f"{head}: HF_HUB_OFFLINE keeps everything off the network ({left})") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status == 401:
            raise UserError(f"{head}: the hub does not take this login ({left}): run `hf auth login`") from None
        if status == 403:
            raise UserError(f"{head}: this login may not write there ({left})") from None
        raise UserError(f"{head}: the hub refused it: {_line(error)} ({left})") from error
    except ValueError as error:  # a card that the hub does not take, errors of its file store
        raise UserError(f"{head}: {_line(error)} ({left})") from error
    except Exception as error:
        # Which library carries its requests depends on the version of huggingface_hub.
        if not isinstance(error, OSError) and not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        raise UserError(f"{head}: the hub cannot be reached: {_line(error)} ({left})") from error


def _line(error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 300 else f"{said[:297]}..."
