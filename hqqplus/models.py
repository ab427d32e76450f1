"""Models by name: parents, packed folders, packed folders with an adapter.

The trap that this module exists for: a packed folder read by transformers alone, without `import hqqplus`, comes up
as a freshly initialised model with no more than a warning. `hqqplus.load` cannot be used without importing it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hqqplus.adapters import eight_bit
from hqqplus.adapters.card import packed_card
from hqqplus.adapters.fingerprint import (
    CONTENTS,
    PARENT,
    SOLVER,
    Fingerprint,
    check_base,
    check_packed,
    check_tokenizer,
    differences,
    packed_sha256,
    settle,
)
from hqqplus.digests import checkpoint_digest, weight_files
from hqqplus.errors import UserError
from hqqplus.files import write_text
from hqqplus.kernels import int8
from hqqplus.model_names import check_folder, is_local, one_sentence, resolve_name
from hqqplus.modules import PackedLinear, PackedStack, packed_modules
from hqqplus.quantization.solver import SOLVER_VERSION
from hqqplus.untrusted import check_adapter_files, check_links, read_json

if TYPE_CHECKING:
    from hqqplus.integrations.transformers import HqqPlusConfig

COMPUTE = ("auto", "int8")
_log = logging.getLogger(__name__)

PACKED_FOLDERS = ("backbone", "base")
"""Where a run leaves packed models beside its adapter: with trained scales, and as quantized."""


@contextmanager
def _load_report() -> Iterator[None]:
    """Say in one sentence why a model cannot be loaded, where transformers points to its report.

    The report is a table on the terminal, with whole tracebacks in its cells. Of a model that loads it is passed on.
    """
    log = logging.getLogger("transformers.modeling_utils")
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        report = "LOAD REPORT" in record.getMessage()
        if report:
            held.append(record)
        return not report

    log.addFilter(hold)
    try:
        yield
    except RuntimeError as error:
        report = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(record.getMessage() for record in held))  # without colours
        shape = re.search(r"^(.+?) *\| *MISMATCH", report, re.M)
        conversion = re.search(r"^\w*Error: (.+)$", report, re.M)
        if shape:
            raise UserError(f"{shape[1]} has not the shape that config.json asks for") from error
        if conversion:
            raise UserError(conversion[1]) from error
        raise
    finally:
        log.removeFilter(hold)
    for record in held:
        log.handle(record)


def default_dtype(device: torch.device | str) -> torch.dtype:
    """What `dtype: auto` means: bfloat16 on a GPU that has it (else float16), float32 on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float32


