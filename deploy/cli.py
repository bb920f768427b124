"""The `expertwire` command. Exit codes: 0 done, 1 the engine failed, 2 a wrong option, model or input."""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from expertwire.deploy import calibrate
from expertwire.deploy.grpc.config import Limits, ServerConfig
from expertwire.deploy.model_options import add_model_options, engine_configs
from expertwire.deploy.options import (
    BRANCH_FIELDS,
    CATALOG_FIELDS,
    EXPLAINED_FIELDS,
    LIMIT_FIELDS,
    SERVER_FIELDS,
    add_engine_options,
    add_options,
    catalog_of,
    engine_config,
    model_folder,
    sentence,
    set_fields,
)
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.frontend.api import EngineFailed
from expertwire.scheduler.sampling_params import SamplingParams

SAMPLING_FIELDS = (*BRANCH_FIELDS, "n")
BENCHES: Mapping[str, tuple[str, str]] = {  # by name: the module in `expertwire.bench`, and the help text
    "throughput": ("serving.throughput", "tokens per second and per core-second with random prompts"),
    "all-to-all": ("all_to_all.run", "dispatch and combine, compared with bounds, a model and published figures"),
    "control": ("control", "latency of the control channel per step"),
    "quantize": ("kernels.quantize", "loss of accuracy by quantised experts"),
    "balance": (
        "scheduler.balance",
        "load balance of experts over ranks after rebalancing (EPLB), with simulated routing",
    ),
    "schedule": (
        "scheduler.run",
        "goodput, latencies, load balance and prefix hits of the scheduler on simulated ranks",
    ),
}


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, but let the parser that knows the options complain of others, since it can say which one was meant."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized argument {rest[0]}{self._meant(rest[0].partition('=')[0])}")
        return found, rest

    def _meant(self, word: str) -> str:
        """Return a question that names the options which somebody who wrote `word` may have meant, or ""."""
        names = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        near = [name for name in names if name.startswith(word)] or difflib.get_close_matches(word, names, 1)
        return f"; did you mean {' or '.join(near)}?" if near and word.startswith("--") else ""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code."""
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
    """Return the parser of all commands.

    Args:
        benches: benchmarks whose modules are imported for their options.
    """
    parser = _Parser(prog="expertwire", description="Serve Mixture-of-Experts language models.")
    parser.add_argument("--version", action="version", version=f"expertwire {importlib.metadata.version('expertwire')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_generate(commands)
    _add_demo(commands)
    _add_inspect(commands)
    _add_explain(commands)
    _add_experts(commands)
    _add_token(commands)
    _add_replay(commands)
    calibrate.add_parser(commands)
    group = commands.add_parser("bench", help="run a benchmark", description="Run a benchmark.")
    subcommands = group.add_subparsers(metavar="BENCHMARK", required=True)
    for name, (module_name, text) in BENCHES.items():
        bench = subcommands.add_parser(name, help=text, description=sentence(text))
        if name in benches:
            module = importlib.import_module(f"expertwire.bench.{module_name}")
            module.add_arguments(bench)
            bench.set_defaults(command=module.main)
    return parser


def _add_serve(commands: Any) -> None:
    parser = commands.add_parser("serve", help="serve a model over gRPC", description="Serve a model over gRPC.")
    add_options(parser.add_argument_group("server"), ServerConfig, SERVER_FIELDS)
    text = "what clients may hold of each front; docs/server.md says how a call beyond it ends"
    add_options(parser.add_argument_group("limits", text), Limits, LIMIT_FIELDS)
    add_model_options(parser)
    add_engine_options(parser)
    parser.set_defaults(command=_serve)


def _serve(args: argparse.Namespace) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # our errors say what is wrong
    from expertwire.deploy.serve import serve

    server = ServerConfig(**set_fields(args, SERVER_FIELDS), limits=Limits(**set_fields(args, LIMIT_FIELDS)))
    return serve(engine_configs(args), server, announce=functools.partial(print, flush=True))


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate", help="generate text without a server", description="Generate text without a server."
    )
    parser.add_argument("--prompt", action="append", required=True, help="prompt text; may be repeated")
    group = parser.add_argument_group("sampling", "defaults in the model's generation_config.json come first")
    add_options(group, SamplingParams, SAMPLING_FIELDS)
    text = "strategy of test-time compute, such as majority_vote:n=8,answer=boxed (docs/test_time_compute.md)"
    parser.add_argument("--strategy", metavar="NAME:OPTIONS", help=text)
    add_options(parser, ServerConfig, CATALOG_FIELDS)
    add_engine_options(parser)
    parser.set_defaults(command=_generate)


def _generate(args: argparse.Namespace) -> int:
    from expertwire.deploy.generate import generate

    fields = set_fields(args, SAMPLING_FIELDS)
    SamplingParams(**fields)  # before the model is loaded; so is the strategy
    catalog = catalog_of(args)
    strategy = None if args.strategy is None else catalog.parse(args.strategy)
    generate(
        engine_config(args),
        args.prompt,
        lambda frontend: frontend.model_info.sampling_params(**fields),
        strategy,
        out=functools.partial(print, end="", flush=True),
        log=sys.stderr.write,
    )
    return 0


def _add_inspect(commands: Any) -> None:
    text = "print the parameters of a checkpoint and the memory that it needs"
    parser = commands.add_parser("inspect", help=text, description=sentence(text))
    parser.add_argument(
        "path", metavar="PATH", help="folder of a checkpoint, or with its config.json alone; or a name on the hub"
    )
    parser.add_argument("--ep-size", type=_ranks, default=1, metavar="N", help="number of ranks (default: %(default)s)")
    text = "tokens of one request (default: the model's maximum)"
    parser.add_argument("--context", type=_ranks, metavar="N", help=text)
    text = "memory of a GPU in GiB (default: %(default)s, of an H200)"
    parser.add_argument("--gpu-memory", type=float, default=140.4, metavar="GIB", help=text)
    add_options(parser, EngineConfig, ("kv_cache_dtype",))
    parser.set_defaults(command=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    from expertwire.deploy import hub
    from expertwire.deploy.inspect import lines

    path = hub.model_folder(args.path, weights=False) if hub.is_name(args.path) else args.path
    for line in lines(path, args.ep_size, args.context, args.gpu_memory, **set_fields(args, ("kv_cache_dtype",))):
        print(line)
    return 0


def _add_explain(commands: Any) -> None:
    text = "print the kernels and the all-to-all backend that a model runs with, and why"
    parser = commands.add_parser("explain", help=text, description=sentence(text))
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder with a config.json (default: the demo model)")
    text = "target device; h200 and b200 need not be present (default: %(default)s)"
    parser.add_argument("--device", choices=("cpu", "cuda", "h200", "b200"), default="cpu", help=text)
    parser.add_argument("--ep-size", type=_ranks, default=1, metavar="N", help="number of ranks (default: %(default)s)")
    text = (
        "location of the ranks: a file, or nvl72, nvl36 or hgx8 (default: this machine; nvl72 for b200, hgx8 for h200)"
    )
    parser.add_argument("--topology", metavar="FILE", help=text)
    add_options(parser, EngineConfig, EXPLAINED_FIELDS)
    parser.set_defaults(command=_explain)


def _explain(args: argparse.Namespace) -> int:
    from expertwire.deploy.explain import explain

    config = EngineConfig(model=model_folder(args), ep_size=args.ep_size, **set_fields(args, EXPLAINED_FIELDS))
    for line in explain(config, args.device, args.topology):
        print(line)
    return 0


def _add_experts(commands: Any) -> None:
    text = "show the load of experts and ranks"
    parser = commands.add_parser("experts", help=text, description=sentence(text))
    parser.add_argument("source", metavar="SOURCE", help="host:port of a server, or a file written by --json")
    text = "PEM file of the authority of a server with TLS (default: no TLS)"
    parser.add_argument("--ssl-ca-certs", metavar="FILE", help=text)
    parser.add_argument("--token-file", metavar="FILE", help="file with a token for the server")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also write the heat map there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there, as JSON")
    parser.set_defaults(command=_experts)


def _experts(args: argparse.Namespace) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from expertwire.deploy import experts

    values = experts.read(args.source, ca_certs=args.ssl_ca_certs, token_file=args.token_file)
    for line in experts.lines(values):
        print(line)
    if args.json:
        args.json.write_text(json.dumps(values) + "\n")
    if args.png:
        experts.save_png(values, args.png)
    return 0


def _add_token(commands: Any) -> None:
    text = "make a token for a new tenant: its table for the tenants file goes to the output, the token to the error output"
    parser = commands.add_parser("token", help=text, description=sentence(text))
    parser.add_argument("tenant", metavar="TENANT", help="name of the tenant: letters, digits and _ . -")
    parser.set_defaults(command=_token)


def _token(args: argparse.Namespace) -> int:
    from expertwire.deploy.tenants import Tenant, make_token

    token, digest = make_token()
    Tenant(name=args.tenant, tokens=(digest,))
    print(f'[tenants."{args.tenant}"]\ntokens = ["{digest}"]')
    print(token, file=sys.stderr)
    return 0


def _add_replay(commands: Any) -> None:
    text = "say what a cascade's thresholds did, and what others would have done, from its decision log"
    parser = commands.add_parser("replay", help=text, description=sentence(text))
    parser.add_argument("log", metavar="LOG", help="file of decision records, written by --decision-log")
    text = "another threshold: router=X, confidence=X or verifier=X, or X alone for confidence; may be repeated"
    parser.add_argument("--threshold", action="append", default=[], metavar="X", help=text)
    parser.set_defaults(command=_replay)


def _replay(args: argparse.Namespace) -> int:
    from expertwire.deploy import replay

    for line in replay.lines(args.log, replay.thresholds_of(args.threshold)):
        print(line)
    return 0


def _add_demo(commands: Any) -> None:
    text = "serve the demo model and ask it questions"
    parser = commands.add_parser("demo", help=text, description=sentence(text))
    parser.add_argument(
        "--launcher", choices=("ray", "local"), default="ray", help="starts the ranks (default: %(default)s)"
    )
    parser.add_argument("--ep-size", type=_ranks, default=2, metavar="N", help="number of ranks (default: %(default)s)")
    parser.set_defaults(command=_demo)


def _demo(args: argparse.Namespace) -> int:
    from expertwire.deploy.demo import demo

    return demo(launcher=args.launcher, ep_size=args.ep_size)


def _ranks(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text}")
    return int(text)


def _fail(error: Exception, code: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
