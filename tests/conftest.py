"""What all tests share: how they are shared out to processes, and which files need packages that may be missing.

`pytest -n 2` shares the tests out file by file, because fixtures of a file take seconds. Tests that share nothing and
take seconds each are shared out one by one. All files that start Ray go to one process: `ray stop`, which
deploy/ray_cluster.sh runs, ends every Ray on a machine.
"""

import os

import pytest

# Two processes of tests share the cores, and torch's threads spin while they wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

ONE_BY_ONE = ("test_compiled.py", "test_interpreted.py")
RAY = ("test_demo.py", "test_models_full.py", "test_ray_cluster.py", "test_ray_devices.py", "test_ray_launcher.py")
# A machine lent for its GPU may lack these: a file of tests that needs one of them is skipped there.
OPTIONAL = ("grpc_health", "grpc_reflection", "grpc_tools", "hypothesis", "ray", "transformers")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            """The group of a test."""
            file = nodeid.partition("::")[0].rpartition("/")[2]
            return nodeid if file in ONE_BY_ONE else "ray" if file in RAY else file

    return Groups(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    package = missing_package(report.call.excinfo) if report.failed else None
    if package in OPTIONAL:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 1, f"Skipped: {package} is not installed")
    return report


def missing_package(excinfo):
    """The package whose absence made an import fail; None if it was something else."""
    error = None if excinfo is None else excinfo.value
    while error is not None and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__
    return None if error is None or error.name is None else error.name.partition(".")[0]


def pytest_collection_modifyitems(items):
    """Tests that need GPUs are skipped where there are too few."""
    needed = {"gpu": 1, "multi_gpu": 2}
    for item in items:
        most = max((number for name, number in needed.items() if item.get_closest_marker(name)), default=0)
        if most and most > num_gpus():
            item.add_marker(pytest.mark.skip(reason=f"needs {most} CUDA device(s), and there are {num_gpus()}"))


def num_gpus():
    import torch

    return torch.cuda.device_count()
