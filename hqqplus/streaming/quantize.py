"""Quantizing a checkpoint on the disk, a layer at a time: `quantize_checkpoint`.

Each safetensors file of the checkpoint becomes one of the same name with packed tensors in it. No more than one weight
is in memory, whatever the size of the model or of its files, and what is written is not done again after a kill
(`hqqplus.streaming.partial`). The tensors are, byte for byte, those that quantizing while loading gives.

The experts of a mixture lie in a checkpoint matrix by matrix, and are packed to a stack: that is in memory, packed,
with the full-precision matrix of one expert, and is written to the file in which its first expert lay.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hqqplus import models
from hqqplus.adapters.fingerprint import Fingerprint, sha256_of_layers
from hqqplus.errors import NotStreamable, UserError
from hqqplus.evaluation.layers import Layer, LayerCollector, Layers, write_layers
from hqqplus.files import check_output, check_space, full_disk, replacing_folder, write_json
from hqqplus.modules import PackedEmbedding, PackedStack, observe_packing, packed_modules
from hqqplus.modules.replace import check_solutions, solutions_in_use
from hqqplus.progress import WorkProgress
from hqqplus.quantization.solver import SOLVER_VERSION
from hqqplus.quantization.statistics import ExpertStatistics, LayerStatistics, layer_statistics
from hqqplus.quantization.tensor import state_shapes
from hqqplus.shards import Form, SafetensorsWriter, StoredTensor, byte_size, read_header
from hqqplus.streaming.checkpoint import INDEX, SINGLE, FusedTensor, WholeTensor, dtype_of, fetch, identity
from hqqplus.streaming.partial import FileInWork, PartialFolder, partial_folder

if TYPE_CHECKING:
    from hqqplus.integrations.skeleton import Place, Skeleton
    from hqqplus.integrations.transformers import HqqPlusConfig

# Room for configuration, tokenizer, report and card.
_SMALL_BYTES = 2**25
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quantized:
    """What `quantize_checkpoint` made.

    Attributes:
        folder: where it is.
        layers: how well each layer came out.
        fingerprint: as in its `hqqplus.json`.
        kept: files that an earlier, interrupted start had finished.
        streamed: False where transformers had to load the whole model.
        seconds: that this start took.
    """

    folder: Path
    layers: Layers
    fingerprint: Fingerprint
    kept: tuple[str, ...]
    streamed: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """A summary for programs; the figures of single layers are in `layers.json`."""
        return {
            "output": str(self.folder),
            "base": self.fingerprint.base,
            "revision": self.fingerprint.revision,
            "packed_sha256": self.fingerprint.packed_sha256,
            "quantization": self.fingerprint.quantization,
            **self.layers.totals(),
            "kept_files": list(self.kept),
            "streamed": self.streamed,
            "seconds": self.seconds,
        }


def quantize_checkpoint(
    name: str,
    output: str | Path,
    quantization: HqqPlusConfig,
    *,
    revision: str | None = None,
    dtype: str = "checkpoint",
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    versions: dict[str, str] | None = None,
    calibration: dict[str, Any] | None = None,
    where: str = "model",
    quiet: bool = False,
) -> Quantized:
    """Quantize model `name` (a folder or a hub id) and write the packed model to folder `output`.

    A call that was interrupted is continued by the same call. `output` is replaced, if it exists, by the last step. A
    checkpoint whose tensors transformers renames or fuses while it loads them (other than experts that are packed) is
    loaded as a whole instead; the reason is logged. Within `modules.replace.packed_already` layers that were solved
    beforehand are written as they are.

    Args:
        quantization: how to pack it.
        revision: branch, tag or commit of a hub model.
        dtype: of what is not packed; "checkpoint" leaves it as loading does, "auto" depends on the device.
        device: where layers are solved; by default the GPU if there is one.
        versions: of packages, and
        calibration: how the solutions in use were found, both for the fingerprint.
        where: what to call the model in errors.
        quiet: show no progress.

    Raises:
        UserError: if the model cannot be read, is packed already, holds NaN or infinite values, or does not fit on the
            disk; if solutions made beforehand are of another model or plan; if `output` cannot be written, or
            OUTPUT.partial holds the beginning of something else.
    """
    from hqqplus.integrations.skeleton import no_progress_bars

    started = time.monotonic()
    output = Path(output)
    check_output(output, "output")
    if models.is_packed(name):
        raise UserError(f"model: {name}: this model is packed already; quantize its parent")
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code, "where": where}
    tokenizer = models.load_tokenizer(name, **options)
    models.check_folder(name, where)
    place = models.pick_device(device)
    cast_to = None if dtype == "checkpoint" else models.compute_dtype(dtype, place, where)
    job = _Job(name, output, quantization, cast_to, place, tokenizer, versions or {}, calibration, where, quiet)
    kept: list[str] = []
    try:
        layers, fingerprint, kept = _stream(job, revision, trust_remote_code)
        streamed = True
    except NotStreamable as reason:
        _log.warning("%s: this model %s: it is loaded as a whole", name, reason)
        with no_progress_bars() if quiet else nullcontext():
            layers, fingerprint = _load(job, {**options, "dtype": dtype, "device": device})
        streamed = False
    return Quantized(output, layers, fingerprint, tuple(kept), streamed, time.monotonic() - started)


def quantize_folder(
    name: str,
    output: str | Path,
    quantization: HqqPlusConfig,
    *,
    revision: str | None = None,
    dtype: str = "checkpoint",
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    versions: dict[str, str] | None = None,
    where: str = "model",
) -> Any:
    """Quantize model `name`, write the packed model to `output` and return it: `quantize_checkpoint`, then loaded.

    What is not packed is written in `dtype`, by default that of the checkpoint. An interrupted call is continued by
    the same call; `output` is replaced, if it exists, once all is written.

    Raises:
        UserError: if the model cannot be read, is packed already, or does not fit on the disk.
    """
    options: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code, "where": where}
    quantize_checkpoint(name, output, quantization, revision=revision, dtype=dtype, versions=versions, **options)
    return models.load_causal_lm(str(output), dtype="checkpoint", **options)


@dataclass(frozen=True)
class _Job:
    base: str
    output: Path
    quantization: HqqPlusConfig
    cast_to: torch.dtype | None
    device: torch.device
    tokenizer: Any
    versions: dict[str, str]
    calibration: dict[str, Any] | None
    where: str
    quiet: bool

    @property
    def title(self) -> str:
        group = "row" if self.quantization.group_size == -1 else self.quantization.group_size
        return f"{self.base}, {self.quantization.nbits}-bit g{group}"

    def fingerprint(self, model: Any, revision: str | None, sha256: str | None = None) -> Fingerprint:
        found = models.fingerprint_of(model, self.base, revision, self.versions, sha256, self.tokenizer)
        return replace(found, calibration=self.calibration)

    def write_companions(self, folder: Path, fingerprint: Fingerprint, layers: Layers) -> None:
        models.write_companions(folder, self.tokenizer, fingerprint)
        write_layers(layers, folder)


# --- file by file ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A tensor of the model as it lies in the checkpoint: it is packed into layer `layer`, or, where that is None,
    copied."""

    tensor: WholeTensor | FusedTensor
    layer: str | None
    dtype: torch.dtype  # that loading gives it
    outputs: dict[str, Form]
    is_parameter: bool


