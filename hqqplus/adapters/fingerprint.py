"""What an adapter was trained on, written beside it, so that it cannot be put on another base unnoticed.

PEFT's `adapter_config.json` names a base model but not how it was quantized: an adapter trained on a 1-bit backbone
loads on a 4-bit one without a word. `hqqplus.json` holds the quantization and a hash of the packed tensors themselves,
and digests of what else there must not be another of: parent, solver, tokenizer, chat template, training data.

What is compared is a dictionary from names to values (`Fingerprint.identity`); what one side does not know, because an
earlier version wrote it, is not compared. Whoever is refused is told both values, and how to go on all the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqqplus.digests import digest_of, template_digest, tokenizer_digest
from hqqplus.errors import UserError
from hqqplus.files import write_json
from hqqplus.modules import packed_modules
from hqqplus.recipe_yaml import shown
from hqqplus.untrusted import read_json

FILE_NAME = "hqqplus.json"
PARENT, REVISION, CONTENTS = "parent", "revision", "the parent's contents"
SOLVER, PACKED, SCALES = "solver version", "packed weights", "trained scales"
TOKENIZER, TEMPLATE, DATA = "tokenizer", "chat template", "training data"
ALLOW = "say --allow-mismatch (in Python allow_mismatch=True) if you know that it makes no difference"

_OF_A_PARENT = (PARENT, REVISION, CONTENTS)
# What a folder says of itself, and an adapter on it need not agree with.
_OF_A_FOLDER = (PACKED, SCALES, TOKENIZER, TEMPLATE, DATA)
_FORMAT = 1
_SHORT, _LONG = 12, 80
_TEXT_OR_NONE = (str, type(None))
# Field -> what it holds in the file.
_TYPES: dict[str, Any] = {
    "base": str,
    "revision": _TEXT_OR_NONE,
    "packed_sha256": str,
    "quantization": dict,
    "versions": dict,
    "format": int,
    "baked": bool,
    "calibration": (dict, type(None)),
    "parent_digest": _TEXT_OR_NONE,
    "solver": (int, type(None)),
    "tokenizer": _TEXT_OR_NONE,
    "template": _TEXT_OR_NONE,
    "data": _TEXT_OR_NONE,
    "converted": _TEXT_OR_NONE,
}


@dataclass(frozen=True)
class Fingerprint:
    """The base of an adapter.

    Attributes:
        base: id or folder of the model that was quantized; `revision` its commit, where one is known.
        packed_sha256: hash over the names and bytes of all packed tensors.
        quantization: the quantization config as a dict.
        versions: of the packages that made it.
        calibration: how it was calibrated; None where no text was looked at.
        baked: whether scales were trained after quantization, so that quantizing `base` anew gives another model.
        parent_digest: of config and weights of `base`; this and what follows is None where it is not known.
        solver: `SOLVER_VERSION` of the solver that quantized it.
        tokenizer, template: digests of the tokenizer and its chat template, as they lie beside this file.
        data: of an adapter, a digest of the rows that it was trained on.
        converted: the layout in which `base` is packed itself, where it was converted and not quantized.
    """

    base: str
    revision: str | None
    packed_sha256: str
    quantization: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    format: int = _FORMAT
    baked: bool = False
    calibration: dict[str, Any] | None = None
    parent_digest: str | None = None
    solver: int | None = None
    tokenizer: str | None = None
    template: str | None = None
    data: str | None = None
    converted: str | None = None

    def write(self, folder: str | Path) -> None:
        write_json(Path(folder) / FILE_NAME, asdict(self))

    @classmethod
    def read(cls, folder: str | Path) -> Fingerprint | None:
        """The fingerprint in `folder`; None where there is none.

        Raises:
            UserError: if the file is there but cannot be understood.
        """
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            return None
        try:
            values = read_json(path)
        except (ValueError, OSError) as error:
            raise UserError(f"{path}: not a fingerprint of hqqplus ({error})") from None
        # Files of earlier versions know neither baked nor metadata_bits: these are what they meant.
        given = {"baked": False, **values} if isinstance(values, dict) else {}
        fields: dict[str, Any] = {name: given.get(name) for name in _TYPES}
        wrong = [name for name, kind in _TYPES.items() if not isinstance(fields.get(name), kind)]
        if wrong:
            raise UserError(f"{path}: not a fingerprint of hqqplus ({', '.join(wrong)}: missing or of another type)")
        if fields["format"] != _FORMAT:
            found = shown(fields["format"])
            raise UserError(f"{path}: its format is {found}, this hqqplus reads {_FORMAT}: update hqqplus")
        return cls(**{**fields, "quantization": {"metadata_bits": 16, **fields["quantization"]}})

    def with_tokenizer(self, tokenizer: Any) -> Fingerprint:
        """The same with the digests of `tokenizer`."""
        return replace(self, tokenizer=tokenizer_digest(tokenizer), template=template_digest(tokenizer))

    def identity(self) -> dict[str, str]:
        """What it says of the base, name -> value; what is not known is left out."""
        known = {
            PARENT: self.base,
            REVISION: self.revision,
            CONTENTS: self.parent_digest,
            **quantization_identity(self.quantization),
            SOLVER: self.solver,
            PACKED: self.packed_sha256,
            SCALES: "yes" if self.baked else "no",
            TOKENIZER: self.tokenizer,
            TEMPLATE: self.template,
            DATA: self.data,
        }
        return {name: str(value) for name, value in known.items() if value is not None}

    @property
    def unrepeatable(self) -> str:
        """Why quantizing `base` anew would not give this packed model; empty where it would."""
        if self.baked:
            return "its scales were trained"
        if self.converted:
            return "it was converted from one that is packed itself"
        return "calibrated" if self.calibration else ""

    def describe(self) -> str:
        """`2-bit g64 of NAME (sha256 0123456789ab)`, and whether its scales were trained."""
        trained = ", scales trained" if self.baked else ""
        trained = f", converted ({self.converted}){trained}" if self.converted else trained
        return f"{_bits(self.quantization)} of {self.base}{trained} (sha256 {self.packed_sha256[:12]})"


# Comparing -----------------------------------------------------------------------------------------------------------


def quantization_identity(quantization: Mapping[str, Any]) -> dict[str, str]:
    """The settings of a quantization by dotted name: `quantization.solver.gain` -> "0.0"."""
    return flattened(quantization, "quantization")


def flattened(values: Mapping[str, Any], above: str) -> dict[str, str]:
    """Nested `values` as one level of texts, under dotted names that begin with `above`."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flattened(value, f"{above}.{name}")
        else:
            found[f"{above}.{name}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return found


def differences(stored: Mapping[str, str], here: Mapping[str, str], there: str) -> list[str]:
    """What is known on both sides and differs: `tokenizer: 3f2a51c09d7e (adapter), 9bc1d2e3f405 (here)`.

    A parent is its contents: where those are known, it does not matter by which name or revision it was found.

    Args:
        there: what to call the side of `stored`.
    """
    found = []
    if CONTENTS in stored and CONTENTS in here:
        if stored[CONTENTS] != here[CONTENTS]:
            found.append(_two(PARENT, _parent(stored), _parent(here), there))
    elif stored.get(PARENT) == here.get(PARENT):
        found += _differing((REVISION,), stored, here, there)
    return found + _differing([name for name in stored if name not in _OF_A_PARENT], stored, here, there)


def _differing(names: Iterable[str], stored: Mapping[str, str], here: Mapping[str, str], there: str) -> list[str]:
    return [
        _two(name, _shown(stored[name]), _shown(here[name]), there)
        for name in names
        if name in stored and name in here and stored[name] != here[name]
    ]


def settle(head: str, found: Sequence[str], way_out: str, allow: bool) -> list[str]:
    """Refuse what differs; where that is allowed, return the sentence that says it (none where nothing differs).

    Args:
        head: which file is about what.
        found: what `differences` returned.
        way_out: what to do about it.

    Raises:
        UserError: `HEAD: FOUND; ...: WAY OUT, or say --allow-mismatch ...`.
    """
    if not found:
        return []
    text = f"{head}: {'; '.join(found)}"
    if allow:
        return [f"{text} (allowed)"]
    raise UserError(f"{text}: {way_out}, or {ALLOW}")


def _two(name: str, stored: str, here: str, there: str) -> str:
    return f"{name}: {stored} ({there}), {here} (here)"


def _parent(values: Mapping[str, str]) -> str:
    revision = f" at {values[REVISION]}" if REVISION in values else ""
    return f"{values.get(PARENT, 'one')}{revision} with contents {_shown(values[CONTENTS])}"


def _shown(value: str) -> str:
    """A value in short; two long ones that differ still do."""
    if len(value) >= 2 * _SHORT and set(value) <= set("0123456789abcdef"):
        return value[:_SHORT]
    return value if len(value) <= _LONG else f"{value[: _LONG - 20]}... ({digest_of([value.encode()])[:_SHORT]})"


# The hash of a base --------------------------------------------------------------------------------------------------


def packed_sha256(model: nn.Module) -> str:
    """sha256 over the names and bytes of the packed tensors of `model`, in the order of their names.

    Only these: they are integers, so the hash does not depend on the dtype that the rest was loaded in.
    """
    layers = sorted(packed_modules(model).items())
    return sha256_of_layers((name, module.packed_parameters()) for name, module in layers)


def sha256_of_layers(layers: Iterable[tuple[str, Mapping[str, Tensor]]]) -> str:
    """`packed_sha256` of packed layers that come one at a time: (module name, its packed tensors by name), sorted."""
    digest = hashlib.sha256()
    for name, tensors in layers:
        for key, packed in tensors.items():
            tensor = packed.detach().cpu().contiguous()
            digest.update(f"{name}.{key}{tuple(tensor.shape)}".encode())
            digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


# The checks ----------------------------------------------------------------------------------------------------------


def check_base(
    model: nn.Module, adapter: str | Path, base: Fingerprint | None = None, allow: bool = False
) -> list[str]:
    """Refuse the adapter in folder `adapter` if it was trained on another base than `model`.

    An adapter without a fingerprint (not made by hqqplus) passes.

    Args:
        base: the fingerprint beside `model`, where it has one: it names what the tensors cannot.
        allow: let it pass.

    Returns:
        What was let pass, a sentence each.

    Raises:
        UserError: naming both bases.
    """
    wanted = Fingerprint.read(adapter)
    if wanted is None:
        return []
    found = packed_sha256(model)
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    quantization: dict[str, Any] = config.to_dict() if hasattr(config, "nbits") else {}
    here = base.identity() if base is not None else quantization_identity(quantization)
    if found == wanted.packed_sha256:
        # Only what is not packed can be another: embedding, norms, biases.
        parent = {name: value for name, value in here.items() if name in _OF_A_PARENT}
        head = f"{adapter}: this adapter was trained on another base, whose packed weights alone are the same"
        changes = differences(wanted.identity(), parent, "adapter")
        return settle(head, changes, "load it on the base it belongs to", allow)
    changes = differences(wanted.identity(), {n: v for n, v in here.items() if n not in _OF_A_FOLDER}, "adapter")
    bits, advice = "not quantized by hqqplus", "load it on the base it belongs to"
    if quantization:
        bits = f"{_bits(quantization)} (sha256 {found[:_SHORT]})"
        if wanted.baked:
            advice = "no quantizing brings trained scales back: load it on the packed folder that came with it"
        elif not changes:
            advice = (
                "the same weights quantized in another dtype, or on another device, need not come out the same: "
                "load it on the packed folder that it was trained on"
            )
    head = f"{adapter}: this adapter was trained on {wanted.describe()}, but the base is {bits}"
    hashes = _two(PACKED, wanted.packed_sha256[:_SHORT], found[:_SHORT], "adapter")
    return settle(head, changes or [hashes], advice, allow)


def check_packed(model: nn.Module, folder: str | Path, allow: bool = False) -> list[str]:
    """Refuse `model`, loaded from packed `folder`, if its packed tensors are not those that the folder was written
    with. A folder without a fingerprint passes.

    Returns:
        What was let pass, a sentence each.

    Raises:
        UserError: naming both hashes.
    """
    wanted = Fingerprint.read(folder)
    if wanted is None:
        return []
    changes = differences({PACKED: wanted.packed_sha256}, {PACKED: packed_sha256(model)}, FILE_NAME)
    head = f"{folder}: this packed model is not the one that it was written as"
    return settle(head, changes, "fetch or quantize it anew", allow)


def check_tokenizer(tokenizer: Any, folder: str | Path, allow: bool = False) -> list[str]:
    """Refuse `tokenizer` if it, or its chat template, is another than that of the adapter or packed model in `folder`.

    Returns:
        What was let pass, a sentence each.

    Raises:
        UserError: naming both digests.
    """
    wanted = Fingerprint.read(folder)
    if wanted is None or wanted.tokenizer is None:
        return []
    here = {TOKENIZER: tokenizer_digest(tokenizer), TEMPLATE: template_digest(tokenizer)}
    head = f"{folder}: this tokenizer is not the one that it was made with"
    return settle(head, differences(wanted.identity(), here, FILE_NAME), "put its own tokenizer back", allow)


def _bits(quantization: Mapping[str, Any]) -> str:
    """`2-bit g64`, and the bits of the metadata where they are not the usual 16."""
    group, metadata = quantization.get("group_size"), quantization.get("metadata_bits", 16)
    text = f"{quantization.get('nbits')}-bit g{'row' if group == -1 else group}"
    return text if metadata == 16 else f"{text} with {metadata}-bit metadata"
