"""Report on every GPU kernel, compiled for Hopper and Blackwell without either: one line a case and architecture.

    python -m expertwire.bench.kernels.report [--jobs N] [PART_OF_NAME]

Exits with 1 if a kernel has a problem. Accesses: bytes a thread moves at once, and the number of
such instructions.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from triton.errors import TritonError

from expertwire.bench.kernels.compile_cases import every_case
from expertwire.bench.kernels.compile_check import compile_case, problems_of

HEAD = (
    "case",
    "sm",
    "instruction",
    "registers",
    "shared",
    "spills",
    "tmem",
    "TMA",
    "copies",
    "loads",
    "stores",
    "problems",
)
NAME = 66  # characters
LINE = f"{{:<{NAME}}}" + " {:>3} {:<11} {:>9} {:>7} {:>6} {:>4} {:>3} {:<12} {:<18} {:<14} {}"


def line(index: int, arch: int) -> tuple[str, bool]:
    """Return the line of a case, and whether it has no problem."""
    case = every_case()[index]
    try:
        compiled = compile_case(case, arch)
    except (TritonError, RuntimeError) as error:
        message = str(error.__cause__ or error).strip().splitlines()
        return (
            f"{case.name:<{NAME}} {arch:>3} does not compile: {message[-1] if message else type(error).__name__}",
            False,
        )
    problems = problems_of(case, arch, compiled)

    def accesses(name: str) -> str:
        return " ".join(f"{width}Bx{count}" for width, count in sorted(compiled.widths(name).items(), reverse=True))

    text = LINE.format(
        case.name,
        arch,
        compiled.matrix_instruction or "-",
        compiled.registers,
        compiled.shared,
        compiled.spills,
        compiled.tensor_memory,
        "yes" if compiled.has("UTMALDG") else "-",
        accesses("LDGSTS") or "-",
        accesses("LDG") or "-",
        accesses("STG") or ("TMA" if compiled.has("UTMASTG") else "-"),
        "; ".join(problems) or "-",
    )
    return text, not problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part_of_name", nargs="?", default="", help="only cases whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a CPU)")
    args = parser.parse_args()
    cases = every_case()
    runs = [(i, arch) for i, case in enumerate(cases) if args.part_of_name in case.name for arch in case.expect]
    print(LINE.format(*HEAD))
    fine = True
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for text, is_fine in pool.map(line, *zip(*runs, strict=True)):
            print(text, flush=True)
            fine &= is_fine
    sys.exit(not fine)


if __name__ == "__main__":
    main()
