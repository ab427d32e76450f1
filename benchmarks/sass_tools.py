"""Triton kernels as machine code, without a GPU: compile them as a call would, disassemble them, count.

    compiled = compile_call(kernel, arguments, constants, options, capability=89)
    code = inspect(compiled)     # .instructions, .loops, .registers, .spills, .shared

Triton brings ptxas, nvdisasm and cuobjdump along. Nothing here knows a kernel of hqqplus.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

# All that Triton compiles for and hqqplus supports: Turing, Ampere (data centre, desktop), Ada, Hopper, Blackwell.
CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
_ALIGNED = 16
_POINTERS = {
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


class Code(NamedTuple):
    """A kernel on one GPU: its SASS instructions (predicates taken off), the (first, last) of each loop, registers of
    a lane, instructions that spill them, and bytes of shared memory of a program."""

    instructions: list[str]
    loops: list[tuple[int, int]]
    registers: int
    spills: int
    shared: int

    @property
    def executed(self) -> int:
        """Instructions of a kernel without loops: all before the padding behind its end."""
        return sum(not instruction.startswith("NOP") for instruction in self.instructions)

    def counts(self, *names: str) -> dict[str, int]:
        """How many instructions there are by opcode, of the opcodes that begin with one of `names` (or of all)."""
        opcodes = Counter(instruction.split()[0] for instruction in self.instructions)
        return {name: count for name, count in opcodes.items() if not names or name.startswith(names)}


def compile_call(
    kernel: Any,
    arguments: Sequence[Any],
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
    capability: int,
) -> Any:
    """`kernel` as it is compiled for sm_`capability` when it is launched with `arguments` (by place) and `constants`.

    Tensors may lie on any device, `meta` too: of them types and alignment count, of integers whether they are 1 or
    divisible by 16, as in a launch.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fixed = dict(constants)
    signature: dict[str, str] = {}
    aligned = []
    values = dict(zip(kernel.arg_names, arguments, strict=False))
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in fixed:
            signature[name] = "constexpr"
            continue
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            divisible = value.data_ptr() % _ALIGNED == 0
        elif isinstance(value, int):
            if value == 1 and not parameter.do_not_specialize:
                signature[name], fixed[name] = "constexpr", 1
                continue
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % _ALIGNED == 0
        else:
            signature[name], divisible = "fp32", False
        if divisible and not parameter.do_not_specialize:
            aligned.append(place)
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=fixed,
        attrs={(place,): [["tt.divisibility", _ALIGNED]] for place in aligned},
    )
    import triton

    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))


def inspect(compiled: Any) -> Code:
    instructions, loops, registers = disassemble(compiled.asm["cubin"])
    return Code(instructions, loops, registers, spills(instructions), compiled.metadata.shared)


def disassemble(cubin: bytes) -> tuple[list[str], list[tuple[int, int]], int]:
    """(SASS instructions, (first, last) of each loop, registers a lane) of a kernel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing, usage = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
        )
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        if instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            instructions.append(re.sub(r"^@!?U?P\d+\s+", "", instruction[1]))
    loops = []
    for at, instruction in enumerate(instructions):
        target = re.search(r"^BRA.*`\((\.L_x_\d+)\)", instruction)
        if target and labels[target[1]] < at:
            loops.append((labels[target[1]], at))
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None
    return instructions, sorted(loops), int(registers[1])


def spills(instructions: list[str]) -> int:
    """How many instructions move registers to or from local memory."""
    return sum(instruction.startswith(("LDL", "STL")) for instruction in instructions)
