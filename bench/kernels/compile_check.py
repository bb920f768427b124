"""Compile check: compile a kernel for architectures that need not be here, and inspect the machine code.

A `Case` is one launch that a wrapper can make. `compile_case` compiles it as the launch would,
without a GPU; `problems_of` lists what in the result would be slow or would not run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

from expertwire.kernels.gpu.compile_ahead import absent_gpu
from expertwire.kernels.gpu.device import REGISTERS_PER_SM

ARCHITECTURES = (90, 100)
SHARED_PER_BLOCK = 227 * 1024  # bytes
SHARED_PER_SM, SHARED_RESERVED = 228 * 1024, 1024  # bytes; reserved in each block
TENSOR_MEMORY_COLUMNS = 512
_SHARES = r"(LD|ST)G?|LDGSTS|ATOMG?|REDG?|U(TMA|BLK)\w*"  # machine code
_JUMPS = re.compile(r"^\s*(@!?%p\d+\s+)?(bra|brx|call|ret|exit)\b", re.MULTILINE)  # PTX


@dataclass(frozen=True, kw_only=True)
class Case:
    """One launch of a kernel.

    name: unique, for instance "grouped_gemm.w13 bf16 tokens16".
    kernel: the `@triton.jit` function.
    args: the runtime arguments by name: torch dtypes in place of pointers, realistic integers, descriptors of meta tensors.
    constexprs: by name.
    expect: architecture -> what the matrix instruction's name must contain: "HGMMA", "QGMMA", "HMMA", "UTC"; "" for none.
        The case is compiled for these architectures only.
    blocks_per_sm: resident blocks planned.
    wide: whether tensors are read by 16-byte accesses or TMA, and written by `store_bytes` a thread at once or TMA.
    narrow_copies: whether some asynchronous copies are of scalars, such as scales.
    options: further launch options, such as `enable_fp_fusion`; warps and stages may be among them.
    """

    name: str
    kernel: Any
    args: dict[str, Any]
    constexprs: dict[str, Any]
    expect: dict[int, str] = field(default_factory=lambda: dict.fromkeys(ARCHITECTURES, ""))
    num_warps: int = 4
    num_stages: int = 3
    blocks_per_sm: int = 1
    wide: bool = True
    store_bytes: int = 16
    narrow_copies: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled case: registers a thread; shared memory, stack and local memory in bytes; instruction counts."""

    registers: int
    shared: int
    stack: int
    local: int
    tensor_memory: int  # columns
    scratch: int  # bytes of global memory that a launch would need
    num_warps: int
    early: bool  # launched while the previous kernel may still run
    instructions: Counter[str]  # by full name, "LDG.E.128", in the order of their first
    ptx: str

    @property
    def spills(self) -> int:
        """Return the number of accesses of local memory."""
        return self._count("STL", "LDL")

    @property
    def matrix_instruction(self) -> str:
        """Return the matrix instructions' names without their modifiers."""
        names = {name.split(".")[0] for name in self.instructions}
        return "+".join(sorted(name for name in names if re.fullmatch(r"[HQ]G?MMA|UTC\w*MMA", name)))

    def widths(self, *names: str) -> Counter[int]:
        """Return bytes -> how many of these instructions ("LDG", "STG", "LDGSTS") move so many a thread."""
        counts: Counter[int] = Counter()
        for full, count in self.instructions.items():
            name, *modifiers = full.split(".")
            if name in names:
                sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1, "256": 32}
                counts[next((sizes[modifier] for modifier in modifiers if modifier in sizes), 4)] += count
        return counts

    def has(self, part: str) -> bool:
        """Return whether some instruction's name contains `part`."""
        return any(part in name.split(".")[0] for name in self.instructions)

    @property
    def waits(self) -> bool:
        """Return whether all threads wait for the previous kernel before any jump and any access of
        shared or global memory.
        """
        names = [full.split(".")[0] for full in self.instructions]
        before = names[: names.index("ACQBULK")] if "ACQBULK" in names else names
        start, waits, _ = self.ptx.partition("griddepcontrol.wait")
        return bool(waits) and not _JUMPS.search(start) and not any(re.fullmatch(_SHARES, name) for name in before)

    def _count(self, *names: str) -> int:
        return sum(count for full, count in self.instructions.items() if full.split(".")[0] in names)


