"""The `expertwire` command. Exit codes: 0 done, 1 the engine failed, 2 a wrong option, model or input."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from expertwire.deploy.options import (
    EXPLAINED_FIELDS,
    add_engine_options,
    add_options,
    engine_config,
    given,
    model_folder,
)
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.frontend.api import EngineFailed
from expertwire.scheduler.sampling_params import SamplingParams

SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "stop", "n")
BENCHES: Mapping[str, tuple[str, str]] = {  # by name: the module in `expertwire.bench`, and the help text
    "throughput": ("serving.throughput", "tokens per second and per core-second of random prompts"),
    "all-to-all": ("all_to_all.run", "dispatch and combine beside their bounds, a model and published figures"),
    "control": ("control", "microseconds per step of the control channel"),
    "quantize": ("kernels.quantize", "what holding experts in fewer bits costs in accuracy"),
    "balance": (
        "scheduler.balance",
        "how evenly experts' rows spread over ranks after rebalancing, on simulated routing",
    ),
    "schedule": ("scheduler.run", "goodput, latencies, balance and prefix hits of the scheduler on simulated ranks"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = make_parser(benches=argv[1:2] if argv[:1] == ["bench"] else ()).parse_args(argv)
    try:
        return args.command(args) or 0
    except (ValueError, OSError) as error:
        return _fail(error, 2)
    except EngineFailed as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return 130


def make_parser(*, benches: Collection[str] = BENCHES) -> argparse.ArgumentParser:
    """The parser of all commands.

    Args:
        benches: the benchmarks whose options are wanted, which cost some imports.
    """
    parser = _Parser(prog="expertwire", description="Serves Mixture-of-Experts language models.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_generate(commands)
    _add_demo(commands)
    _add_inspect(commands)
    _add_explain(commands)
    _add_experts(commands)
    group = commands.add_parser("bench", help="measure", description="Measures.")
    subcommands = group.add_subparsers(metavar="BENCHMARK", required=True)
    for name, (module_name, text) in BENCHES.items():
        bench = subcommands.add_parser(name, help=text, description=text.capitalize() + ".")
        if name in benches:
            module = importlib.import_module(f"expertwire.bench.{module_name}")
            module.add_arguments(bench)
            bench.set_defaults(command=module.main)
    return parser


def _add_serve(commands: Any) -> None:
    parser = commands.add_parser("serve", help="serve a model over gRPC", description="Serves a model over gRPC.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=50051, help="0 takes a free one (default: %(default)s)")
    parser.add_argument(
        "--drain-timeout", type=_seconds, default=30.0, metavar="X",
        help="seconds that running requests get to finish after SIGTERM (default: %(default)s)",
    )  # fmt: skip
    add_engine_options(parser)
    parser.set_defaults(command=_serve)


def _serve(args: argparse.Namespace) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what matters of its messages is in our errors
    from expertwire.deploy.serve import serve

    where = {"host": args.host, "port": args.port, "drain_timeout_s": args.drain_timeout}
    return serve(engine_config(args), **where, announce=functools.partial(print, flush=True))


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate", help="continue prompts, without a server", description="Continues prompts, without a server."
    )
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; may be given several times")
    add_options(parser.add_argument_group("sampling"), SamplingParams, SAMPLING_FIELDS)
    add_engine_options(parser)
    parser.set_defaults(command=_generate)


def _generate(args: argparse.Namespace) -> int:
    from expertwire.deploy.generate import generate

    params = SamplingParams(**given(args, SAMPLING_FIELDS))
    generate(engine_config(args), args.prompt, params, write=functools.partial(print, end="", flush=True))
    return 0


def _add_inspect(commands: Any) -> None:
    text = "say what a checkpoint is: parameters, bytes, memory"
    parser = commands.add_parser("inspect", help=text, description=text.capitalize() + ".")
    parser.add_argument("path", metavar="PATH", help="folder of a checkpoint, or of its config.json alone")
    parser.add_argument("--ep-size", type=_ranks, default=1, metavar="N", help="ranks (default: %(default)s)")
    text = "tokens of a request (default: as many as the model can do)"
    parser.add_argument("--context", type=_ranks, metavar="N", help=text)
    text = "memory of a GPU, in GiB (default: %(default)s, an H200's)"
    parser.add_argument("--gpu-memory", type=float, default=140.4, metavar="GIB", help=text)
    add_options(parser, EngineConfig, ("kv_cache_dtype",))
    parser.set_defaults(command=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    from expertwire.deploy.inspect import lines

    for line in lines(args.path, args.ep_size, args.context, args.gpu_memory, **given(args, ("kv_cache_dtype",))):
        print(line)
    return 0


def _add_explain(commands: Any) -> None:
    text = "say which kernels a model runs with, and why"
    parser = commands.add_parser("explain", help=text, description=text.capitalize() + ".")
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder with a config.json (default: the demo model)")
    text = "h200 and b200 need not be here (default: %(default)s)"
    parser.add_argument("--device", choices=("cpu", "cuda", "h200", "b200"), default="cpu", help=text)
    parser.add_argument("--ep-size", type=_ranks, default=1, metavar="N", help="ranks (default: %(default)s)")
    text = (
        "where the ranks are: a file, or nvl72, nvl36 or hgx8 (default: this machine; nvl72 with b200, hgx8 with h200)"
    )
    parser.add_argument("--topology", metavar="FILE", help=text)
    add_options(parser, EngineConfig, EXPLAINED_FIELDS)
    parser.set_defaults(command=_explain)


def _explain(args: argparse.Namespace) -> int:
    from expertwire.deploy.explain import explain

    config = EngineConfig(model=model_folder(args), ep_size=args.ep_size, **given(args, EXPLAINED_FIELDS))
    for line in explain(config, args.device, args.topology):
        print(line)
    return 0


def _add_experts(commands: Any) -> None:
    text = "show how tokens spread over experts and ranks"
    parser = commands.add_parser("experts", help=text, description=text.capitalize() + ".")
    parser.add_argument("source", metavar="SOURCE", help="host:port of a server, or a file that --json has written")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw it there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    parser.set_defaults(command=_experts)


def _experts(args: argparse.Namespace) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from expertwire.deploy import experts

    values = experts.read(args.source)
    for line in experts.lines(values):
        print(line)
    if args.json:
        args.json.write_text(json.dumps(values) + "\n")
    if args.png:
        experts.save_png(values, args.png)
    return 0


def _add_demo(commands: Any) -> None:
    text = "serve the demo model and ask it questions"
    parser = commands.add_parser("demo", help=text, description=text.capitalize() + ".")
    parser.add_argument("--launcher", choices=("ray", "local"), default="ray", help="(default: %(default)s)")
    parser.add_argument("--ep-size", type=int, default=2, metavar="N", help="ranks (default: %(default)s)")
    parser.set_defaults(command=_demo)


def _demo(args: argparse.Namespace) -> int:
    from expertwire.deploy.demo import demo

    return demo(launcher=args.launcher, ep_size=args.ep_size)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 16:
        raise argparse.ArgumentTypeError(f"must be in [0, 65535], got {text}")
    return int(text)


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number of seconds >= 0, got {text}")


def _ranks(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text}")
    return int(text)


def _fail(error: Exception, code: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