def pick_device(device: torch.device | str | None) -> torch.device:
    """`device`; without one the GPU if there is one, else the CPU.

    Raises:
        UserError: if torch knows no such device, or sees none.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UserError(f"device: {device!r} is none of torch's, such as cuda, cuda:1 or cpu") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: {found} is asked for, but torch sees {torch.cuda.device_count()} GPUs")
    return found


def load_causal_lm(
    name: str,
    *,
    quantization: HqqPlusConfig | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    where: str = "model.name_or_path",
) -> Any:
    """`AutoModelForCausalLM.from_pretrained` with a device, a dtype and clear errors.

    With `quantization` a full-precision model is quantized while it loads, from the dtype of its checkpoint whatever
    `dtype` is, so that the codes do not depend on what is computed in afterwards; a packed one keeps its own.

    `dtype` "checkpoint" leaves everything in the dtype of the checkpoint. `device_map` is transformers' own, for a
    model over several devices; in one process of several it is refused.

    Raises:
        UserError: naming `where` and `name`.
    """
    from transformers import AutoModelForCausalLM

    # also registers the quantizer
    from hqqplus.integrations.transformers import cast_unpacked, packing_shown, refuse_spread

    with one_sentence(name, where):
        refuse_spread(device_map)
    check_folder(name, where)
    device = pick_device(device)
    torch_dtype = None if dtype == "checkpoint" else compute_dtype(dtype, device, where)
    as_stored = torch_dtype is None or quantization is not None
    arguments: dict[str, Any] = {"dtype": "auto" if as_stored else torch_dtype, "trust_remote_code": trust_remote_code}
    if revision is not None:
        arguments["revision"] = revision
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    if quantization is not None:
        arguments["quantization_config"] = quantization
    if device_map is not None:
        arguments["device_map"] = device_map
    elif device.type != "cpu":
        arguments["device_map"] = {"": device}
    shown = packing_shown() if quantization is not None else nullcontext()
    with one_sentence(name, where), _load_report(), shown:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolve_name(name), use_safetensors=True, output_loading_info=True, **arguments
        )
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            # transformers would go on with random ones, and a warning.
            further = f" and {len(missing) - 1} more tensors" if missing[1:] else ""
            raise UserError(f"the checkpoint lacks {missing[0]}{further}")
    if as_stored and torch_dtype is not None:
        cast_unpacked(model, torch_dtype)
    return model


def compute_dtype(dtype: str | torch.dtype, device: torch.device, where: str) -> torch.dtype:
    """`dtype`, which may be a name or "auto", as one of torch's.

    Raises:
        UserError: if torch has no such dtype.
    """
    found = (
        default_dtype(device) if dtype == "auto" else getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    )
    if not isinstance(found, torch.dtype):
        raise UserError(f"{where}: dtype is {dtype!r}: it must be auto or one of torch's, such as bfloat16")
    return found


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, where: str = "model.name_or_path"
) -> Any:
    """The tokenizer of a model. One without a padding token pads with its end of sequence.

    Raises:
        UserError: naming `where` and `name`.
    """
    from transformers import AutoTokenizer

    local = is_local(name, where)
    with one_sentence(f"{name}: the tokenizer", where):
        if local:
            check_links(Path(resolve_name(name)))
        arguments = {"revision": revision} if revision is not None else {}
        tokenizer = AutoTokenizer.from_pretrained(resolve_name(name), trust_remote_code=trust_remote_code, **arguments)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"{where}: {name}: the tokenizer has neither a padding nor an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def is_packed(name: str) -> bool:
    """Whether local folder `name` holds a packed model."""
    path = Path(resolve_name(name)) / "config.json"
    try:
        config = read_json(path)
    except (OSError, ValueError):
        return False
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == "hqqplus"


def load(
    name: str | Path,
    adapter: str | Path | None = None,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    compute: str = "auto",
    allow_mismatch: bool = False,
    device_map: str | Mapping[str, Any] | None = None,
) -> Any:
    """Load a model for use: a packed folder, a full-precision one, or either with an adapter on top.

    Args:
        name: folder or hub id of the base, or an adapter folder written by hqqplus: its base is then the packed folder
            that the run left beside it, or else the one that is named in it.
        adapter: folder of an adapter. If the base is not packed, it is quantized as the adapter's fingerprint says.
        revision, trust_remote_code: as in transformers, for the base.
        dtype: a torch dtype or its name; "auto" is bfloat16 on a GPU and float32 on a CPU.
        device: where to; by default the GPU if there is one.
        compute: "int8" rounds the activations of the layers of 1 bit to 8 bits a token wherever no gradient is asked
            for (`kernels/int8.py`), and says which packed layers it leaves alone; "auto" rounds none.
        allow_mismatch: put the adapter on a base that it was not trained on, with a warning that names both.
        device_map: as in transformers, "auto" for one: the base over several devices, in a single process.

    Returns:
        A transformers model in evaluation mode, or a `PeftModel` around it.

    Raises:
        UserError: if anything is missing or damaged, if the adapter was trained on another base, or if `compute` is
            "int8" and the model has no layer of 1 bit.
    """
    if compute not in COMPUTE:
        raise UserError(f"compute is {compute!r}: it must be one of {', '.join(COMPUTE)}")
    base, adapter, model = _load_base(
        name, adapter, revision, dtype, device, trust_remote_code, allow_mismatch, device_map
    )
    if compute == "int8":
        use_int8(model, str(name))
    return model if adapter is None else put_adapter(model, adapter, base, allow_mismatch)


def load_with_tokenizer(
    name: str | Path,
    adapter: str | Path | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_mismatch: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """`load`, and the tokenizer: the adapter's if it brings one (it may have grown), else the model's.

    Tokenizer and chat template, and without an adapter the packed tensors, must be those that the folder was written
    with.

    Args:
        allow_mismatch: warn instead of refusing.
        options: the other arguments of `load`.

    Raises:
        UserError: as `load`, or if tokenizer, template or packed tensors are others.
    """
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    model = load(name, adapter, allow_mismatch=allow_mismatch, **common, **options)
    home = name
    if adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file():
        home, common["revision"] = adapter, None
    tokenizer = load_tokenizer(str(home), where="model", **common)
    _check_folder(name, adapter, model, tokenizer, allow_mismatch)
    return model, tokenizer


def load_unadapted(
    name: str | Path,
    adapter: str | Path | None = None,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    allow_mismatch: bool = False,
) -> tuple[str, str | Path | None, Any, Any]:
    """(base name, adapter folder, base model, tokenizer): what `load_with_tokenizer` loads, checked in the same way,
    with the adapter still to be put on.

    Raises:
        UserError: as `load_with_tokenizer`.
    """
    base, adapter, model = _load_base(name, adapter, revision, dtype, device, trust_remote_code, allow_mismatch)
    has_tokenizer = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(
        str(adapter) if has_tokenizer else base, trust_remote_code=trust_remote_code, where="model"
    )
    if adapter is not None:
        _warn(_check_base(model, adapter, base, allow_mismatch))
    _check_folder(base, adapter, model, tokenizer, allow_mismatch)
    return base, adapter, model, tokenizer


def _check_folder(name: str | Path, adapter: str | Path | None, model: Any, tokenizer: Any, allow: bool) -> None:
    """Check what `load` alone does not: the tokenizer."""
    folder = resolve_name(str(name)) if adapter is None else adapter
    _warn(check_tokenizer(tokenizer, folder, allow))


def _warn(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        _log.warning("%s", sentence)


def content_digest(name: str, revision: str | None = None, where: str = "the parent") -> str | None:
    """`digests.checkpoint_digest` of model `name`, a folder or a hub id; None where its files are not on this machine.

    Raises:
        UserError: if they are there and damaged.
    """
    folder = Path(resolve_name(name))
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        try:
            found = try_to_load_from_cache(name, "config.json", revision=revision)
        except ValueError:  # no name for a hub
            return None
        if not isinstance(found, str):
            return None
        folder = Path(found).parent
    if not (folder / "config.json").is_file() or not weight_files(folder):
        return None
    with one_sentence(name, where):
        return checkpoint_digest(folder)


def check_parent(name: str | Path, adapter: str | Path | None, parent: str, allow_mismatch: bool = False) -> None:
    """Refuse `parent`, a model, if adapter or packed folder `name` were made from another one; pass what is not known.

    A packed `parent` counts as what it was quantized from.

    Raises:
        UserError: naming both.
    """
    folder = Path(resolve_name(str(name)) if adapter is None else adapter)
    wanted, noted = Fingerprint.read(folder), Fingerprint.read(resolve_name(parent))
    contents = noted.parent_digest if noted is not None else content_digest(parent)
    if wanted is None or contents is None:
        return
    changes = differences(
        wanted.identity(), {PARENT: noted.base if noted else parent, CONTENTS: contents}, "hqqplus.json"
    )
    _warn(settle(f"{folder}: {parent} is not its parent", changes, "name the parent", allow_mismatch))


def _load_base(
    name: str | Path,
    adapter: str | Path | None,
    revision: str | None,
    dtype: str | torch.dtype,
    device: torch.device | str | None,
    trust_remote_code: bool,
    allow_mismatch: bool,
    device_map: str | Mapping[str, Any] | None = None,
) -> tuple[str, str | Path | None, Any]:
    """(base name, adapter folder, base model), with the base that the adapter's fingerprint asks for."""
    from hqqplus.integrations.transformers import HqqPlusConfig

    base = str(name)
    if adapter is None and (Path(base) / "adapter_config.json").is_file():
        fingerprint, adapter = Fingerprint.read(base), base
        if fingerprint is None:
            raise UserError(
                f"{base}: this adapter has no hqqplus.json that names its base: give the base and the adapter"
            )
        base = _packed_beside(base, fingerprint) or fingerprint.base
    quantization = None
    if adapter is not None:
        if not (Path(adapter) / "adapter_config.json").is_file():
            raise UserError(f"adapter: {adapter}: this folder holds no adapter (no adapter_config.json)")
        if not any(Path(adapter).glob("adapter_model.*")) and not eight_bit.is_packed(adapter):
            raise UserError(f"adapter: {adapter}: this folder holds no weights (no adapter_model.safetensors)")
        fingerprint = Fingerprint.read(adapter)
        if fingerprint is not None and fingerprint.base == base:
            revision = revision or fingerprint.revision
        if fingerprint is not None and not is_packed(base):
            if fingerprint.unrepeatable and not allow_mismatch:
                raise UserError(
                    f"adapter: {adapter}: this adapter belongs to a packed model that no quantizing of {base} brings "
                    f"back ({fingerprint.unrepeatable}): name the packed folder that came with it as the base"
                )
            _check_repeatable(fingerprint, adapter, base, revision, allow_mismatch)
            try:
                quantization = HqqPlusConfig(**fingerprint.quantization)
            except (ValueError, TypeError) as error:
                raise UserError(f"adapter: {adapter}: the quantization it asks for is none: {error}") from None
    model = load_causal_lm(
        base,
        quantization=quantization,
        revision=revision,
        dtype=dtype,
        device=device,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        where="model",
    )
    # An adapter knows the hash of its base. What is offloaded to the disk is not there to be hashed.
    if adapter is None and is_packed(base) and not any(parameter.is_meta for parameter in model.parameters()):
        _warn(check_packed(model, resolve_name(base), allow_mismatch))
    return base, adapter, model


