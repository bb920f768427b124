import contextlib

import pytest

from expertwire.scheduler.warm_up import warm_up

with contextlib.suppress(ModuleNotFoundError):  # where it is missing, the files that need it are skipped
    from hypothesis import settings

    settings.register_profile("untimed", deadline=None)  # how long an example takes says how busy the machine is
    settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _compiled():
    """Compile all loops before the first test."""
    warm_up()
