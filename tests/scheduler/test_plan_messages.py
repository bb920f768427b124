"""Packing of plans and results; malformed messages are refused with a reason."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertwire.comm.control.channel import pack, unpack
from expertwire.scheduler.plan import StepPlan, StepResult

KINDS = pytest.mark.parametrize("kind", [StepPlan, StepResult])


def message(kind, seed=0, largest=9):
    """Return a message of random arrays of random lengths."""
    dice = np.random.default_rng(seed)
    scalars = {name: int(dice.integers(-(1 << 40), 1 << 40)) for name in kind.scalars}
    arrays = {
        name: np.frombuffer(dice.bytes(int(dice.integers(largest + 1)) * dtype.itemsize), dtype)
        for name, dtype in kind.dtypes.items()
    }
    return kind(**scalars, **arrays)


def words(kind):
    """Return a message's words, and those of its head as i64."""
    array = message(kind).to_arrays()[kind.__name__].copy()
    head = 1 + len(kind.scalars) + len(kind.dtypes)
    return array, array[: 2 * head].view(np.int64)


@KINDS
@given(seed=st.integers(0, 1 << 32))
def test_messages_arrive_as_they_were(kind, seed):
    sent = message(kind, seed)
    got = kind.from_arrays(unpack(bytearray(pack(sent.to_arrays()))))
    for name in kind.scalars:
        assert getattr(got, name) == getattr(sent, name)
    for name, dtype in kind.dtypes.items():
        assert getattr(got, name).dtype == dtype
        assert getattr(got, name).tobytes() == getattr(sent, name).tobytes()


@KINDS
def test_the_declared_types_are_those_of_the_fields(kind):
    """Builders of messages rely on the declared dtypes."""
    assert [*kind.scalars, *kind.dtypes] == list(kind.__dataclass_fields__)
    assert {str(dtype) for dtype in kind.dtypes.values() if not dtype.names} <= {"int32", "int64", "uint8", "float32"}


def test_words_are_not_copied():
    arrays = message(StepPlan, seed=1).to_arrays()
    plan = StepPlan.from_arrays(arrays)
    words = [getattr(plan, name) for name, dtype in StepPlan.dtypes.items() if dtype == np.int32]
    assert any(map(len, words))
    assert all(np.shares_memory(array, arrays["StepPlan"]) for array in words if len(array))


@pytest.mark.parametrize(("kind", "name"), [(StepPlan, "sched_slot_S"), (StepResult, "token_O")])
def test_an_array_of_another_type_is_not_sent(kind, name):
    wrong = kind(**{**vars(message(kind)), name: np.zeros(3, np.int64)})
    with pytest.raises(AssertionError, match=f"'{name}': dtype\\('int64'\\)"):
        wrong.to_arrays()


def test_another_message_is_refused():
    with pytest.raises(ValueError, match=r"expected a StepPlan, got .*StepResult"):
        StepPlan.from_arrays(message(StepResult).to_arrays())
    with pytest.raises(ValueError, match=r"expected a StepPlan, got .*int32\[2, 2\]"):
        StepPlan.from_arrays({"StepPlan": np.zeros((2, 2), np.int32)})
    with pytest.raises(ValueError, match=r"expected a StepResult, got .*float32"):
        StepResult.from_arrays({"StepResult": np.zeros(1000, np.float32)})
    with pytest.raises(ValueError, match=r"expected a StepResult, got .*int32\[3\]"):
        StepResult.from_arrays({"StepResult": np.zeros(3, np.int32)})


@KINDS
def test_another_version_is_refused(kind):
    array, head = words(kind)
    head[0] += 1
    with pytest.raises(ValueError, match=f"a {kind.__name__} of another version"):
        kind.from_arrays({kind.__name__: array})


@KINDS
def test_missing_words_and_wrong_lengths_are_refused(kind):
    array, head = words(kind)
    with pytest.raises(ValueError, match=f"malformed {kind.__name__} of {len(array) - 1} words"):
        kind.from_arrays({kind.__name__: array[:-1]})
    for length in (-1, 1 << 40):
        head[-1] = length
        with pytest.raises(ValueError, match=f"malformed {kind.__name__} of {len(array)} words"):
            kind.from_arrays({kind.__name__: array})


@pytest.mark.parametrize(("kind", "name"), [(StepPlan, "admit_sampling_A"), (StepResult, "expert_load")])
def test_a_part_of_an_item_is_refused(kind, name):
    array, head = words(kind)
    index = 1 + len(kind.scalars) + list(kind.dtypes).index(name)
    head[index] += 1
    with pytest.raises(ValueError, match=f"malformed {kind.__name__}"):
        kind.from_arrays({kind.__name__: np.concatenate((array, np.zeros(1, np.int32)))})
