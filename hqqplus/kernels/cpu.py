"""The ops on a CPU with what torch brings along: no compiler on the user's machine, one pass over the packed bytes.

    few rows of x    y[m, r] = sum_g scale[r, g] (q[r, g] . x[m, g]) + offset[r, g] sum(x[m, g])          `_integer`
    many rows        W slice by slice in the dtype of the product, each slice multiplied while it is in the cache

Layout. Planar (`quantization/packing.py`): plane i of the bytes of a row, byte & mask << nbits i, is one group after
the other, still in units of 2^(nbits i), which goes into the scale: no shift is needed. Whole blocks are taken apart
that way; the rest of a row, and 3-bit codes for floats, by `unpack`.

Few rows. The codes become int8 and x fixed-point numbers: for each token and plane a step and digits of 7 bits, two
for bfloat16, which has 8 significant bits itself, three else. `torch._int_mm` sums in int32, exactly. Several groups
share a product whose right side is block-diagonal, because 16 columns cost hardly more than two. With 7 bits not even
the int16 sums of processors without VNNI can saturate. Bytes a weight: nbits/8 read from memory, 1 written and 1 read
in scratch; bfloat16 reads 2 from memory.

Many rows. Bytes a weight: nbits/8 read from memory, then 1 + 4 + 4 + 4 + 2 written and read in scratch of a few MiB,
then an ordinary product.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from hqqplus.kernels import reference
from hqqplus.kernels.packed import Packed, shaped
from hqqplus.quantization.metadata import decode
from hqqplus.quantization.packing import unpack
from hqqplus.quantization.spec import BLOCK

_DIGIT = 128
_SHARED = 8  # groups of one product: 16 or 24 columns, one or two registers of int32 sums
_INTEGER_CODES, _FLOAT_CODES = 2**23, 2**21  # of a slice; smaller ones cost more in calls than they save in the caches

# Weights of a layer from which on all this is faster than the reference: below, the calls cost more than the work.
SMALLEST = 2**19

embedding = reference.embedding


@torch.no_grad()
def matmul(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    out_features, in_features = packed.shape
    rows = x.reshape(-1, in_features).contiguous()
    if rows.shape[0] == 0 or x.dtype == torch.float64:
        return reference.matmul(x, packed, bias)
    bias = None if bias is None else bias.to(x.dtype)
    if packed.spec.axis == 0:
        y = _times_stored(rows, packed, bias)
    elif _suits_integers(rows, packed):
        y = _integer(rows, packed)
        y = (y if bias is None else y.add_(bias)).to(x.dtype).contiguous()
    else:
        y = _times_turned(rows, packed, bias)
    return shaped(y, (*x.shape[:-1], out_features))


@torch.no_grad()
def matmul_dx(dy: Tensor, packed: Packed) -> Tensor:
    out_features, in_features = packed.shape
    rows = dy.reshape(-1, out_features).contiguous()
    if rows.shape[0] == 0 or dy.dtype == torch.float64:
        return reference.matmul_dx(dy, packed)
    dx = _times_stored(rows, packed, None) if packed.spec.axis == 1 else _times_turned(rows, packed, None)
    return shaped(dx, (*dy.shape[:-1], in_features))


@torch.no_grad()
def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    layout = packed.layout
    stored = torch.empty(layout.rows, layout.padded, dtype=dtype)
    for start, stop in _row_slices(packed, _FLOAT_CODES):
        _fill(stored[start:stop], packed, start, stop)
    stored = stored[:, : layout.width]
    return (stored if packed.spec.axis == 1 else stored.t()).contiguous()


@cache
def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products of `dtype` are fastest: without instructions of its own a 16-bit one is emulated."""
    native = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype if dtype in native and native[dtype]() else torch.float32


