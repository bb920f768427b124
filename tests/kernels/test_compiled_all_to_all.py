"""Machine code of dispatch and combine: few loads, wide stores, and signals after the rows they announce."""

import os
import re

import pytest
from helpers.slow import slow_but

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from expertwire.bench.kernels.compile_cases import all_to_all
from expertwire.bench.kernels.compile_check import compile_case

CASES = {case.name: case for case in all_to_all.cases()}
SENDS = [name for name in CASES if name.startswith("dispatch_combine.dispatch_send")]
LOW_LATENCY_SENDS = [name for name in CASES if name.startswith("dispatch_low_latency.send")]
QUANTISED = [name for name in SENDS + LOW_LATENCY_SENDS if name.endswith("quantised")]


@pytest.fixture(scope="module", params=slow_but([90], [90, 100]))
def compiled(request):
    made = {}

    def get(name):
        if name not in made:
            made[name] = compile_case(CASES[name], request.param)
        return made[name]

    return get


def find(pattern, ptx):
    return [match.start() for match in re.finditer(pattern, ptx)]


def row_accesses(case):
    """Return a thread's 16-byte accesses to load a row, and to store it once."""
    given = case.constexprs["COLUMNS"] * 2 or case.constexprs["WORDS"] * 4
    return [-(-nbytes // (16 * 32 * case.num_warps)) for nbytes in (given, case.constexprs["WORDS"] * 4)]


@pytest.mark.parametrize("name", SENDS)
def test_a_row_is_loaded_once_however_many_ranks_it_goes_to(compiled, name):
    case, code = CASES[name], compiled(name)
    loads, stores = row_accesses(case)
    assert code.widths("LDG", "LD")[16] == loads
    assert code.widths("STG", "ST")[16] >= stores * case.constexprs["K"]
    assert not loads_in_loop_of_stores(code.ptx), "a row is loaded in the loop over the ranks it goes to"


def loads_in_loop_of_stores(ptx):
    """Return the 16-byte loads in the innermost loop of the first 16-byte stores: from a label to a jump back to it."""
    labels = {match[1]: match.start() for match in re.finditer(r"^(\$\w+):", ptx, re.MULTILINE)}
    jumps = [(labels[match[1]], match.start()) for match in re.finditer(r"\bbra(?:\.uni)? *\t*(\$\w+);", ptx)]
    stored, *_ = find(r"st\.global\.v4", ptx)
    around = [(start, end) for start, end in jumps if start < stored < end]
    assert around, "no loop has the stores in it"
    start, end = min(around, key=lambda loop: loop[1] - loop[0])
    return [at for at in find(r"ld\.global\.v4", ptx) if start < at < end]


@pytest.mark.parametrize("name", LOW_LATENCY_SENDS)
def test_low_latency_sends(compiled, name):
    case, code = CASES[name], compiled(name)
    loads, _ = row_accesses(case)
    ids = 8 * case.constexprs["TOKENS"] * case.constexprs["K"] // (16 * 32 * case.num_warps)  # every program's
    assert code.widths("LDG", "LD")[16] <= loads + ids
    barrier = min(find(r"bar\.sync|barrier\.sync", code.ptx))
    early = [at for at in find(r"ld\.global\.v4", code.ptx) if at < barrier]
    assert len(early) >= loads, "the row is loaded before its destinations are found"


@pytest.mark.parametrize("name", QUANTISED)
def test_rows_are_quantised_in_registers(compiled, name):
    """Check the instruction that rounds; shared memory may hold only partial sums and scales."""
    code, columns = compiled(name), CASES[name].constexprs["COLUMNS"]
    assert find(r"cvt\.rn\.satfinite\.e4m3x2\.f32", code.ptx)
    assert code.shared < columns
    assert not code.spills


@pytest.mark.parametrize("name", [*SENDS, *LOW_LATENCY_SENDS, "dispatch_combine.combine_send EP8 T128 quantised"])
def test_signals_are_released_to_the_system_after_all_rows(compiled, name):
    """Check the order: rows, a barrier, this program's atomic count, and the last program's signals."""
    ptx = compiled(name).ptx
    [counted], [signalled] = (
        find(r"atom\.global\.gpu\.acq_rel\.add", ptx),
        find(r"atom\.global\.sys\.release\.exch", ptx),
    )
    rows = find(r"st\.global\.v4", ptx)
    barriers = find(r"bar\.sync|barrier\.sync", ptx)
    assert rows
    assert counted < signalled
    assert any(max(rows) < barrier < counted for barrier in barriers)
    if name in SENDS:  # the number of rows, too
        numbers = [at for at in find(r"st\.global\.b64", ptx) if counted < at < signalled]
        assert numbers
        assert any(max(numbers) < barrier < signalled for barrier in barriers)


@pytest.mark.parametrize("name", ["signals.wait EP8", "dispatch_low_latency.receive EP8 T128"])
def test_waits_acquire_from_the_system_and_report_stalls(compiled, name):
    ptx = compiled(name).ptx
    polled, [acquired] = find(r"ld\.volatile\.global", ptx), find(r"atom\.global\.sys\.acquire\.add", ptx)
    turns = [at for at in find(r"\bbra\b", ptx) if min(polled) < at < acquired]  # the loop's end
    assert turns
    assert not [at for at in find(r"bar\.sync|barrier\.sync", ptx) if min(polled) < at < acquired]
    assert find(r"atom\.global\.sys\.release\.exch", ptx)
    assert find(r"globaltimer", ptx)
