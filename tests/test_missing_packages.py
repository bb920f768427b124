"""Tests and commands where packages are missing that a machine lent for its GPU may lack."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MISSING = ("ray", "grpc_health", "grpc_reflection", "grpc_tools")
# Those that need one of them, and one that does not.
FILES = (
    "tests/bench/test_control_bench.py",
    "tests/deploy/test_experts_command.py",
    "tests/deploy/test_grpc_client.py",
    "tests/deploy/test_grpc_server.py",
    "tests/deploy/test_ray_launcher.py",
    "tests/deploy/test_serve.py",
    "tests/public/test_bad_inputs.py",
    "tests/scheduler/test_policy.py",
    "tests/gpu",
)


def without(missing, code):
    """Run it in a process in which these packages cannot be imported."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({missing!r}))"
    return subprocess.run(
        [sys.executable, "-c", f"{hide}; {code}"], cwd=ROOT, capture_output=True, text=True, timeout=250
    )


def test_tests_are_collected():
    done = without(
        MISSING, f"import pytest; sys.exit(pytest.main(['--co', '-q', '-rs', '-p', 'no:cacheprovider', *{FILES!r}]))"
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "test_policy.py" in done.stdout
    assert "test_gpu_model.py" in done.stdout
    assert "ray is not installed" in done.stdout


def test_an_error_of_another_kind_is_still_an_error(tmp_path):
    file = tmp_path / "test_broken.py"
    file.write_text("import a_module_that_nobody_has\n")
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    done = without((), f"import pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', {str(file)!r}]))")
    assert done.returncode == 2, done.stdout
    assert "a_module_that_nobody_has" in done.stdout


def test_modules_that_do_not_need_them_are_imported():
    modules = (
        "deploy.cli",
        "deploy.grpc.client",
        "bench.serving.throughput",
        "bench.first_contact.run",
        "bench.kernels.run",
    )
    done = without(MISSING, "; ".join(f"import expertwire.{module}" for module in modules))
    assert done.returncode == 0, done.stderr


def test_no_benchmark_needs_an_option():
    code = (
        "from expertwire.bench.first_contact import run as first_contact; "
        "from expertwire.bench.kernels import run as kernels; from expertwire.deploy import cli; "
        "[each.make_parser().parse_args([]) for each in (first_contact, kernels)]; "
        "parser = cli.make_parser(); [parser.parse_args(['bench', name]) for name in cli.BENCHES]"
    )
    done = without((), code)
    assert done.returncode == 0, done.stderr
