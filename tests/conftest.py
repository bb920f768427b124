"""Set-up of all tests: their distribution to processes, and the files that need packages which may be missing.

`pytest -n 2` distributes the tests file by file, because fixtures of a file take seconds. Tests that share nothing and
take seconds each are distributed one by one. All files that start Ray go to one process: `ray stop`, which
deploy/ray_cluster.sh runs, ends every Ray on a machine. Groups that take a minute or more come first, so that no
process works on one of them alone at the end, and the tests that are distributed one by one come last.
"""

import contextlib
import os
import random
import sys

import numpy as np
import pytest

with contextlib.suppress(ModuleNotFoundError):  # where it is missing, the files that need it are skipped
    from hypothesis import settings
    from hypothesis.internal.conjecture import providers

    # How long an example takes says how busy the machine is.
    settings.register_profile("fixed", derandomize=True, deadline=None)
    settings.register_profile("random", derandomize=False, deadline=None, print_blob=True)
    settings.load_profile("fixed")
    # hypothesis draws constants that it finds in our modules, too. Which of them are loaded depends on the tests that the
    # process ran before, and no change of a module should change what tests of another draw.
    providers.is_local_module_file = lambda path: False

# Two processes of tests share the cores, and torch's threads spin while they wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

ONE_BY_ONE = ("test_compiled.py", "test_interpreted.py")
RAY = ("test_demo.py", "test_models_full.py", "test_ray_cluster.py", "test_ray_devices.py", "test_ray_launcher.py")
# Groups, longest first; of files in Triton's interpreter, the test that runs one.
LONG = (
    "test_gpu_engine", "test_gpu_attention", "ray", "test_serve_cascades.py", "test_serve.py", "test_control_hub.py",
    "test_architectures.py", "test_bad_inputs.py", "test_cascade_drafts.py",
    "test_gpu_prepare_inputs", "test_all_to_all_choice.py", "test_gpu_dispatch_combine",
    "test_gpu_latent_engine", "test_gpu_quantized_model",
    "test_gpu_graphs", "test_all_to_all.py", "test_gpu_start", "test_gpu_mla", "test_gpu_prefill",
)  # fmt: skip
FORKS = pytest.StashKey()
ENVIRONMENT = pytest.StashKey()  # the variables when the tests have been collected
# A machine lent for its GPU may lack these: a file of tests that needs one of them is skipped there.
OPTIONAL = ("grpc_health", "grpc_reflection", "grpc_tools", "hypothesis", "ray", "transformers")


def group_of(nodeid):
    """Return the group of tests that a test is distributed with."""
    file = nodeid.partition("::")[0].rpartition("/")[2]
    return nodeid if file in ONE_BY_ONE else "ray" if file in RAY else file


def rank_of(nodeid):
    """Return a sort key that puts long groups first and single tests last."""
    group = group_of(nodeid)
    name = group.partition("test_interpreted[")[2].removesuffix("]") or group
    return LONG.index(name) if name in LONG else len(LONG) + (group == nodeid)


def pytest_addoption(parser):
    parser.addoption(
        "--new-interpreters",
        action="store_true",
        help="start children as users' are, not as forks of a process that has torch",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Let children of this test, and of the fixtures that it is the first to need, be forks (helpers/forks.py)."""
    from helpers import forks

    config = item.config
    if item.get_closest_marker("new_interpreters") or config.getoption("--new-interpreters") or not forks.are_safe():
        forks.process.start_call = forks.start_call
        return
    if FORKS not in config.stash:
        config.stash[FORKS] = forks.Forks(config.stash[ENVIRONMENT])
        config.add_cleanup(config.stash[FORKS].close)
    forks.process.start_call = config.stash[FORKS].start_call


def pytest_collection_finish(session):
    session.config.stash[ENVIRONMENT] = dict(os.environ)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """Undo what a test leaves in the environment, such as the variables that Ray and the command line set.

    A child whose environment differs from the one in which tests were collected is a new interpreter, so one such test would make
    all later ones of its process several times as slow. What starts Ray for a whole file keeps it until the end of the file.
    """
    result = yield
    if item.path.name not in RAY or nextitem is None or nextitem.path != item.path:
        wanted = item.config.stash[ENVIRONMENT]
        for name in os.environ.keys() - wanted.keys() - {"PYTEST_CURRENT_TEST"}:
            del os.environ[name]
        os.environ.update(wanted)
    return result


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            """Return the group of a test."""
            return group_of(nodeid)

    config.option.loadscopereorder = False  # the order is that of `pytest_collection_modifyitems`
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
    """Return the package whose absence made an import fail; None if it was something else."""
    error = None if excinfo is None else excinfo.value
    while error is not None and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__
    return None if error is None or error.name is None else error.name.partition(".")[0]


def pytest_collection_modifyitems(items):
    """Order the tests for their distribution, and skip those that need more GPUs than there are."""
    items.sort(key=lambda item: rank_of(item.nodeid))
    needed = {"gpu": 1, "multi_gpu": 2}
    for item in items:
        most = max((number for name, number in needed.items() if item.get_closest_marker(name)), default=0)
        if most and most > num_gpus():
            item.add_marker(pytest.mark.skip(reason=f"needs {most} CUDA device(s), and there are {num_gpus()}"))


@pytest.fixture(autouse=True)
def _seeded():
    """Make what a test draws without a seed independent of the tests before it."""
    random.seed(0)
    np.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


def num_gpus():
    import torch

    return torch.cuda.device_count()
