"""The adapter as it ships: bf16 weights, tokenizer, fingerprint and model card in one folder.

`ship_adapter` writes it from a model at the end of a run, `ship_run` from the folder of a finished run, to be handed
on: checked for what does not belong there, in 8 bits if asked for, with nothing in it about this machine.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqqplus.adapters import eight_bit
from hqqplus.adapters.card import model_card, packed_card, shared_name
from hqqplus.adapters.fingerprint import FILE_NAME, Fingerprint
from hqqplus.adapters.licence import find_licence
from hqqplus.errors import UserError
from hqqplus.files import check_output, check_space, full_disk, replacing_folder, write_json, write_text
from hqqplus.model_names import one_sentence
from hqqplus.modules.sharding import assign, gathered, whole
from hqqplus.modules.trainable import DELTAS
from hqqplus.shards import read_header
from hqqplus.untrusted import check_adapter_files, read_object

SHIPPED_DTYPE = torch.bfloat16
MAX_BYTES = 60_000_000
ADAPTER, BACKBONE, CARD, WEIGHTS = "adapter", "backbone", "README.md", eight_bit.STANDARD
BACKBONES = (BACKBONE, "base")
# Parts of the names of modules that hold one row a token.
TABLES = ("embed", "lm_head", "wte", "wpe")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)


@torch.no_grad()
def round_adapter(model: Any) -> None:
    """Round the trainable weights of `model` to what will be shipped, in place and in their own dtype.

    What is measured afterwards is then what a user who loads the shipped adapter gets, to the bit.
    """
    for name, parameter in model.named_parameters():
        # Trained scales are shipped as bytes: a sharded model has their deltas to the end.
        if parameter.requires_grad and name.rpartition(".")[2] not in DELTAS:
            assign(parameter, whole(parameter).to(SHIPPED_DTYPE))


def adapter_size(model: Any) -> tuple[int, int]:
    """(parameters, bytes as shipped) of the trainable weights of `model`."""
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return count, count * SHIPPED_DTYPE.itemsize


def ship_adapter(
    model: Any, tokenizer: Any, folder: str | Path, fingerprint: Fingerprint, card: str, writes: bool = True
) -> None:
    """Write the adapter of PEFT model `model` to `folder`, all of it or nothing.

    `card` is the model card's Markdown. What stood at `folder` before is replaced.

    Args:
        writes: whether this process does; every process has to call, since a sharded model is gathered by all.
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = fingerprint.base, fingerprint.revision
    shipped = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if "lora_" in name or "modules_to_save" in name or (config.bias != "none" and name.endswith(".bias"))
    }
    state = {
        name: tensor.to(SHIPPED_DTYPE) if tensor.is_floating_point() else tensor
        for name, tensor in gathered(shipped, writes).items()
    }
    if not writes:
        return
    with replacing_folder(folder) as temporary:
        model.save_pretrained(temporary, state_dict=state, save_embedding_layers=False)
        tokenizer.save_pretrained(temporary)
        fingerprint.with_tokenizer(tokenizer).write(temporary)
        write_text(temporary / "README.md", card)


# A finished run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shipped:
    """What `ship_run` wrote.

    Attributes:
        folder: where it lies; `files` its files, relative to it, with their sizes in bytes, by name.
        adapter_bytes: of the file with the adapter's weights.
        notes: what its user should know, a sentence each.
    """

    folder: Path
    files: dict[str, int]
    adapter_bytes: int
    notes: tuple[str, ...] = ()