@dataclass(frozen=True)
class _Shard:
    """A file to write, and the tensors of the checkpoint that go into it, in the order of the old file."""

    name: str
    sources: list[_Source]

    @property
    def forms(self) -> dict[str, Form]:
        return {name: form for source in self.sources for name, form in source.outputs.items()}

    @property
    def layers(self) -> dict[str, str]:
        """Tensor of the model -> the layer that it is packed into."""
        return {source.tensor.name: source.layer for source in self.sources if source.layer is not None}


def _stream(job: _Job, revision: str | None, trust_remote_code: bool) -> tuple[Layers, Fingerprint, list[str]]:
    """Quantize file by file. Returns the layers, the fingerprint and the names of files that were there already.

    Raises:
        NotStreamable: before anything is written.
        UserError: as `quantize_checkpoint`.
    """
    from hqqplus.integrations.skeleton import build_skeleton

    with models.one_sentence(job.base, job.where):
        folder, files, commit = fetch(job.base, revision, trust_remote_code, job.where)
        headers = {file: read_header(folder / file) for file in files}
        dtype = dtype_of(headers[files[0]])
        skeleton = build_skeleton(folder, job.quantization, dtype, job.cast_to, trust_remote_code)
        check_solutions(skeleton.specs)
        shards = _plan(skeleton, headers)
    settings = {
        "quantization": job.quantization.to_dict(),
        "dtype": str(job.cast_to or "checkpoint"),
        "device": job.device.type,
        "hqqplus": job.versions.get("hqqplus"),
        "solver": SOLVER_VERSION,
    }
    if (solutions := solutions_in_use()) is not None:
        settings["solutions"] = solutions.digest
    forms = {shard.name: shard.forms for shard in shards}
    with (
        full_disk(job.output, "output", "make room and run it again, it goes on where it was"),
        partial_folder(job.output, settings, identity(folder, files, commit)) as partial,
    ):
        kept = partial.finished(forms, {shard.name: shard.layers for shard in shards})
        partial.check_space(sum(map(SafetensorsWriter.size, forms.values())) + _SMALL_BYTES)
        with _progress(job, skeleton, partial) as progress:
            if partial.begun:
                progress.say(f"{partial.path}: goes on where it was, {len(kept)} of {len(shards)} files are finished")
            for shard in shards:
                if shard.name not in kept:
                    with partial.writing(shard.name, shard.forms) as file:
                        _quantize(job, shard, skeleton, partial, file, progress)
        layers = tuple(
            Layer(name, isinstance(layer, PackedEmbedding), partial.layers[name])
            for name, layer in skeleton.layers().items()
        )
        report = Layers(job.title, layers, sum(map(byte_size, skeleton.stored.values())))
        _write_index(partial.model, skeleton, shards)
        # Apart, because `save_pretrained` removes weights that it finds.
        with replacing_folder(partial.path / "configuration") as temporary:
            skeleton.save(temporary)
            for path in temporary.iterdir():
                path.replace(partial.model / path.name)
        sha256 = sha256_of_layers(_packed_tensors(skeleton, [partial.model / shard.name for shard in shards]))
        fingerprint = job.fingerprint(skeleton.model, revision or commit, sha256)
        job.write_companions(partial.model, fingerprint, report)
        partial.become_output()
    return report, fingerprint, kept


