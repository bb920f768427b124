"""What the machine code of dispatch and combine must have: few loads, wide stores, and flags after what they announce."""

import os
import re

import pytest
from helpers.slow import slow_but

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from expertwire.kernels.gpu import compile as ahead_of_time
from expertwire.kernels.gpu import exchange, exchange_few, exchange_flags

CASES = {case.name: case for case in [*exchange.cases(), *exchange_few.cases(), *exchange_flags.cases()]}
SENDS = [name for name in CASES if name.startswith("exchange.send")]
SENDS_OF_FEW = [name for name in CASES if name.startswith("exchange_few.send")]
QUANTISED = [name for name in SENDS + SENDS_OF_FEW if name.endswith("quantised")]


@pytest.fixture(scope="module", params=slow_but([90], [90, 100]))
def compiled(request):
    made = {}

    def get(name):
        if name not in made:
            made[name] = ahead_of_time.compile_case(CASES[name], request.param)
        return made[name]

    return get


def find(pattern, ptx):
    return [match.start() for match in re.finditer(pattern, ptx)]


def row_accesses(case):
    """Of 16 bytes, by a thread: to load a row, and to store it once."""
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
    """The 16-byte loads in the innermost loop that the first 16-byte stores are in: from a label to a jump back to it."""
    labels = {match[1]: match.start() for match in re.finditer(r"^(\$\w+):", ptx, re.MULTILINE)}
    jumps = [(labels[match[1]], match.start()) for match in re.finditer(r"\bbra(?:\.uni)? *\t*(\$\w+);", ptx)]
    stored, *_ = find(r"st\.global\.v4", ptx)
    around = [(start, end) for start, end in jumps if start < stored < end]
    assert around, "no loop has the stores in it"
    start, end = min(around, key=lambda loop: loop[1] - loop[0])
    return [at for at in find(r"ld\.global\.v4", ptx) if start < at < end]


@pytest.mark.parametrize("name", SENDS_OF_FEW)
def test_few_rows_too(compiled, name):
    case, code = CASES[name], compiled(name)
    loads, _ = row_accesses(case)
    ids = 8 * case.constexprs["TOKENS"] * case.constexprs["K"] // (16 * 32 * case.num_warps)  # every program's
    assert code.widths("LDG", "LD")[16] <= loads + ids
    barrier = min(find(r"bar\.sync|barrier\.sync", code.ptx))
    early = [at for at in find(r"ld\.global\.v4", code.ptx) if at < barrier]
    assert len(early) >= loads, "the row is on its way before it is found where it goes"


@pytest.mark.parametrize("name", QUANTISED)
def test_rows_are_quantised_in_registers(compiled, name):
    """Rounded by the instruction for it, and never put down: shared memory is for what is left of sums, and for scales."""
    code, columns = compiled(name), CASES[name].constexprs["COLUMNS"]
    assert find(r"cvt\.rn\.satfinite\.e4m3x2\.f32", code.ptx)
    assert code.shared < columns
    assert not code.spills


@pytest.mark.parametrize("name", [*SENDS, *SENDS_OF_FEW, "exchange.go_home EP8 T128 quantised"])
def test_flags_are_released_to_the_system_after_all_rows(compiled, name):
    """Rows, a barrier, this program's part of the count, and of the last program the flags."""
    ptx = compiled(name).ptx
    [counted], [flagged] = find(r"atom\.global\.gpu\.acq_rel\.add", ptx), find(r"atom\.global\.sys\.release\.exch", ptx)
    rows = find(r"st\.global\.v4", ptx)
    barriers = find(r"bar\.sync|barrier\.sync", ptx)
    assert rows
    assert counted < flagged
    assert any(max(rows) < barrier < counted for barrier in barriers)
    if name in SENDS:  # the number of rows, too
        numbers = [at for at in find(r"st\.global\.b64", ptx) if counted < at < flagged]
        assert numbers
        assert any(max(numbers) < barrier < flagged for barrier in barriers)


@pytest.mark.parametrize("name", ["exchange_flags.wait EP8", "exchange_few.arrive EP8 T128"])
def test_waits_acquire_from_the_system_and_tell_it_in_the_end(compiled, name):
    ptx = compiled(name).ptx
    polled, [acquired] = find(r"ld\.volatile\.global", ptx), find(r"atom\.global\.sys\.acquire\.add", ptx)
    turns = [at for at in find(r"\bbra\b", ptx) if min(polled) < at < acquired]  # the loop's end
    assert turns
    assert not [at for at in find(r"bar\.sync|barrier\.sync", ptx) if min(polled) < at < acquired]
    assert find(r"atom\.global\.sys\.release\.exch", ptx)
    assert find(r"globaltimer", ptx)
