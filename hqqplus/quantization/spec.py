"""What to quantize a matrix to: `QuantSpec` for one matrix, `QuantPlan` for the matrices of a model by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

NBITS = (1, 2, 3, 4, 8)
WHOLE_ROW = -1
SMALLEST_GROUP, LARGEST_GROUP, GROUP_STEP = 8, 256, 8
METADATA_DTYPES = ("float16", "bfloat16")
METADATA_BITS = (8, 16)
BLOCK = 128
"""Groups whose 8-bit metadata share their two affine maps, and the bits of these: four 16-bit floats."""
BLOCK_BITS = 4 * 16


@dataclass(frozen=True)
class QuantSpec:
    """How one weight matrix is quantized.

    Args:
        nbits: bits per code, one of 1, 2, 3, 4, 8.
        group_size: weights that share one scale and one offset: a multiple of 8 from 8 to 256, or -1 for the whole
            row (for axis 0: the whole column). A width that it does not divide is padded.
        axis: 1, a group is consecutive weights of one output row; 0, of one input column, consecutive output rows.
        metadata_dtype: how scale and offset are stored, "float16" (finer: at 8 bits a bfloat16 offset is off by half a
            step) or "bfloat16" (for weights beyond float16's range).
        metadata_bits: 16, scale and offset are such floats; or 8, they are codes, and blocks of 128 groups share the
            floats that turn codes into values (`quantization/metadata.py`).

    Raises:
        ValueError: for any other value, with what is allowed.
        TypeError: for a value of another type.
    """

    nbits: int = 2
    group_size: int = 32
    axis: int = 1
    metadata_dtype: str = "float16"
    metadata_bits: int = 8

    def __post_init__(self) -> None:
        for name in ("nbits", "group_size", "axis", "metadata_bits"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}: it must be an integer")
        if self.nbits not in NBITS:
            raise ValueError(f"nbits is {self.nbits}: it must be one of {', '.join(map(str, NBITS))}")
        in_range = SMALLEST_GROUP <= self.group_size <= LARGEST_GROUP and self.group_size % GROUP_STEP == 0
        if not in_range and self.group_size != WHOLE_ROW:
            raise ValueError(
                f"group_size is {self.group_size}: it must be a multiple of {GROUP_STEP} from {SMALLEST_GROUP} to "
                f"{LARGEST_GROUP}, or {WHOLE_ROW} for the whole row"
            )
        if self.axis not in (0, 1):
            raise ValueError(f"axis is {self.axis}: it must be 0 or 1")
        if self.metadata_dtype not in METADATA_DTYPES:
            raise ValueError(
                f"metadata_dtype is {self.metadata_dtype!r}: it must be one of {', '.join(METADATA_DTYPES)}"
            )
        if self.metadata_bits not in METADATA_BITS:
            allowed = " or ".join(map(str, METADATA_BITS))
            raise ValueError(f"metadata_bits is {self.metadata_bits}: it must be {allowed}")

    @property
    def qmax(self) -> int:
        """The largest code, 2^nbits - 1."""
        return 2**self.nbits - 1

    def layout(self, out_features: int, in_features: int) -> Layout:
        """The sizes of the packed tensors of an `[out_features, in_features]` weight."""
        rows, width = (out_features, in_features) if self.axis == 1 else (in_features, out_features)
        whole = self.group_size == WHOLE_ROW
        group = _round_up(width, GROUP_STEP) if whole else self.group_size
        padded = _round_up(width, group)
        # A bit-plane of a kernel's block is one group; a group that is the whole row is cut into planes of 128.
        plane = group if group <= LARGEST_GROUP else 128
        return Layout(rows=rows, width=width, padded=padded, group=group, groups=padded // group, plane=plane)

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Everything stored for the matrix (codes with padding, scales, offsets) in bits, over its number of weights.

        Where the group size divides the width this is `nbits + 32 / group_size`; with 8-bit metadata, where 128
        divides the number of groups too, it is `nbits + 16 / group_size + 64 / (128 group_size)`.
        """
        layout = self.layout(out_features, in_features)
        groups = layout.rows * layout.groups
        bits = layout.rows * layout.padded * self.nbits + 2 * self.metadata_bits * groups
        if self.metadata_bits == 8:
            bits += BLOCK_BITS * block_count(groups)
        return bits / (out_features * in_features)

    def replace(self, **changes: Any) -> QuantSpec:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Layout:
    """Sizes of a packed matrix: `rows` of `width` weights, padded to `padded` = `groups` x `group`."""

    rows: int
    width: int
    padded: int
    group: int
    groups: int
    plane: int


@dataclass(frozen=True)
class SolverOptions:
    """What the solver minimises.

    Args:
        lp_norm: 2 is least squares. Below 1, the sum of |w - Q|^p, in which a few large errors weigh less.
        threshold: for `lp_norm` below 1, the error from which on a weight counts as an outlier, in standard deviations
            of its group.
        gain: exponent of the row gain (<W, W> / <W, Q>)^gain, folded into the scales. Least squares shrinks a row to
            (1 - NMSE) of itself; 1 undoes that, 0 leaves it.
        thorough: search several times as long (above 2 bits, or groups of 32), for the last tenths of a per cent of
            the error and hardly a group more than 1 % above its optimum.

    Raises:
        ValueError: for values out of range, with what is allowed.
        TypeError: for what is no number.
    """

    lp_norm: float = 2.0
    threshold: float = 0.5
    gain: float = 0.0
    thorough: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.thorough, bool):
            raise TypeError(f"thorough is {self.thorough!r}: it must be true or false")
        for name in ("lp_norm", "threshold", "gain"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}: it must be a number")
        if self.lp_norm != 2 and not 0 < self.lp_norm < 1:
            raise ValueError(f"lp_norm is {self.lp_norm}: it must be 2 (least squares) or between 0 and 1")
        if not 0 < self.threshold < float("inf"):
            raise ValueError(f"threshold is {self.threshold}: it must be a positive number of standard deviations")
        if not 0 <= self.gain <= 1:
            raise ValueError(f"gain is {self.gain}: it must be between 0 and 1")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class QuantPlan:
    """Which spec each module of a model gets, by its dotted name.

    Args:
        default: the spec of every linear layer that nothing below speaks of.
        overrides: name pattern -> the fields that differ there, e.g. `{"*.down_proj": {"nbits": 4}}`. The last
            pattern that matches a name wins. Embeddings and the output head are quantized only where a pattern
            names them.
        skip: name patterns of modules that stay in full precision. Skips win over overrides.
        solver: what the solver minimises, for all of them.

    A pattern is a shell-style glob over the whole dotted name, or a trailing part of the name: `lm_head`,
    `mlp.down_proj` and `*.layers.0.*` all work.

    Raises:
        ValueError, TypeError: for an override that is no valid change of the default, or a `skip` that is one string.
    """

    default: QuantSpec = field(default_factory=QuantSpec)
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    skip: tuple[str, ...] = ()
    solver: SolverOptions = field(default_factory=SolverOptions)

    def __post_init__(self) -> None:
        if isinstance(self.skip, str):
            raise TypeError(f"skip is {self.skip!r}: it must be a tuple of patterns")
        allowed = [f.name for f in dataclasses.fields(QuantSpec)]
        for pattern, changes in self.overrides.items():
            for name in changes:
                if name not in allowed:
                    raise ValueError(f"override {pattern!r}: {name!r} is not one of {', '.join(allowed)}")
            try:
                self.default.replace(**changes)
            except (ValueError, TypeError) as error:
                raise type(error)(f"override {pattern!r}: {error}") from None

    def override_for(self, name: str) -> QuantSpec | None:
        """The spec that an override gives `name`; None where no pattern names it or it is skipped."""
        matching = [changes for pattern, changes in self.overrides.items() if matches(name, pattern)]
        if not matching or self.skips(name):
            return None
        return self.default.replace(**matching[-1])

    def spec_for(self, name: str) -> QuantSpec | None:
        """The spec of linear layer `name`; None where it is skipped."""
        if self.skips(name):
            return None
        return self.override_for(name) or self.default

    def skips(self, name: str) -> bool:
        return any(matches(name, pattern) for pattern in self.skip)


def matches(name: str, pattern: str) -> bool:
    """Whether dotted `name` is named by `pattern`: a glob over all of it, or a trailing part of it."""
    return fnmatchcase(name, pattern) or name.endswith(f".{pattern}")


def block_count(groups: int) -> int:
    """How many blocks of 8-bit metadata `groups` groups make; the last one may be shorter."""
    return -(-groups // BLOCK)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