def _plan(skeleton: Skeleton, headers: Mapping[str, Mapping[str, StoredTensor]]) -> list[_Shard]:
    """What to write into which file.

    Raises:
        NotStreamable: if a tensor is not loaded just as it is.
        UserError: if one is missing, or of another shape than the configuration asks for.
    """

    found: dict[str, StoredTensor] = {}
    for header in headers.values():
        if double := next((name for name in header if name in found), None):
            raise NotStreamable(f"holds {double} in more than one file")
        found.update(header)
    places = skeleton.places(found)
    names = {name: place.name for name, place in places.items()}  # in the checkpoint -> in the model
    for other, kept in skeleton.ties.items():
        if other in names and kept in names and not _equal(found[other], found[kept]):
            raise NotStreamable(f"ties {other} to {kept}, but has different ones in its checkpoint")
        if other in names and names.pop(other) and kept not in names:
            names[other] = kept
    missing = sorted(skeleton.loaded.keys() - skeleton.ties.keys() - set(names.values()))
    if made_up := next((name for name in missing if skeleton.may_lack(name)), None):
        raise NotStreamable(f"lacks {made_up}, which is made up while loading")
    if missing:
        further = f" and {len(missing) - 1} more tensors" if missing[1:] else ""
        raise UserError(f"the checkpoint lacks {missing[0]}{further}")
    if unused := [name for name in found if name not in places]:
        _log.warning("%d tensors of the checkpoint are none of the model's, such as %s", len(unused), unused[0])
    parameters = {name for name, _ in skeleton.model.named_parameters()}
    fused = _fused(found, places, skeleton)
    shards = []
    for file, header in headers.items():
        sources = []
        for name, stored in header.items():
            if name not in names:
                continue
            tensor = fused.get(names[name]) or WholeTensor(names[name], stored)
            if isinstance(tensor, WholeTensor) or tensor.experts[0][0] is stored:
                sources.append(_source(tensor, skeleton, parameters))
        if sources := [source for source in sources if source.outputs]:
            shards.append(_Shard(file, sources))
    if {name: form for shard in shards for name, form in shard.forms.items()} != skeleton.stored:
        raise NotStreamable("is saved with other tensors than it is loaded from")
    return shards


