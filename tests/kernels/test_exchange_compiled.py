"""What the machine code of dispatch and combine must have: few loads, wide stores, and flags after what they announce."""

import os
import re

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from expertwire.kernels.gpu import compile as ahead_of_time
from expertwire.kernels.gpu import exchange, exchange_few

CASES = {case.name.partition(" ")[0]: case for case in [*exchange.cases(), *exchange_few.cases()] if not case.full}


@pytest.fixture(scope="module", params=[90, pytest.param(100, marks=pytest.mark.full)])
def compiled(request):
    made = {}

    def get(name):
        if name not in made:
            made[name] = ahead_of_time.compile_case(CASES[name], request.param)
        return made[name]

    return get


def find(pattern, ptx):
    return [match.start() for match in re.finditer(pattern, ptx)]


def test_a_row_is_loaded_once_however_many_ranks_it_goes_to(compiled):
    case, code = CASES["exchange.send"], compiled("exchange.send")
    loads = -(-case.constexprs["WORDS"] * 4 // (16 * 32 * case.num_warps))
    assert code.widths("LDG", "LD")[16] == loads
    assert code.widths("STG", "ST")[16] >= loads * case.constexprs["K"]


def test_few_rows_too(compiled):
    case, code = CASES["exchange_few.send"], compiled("exchange_few.send")
    a_thread = 16 * 32 * case.num_warps
    ids = 8 * case.constexprs["TOKENS"] * case.constexprs["K"] // a_thread  # looked at by every program
    assert code.widths("LDG", "LD")[16] <= -(-case.constexprs["WORDS"] * 4 // a_thread) + ids


@pytest.mark.parametrize("name", ["exchange.send", "exchange.go_home", "exchange_few.send"])
def test_flags_are_released_to_the_system_after_all_rows(compiled, name):
    """Rows, a barrier, this program's part of the count, and of the last program the flags."""
    ptx = compiled(name).ptx
    [counted], [flagged] = find(r"atom\.global\.gpu\.acq_rel\.add", ptx), find(r"atom\.global\.sys\.release\.exch", ptx)
    rows = find(r"st\.global\.v4", ptx)
    barriers = find(r"bar\.sync|barrier\.sync", ptx)
    assert rows
    assert counted < flagged
    assert any(max(rows) < barrier < counted for barrier in barriers)
    if name == "exchange.send":  # the number of rows, too
        numbers = [at for at in find(r"st\.global\.b64", ptx) if counted < at < flagged]
        assert numbers
        assert any(max(numbers) < barrier < flagged for barrier in barriers)


@pytest.mark.parametrize("name", ["exchange.wait", "exchange_few.arrive"])
def test_waits_acquire_from_the_system_and_tell_it_in_the_end(compiled, name):
    ptx = compiled(name).ptx
    assert find(r"atom\.global\.sys\.acquire\.add", ptx)
    assert find(r"atom\.global\.sys\.release\.exch", ptx)
    assert find(r"globaltimer", ptx)
