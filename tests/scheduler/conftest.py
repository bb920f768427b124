import pytest

from expertwire.scheduler.rehearsal import rehearse


@pytest.fixture(scope="session", autouse=True)
def _compiled():
    """No test waits for the compiler, as some have deadlines."""
    rehearse()
