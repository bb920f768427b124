"""Every kernel, compiled for Hopper and Blackwell without either: no spills, and tensor cores are used."""

import dataclasses
import os
import re
from collections import Counter

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from expertwire.bench.kernels import report as kernels_report
from expertwire.bench.kernels.compile_cases import every_case
from expertwire.bench.kernels.compile_check import Case, Compiled, problems_of

CASES = every_case()


def representatives():
    """One case of every kernel file, for Hopper and Blackwell in turn; a case's name begins with its file's."""
    first = {}
    for place, case in enumerate(CASES):
        first.setdefault(re.split(r"[. ]", case.name)[0], place)
    return {
        (place, list(CASES[place].expect)[number % len(CASES[place].expect)])
        for number, place in enumerate(first.values())
    }


KEPT = representatives()
RUNS = [
    pytest.param(place, arch, id=f"{case.name}-sm_{arch}", marks=() if (place, arch) in KEPT else pytest.mark.slow)
    for place, case in enumerate(CASES)
    for arch in case.expect
]


@pytest.mark.parametrize(("place", "arch"), RUNS)
def test_compiled(place, arch):
    text, fine = kernels_report.line(place, arch)
    assert fine, text


def test_names_are_unique():
    assert [name for name, count in Counter(case.name for case in CASES).items() if count > 1] == []


def test_the_report_names_the_case_and_its_problems(monkeypatch):
    """Take a kernel without matrix products for one that should have some."""
    case = next(case for case in CASES if case.name.startswith("grouped_gemm_tiles.build_tile_map"))
    monkeypatch.setattr(kernels_report, "every_case", lambda: [dataclasses.replace(case, expect={90: "HGMMA"})])
    text, fine = kernels_report.line(0, 90)
    assert not fine
    assert text.startswith(case.name) and text.endswith("matrix instruction none, not HGMMA")


GOOD = Compiled(
    registers=128,
    shared=100 * 1024,
    stack=0,
    local=0,
    tensor_memory=0,
    scratch=0,
    num_warps=8,
    early=False,
    instructions=Counter({"HGMMA.64x128x16.F32.BF16": 8, "LDGSTS.E.BYPASS.128": 4, "STG.E.128": 2}),
    ptx="",
)

WAITS = "// %bb.0:  // %__nv_rsqrtf.exit\n\tmov.u32 %r1, %tid.x;\n\tgriddepcontrol.wait;\n\tbra.uni $L1;"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, ""),
        ({"stack": 8}, "8 B of stack"),
        ({"instructions": GOOD.instructions + Counter({"STL.64": 3, "LDL": 1})}, "4 spills"),
        ({"instructions": Counter({"HMMA.16816.F32.BF16": 8, "LDG.E.128": 4, "STG.E.128": 2})}, "HMMA, not HGMMA"),
        ({"instructions": Counter({"LDG.E.128": 4, "STG.E.128": 2})}, "none, not HGMMA"),
        ({"instructions": GOOD.instructions + Counter({"LDGSTS.E.64": 1})}, "copies of [8, 16] bytes"),
        ({"instructions": Counter({"HGMMA": 8, "LDG.E": 4, "STG.E.128": 2})}, "no 16-byte load"),
        ({"instructions": Counter({"HGMMA": 8, "UTMALDG.2D": 4, "STG.E.64": 2})}, "no 16-byte store"),
        ({"shared": 230 * 1024}, "more than the 232448 of a block"),
        ({"shared": 114 * 1024}, "2 blocks with 116736 B"),
        ({"registers": 136}, "2 blocks of 8 warps with 136 registers"),
        ({"tensor_memory": 320}, "320 columns"),
        ({"scratch": 128}, "128 B of scratch memory"),
        ({"early": True}, "does not first wait"),
        ({"early": True, "instructions": Counter({"S2R": 1, "ACQBULK": 1}) + GOOD.instructions, "ptx": WAITS}, ""),
        ({"early": True, "instructions": Counter({"LDG.E": 1, "ACQBULK": 1}), "ptx": WAITS}, "does not first"),
        (
            {"early": True, "instructions": Counter({"ACQBULK": 1}), "ptx": "\t@%p1 bra $L1;\n" + WAITS},
            "does not first",
        ),
    ],
)
def test_what_counts_as_a_problem(change, found):
    case = Case(name="", kernel=None, args={}, constexprs={}, expect={90: "HGMMA"}, num_warps=8, blocks_per_sm=2)
    problems = problems_of(case, 90, dataclasses.replace(GOOD, **change))
    assert (found in " ".join(problems)) and bool(problems) == bool(found)