def _row_slices(packed: Packed, codes: int) -> list[tuple[int, int]]:
    """Slices of about `codes` weights; their starts are multiples of BLOCK, where a block of 8-bit metadata starts."""
    layout = packed.layout
    step = max(codes // layout.padded // BLOCK, 1) * BLOCK
    return [(start, min(start + step, layout.rows)) for start in range(0, layout.rows, step)]


def _metadata(packed: Packed, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Scale and offset [stop - start, groups] of rows `start` (a multiple of BLOCK) to `stop` in float32.

    They equal those of `quantization.metadata.decode`, which allocates where this works in place.
    """
    scale, offset, blocks, spec = packed.scale[start:stop], packed.offset[start:stop], packed.blocks, packed.spec
    if blocks is None:
        return scale.float(), offset.float()
    groups = packed.layout.groups
    blocks = blocks[start * groups // BLOCK : -(-stop * groups // BLOCK)]
    if scale.numel() % BLOCK or not _exact(packed):
        return decode(scale, offset, blocks, spec.qmax)
    step, zero = blocks.float().view(-1, 2, 2).unbind(2)  # [blocks, 2] both
    step = step / 256
    scale, middle = (
        codes.float().view(-1, BLOCK).sub_(zero[:, i, None]).mul_(step[:, i, None]).view(scale.shape)
        for i, codes in enumerate((scale, offset))
    )
    return scale, middle.sub_(scale, alpha=spec.qmax / 2)


def _exact(packed: Packed) -> bool:
    """Whether float32 holds a scale times a code: of 11 bits, or 11 + 9 with 8-bit metadata, times `nbits`."""
    return packed.blocks is None or packed.spec.nbits <= 4


# Many rows: the weight in floats, a slice at a time.


def _times_turned(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x [M, width] times the transpose of the stored matrix, plus `bias` [rows]: [M, rows], by rows."""
    layout, dtype = packed.layout, _product_dtype(x.dtype)
    y, factor = x.new_empty(x.shape[0], layout.rows), x.to(dtype)
    slices = _row_slices(packed, _FLOAT_CODES)
    scratch = torch.empty(slices[0][1], layout.padded, dtype=dtype)
    for start, stop in slices:
        weight = scratch[: stop - start]
        _fill(weight, packed, start, stop)
        _product(y[:, start:stop], factor, weight[:, : layout.width].t(), None if bias is None else bias[start:stop])
    return y


def _times_stored(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x [M, rows] times the stored matrix [rows, width], plus `bias` [width]: [M, width].

    By columns, so that no sum is rounded twice.
    """
    layout, dtype = packed.layout, _product_dtype(x.dtype)
    y, factor = x.new_empty(x.shape[0], layout.width), x.to(dtype)
    metadata = _metadata(packed, 0, layout.rows)
    unit = _unit(packed)
    step = max(_FLOAT_CODES // layout.rows // unit, 1) * unit
    scratch = torch.empty(layout.rows * min(step, layout.padded), dtype=dtype)
    for start in range(0, layout.width, step):
        stop = min(start + step, layout.padded)
        weight = scratch[: layout.rows * (stop - start)].view(layout.rows, stop - start)
        _fill_columns(weight, packed, packed.W_q, *metadata, start)
        end = min(stop, layout.width)
        _product(y[:, start:end], factor, weight[:, : end - start], None if bias is None else bias[start:end])
    return y


def _product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """x [M, k] times weight [k, n], plus `bias` [n], into `y` [M, n], which may be of another dtype."""
    if y.dtype != x.dtype:
        y.copy_(x @ weight if bias is None else torch.addmm(bias.to(x.dtype), x, weight))
    elif bias is None:
        torch.mm(x, weight, out=y)
    else:
        torch.addmm(bias, x, weight, out=y)


def _unit(packed: Packed) -> int:
    """Columns after which the packed bytes of a row can be cut: one block, of the coarser run for 3 bits."""
    return packed.layout.plane * {1: 8, 2: 4, 3: 8, 4: 2, 8: 1}[packed.spec.nbits]


def _fill(weight: Tensor, packed: Packed, start: int, stop: int) -> None:
    """Rows `start` to `stop` of the stored matrix into `weight` [stop - start, padded]."""
    _fill_columns(weight, packed, packed.W_q[start:stop], *_metadata(packed, start, stop), 0)


def _fill_columns(weight: Tensor, packed: Packed, W_q: Tensor, scale: Tensor, offset: Tensor, first: int) -> None:
    """Columns `first` (a multiple of `_unit`) and on of rows with the bytes `W_q` into `weight` [rows, columns].

    Scale and offset are those of the whole rows. The map is evaluated in float32 and rounded once, as the reference's.
    """
    nbits, layout = packed.spec.nbits, packed.layout
    rows, columns = weight.shape
    unit, plane = _unit(packed), layout.plane
    exact = _exact(packed)
    if layout.groups > 1:
        part = slice(first // layout.group, -(-(first + columns) // layout.group))
        scale, offset = scale[:, part], offset[:, part]
    planar = columns // unit * unit if nbits != 3 else 0
    if planar:
        per = 8 // nbits
        blocks = planar // unit
        packed_bytes = W_q[:, first // per : (first + planar) // per]
        shape = (rows, blocks, per) if layout.groups > 1 else (rows, 1, 1)
        groups = blocks * per if layout.groups > 1 else 1
        scales, offsets = scale[:, :groups].reshape(shape), offset[:, :groups].reshape(shape)
        codes = torch.empty(rows, blocks * plane, dtype=torch.uint8)
        values = torch.empty(rows, blocks, plane)
        target = weight[:, :planar].unflatten(1, (blocks, per, plane))
        for i in range(per):
            at = min(i, shape[2] - 1)
            torch.bitwise_and(packed_bytes, packed.spec.qmax << nbits * i, out=codes)
            values.copy_(codes.view(values.shape))
            _affine(values, scales[:, :, at, None] * 2.0 ** (-nbits * i), offsets[:, :, at, None], exact)
            target[:, :, i].copy_(values)
    if planar < columns:
        codes = unpack(_tail(W_q, packed, first + planar, first + columns), nbits, plane)
        if layout.groups > 1:
            done = planar // layout.group
            scale, offset = scale[:, done:, None], offset[:, done:, None]
            values = codes.view(rows, -1, layout.group).float()
        else:
            values = codes.float()
        weight[:, planar:].copy_(_affine(values, scale, offset, exact).view(rows, -1))


def _affine(values: Tensor, scale: Tensor, offset: Tensor, exact: bool) -> Tensor:
    """values * scale + offset, in place, rounded as by the reference: in two steps, twice as fast, where `exact`."""
    return values.mul_(scale).add_(offset) if exact else torch.addcmul(offset, values, scale, out=values)


def _tail(W_q: Tensor, packed: Packed, start: int, stop: int) -> Tensor:
    """The bytes of columns `start` (a multiple of `_unit`) to `stop`, packed like a row of that width."""
    if packed.spec.nbits != 3:
        return W_q[:, start * packed.spec.nbits // 8 : stop * packed.spec.nbits // 8]
    high = packed.layout.padded // 4  # where the run of the high bits starts
    return torch.cat([W_q[:, start // 4 : stop // 4], W_q[:, high + start // 8 : high + stop // 8]], dim=1)


# Few rows: codes and fixed-point digits of x.


def _suits_integers(x: Tensor, packed: Packed) -> bool:
    """Whether `_integer` can serve and is faster: each group has a sum for each digit of each row to be scaled."""
    layout = packed.layout
    if layout.padded < _unit(packed) or not (layout.groups == 1 or layout.group == layout.plane):
        return False
    return (x.shape[0] == 1 or x.shape[0] * _digit_count(x.dtype) <= layout.plane // 8) and _fast_int_mm()


@cache
def _fast_int_mm() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX") and torch.backends.mkldnn.is_available()


def _digit_count(dtype: torch.dtype) -> int:
    return 2 if dtype == torch.bfloat16 else 3


def _digits(x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, planes, p] -> int8 digits [count, M, planes, p], the highest first; step and sum [planes, M].

    In steps of its largest value over the largest number, x is rounded to digits from -64 to 63.
    """
    largest = sum((_DIGIT // 2 - 1) * _DIGIT**i for i in range(count))
    step = x.abs().amax(2).div_(largest).clamp_min_(torch.finfo(torch.float32).tiny)
    rest = (x / step[..., None]).round_()
    total = rest.sum(2) * step
    digits = torch.empty(count, *x.shape, dtype=torch.int8)
    for i in range(count - 1, 0, -1):
        upper = ((rest + _DIGIT // 2) / _DIGIT).floor_()
        digits[i] = rest - upper * _DIGIT
        rest = upper
    digits[0] = rest
    return digits, step.t(), total.t()


def _integer(x: Tensor, packed: Packed) -> Tensor:
    """x [M, width] times the transpose of the stored matrix: [M, rows] in float32."""
    layout, spec = packed.layout, packed.spec
    whole = layout.padded // _unit(packed) * _unit(packed)
    tokens, planes = x.shape[0], whole // layout.plane
    values = pad(x.float(), (0, layout.padded - layout.width))
    digits, step, total = _digits(values[:, :whole].unflatten(1, (planes, layout.plane)), _digit_count(x.dtype))
    slices = _row_slices(packed, _INTEGER_CODES)
    bit_runs = [(spec.nbits, 0, 1)] if spec.nbits != 3 else [(2, 0, 1), (1, layout.padded // 4, 4)]
    runs = [_Run(digits, step, *bits_first_weight, slices[0][1]) for bits_first_weight in bit_runs]
    beside = torch.stack([run.half for run in runs]).sum(0)[:, None] * total  # [planes, M]
    tail = torch.empty(slices[0][1], layout.padded - whole)
    y = torch.empty(layout.rows, tokens)
    for start, stop in slices:
        part, W_q = y[start:stop], packed.W_q[start:stop]
        scale, offset = all_scale, all_offset = _metadata(packed, start, stop)
        if layout.groups == 1:
            scale, offset = scale.expand(-1, planes), offset.expand(-1, planes)
        torch.mm(offset[:, :planes], total, out=part)
        part.addmm_(scale[:, :planes], beside)
        for run in runs:
            run.add(part, W_q, scale[:, :planes])
        if whole < layout.padded:
            weight = tail[: stop - start]
            _fill_columns(weight, packed, W_q, all_scale, all_offset, whole)
            part.addmm_(weight, values[:, whole:].t())
    return y.t()


class _Run:
    """The bytes of a row from `first` on, planes of codes of `bits` bits, the lowest worth `weight`; and x to match.

    Attributes:
        half: [planes] what is missing in the codes: the highest plane becomes signed by taking half its range off.
        right: [k, columns] int8, the right sides of the products of plane 0, of plane 1 ...: each takes `share` blocks
            and gives a sum for each digit, token and block.
    """

    def __init__(self, digits: Tensor, step: Tensor, bits: int, first: int, weight: int, rows: int) -> None:
        self.count, self.tokens, planes, plane = digits.shape
        self.bits, self.per = bits, 8 // bits
        blocks = planes // self.per
        self.share = min(max(_SHARED // self.tokens, 1), blocks)
        self.chunks = -(-blocks // self.share)
        self.bytes = slice(first, first + blocks * plane)
        units = [weight * 2.0 ** (-bits * i) for i in range(self.per)]
        self.factor = step * torch.tensor(units).repeat(blocks)[:, None]  # [planes, M]
        self.half = torch.tensor([0.0] * (self.per - 1) + [weight * 2.0 ** (bits - 1)]).repeat(blocks)
        right = torch.zeros(
            self.per, self.chunks, self.share, plane, digits.shape[0] * self.tokens, self.share, dtype=torch.int8
        )
        padded = pad(digits, (0, 0, 0, (self.chunks * self.share - blocks) * self.per))
        padded = padded.view(-1, self.chunks, self.share, self.per, plane)
        right.diagonal(dim1=2, dim2=5).copy_(padded.permute(3, 1, 4, 0, 2))
        right = right.view(self.per, self.chunks, self.share * plane, -1)
        self.right = [p[: blocks * plane - c * self.share * plane] for part in right for c, p in enumerate(part)]
        self.codes = torch.empty(rows, blocks * plane, dtype=torch.uint8)
        self.sums = torch.empty(self.per * self.chunks, rows, right.shape[-1], dtype=torch.int32)
        self.scales = torch.zeros(rows, self.chunks * self.share * self.per)
        self.ones = torch.ones(self.share)

    def add(self, y: Tensor, W_q: Tensor, scale: Tensor) -> None:
        """Add this run's products of rows [rows, bytes] with scales [rows, planes] to `y` [rows, M]."""
        rows = y.shape[0]
        W_q, codes, sums, scales = W_q[:, self.bytes], self.codes[:rows], self.sums[:, :rows], self.scales[:rows]
        left = codes.view(torch.int8).split(self.right[0].shape[0], 1)
        pairs = list(zip(self.right, sums.unbind(0), strict=True))
        for i in range(self.per):
            torch.bitwise_and(W_q, 2**self.bits - 1 << self.bits * i, out=codes)
            if i == self.per - 1:
                codes.bitwise_xor_(128)
            for part, (right, out) in zip(left, pairs[i * self.chunks :], strict=False):
                torch._int_mm(part, right, out=out)
        digits = sums.view(self.per, self.chunks, rows, self.count, self.tokens, self.share)
        ordered = scales.view(rows, self.chunks, self.share, self.per).permute(3, 1, 0, 2)  # as the sums
        for token in range(self.tokens):
            total, *lower = digits[..., token, :].unbind(3)  # [per, chunks, rows, share] each
            for i, digit in enumerate(lower):  # two digits fit into int32, three do not
                total = torch.add(digit, total if i == 0 else total.float(), alpha=_DIGIT)
            torch.mul(scale, self.factor[:, token], out=scales[:, : scale.shape[1]])
            products = (total * ordered).view(-1, rows * self.share).sum(0)
            y[:, token] += products.view(rows, self.share) @ self.ones
