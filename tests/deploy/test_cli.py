"""The command line: what it accepts, what it says to bad input, and one run of each command."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from expertwire.deploy import cli
from expertwire.deploy.options import ENGINE_FIELDS, ENGINE_GROUPS, engine_config, help_texts
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.frontend.api import EngineFailed


def run(*args: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it."""
    command = [sys.executable, "-m", "expertwire.deploy.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


def fails(capsys, *args: str) -> str:
    """The one line that a command says before it exits with 2."""
    try:
        code = cli.main(args)
    except SystemExit as leaving:
        code = leaving.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["COMMAND"]),
        (["sevre"], ["sevre", "serve", "generate", "demo", "bench"]),
        (["serve", "--prot", "1"], ["--prot", "did you mean --port?", "serve --help"]),
        (["serve", "--dtyp=float32"], ["--dtyp", "did you mean --dtype?"]),
        (["serve", "--ep", "2"], ["unrecognized argument --ep;", "did you mean --ep-size or --eplb-step-interval?"]),
        (["bench", "throughput", "--num-prompt", "1"], ["did you mean --num-prompts?"]),
        (["serve", "model", "another"], ["another"]),
        (["serve", "--port", "many"], ["--port", "many"]),
        (["serve", "--port", "70000"], ["port", "[0, 65536)", "70000"]),
        (["serve", "--drain-timeout", "-1"], ["drain_timeout_s", ">= 0"]),
        (["serve", "--host", "no host", "--port", "1", "--insecure"], ["--host no host"]),
        (["serve", "--host", "0.0.0.0"], ["--host 0.0.0.0", "--ssl-certfile", "--insecure"]),
        (["serve", "/no/such/folder"], ["/no/such/folder"]),
        (["serve", "--dtype", "int8"], ["--dtype", "int8", "bfloat16"]),
        (["serve", "--launcher", "slurm"], ["--launcher", "slurm", "ray"]),
        (["serve", "--ep-size", "two"], ["--ep-size", "two"]),
        (["serve", "--ep-size", "0"], ["ep_size", ">= 1", "0"]),
        (["serve", "--scheduling-policy", "lottery"], ["--scheduling-policy", "lottery", "fcfs", "fair"]),
        (["serve", "--scheduling-policy", "priority", "--aging", "-1"], ["aging", "from 0 to"]),
        (["serve", "--chunked-prefill-size", "0"], ["chunked_prefill_size", ">= 1"]),
        (["serve", "--max-num-batched-tokens", "0"], ["max_num_batched_tokens", ">= 1"]),
        (["serve", "--kv-cache-memory-bytes", "-5"], ["kv_cache_memory_bytes", ">= 1"]),
        (["serve", "--kv-cache-memory-bytes", "4 gigs"], ["--kv-cache-memory-bytes", "512M", "4 gigs"]),
        (["demo", "--ep-size", "100000"], ["--ep-size", "at most", "100000"]),
        (["demo", "--ep-size", "0"], ["--ep-size", ">= 1"]),
        (["serve", "--start-timeout", "0"], ["start_timeout_s", "> 0"]),
        (["serve", "--launcher", "local", "--ray-address", "x:1"], ["ray_address", "no effect", "local"]),
        (["generate"], ["--prompt"]),
        (["generate", "--prompt", "SUM", "--top-p", "2"], ["top_p", "(0, 1]", "2"]),
        (["generate", "--prompt", "SUM", "--max-tokens", "0"], ["max_tokens", ">= 1"]),
        (["generate", "--prompt", "SUM", "--n", "1000"], ["n must", "256"]),
        (["generate", "/no/such/folder", "--prompt", "a"], ["/no/such/folder"]),
        (["generate", "--prompt", "a", "--strategy", "luck"], ["strategy must be one of", "best_of_n", "'luck'"]),
        (["generate", "--prompt", "a", "--strategy", "majority_vote:n=0,answer=boxed"], ["n must be", "0"]),
        (["demo", "--launcher", "auto"], ["--launcher", "auto", "ray", "local"]),
        (["bench"], ["BENCHMARK"]),
        (["bench", "speed"], ["speed", "throughput"]),
        (["bench", "throughput", "--num-prompts", "0"], ["num_prompts", ">= 1"]),
        (["bench", "throughput", "--json", "/no/such/folder/x.json"], ["--json", "/no/such/folder"]),
        (["bench", "throughput", "/no/such/folder", "--load-format", "dummy"], ["/no/such/folder"]),
    ],
)
def test_bad_input_is_one_line_that_names_it(capsys, args, words):
    message = fails(capsys, *args)
    assert all(word in message for word in words), message