def compile_case(case: Case, arch: int) -> Compiled:
    """Compile with an empty cache that is thrown away; raise what Triton and ptxas raise."""
    arguments = {**case.args, **case.constexprs}
    ordered = [arguments.pop(name) for name in case.kernel.arg_names]
    assert not arguments, f"{case.name}: the kernel has no {sorted(arguments)}"
    scratch, cache = tempfile.TemporaryDirectory(prefix="expertwire-compile-"), triton.knobs.cache.scope()
    with scratch as folder, absent_gpu(arch), cache:
        triton.knobs.cache.dir = folder
        case.kernel.device_caches.clear()  # keyed by the device's number
        options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
        kernel = case.kernel.warmup(*ordered, grid=(1,), **options)
        case.kernel.device_caches.clear()
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        return _inspect(cubin, kernel)


def _inspect(cubin: Path, kernel: Any) -> Compiled:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    usage = _run(tools / "cuobjdump", "-res-usage", cubin)
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    code = _run(tools / "nvdisasm", "-c", "--no-dataflow", cubin)
    # An instruction follows its address, and maybe a predicate: "/*0010*/  @!P0 LDG.E.128 R4, ..."
    names = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE)
    return Compiled(
        registers=used["REG"],
        shared=kernel.metadata.shared,
        stack=used["STACK"],
        local=used["LOCAL"],
        tensor_memory=getattr(kernel.metadata, "tmem_size", 0) or 0,
        scratch=kernel.metadata.global_scratch_size,
        num_warps=kernel.metadata.num_warps,
        early=kernel.metadata.launch_pdl,
        instructions=Counter(names),
        ptx=kernel.asm["ptx"],
    )


def _run(tool: Path, *arguments: str | Path) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def problems_of(case: Case, arch: int, compiled: Compiled) -> list[str]:
    """Return the problems of a compiled case, in words; empty if there are none."""
    return [
        *_spilled(compiled),
        *_wrong_instruction(case, arch, compiled),
        *_too_big(case, compiled),
        *_wants_scratch(compiled),
        *_unordered(compiled),
        *(_narrow(case, compiled) if case.wide else []),
    ]


def _spilled(compiled: Compiled) -> Iterator[str]:
    if compiled.spills or compiled.stack or compiled.local:
        yield f"{compiled.spills} spills, {compiled.stack} B of stack, {compiled.local} B of local memory"


def _wants_scratch(compiled: Compiled) -> Iterator[str]:
    if compiled.scratch:
        yield f"{compiled.scratch} B of scratch memory, which is never allocated"


def _unordered(compiled: Compiled) -> Iterator[str]:
    if compiled.early and not compiled.waits:
        yield "launched early, but does not first wait for the previous kernel"


def _wrong_instruction(case: Case, arch: int, compiled: Compiled) -> Iterator[str]:
    expected, found = case.expect[arch], compiled.matrix_instruction
    if not compiled.instructions:
        yield "no machine code"
    if expected not in found or bool(expected) != bool(found) or "+" in found:
        yield f"matrix instruction {found or 'none'}, not {expected or 'none'}"


def _too_big(case: Case, compiled: Compiled) -> Iterator[str]:
    if compiled.shared > SHARED_PER_BLOCK:
        yield f"{compiled.shared} B of shared memory, more than the {SHARED_PER_BLOCK} of a block"
    blocks = case.blocks_per_sm
    if blocks * (compiled.shared + SHARED_RESERVED) > SHARED_PER_SM:
        yield f"{blocks} blocks with {compiled.shared} B of shared memory each do not fit an SM"
    a_warp = -(-compiled.registers // 8) * 8 * 32
    if blocks * compiled.num_warps * a_warp > REGISTERS_PER_SM:
        yield f"{blocks} blocks of {compiled.num_warps} warps with {compiled.registers} registers each do not fit an SM"
    if blocks * compiled.tensor_memory > TENSOR_MEMORY_COLUMNS:
        yield f"{blocks} blocks with {compiled.tensor_memory} columns of tensor memory each do not fit an SM"


def _narrow(case: Case, compiled: Compiled) -> list[str]:
    found = []
    if not case.narrow_copies and any(width < 16 for width in compiled.widths("LDGSTS")):
        found.append(f"asynchronous copies of {sorted(compiled.widths('LDGSTS'))} bytes")
    if not compiled.has("UTMALDG") and max([0, *compiled.widths("LDG", "LDGSTS")]) < 16:
        found.append("no 16-byte load")
    if not compiled.has("UTMASTG") and max([0, *compiled.widths("STG")]) < case.store_bytes:
        found.append(f"no {case.store_bytes}-byte store")
    return found