def _fused(
    found: Mapping[str, StoredTensor], places: Mapping[str, Place], skeleton: Skeleton
) -> dict[str, FusedTensor]:
    """Name in the model -> its parts, of the tensors that are fused.

    Raises:
        UserError: if experts or parts of them are missing, or they are not all of one form.
    """
    parts: dict[str, dict[tuple[int, int], StoredTensor]] = {}
    for name, place in places.items():
        if place.expert is not None:
            parts.setdefault(place.name, {})[place.expert] = found[name]
    fused = {}
    for name, own in parts.items():
        experts, count = 1 + max(expert for expert, _ in own), 1 + max(part for _, part in own)
        if len(own) != experts * count:
            raise UserError(f"the checkpoint lacks parts of {name}: it has {len(own)} of {experts * count}")
        tensor = FusedTensor(name, tuple(tuple(own[e, part] for part in range(count)) for e in range(experts)))
        if experts != skeleton.loaded[name][0][0]:
            wanted = skeleton.loaded[name][0][0]
            raise UserError(f"{name}: the checkpoint has {experts} experts, and config.json asks for {wanted}")
        if not tensor.is_even:
            raise UserError(f"{name}: the checkpoint's experts are not all of one shape")
        fused[name] = tensor
    return fused


def _source(tensor: WholeTensor | FusedTensor, skeleton: Skeleton, parameters: set[str]) -> _Source:
    name = tensor.name
    shape, dtype = skeleton.loaded[name]
    if tensor.shape != shape:
        stored = tensor.stored.name if isinstance(tensor, WholeTensor) else name
        raise UserError(f"{stored} has not the shape that config.json asks for")
    layer = name
    if skeleton.stack(name) is None:
        layer = name.removesuffix(".weight") if name.endswith(".weight") else ""
    if layer not in skeleton.specs:
        outputs = {name: skeleton.stored[name]} if name in skeleton.stored else {}
        return _Source(tensor, None, dtype, outputs, name in parameters)
    stack = skeleton.stack(layer)
    forms = state_shapes(skeleton.specs[layer], *shape[-2:])
    stacked = () if stack is None else (stack.experts,)
    outputs = {f"{layer}.{key}": ((*stacked, *size), kind) for key, (size, kind) in forms.items()}
    return _Source(tensor, layer, dtype, outputs, True)


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return all(torch.equal(a, b) for a, b in zip(one.pieces(), other.pieces(), strict=True))


def _progress(job: _Job, skeleton: Skeleton, partial: PartialFolder) -> WorkProgress:
    weights = skeleton.weights()
    done = sum(count for name, count in weights.items() if name in partial.layers)
    return WorkProgress(sum(weights.values()), done, job.quiet)


def _quantize(
    job: _Job, shard: _Shard, skeleton: Skeleton, partial: PartialFolder, file: FileInWork, progress: WorkProgress
) -> None:
    """Write what is not yet in `file`."""
    for source in shard.sources:
        name, layer = source.tensor.name, source.layer
        if name in file.written:
            continue
        if layer is None:
            (output,) = source.outputs
            file.writer.write_pieces(output, _copied(job, source, partial))
            file.note(name)
            continue
        with _reading(job, partial):
            state, statistics = _pack(job, source, layer, skeleton, progress)
        for key, tensor in state.items():
            file.writer.write(f"{layer}.{key}", tensor)
        file.note(name, layer, statistics)


