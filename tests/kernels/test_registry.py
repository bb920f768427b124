"""Which implementations are chosen, and that one can read it."""

from expertwire.kernels import registry


def test_the_choice_can_be_read():
    lines = registry.choose("cpu").explain().splitlines()
    assert len(lines) == 7
    assert all(": expertwire.kernels.cpu." in line for line in lines), lines
    assert "attend: expertwire.kernels.attention.attend" in registry.choose("cuda").explain().splitlines()
