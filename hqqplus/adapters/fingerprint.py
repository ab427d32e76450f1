"""What an adapter was trained on, written beside it, so that it cannot be put on another base unnoticed.

PEFT's `adapter_config.json` names a base model but not how it was quantized: an adapter trained on a 1-bit backbone
loads on a 4-bit one without a word. `hqqplus.json` holds the quantization and a hash of the packed tensors themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqqplus.errors import UserError
from hqqplus.files import write_json
from hqqplus.modules import packed_modules

FILE_NAME = "hqqplus.json"
_FORMAT = 1
# Field -> what it holds in the file.
_TYPES: dict[str, Any] = {
    "base": str,
    "revision": (str, type(None)),
    "packed_sha256": str,
    "quantization": dict,
    "versions": dict,
    "format": int,
    "baked": bool,
    "calibration": (dict, type(None)),
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
    """

    base: str
    revision: str | None
    packed_sha256: str
    quantization: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    format: int = _FORMAT
    baked: bool = False
    calibration: dict[str, Any] | None = None

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
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise UserError(f"{path}: not a fingerprint of hqqplus ({error})") from None
        # Files of earlier versions know neither baked nor metadata_bits: these are what they meant.
        given = {"baked": False, **values} if isinstance(values, dict) else {}
        fields: dict[str, Any] = {name: given.get(name) for name in _TYPES}
        wrong = [name for name, kind in _TYPES.items() if not isinstance(fields.get(name), kind)]
        if wrong:
            raise UserError(f"{path}: not a fingerprint of hqqplus ({', '.join(wrong)}: missing or of another type)")
        if fields["format"] != _FORMAT:
            raise UserError(f"{path}: its format is {fields['format']}, this hqqplus reads {_FORMAT}: update hqqplus")
        return cls(**{**fields, "quantization": {"metadata_bits": 16, **fields["quantization"]}})

    @property
    def unrepeatable(self) -> str:
        """Why quantizing `base` anew would not give this packed model; empty where it would."""
        if self.baked:
            return "its scales were trained"
        return "calibrated" if self.calibration else ""

    def describe(self) -> str:
        """`2-bit g64 of NAME (sha256 0123456789ab)`, and whether its scales were trained."""
        trained = ", scales trained" if self.baked else ""
        return f"{_bits(self.quantization)} of {self.base}{trained} (sha256 {self.packed_sha256[:12]})"


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


def check_base(model: nn.Module, adapter: str | Path) -> None:
    """Refuse the adapter in folder `adapter` if it was trained on another base than `model`.

    An adapter without a fingerprint (not made by hqqplus) passes.

    Raises:
        UserError: naming both bases.
    """
    wanted = Fingerprint.read(adapter)
    if wanted is None:
        return
    found = packed_sha256(model)
    if found != wanted.packed_sha256:
        config = getattr(model, "config", None)
        quantization = getattr(config, "quantization_config", None)
        bits, advice = "not quantized by hqqplus", "load it on the base it belongs to"
        if quantization is not None and hasattr(quantization, "nbits"):
            bits = f"{_bits(quantization.to_dict())} (sha256 {found[:12]})"
            if wanted.baked:
                advice = "no quantizing brings trained scales back: load it on the packed folder that came with it"
            elif {**wanted.quantization, "quant_method": quantization.quant_method} == quantization.to_dict():
                advice = (
                    "the same weights quantized in another dtype, or on another device, need not come out the same: "
                    "load it on the packed folder that it was trained on"
                )
        raise UserError(
            f"{adapter}: this adapter was trained on {wanted.describe()}, but the base is {bits}; {advice}"
        )


def _bits(quantization: Mapping[str, Any]) -> str:
    """`2-bit g64`, and the bits of the metadata where they are not the usual 16."""
    group, metadata = quantization.get("group_size"), quantization.get("metadata_bits", 16)
    text = f"{quantization.get('nbits')}-bit g{'row' if group == -1 else group}"
    return text if metadata == 16 else f"{text} with {metadata}-bit metadata"
