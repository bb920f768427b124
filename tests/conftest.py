"""How the tests are shared out to processes (`--dist loadgroup`): file by file, because fixtures of a file take seconds.

All files that start Ray go to one process: `ray stop`, which deploy/ray_cluster.sh runs, ends every Ray on a machine.
"""

import os

import pytest

# Two processes of tests share the cores, and torch's threads spin while they wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

RAY = ("test_demo.py", "test_models_full.py", "test_ray_cluster.py", "test_ray_launcher.py")


def pytest_collection_modifyitems(items):
    for item in items:
        file = item.path.name
        item.add_marker(pytest.mark.xdist_group("ray" if file in RAY else file))