def test_a_taken_port_is_found_before_anything_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        # The model is missing too, so the port was looked at first.
        assert f"--port {port}" in fails(capsys, "serve", "/no/such/folder", "--port", port)


def test_an_engine_failure_is_exit_code_1(capsys, monkeypatch):
    def fail(args):
        raise EngineFailed("the engine failed at rank 1:\nit fell over", 1)

    monkeypatch.setattr(cli, "_demo", fail)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == "error: the engine failed at rank 1: it fell over\n"


def test_options_reach_the_configuration():
    parser = cli.make_parser(benches=())
    assert engine_config(parser.parse_args(["serve", "m"])) == EngineConfig(model="m")
    args = parser.parse_args(["serve", "m", "--ep-size", "3", "--start-timeout", "2.5", "--dtype", "bfloat16"])
    assert engine_config(args) == EngineConfig(model="m", ep_size=3, start_timeout_s=2.5, dtype="bfloat16")
    scheduling = [
        "--scheduling-policy",
        "fair",
        "--no-enable-prefix-caching",
        "--chunked-prefill-size",
        "64",
    ]
    assert engine_config(parser.parse_args(["serve", "m", *scheduling])) == EngineConfig(
        model="m",
        scheduling_policy="fair",
        enable_prefix_caching=False,
        chunked_prefill_size=64,
    )
    demo = Path(engine_config(parser.parse_args(["serve"])).model)
    assert json.loads((demo / "config.json").read_text())["architectures"] == ["Qwen3MoeForCausalLM"]


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("4096", 4096), ("512M", 512 << 20), ("4G", 4 << 30), ("1.5g", 3 << 29), ("2GiB", 2 << 30), ("7kb", 7 << 10)],
)
def test_bytes_may_have_a_unit(text, nbytes):
    args = cli.make_parser(benches=()).parse_args(["serve", "--kv-cache-memory-bytes", text])
    assert engine_config(args).kv_cache_memory_bytes == nbytes


def test_the_version(capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main(["--version"])
    assert (leaving.value.code, capsys.readouterr().out) == (0, f"expertwire {version('expertwire')}\n")


def test_the_engine_s_options_are_in_one_group_each():
    grouped = [name for fields in ENGINE_GROUPS.values() for name in fields]
    assert len(grouped) == len(set(grouped)) and set(grouped) <= set(ENGINE_FIELDS)


def test_every_engine_option_is_explained():
    texts = help_texts(EngineConfig)
    assert set(texts) == set(EngineConfig.__dataclass_fields__)
    assert texts["kv_cache_memory_bytes"].endswith("after loading")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from expertwire.deploy import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'ray', 'grpc', 'numba', 'tokenizers'} & set(sys.modules)))"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0].startswith("usage: expertwire") and lines[-1] == "[]"


def test_generate_answers():
    done = run("generate", "--prompt", "SUM 40 70 15 ?", "--temperature", "0", "--max-tokens", "64")
    assert (done.returncode, done.stdout.strip()[-9:]) == (0, "answer 25"), done.stderr


def test_generate_by_a_strategy(capsys):
    strategy = '{"strategy": "majority_vote", "n": 5, "answer": {"type": "regex", "pattern": "answer ([0-9]+)"}}'
    request = ["--prompt", "SUM 40 70 15 ?", "--temperature", "0", "--max-tokens", "64", "--strategy", strategy]
    assert cli.main(["generate", *request]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("answer 25\n")
    assert out.count("\n") == 1
    assert "prompt 1: answer '25', most votes" in err
    assert "branches kept; tokens: " in err


def test_generate_several_prompts_and_outputs(capsys):
    requests = [
        "--prompt",
        "SUM 1 2 ?",
        "--prompt",
        "SUM 3 4 ?",
        "--n",
        "2",
        "--max-tokens",
        "3",
        "--load-format",
        "mock",
    ]
    assert cli.main(["generate", *requests]) == 0
    headings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("==>")]
    assert headings == [f"==> prompt {i}, output {j} <==" for i in (1, 2) for j in (1, 2)]


def test_generate_refuses_what_does_not_fit_the_model(capsys):
    assert cli.main(["generate", "--prompt", "1 " * 3000, "--max-tokens", "3", "--load-format", "mock"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "max_model_len" in err.splitlines()[-1]
