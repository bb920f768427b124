"""How the tests are shared out to processes (`pytest -n 2`): file by file, because fixtures of a file take seconds.

Tests that share nothing and take seconds each are shared out one by one. All files that start Ray go to one process: `ray stop`,
which deploy/ray_cluster.sh runs, ends every Ray on a machine.
"""

import os

import pytest

# Two processes of tests share the cores, and torch's threads spin while they wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

ONE_BY_ONE = ("test_compiled.py", "test_interpreted.py")
RAY = ("test_demo.py", "test_models_full.py", "test_ray_cluster.py", "test_ray_launcher.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            """The group of a test."""
            file = nodeid.partition("::")[0].rpartition("/")[2]
            return nodeid if file in ONE_BY_ONE else "ray" if file in RAY else file

    return Groups(config, log)