def _check_repeatable(
    fingerprint: Fingerprint, adapter: str | Path, base: str, revision: str | None, allow: bool
) -> None:
    """Refuse, before the work, to quantize `base` for an adapter to what it was not trained on."""
    here = {PARENT: base, SOLVER: str(SOLVER_VERSION)}
    if fingerprint.parent_digest is not None and (contents := content_digest(base, revision)) is not None:
        here[CONTENTS] = contents
    changes = differences(fingerprint.identity(), here, "adapter")
    head = f"adapter: {adapter}: what it was trained on cannot be quantized from {base} here"
    _warn(settle(head, changes, "name the packed folder that it was trained on as the base", allow))


def _packed_beside(adapter: str | Path, fingerprint: Fingerprint) -> str | None:
    """The packed folder that a run left beside the adapter in folder `adapter`, or that came within it, if it is its
    base."""
    home = Path(adapter).absolute()
    for folder in (home / PACKED_FOLDERS[0], *(home.parent / name for name in PACKED_FOLDERS)):
        found = Fingerprint.read(folder)
        if found is not None and found.packed_sha256 == fingerprint.packed_sha256 and is_packed(str(folder)):
            return str(folder)
    return None


def use_int8(model: Any, name: str) -> None:
    """Let the packed layers of 1 bit compute with 8-bit activations; log those of other widths, which go on as before.

    Raises:
        UserError: if there is none of 1 bit (with axis 1).
    """
    layers = {path: layer for path, layer in packed_modules(model).items() if isinstance(layer, PackedLinear)}
    others = [path for path, layer in layers.items() if not int8.supports(layer.spec)]
    if len(others) == len(layers):
        raise UserError(f"compute: int8 is for layers of 1 bit with axis 1, and {name} has none")
    for layer in layers.values():
        layer.compute = "int8"
    if any(isinstance(module, PackedStack) for module in model.modules()):
        _log.warning("int8: experts take the 16-bit route")
    if others:
        specs = {path: layers[path].spec for path in others}
        named = [f"{path} ({s.nbits}-bit{', axis 0' if s.axis == 0 else ''})" for path, s in specs.items()]
        more = f" and {len(named) - 3} more" if named[3:] else ""
        _log.warning(
            "int8: %d layers of 1 bit take 8-bit activations; the 16-bit route stays for %s%s",
            len(layers) - len(others),
            ", ".join(named[:3]),
            more,
        )