def ship_run(
    run: str | Path,
    output: str | Path,
    *,
    bits: int = 16,
    max_bytes: int = MAX_BYTES,
    backbone: bool = False,
    base: str | None = None,
    repository: str | None = None,
    quiet: bool = True,
) -> Shipped:
    """Write what a finished run made as a folder to hand on: weights, tokenizer, fingerprint, model card.

    Paths of this machine are in none of its files. What stood at `output` before is replaced, if it was such a folder.

    Args:
        run: the output folder of the run.
        bits: 16 for bf16, or 8 (`eight_bit.py`).
        max_bytes: the most that the file with the adapter's weights may take.
        backbone: copy the packed model that the adapter belongs to too, to `backbone/`.
        base: what to call the base to others, where the run knows it by a folder.
        repository: where on the hub it will lie, for the card.
        quiet: show no progress.

    Raises:
        UserError: if the run is not finished or its files are damaged; if the adapter's file holds anything but an
            adapter, or values that are not finite; if it is too large; if the folder may not be written.
    """
    run, output = Path(run), Path(output)
    if bits not in (8, 16):
        raise UserError(f"bits is {bits}: it must be 16 (bf16) or 8")
    fingerprint, report = _finished(run)
    adapter = run / ADAPTER
    _check_target(output, run)
    state = _adapter_state(adapter)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    size = _tensor_bytes(shapes, bits)
    if size > max_bytes:
        raise _too_large(adapter, size, bits, _tensor_bytes(shapes, 8), max_bytes)
    source = _backbone_of(run, fingerprint) if backbone else None
    if source is not None:
        held = sum(path.stat().st_size for path in source.iterdir() if path.is_file())
        check_space(output, held + size, "--out")
    name = base or shared_name(fingerprint.base)
    licence = find_licence(fingerprint.base, fingerprint.revision, network=True)
    shared = replace(fingerprint, base=name)
    with full_disk(output, "the shipped folder"), replacing_folder(output) as temporary:
        file = _write_weights(state, temporary, bits, quiet)
        if (written := file.stat().st_size) > max_bytes:
            raise _too_large(adapter, written, bits, _tensor_bytes(shapes, 8), max_bytes)
        config = {**read_object(adapter / "adapter_config.json"), "base_model_name_or_path": name}
        write_json(temporary / "adapter_config.json", config)
        shared.write(temporary)
        _copy_companions(adapter, temporary)
        if source is not None:
            _copy_backbone(source, temporary / BACKBONE, name)
        card = model_card(
            title=f"{report.name} adapter",
            recipe=report.recipe,
            report=report,
            fingerprint=shared,
            licence=licence,
            adapter_bytes=size,
            bits=bits,
            backbone=source is not None,
            repository=repository,
        )
        write_text(temporary / CARD, card)
        check_texts(temporary, run)
    notes = []
    if licence.identifier == "unknown":
        notes.append(f"the licence of {name} was not found: the card says so")
    if fingerprint.unrepeatable and source is None:
        notes.append(
            f"no quantizing of {name} brings the packed model of this adapter back ({fingerprint.unrepeatable}): hand "
            "it on too (--backbone)"
        )
    return Shipped(output, files_in(output), written, tuple(notes))


def files_in(folder: Path) -> dict[str, int]:
    """The files in `folder`, relative to it -> size in bytes, sorted by name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def _finished(run: Path) -> tuple[Fingerprint, Any]:
    """Fingerprint and report of a run."""
    from hqqplus.evaluation.report import read_report

    if not run.is_dir():
        raise UserError(f"{run}: there is no such folder: name the output folder of a run")
    fingerprint = Fingerprint.read(run / ADAPTER) if (run / ADAPTER).is_dir() else None
    report = read_report(run)
    if report is None and (run / "report.json").is_file():
        raise UserError(f"{run}: its report.json is damaged: run the recipe again, which continues from a checkpoint")
    if report is None or fingerprint is None:
        lacks = f"{ADAPTER}/" if not (run / ADAPTER).is_dir() else "report.json" if report is None else FILE_NAME
        raise UserError(f"{run}: this is not the folder of a finished run (no {lacks}): run its recipe to the end")
    return fingerprint, report


def _check_target(output: Path, run: Path) -> None:
    check_output(output, "--out")
    target, home = output.resolve(), run.resolve()
    kept = [home / name for name in (ADAPTER, *BACKBONES)]
    if target == home or target in home.parents or any(target == path or path in target.parents for path in kept):
        raise UserError(f"--out: {output}: a folder of the run itself: name another one")
    is_ours = (output / FILE_NAME).is_file() and (output / "adapter_config.json").is_file()
    if output.exists() and not is_ours and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--out: {output}: exists already, and is no shipped adapter: name another folder")


@torch.no_grad()
def _adapter_state(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter, in bf16, once it is known that they are no more than that."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with one_sentence(str(folder), "adapter"):
        check_adapter_files(folder)
        check_contents(folder)
        try:
            state = load_file(folder / WEIGHTS)
        except SafetensorError as error:
            raise UserError(f"a weight file is truncated or damaged ({error})") from None
        for name, tensor in state.items():
            if not torch.isfinite(tensor).all():
                raise UserError(f"{name} holds NaN or infinite values: this adapter is broken")
    return {name: tensor.to(SHIPPED_DTYPE).contiguous() for name, tensor in state.items()}


def check_contents(folder: str | Path) -> None:
    """Refuse the adapter in `folder` if its file holds more than that: an embedding, a head, weights of the base.

    What may be in it: LoRA's tensors (their names have lora_ in them) and, where its configuration names them, trained
    norms and biases. Only headers are read.

    Raises:
        UserError: naming the tensors, and their sizes.
    """
    folder = Path(folder)
    config = read_object(folder / "adapter_config.json")
    saved = [name for name in config.get("modules_to_save") or () if isinstance(name, str)]
    biases = config.get("bias", "none") != "none"
    strangers: list[tuple[str, tuple[int, ...], int]] = []
    for name, stored in read_header(folder / WEIGHTS).items():
        module, _, kind = name.rpartition(".")
        parts = (name, stored.shape, stored.size)
        # A table or a matrix is never a part of it, whoever named it: LoRA is what replaces training those.
        vector = len(stored.shape) == 1 and not any(table in module for table in TABLES)
        trained = any(module == one or module.endswith(f".{one}") for one in saved)
        if "lora_" not in name and not (vector and (trained or (biases and kind == "bias"))):
            strangers.append(parts)
    if not strangers:
        return
    strangers.sort(key=lambda stranger: -stranger[2])
    named = ", ".join(f"{name} {list(shape)} ({size / 1e6:.1f} MB)" for name, shape, size in strangers[:3])
    total = sum(size for _, _, size in strangers)
    more = f" and {len(strangers) - 3} more, {total / 1e6:.1f} MB together" if strangers[3:] else ""
    raise UserError(
        f"{WEIGHTS} holds what is no part of an adapter: {named}{more}. Embeddings, heads and weights of the base are "
        "not shipped: take them out of modules_to_save, and save with save_embedding_layers=False"
    )


def _tensor_bytes(shapes: Mapping[str, tuple[int, ...]], bits: int) -> int:
    if bits == 8:
        return eight_bit.stored_bytes(shapes)
    return sum(math.prod(shape) for shape in shapes.values()) * SHIPPED_DTYPE.itemsize


def _too_large(folder: Path, size: int, bits: int, in_eight: int, most: int) -> UserError:
    advice = f"--bits 8 makes it {in_eight:,}" if bits == 16 and in_eight <= most else "lower its rank"
    kind = "bf16" if bits == 16 else "8 bits"
    return UserError(
        f"{folder}: the adapter is {size:,} bytes in {kind}, and --max-mb allows {most:,}: {advice} "
        "(adapter.r, adapter.budget_mb), or raise the limit"
    )


def _write_weights(state: Mapping[str, Tensor], folder: Path, bits: int, quiet: bool) -> Path:
    from safetensors.torch import save_file

    if bits == 8:
        eight_bit.write_packed(state, folder, quiet)
        return folder / eight_bit.WEIGHTS
    save_file(dict(state), folder / WEIGHTS, {"format": "pt"})
    return folder / WEIGHTS


def _copy_companions(adapter: Path, folder: Path) -> None:
    for path in sorted(adapter.iterdir()):
        if path.name not in TOKENIZER_FILES or not path.is_file():
            continue
        if path.name == "tokenizer_config.json":
            write_json(folder / path.name, _named_anew(read_object(path)))
        else:
            shutil.copyfile(path, folder / path.name)


def _named_anew(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration in which libraries have noted what it was read from, without paths of this machine."""
    paths = ("name_or_path", "_name_or_path", "tokenizer_file", "special_tokens_map_file")
    return {k: shared_name(v) if k in paths and isinstance(v, str) else v for k, v in config.items()}


