import pytest

from expertwire.scheduler.warm_up import warm_up


@pytest.fixture(scope="session", autouse=True)
def _compiled():
    """Compile all loops before the first test."""
    warm_up()