def put_adapter(
    model: Any, adapter: str | Path, base: str | None = None, allow_mismatch: bool = False, check: bool = True
) -> Any:
    """`PeftModel.from_pretrained(model, adapter)`, refused by fingerprint (`check`) where the base is another one.

    Args:
        base: name of the model, whose folder may say more of it than its tensors.
        allow_mismatch: warn instead of refusing.

    Raises:
        UserError: as said, or if the adapter's files are damaged.
    """
    from peft import PeftModel

    if check:
        _warn(_check_base(model, adapter, base, allow_mismatch))
    with one_sentence(str(adapter), "adapter"):
        if not Path(adapter).is_dir():
            return PeftModel.from_pretrained(model, str(adapter)).eval()
        with eight_bit.standard(adapter) as folder:
            stored = check_adapter_files(folder)
            adapted = PeftModel.from_pretrained(model, str(folder)).eval()
        _check_complete(adapted, stored)
        return adapted


def _check_complete(adapted: Any, stored: Iterable[str]) -> None:
    """Refuse an adapter where PEFT would go on with random weights and a warning, or leave out what has no place.

    Args:
        stored: the names of the tensors in its file.
    """
    from peft import get_peft_model_state_dict

    names = set(stored)
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if missing := sorted(wanted - names):
        further = f" and {len(missing) - 1} more tensors" if missing[1:] else ""
        raise UserError(f"the adapter lacks {missing[0]}{further}")
    if unknown := sorted(name for name in names - wanted if "lora_" in name):
        further = f" and {len(unknown) - 1} more tensors" if unknown[1:] else ""
        raise UserError(f"the adapter has {unknown[0]}{further}, which has no place in the model")