def _backbone_of(run: Path, fingerprint: Fingerprint) -> Path:
    from hqqplus.models import is_packed

    for name in BACKBONES:
        found = Fingerprint.read(run / name)
        if found is not None and found.packed_sha256 == fingerprint.packed_sha256 and is_packed(str(run / name)):
            return run / name
    raise UserError(
        f"--backbone: {run}: it holds no packed model of this adapter ({' or '.join(BACKBONES)}): its scales were not "
        "trained, and quantization.save_to led elsewhere"
    )


def _copy_backbone(source: Path, folder: Path, base: str) -> None:
    """What a packed model is loaded from, and nothing else that lies there."""
    folder.mkdir()
    config = read_object(source / "config.json")
    for path in sorted(source.iterdir()):
        weights = path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json")
        code = path.suffix == ".py" and "auto_map" in config
        if path.is_file() and (weights or code or path.name == "generation_config.json"):
            shutil.copyfile(path, folder / path.name)
    write_json(folder / "config.json", _named_anew(config))
    _copy_companions(source, folder)
    found = Fingerprint.read(source)
    assert found is not None  # `_backbone_of` compared it
    found = replace(found, base=base)
    found.write(folder)
    write_text(folder / CARD, packed_card(found))


# What must not leave this machine ------------------------------------------------------------------------------------


def check_texts(folder: Path, run: Path) -> None:
    """Refuse `folder` if a text in it holds a path of this machine, or what looks like a token.

    Raises:
        UserError: naming file and line.
    """
    places = {str(run.resolve()), str(Path.cwd()), tempfile.gettempdir(), str(folder.resolve())}
    # The root of the disk and the like are in every text; below somebody's home folder nothing is.
    places = {place for place in places if len(Path(place).parts) > 2}
    places |= {f"{home}/" for home in {str(Path.home()), os.path.realpath(Path.home())} if home != "/"}
    secret = re.compile(r"\bhf_[A-Za-z0-9]{20,}|\b(sk|wandb)[-_][A-Za-z0-9_-]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY")
    patterns = {place: re.escape(place) + ("" if place.endswith("/") else r"(?![\w-])") for place in places}
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".md", ".json", ".yaml", ".jinja") or path.name == "tokenizer.json":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            where = f"{path.relative_to(folder).as_posix()}:{number}"
            if secret.search(line):
                raise UserError(f"{where}: this looks like a token: take it out of what the run was given")
            if found := next((place for place, pattern in patterns.items() if re.search(pattern, line)), None):
                raise UserError(f"{where}: a path of this machine ({found}) is in it: name what is meant otherwise")