def _pack(
    job: _Job, source: _Source, layer: str, skeleton: Skeleton, progress: WorkProgress
) -> tuple[dict[str, Tensor], LayerStatistics]:
    """The packed tensors of `layer` by name."""
    empty, tensor = skeleton.stack(layer), source.tensor
    if empty is None:
        assert isinstance(tensor, WholeTensor)
        weight = tensor.stored.read().to(device=job.device, dtype=source.dtype)
        packed = skeleton.pack(layer, weight)
        statistics = layer_statistics(weight, packed)
        progress.advance(statistics.weights, layer)
        return packed.state(), statistics
    stack = PackedStack(empty.experts, empty.matrix_shape, empty.spec, device="cpu")
    together = ExpertStatistics()
    for index in range(stack.experts):
        weight = tensor.matrix(index, source.dtype).to(job.device)
        packed = skeleton.pack_expert(layer, index, weight)
        together.add(weight, packed)
        stack.set_expert(index, packed)
        progress.advance(weight.numel(), layer)
    return {key: parameter.detach() for key, parameter in stack.packed_parameters().items()}, together.together()


def _copied(job: _Job, source: _Source, partial: PartialFolder) -> Iterator[Tensor]:
    """The elements of a tensor that stays as it is, in pieces, first in the dtype of loading and then in that asked
    for."""
    ((_, dtype),) = source.outputs.values()
    for loaded in source.tensor.pieces(source.dtype):
        with _reading(job, partial):
            piece = loaded.to(dtype)
            if source.is_parameter and dtype.is_floating_point and not torch.isfinite(piece).all():
                raise ValueError(f"{source.tensor.name}: the tensor holds NaN or infinite values in {dtype}")
        yield piece


@contextmanager
def _reading(job: _Job, partial: PartialFolder) -> Iterator[None]:
    """Turn what is wrong with a weight into a `UserError`; then nothing that was made of the others is of use."""
    try:
        yield
    except ValueError as error:
        partial.discard()
        raise UserError(f"{job.where}: {job.base}: {error}") from None
    except RuntimeError as error:  # no memory left
        raise UserError(f"{job.where}: {job.base}: {str(error).strip().splitlines()[0]}") from error


def _write_index(folder: Path, skeleton: Skeleton, shards: list[_Shard]) -> None:
    """The index over several files, as `save_pretrained` writes it."""
    if [shard.name for shard in shards] == [SINGLE]:
        return
    sizes = {"total_parameters": skeleton.model.num_parameters()}
    sizes["total_size"] = sum(map(byte_size, skeleton.stored.values()))
    files = {name: shard.name for shard in shards for name in shard.forms}
    write_json(folder / INDEX, {"metadata": sizes, "weight_map": dict(sorted(files.items()))})


def _packed_tensors(skeleton: Skeleton, files: list[Path]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name, packed tensors) of each packed module in the order of the names, read back; both of two tied ones."""
    stored = {name: tensor for file in files for name, tensor in read_header(file).items()}
    for name in sorted(skeleton.specs):
        kept = skeleton.tied[0] if skeleton.tied and name == skeleton.tied[1] else name
        keys = state_shapes(skeleton.specs[name], *skeleton.shapes()[kept])
        yield name, {key: stored[f"{kept}.{key}"].read() for key in keys}


# --- as a whole ------------------------------------------------------------------------------------------------------


def _load(job: _Job, options: dict[str, Any]) -> tuple[Layers, Fingerprint]:
    """Quantize while transformers loads the model, and save that."""
    collector = LayerCollector()
    with observe_packing(collector):
        model = models.load_causal_lm(job.base, quantization=job.quantization, **options)
    with models.one_sentence(job.base, job.where):
        check_solutions(packed_modules(model))
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}  # tied ones once
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    report = collector.layers(job.title, model, size)
    fingerprint = job.fingerprint(model, options["revision"])
    check_space(job.output, size + _SMALL_BYTES, "output")
    with full_disk(job.output, "output"), replacing_folder(job.output) as temporary:
        model.save_pretrained(temporary)
        job.write_companions(temporary, fingerprint, report)
    return report, fingerprint