def _check_base(model: Any, adapter: str | Path, base: str | None, allow: bool) -> list[str]:
    noted = Fingerprint.read(resolve_name(base)) if base is not None and is_packed(base) else None
    return check_base(model, adapter, noted, allow)


def fingerprint_of(
    model: Any,
    base: str,
    revision: str | None,
    versions: dict[str, str],
    sha256: str | None = None,
    tokenizer: Any = None,
) -> Fingerprint:
    """The fingerprint of `model`, which was quantized from `base` here.

    Args:
        sha256: `packed_sha256` where it is known.
        tokenizer: of the model, for its digests.
    """
    config = model.config.quantization_config
    commit = revision or getattr(model.config, "_commit_hash", None)
    quantization = {k: v for k, v in config.to_dict().items() if k != "quant_method"}
    found = Fingerprint(
        base,
        commit,
        sha256 or packed_sha256(model),
        quantization,
        versions,
        parent_digest=content_digest(base, commit),
        solver=SOLVER_VERSION,
    )
    return found if tokenizer is None else found.with_tokenizer(tokenizer)


def write_companions(folder: Path, tokenizer: Any, fingerprint: Fingerprint) -> None:
    """Write what lies beside the tensors of a packed model: the tokenizer, the fingerprint, a card."""
    tokenizer.save_pretrained(folder)
    fingerprint.write(folder)
    write_text(folder / "README.md", packed_card(fingerprint))


def parent_weights(name: str, revision: str | None = None) -> Callable[[str], torch.Tensor]:
    """A reader of single weights of a full-precision checkpoint: module name -> its weight, straight from disk.

    Raises (the reader):
        UserError: if the checkpoint has no weight of that name.
    """
    from safetensors import safe_open

    where, folder, files = "the parent", Path(resolve_name(name)), {}
    with one_sentence(name, where):
        if not is_local(name, where):
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(name, revision=revision, allow_patterns=["*.safetensors", "*.json"]))
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as tensors:
                files.update(dict.fromkeys(tensors.keys(), path))

    def read(module: str) -> torch.Tensor:
        key = f"{module}.weight"
        if key not in files:
            raise UserError(f"{name}: no tensor {key!r} to compare the packed layer with")
        with safe_open(files[key], framework="pt") as tensors:
            return tensors.get_tensor(key)

    return read
