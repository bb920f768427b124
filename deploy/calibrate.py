"""`expertwire calibrate`: its options; `calibrate_cascade` and `calibrate_strategies` do the work."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from expertwire.deploy.grpc.config import ServerConfig
from expertwire.deploy.options import (
    BRANCH_FIELDS,
    CATALOG_FIELDS,
    add_engine_options,
    add_options,
    catalog_of,
    engine_config,
    sentence,
    set_fields,
)
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.strategies.compute_optimal import PROBE_SIGNALS


def add_parser(commands: Any) -> None:
    """Add the command to a parser's commands."""
    text = "choose what test-time compute does, by how it did"
    group = commands.add_parser("calibrate", help=text, description=sentence(text))
    subcommands = group.add_subparsers(metavar="WHAT", required=True)
    _add_cascade(subcommands)
    _add_strategies(subcommands)


def _add_cascade(commands: Any) -> None:
    text = "fit a cascade's router and thresholds to a decision log in which both models answered"
    parser = commands.add_parser("cascade", help=text, description=sentence(text))
    parser.add_argument(
        "log", metavar="LOG", help="file of decision records with outcomes, best with a random_share of 1"
    )
    parser.add_argument("--cascade", required=True, metavar="FILE", help="policy that the records were made with")
    parser.add_argument("--out", required=True, metavar="FILE", help="file for the new policy")
    text = "quality that may be lost to the large model alone (default: %(default)s)"
    parser.add_argument("--shortfall", type=float, default=0.0, metavar="X", help=text)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the folds (default: %(default)s)")
    parser.set_defaults(command=_cascade)


def _cascade(args: argparse.Namespace) -> int:
    from expertwire.deploy import calibrate_cascade

    for line in calibrate_cascade.lines(args.log, args.cascade, args.out, shortfall=args.shortfall, seed=args.seed):
        print(line)
    return 0


def _add_strategies(commands: Any) -> None:
    text = "make a table for compute_optimal: which strategy pays for which prompts, by runs on prompts of yours"
    parser = commands.add_parser("strategies", help=text, description=sentence(text))
    text = 'file of prompts, a JSON object a line: {"prompt": text} or {"messages": [...]}, with an "id" or without'
    parser.add_argument("--prompts", required=True, metavar="FILE", help=text)
    text = "strategy that the table may choose, such as majority_vote:n=8,answer=boxed; may be repeated"
    parser.add_argument("--candidate", action="append", default=[], metavar="NAME:OPTIONS", help=text)
    text = "strategy whose accuracy the table has to reach; the table may choose it, too"
    parser.add_argument("--baseline", required=True, metavar="NAME:OPTIONS", help=text)
    text = "name of the verifier that scores results, from 0 for wrong to 1 for right"
    parser.add_argument("--grader", required=True, metavar="NAME", help=text)
    add_options(parser, ServerConfig, CATALOG_FIELDS)
    parser.add_argument("--out", required=True, metavar="FILE", help="file for the strategy with its table, as JSON")
    parser.add_argument("--probe", type=int, default=4, metavar="N", help="outputs of the probe (default: %(default)s)")
    parser.add_argument("--greedy-probe", action="store_true", help="let the first of them be greedy")
    text = "what tells how difficult a prompt is (default: %(default)s)"
    parser.add_argument("--signal", choices=PROBE_SIGNALS, default="agreement", help=text)
    parser.add_argument("--num-bins", type=int, default=3, metavar="N", help="rows of the table (default: %(default)s)")
    text = "accuracy that may be lost to the baseline (default: %(default)s)"
    parser.add_argument("--tolerance", type=float, default=0.0, metavar="X", help=text)
    group = parser.add_argument_group("sampling", "defaults in the model's generation_config.json come first")
    add_options(group, SamplingParams, BRANCH_FIELDS)
    add_engine_options(parser)
    parser.set_defaults(command=_strategies)


def _strategies(args: argparse.Namespace) -> int:
    from expertwire.deploy import calibrate_strategies
    from expertwire.strategies.registry import strategy_to_dict

    fields = set_fields(args, BRANCH_FIELDS)
    SamplingParams(**fields)
    catalog = catalog_of(args)
    if args.grader not in catalog.verifiers:
        known = ", ".join(catalog.verifier_names) or "none is configured"
        raise ValueError(
            f"grader must be a verifier that --strategies or --verifier gives: {known}; got {args.grader!r}"
        )
    study = calibrate_strategies.Study(
        candidates={text: catalog.parse(text) for text in [*args.candidate, args.baseline]},
        baseline=args.baseline,
        verifier=catalog.verifiers[args.grader],
        probe=args.probe,
        greedy_probe=args.greedy_probe,
        signal=args.signal,
        num_bins=args.num_bins,
        tolerance=args.tolerance,
    )
    prompts = calibrate_strategies.read_prompts(args.prompts)
    with open(args.out, "a"):  # before an hour of work
        pass
    strategy, found = calibrate_strategies.run(
        engine_config(args),
        prompts,
        lambda frontend: frontend.model_info.sampling_params(**fields),
        study,
        log=sys.stderr.write,
    )
    options = strategy_to_dict(strategy, verifiers=catalog.verifiers, strategies=catalog.strategies)
    Path(args.out).write_text(json.dumps(options) + "\n")
    for line in calibrate_strategies.report(found, study):
        print(line)
    return 0
