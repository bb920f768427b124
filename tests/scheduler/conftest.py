import pytest
from hypothesis import settings

from expertwire.scheduler.rehearsal import rehearse

settings.register_profile("untimed", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _compiled():
    """No test waits for the compiler."""
    rehearse()
