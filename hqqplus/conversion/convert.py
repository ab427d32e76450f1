"""From a checkpoint that somebody else packed to a packed folder of ours, a layer at a time: `convert_checkpoint`.

Each safetensors file becomes one of the same name, with our tensors in the place of theirs; the rest is copied.
Nothing is solved: codes are repacked, scales and offsets are stored again (`hqqplus.conversion.exact`). All metadata
are looked at before anything is written; then no more than one layer is in memory, and what is written is not done
again after a kill (`hqqplus.streaming.partial`).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hqqplus import models
from hqqplus.adapters.fingerprint import Fingerprint, sha256_of_layers
from hqqplus.conversion.exact import Fitted, dequantized, fit, packed_tensor
from hqqplus.conversion.layouts import Layout, Source, fault, find_layout, layout_name, read_settings, shown
from hqqplus.errors import NotStreamable, UserError
from hqqplus.evaluation.layers import Layer, Layers, write_layers
from hqqplus.files import check_output, full_disk, replacing_folder
from hqqplus.modules import PackedEmbedding
from hqqplus.progress import WorkProgress
from hqqplus.quantization.spec import QuantSpec
from hqqplus.quantization.statistics import layer_statistics
from hqqplus.quantization.tensor import state_shapes
from hqqplus.shards import Form, SafetensorsWriter, StoredTensor, byte_size, read_header
from hqqplus.streaming.checkpoint import fetch, identity
from hqqplus.streaming.partial import FileInWork, PartialFolder, partial_folder
from hqqplus.streaming.quantize import _SMALL_BYTES, _packed_tensors, _write_index

if TYPE_CHECKING:
    from hqqplus.integrations.skeleton import Skeleton
    from hqqplus.integrations.transformers import HqqPlusConfig

# Raised where the same checkpoint would be converted to other bytes.
_CONVERTER_VERSION = 1
# More is no name of a module.
_LONGEST_NAME = 500
# What layouts leave in a checkpoint and no model needs: buffers of older classes, what a loader was told.
_OF_NO_MODEL = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Converted:
    """What `convert_checkpoint` made.

    Attributes:
        folder: where it is.
        layout: how the source was packed.
        layers: the packed layers; their error is that of the conversion, zero where it is exact.
        fingerprint: as in its `hqqplus.json`.
        exact: layers whose every weight is the source's.
        largest_error: the most that a weight is off by, over the largest that its group can hold; and the layer.
        remarks: what a user should know, a sentence each.
        kept: files that an earlier, interrupted start had finished.
        seconds: that this start took.
    """

    folder: Path
    layout: str
    layers: Layers
    fingerprint: Fingerprint
    exact: int
    largest_error: tuple[float, str]
    remarks: tuple[str, ...]
    kept: tuple[str, ...]
    seconds: float

    def describe(self) -> str:
        """`GPTQ, version 1: 14 layers, 2.500 bits per weight, every weight as in the source`."""
        count, (error, name) = len(self.layers.layers), self.largest_error
        loss = "every weight as in the source"
        if self.exact < count:
            loss = (
                f"{self.exact} of them exactly, the others to within {error:.2g} of the largest weight of a group "
                f"(16-bit scales and offsets; most in {name})"
            )
        return f"{self.layout}: {count} layers, {self.layers.bits_per_weight:.3f} bits per weight, {loss}"

    def to_json(self) -> dict[str, Any]:
        """A summary for programs; the figures of single layers are in `layers.json`."""
        error, name = self.largest_error
        return {
            "output": str(self.folder),
            "base": self.fingerprint.base,
            "revision": self.fingerprint.revision,
            "layout": self.layout,
            "packed_sha256": self.fingerprint.packed_sha256,
            "quantization": self.fingerprint.quantization,
            **self.layers.totals(),
            "exact_layers": self.exact,
            "largest_error": error,
            "largest_error_layer": name or None,
            "remarks": list(self.remarks),
            "kept_files": list(self.kept),
            "seconds": self.seconds,
        }


def convert_checkpoint(
    name: str,
    output: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    versions: dict[str, str] | None = None,
    where: str = "model",
    quiet: bool = False,
) -> Converted:
    """Convert checkpoint `name` (a folder or a hub id), packed in a layout that is known, to packed folder `output`.

    What the source does not pack keeps its dtype. A call that was interrupted is continued by the same call. `output`
    is replaced, if it exists, by the last step.

    Args:
        revision: branch, tag or commit of a hub model.
        versions: of packages, for the fingerprint.
        where: what to call the model in errors.
        quiet: show no progress.

    Raises:
        UserError: if the layout is not known, or is one that our format cannot tell; if the checkpoint is damaged,
            its tensors are missing or not of the shapes that its configuration asks for, naming file and tensor; if it
            does not fit on the disk; if `output` cannot be written, or OUTPUT.partial holds something else.
    """
    started = time.monotonic()
    output = Path(output)
    check_output(output, "output")
    if models.is_packed(name):
        raise UserError(f"{where}: {name}: this model is packed by hqqplus already")
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code, "where": where}
    models.check_folder(name, where)
    with models.one_sentence(name, where), _refused():
        folder, files, commit = fetch(name, revision, trust_remote_code, where)
        headers = {file: read_header(folder / file) for file in files}
        plan = _plan(folder, headers, trust_remote_code)
    tokenizer = models.load_tokenizer(name, **options)
    layout, skeleton = plan.layout, plan.skeleton
    settings = {
        "conversion": layout.title,
        "converter": _CONVERTER_VERSION,
        "hqqplus": (versions or {}).get("hqqplus"),
    }
    with (
        full_disk(output, "output", "make room and run it again, it goes on where it was"),
        partial_folder(output, settings, identity(folder, files, commit)) as partial,
    ):
        forms = {shard.name: shard.forms for shard in plan.shards}
        kept = partial.finished(forms, {shard.name: shard.layers for shard in plan.shards})
        partial.check_space(sum(map(SafetensorsWriter.size, forms.values())) + _SMALL_BYTES)
        with _progress(plan, partial, quiet) as progress:
            if partial.begun:
                progress.say(f"{partial.path}: goes on where it was, {len(kept)} of {len(files)} files are finished")
            for shard in plan.shards:
                if shard.name not in kept:
                    with partial.writing(shard.name, shard.forms) as file, _reading(partial, name, where):
                        _write(plan, shard, file, progress)
        layers = tuple(
            Layer(layer, isinstance(module, PackedEmbedding), partial.layers[layer])
            for layer, module in skeleton.layers().items()
        )
        report = Layers(f"{name}, converted ({layout.title})", layers, sum(map(byte_size, skeleton.stored.values())))
        _write_index(partial.model, skeleton, plan.shards)  # type: ignore[arg-type]  # of these only name and forms
        # Apart, because `save_pretrained` removes weights that it finds.
        with replacing_folder(partial.path / "configuration") as temporary:
            skeleton.save(temporary)
            for path in temporary.iterdir():
                path.replace(partial.model / path.name)
        sha256 = sha256_of_layers(_packed_tensors(skeleton, [partial.model / shard.name for shard in plan.shards]))
        found = models.fingerprint_of(skeleton.model, name, revision or commit, versions or {}, sha256, tokenizer)
        # No solver of ours was at work.
        fingerprint = replace(found, solver=None, converted=layout.title)
        models.write_companions(partial.model, tokenizer, fingerprint)
        write_layers(report, partial.model)
        partial.become_output()
    worst = max(plan.losses, key=lambda layer: plan.losses[layer])
    return Converted(
        output,
        layout.title,
        report,
        fingerprint,
        sum(loss == 0 for loss in plan.losses.values()),
        (plan.losses[worst], worst if plan.losses[worst] else ""),
        tuple(layout.remarks),
        tuple(kept),
        time.monotonic() - started,
    )


# --- what goes where -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Item:
    """A layer to be packed, or, without one, a tensor to be copied under its name in the model."""

    tensor: StoredTensor
    layer: str | None
    outputs: dict[str, Form]


@dataclass(frozen=True)
class _Shard:
    name: str
    items: list[_Item]

    @property
    def forms(self) -> dict[str, Form]:
        return {name: form for item in self.items for name, form in item.outputs.items()}

    @property
    def layers(self) -> dict[str, str]:
        """Tensor of the source -> the layer whose codes it holds."""
        return {item.tensor.name: item.layer for item in self.items if item.layer is not None}


@dataclass(frozen=True)
class _Plan:
    """What to write, found out before anything is written. `losses`: layer -> its largest relative error."""

    layout: Layout
    skeleton: Skeleton
    shards: list[_Shard]
    losses: dict[str, float]


def read_plan(name: str, trust_remote_code: bool = False) -> Mapping[str, float]:
    """All that is looked at of folder `name` before it is converted; module name -> its largest relative error.

    Raises:
        UserError: as `convert_checkpoint`.
    """
    with models.one_sentence(name, "model"), _refused():
        folder, files, _ = fetch(name, None, trust_remote_code, "model")
        return _plan(folder, {file: read_header(folder / file) for file in files}, trust_remote_code).losses


@contextmanager
def _refused() -> Iterator[None]:
    """There is no other way for what a layer-by-layer conversion cannot do."""
    try:
        yield
    except NotStreamable as reason:
        raise UserError(f"this model {reason}: that cannot be converted") from None


def _plan(folder: Path, headers: Mapping[str, Mapping[str, StoredTensor]], trust_remote_code: bool) -> _Plan:
    from hqqplus.integrations.skeleton import build_skeleton
    from hqqplus.integrations.transformers import HqqPlusConfig

    config, settings = read_settings(folder)
    found: dict[str, StoredTensor] = {}
    for header in headers.values():
        for name, tensor in header.items():
            if name in found:
                raise fault(tensor, f"it is in {found[name].path.name} as well")
            if len(name) > _LONGEST_NAME:
                raise UserError(f"{tensor.path.name}: a tensor has a name of {len(name)} characters: {shown(name)}")
            found[name] = tensor
    # Which layouts there are is said before transformers has a word on a model that it may not know.
    layout_name(Source(config, settings, found))
    dtype = _plain_dtype(found)

    def skeleton_of(quantization: HqqPlusConfig) -> Skeleton:
        return build_skeleton(folder, quantization, dtype, None, trust_remote_code, packed_otherwise=True)

    plain = skeleton_of(HqqPlusConfig(group_size=-1, metadata_bits=16))
    shapes = {name: shape for name, (shape, _) in plain.loaded.items()}
    layout = find_layout(Source(config, settings, found, shapes, tuple(plain.specs)))
    skeleton = skeleton_of(_quantization(layout.specs, plain))
    for layer, parts in layout.parts.items():
        if skeleton.specs.get(layer) != layout.specs[layer]:
            first = next(iter(parts.values()))
            raise fault(first, f"{layer} is packed, and cannot be in a {type(skeleton.model).__name__} of ours")
    losses = {layer: _fitted(layout, layer).relative for layer in layout.specs}
    return _Plan(layout, skeleton, _shards(layout, skeleton, headers, found), losses)


def _plain_dtype(found: Mapping[str, StoredTensor]) -> torch.dtype:
    """The dtype of what is not packed: that of most numbers in tensors as models have them."""
    counts: Counter[torch.dtype] = Counter()
    for name, tensor in found.items():
        if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32) and name.endswith((".weight", ".bias")):
            counts[tensor.dtype] += tensor.size
    return counts.most_common(1)[0][0] if counts else torch.float32


def _quantization(specs: Mapping[str, QuantSpec], plain: Skeleton) -> HqqPlusConfig:
    """The configuration under which exactly the modules of `specs` are packed, and so."""
    from hqqplus.integrations.transformers import HqqPlusConfig

    default = Counter(specs.values()).most_common(1)[0][0]
    usual = default.to_dict()
    overrides = {}
    for name, spec in specs.items():
        changes = {key: value for key, value in spec.to_dict().items() if value != usual[key]}
        if changes or name not in plain.specs:  # embeddings and heads are packed only where they are named
            overrides[name] = changes
    left = [name for name in plain.specs if name not in specs]
    return HqqPlusConfig(**usual, overrides=overrides, modules_to_not_convert=left or None)


def _shards(
    layout: Layout,
    skeleton: Skeleton,
    headers: Mapping[str, Mapping[str, StoredTensor]],
    found: Mapping[str, StoredTensor],
) -> list[_Shard]:
    read = {tensor.name for parts in layout.parts.values() for tensor in parts.values()}
    main = {next(iter(parts.values())).name: layer for layer, parts in layout.parts.items()}
    rest = [name for name in found if name not in read]
    skeleton.check_names(name for name in rest if name in skeleton.loaded or not _needless(found[name], layout))
    have = {f"{layer}.weight" for layer in layout.specs} | {name for name in rest if name in skeleton.loaded}
    for other, kept in skeleton.ties.items():
        have |= {other, kept} if have & {other, kept} else set()
    if missing := sorted(skeleton.loaded.keys() - have):
        further = f" and {len(missing) - 1} more tensors" if missing[1:] else ""
        raise UserError(f"the checkpoint lacks {missing[0]}{further}, and has nothing packed in its place")
    shards = []
    for file, header in headers.items():
        items = [_item(tensor, main, read, layout, skeleton) for tensor in header.values()]
        if kept_items := [item for item in items if item is not None]:
            shards.append(_Shard(file, kept_items))
    stored = {name: form for shard in shards for name, form in shard.forms.items()}
    if stored != skeleton.stored:
        names = sorted(stored.items() ^ skeleton.stored.items(), key=lambda item: item[0])
        raise UserError(f"what would be written is not what the model is loaded from ({names[0][0]})")
    return shards


def _item(
    tensor: StoredTensor, main: Mapping[str, str], read: set[str], layout: Layout, skeleton: Skeleton
) -> _Item | None:
    """What becomes of a tensor; None where it is a part of a layer, or is needed nowhere.

    Raises:
        UserError: if it is not the model's.
    """
    name = tensor.name
    if (layer := main.get(name)) is not None:
        if skeleton.tied and layer == skeleton.tied[1]:
            raise fault(tensor, f"{layer} is packed by itself, and config.json ties it to the embedding")
        forms = state_shapes(layout.specs[layer], *skeleton.shapes()[layer])
        return _Item(tensor, layer, {f"{layer}.{key}": form for key, form in forms.items()})
    if name in read:
        return None
    if name not in skeleton.loaded:
        if not _needless(tensor, layout):
            raise fault(tensor, "the model that config.json describes has no such tensor")
        return None
    if name not in skeleton.stored:
        return None  # a tied head that lies in the file as well
    if tensor.shape != skeleton.loaded[name][0]:
        wanted = list(skeleton.loaded[name][0])
        raise fault(tensor, f"its shape is {list(tensor.shape)}, the model's configuration asks for {wanted}")
    return _Item(tensor, None, {name: skeleton.stored[name]})


def _needless(tensor: StoredTensor, layout: Layout) -> bool:
    """Whether a tensor that the model has no place for can be left out: it makes no difference."""
    layer, _, last = tensor.name.rpartition(".")
    if tensor.name.endswith(_OF_NO_MODEL):
        return True
    # Older writers of GPTQ gave every layer a bias.
    return last == "bias" and layer in layout.specs and not bool(tensor.read().any())


# --- layer by layer --------------------------------------------------------------------------------------------------


def _fitted(layout: Layout, layer: str) -> Fitted:
    scale, offset = layout.grid(layer)
    try:
        return fit(scale, offset, layout.specs[layer], layout.largest_of(layer))
    except ValueError as error:
        raise fault(list(layout.parts[layer].values())[-1], str(error)) from None


def _progress(plan: _Plan, partial: PartialFolder, quiet: bool) -> WorkProgress:
    weights = {name: rows * columns for name, (rows, columns) in plan.skeleton.shapes().items()}
    done = sum(count for name, count in weights.items() if name in partial.layers)
    return WorkProgress(sum(weights.values()), done, quiet)


def _write(plan: _Plan, shard: _Shard, file: FileInWork, progress: WorkProgress) -> None:
    """Write what is not yet in `file`."""
    for item in shard.items:
        if item.tensor.name in file.written:
            continue
        if item.layer is None:
            ((output, (_, dtype)),) = item.outputs.items()
            file.writer.write_pieces(output, _copied(item.tensor, dtype))
            file.note(item.tensor.name)
            continue
        layer, spec = item.layer, plan.layout.specs[item.layer]
        codes, (scale, offset) = plan.layout.codes(layer), plan.layout.grid(layer)
        packed = packed_tensor(codes, fit(scale, offset, spec, plan.layout.largest_of(layer)), spec)
        statistics = layer_statistics(dequantized(codes, scale, offset, spec), packed)
        for key, tensor in packed.state().items():
            file.writer.write(f"{layer}.{key}", tensor)
        file.note(item.tensor.name, layer, statistics)
        progress.advance(statistics.weights, layer)


def _copied(tensor: StoredTensor, dtype: torch.dtype) -> Iterator[Tensor]:
    for stored in tensor.pieces():
        piece = stored.to(dtype)
        if dtype.is_floating_point and not torch.isfinite(piece).all():
            raise fault(tensor, f"it holds NaN or infinite values in {str(dtype).removeprefix('torch.')}")
        yield piece


@contextmanager
def _reading(partial: PartialFolder, name: str, where: str) -> Iterator[None]:
    """What is wrong with the source; then nothing that was made of the rest is of use."""
    try:
        yield
    except UserError as error:
        partial.discard()
        raise UserError(f"{where}: {name}: {error}") from None
