"""`expertwire bench schedule`: the real scheduler on simulated ranks.

By default a trace (see `traces`) is served by `--ranks` ranks whose steps take as long as a model
of step times says, on a simulated clock (see `simulation`); the report has goodput under latency
targets, latencies, balance, prefix hits and preemptions. The scheduler's own time does not enter
that clock unless `--host-time` is given, so a run can be repeated exactly. `--record` logs every
call, `--replay` runs a log again and compares all plans, `--timeline` draws a picture. `--cost`
measures what a step costs the host (`cost`), `--peer` compares that with another engine's scheduler
(`peer`), and `--load-balancing` compares rules of data-parallel load balancing (`load_balancing`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from expertwire.bench.scheduler import cost as schedule_cost
from expertwire.bench.scheduler import load_balancing, timeline
from expertwire.bench.scheduler import peer as schedule_peer
from expertwire.bench.scheduler.log import replay
from expertwire.bench.scheduler.simulation import EOS, LEFT, Outcome, Simulation, StepModel
from expertwire.bench.scheduler.traces import TRACES, Poisson, Served, oracle_hits
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.load_balancing import LoadBalancing
from expertwire.scheduler.outputs import FinishReason
from expertwire.scheduler.policy import PolicyName

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    text = "arrivals and lengths of requests (default: %(default)s)"
    parser.add_argument("--trace", choices=sorted(TRACES), default="poisson", help=text)
    text = f"order in which waiting requests are served: {', '.join(get_args(PolicyName))} (default: %(default)s)"
    parser.add_argument("--scheduling-policy", default="fcfs", help=text)
    for name, default, text in (
        ("--ranks", 8, "data-parallel ranks"),
        ("--running", 256, "requests that run at once on one rank"),
        ("--requests", 1000, "number of requests"),
        ("--seed", 0, "seed of the trace"),
        ("--blocks", 32768, "KV blocks of 16 tokens on one rank"),
        ("--max-num-batched-tokens", 2048, "token budget of one step on one rank"),
        ("--steps", 10000, "steps to measure, with --cost"),
    ):
        parser.add_argument(name, type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    text = "requests per second (default: the trace's)"
    parser.add_argument("--rate", type=float, metavar="X", help=text)
    parser.add_argument(
        "--chunked-prefill-size",
        type=int,
        metavar="N",
        help="maximum number of prompt tokens in a step of a rank that also decodes",
    )
    for name, default in (("ttft", 2000), ("tpot", 80)):
        text = f"latency objective of goodput (default: {default}, MLPerf's for its DeepSeek-R1 server)"
        parser.add_argument(f"--{name}-ms", type=float, default=default, metavar="X", help=text)
    for name, text in (
        ("overlap", "plan a step while the previous one runs"),
        ("enable-prefix-caching", "reuse KV blocks for prompts with the same prefix"),
    ):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=True, help=text)
    parser.add_argument("--host-time", action="store_true", help="add the scheduler's own time to the simulated clock")
    parser.add_argument(
        "--timeline",
        type=Path,
        metavar="FILE",
        help="draw the ranks' work over time (SVG, unless the file's suffix says otherwise)",
    )
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="log all calls to the scheduler; compressed if the name ends with .gz",
    )
    parser.add_argument("--replay", type=Path, metavar="FILE", help="replay a log and compare every plan, instead")
    parser.add_argument("--cost", action="store_true", help="measure the host's time per step, instead")
    parser.add_argument("--peer", type=Path, metavar="PATH", help="compare with a checkout of nano-vllm, instead")
    text = "compare rules of load balancing over these numbers of ranks on all traces, instead"
    parser.add_argument("--load-balancing", type=int, nargs="+", metavar="N", help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")


def main(args: argparse.Namespace) -> int:
    """Run and print a report; return 1 if a replay differs."""
    for name in ("json", "timeline", "record"):
        file = getattr(args, name)
        if file and not file.parent.is_dir():
            raise ValueError(f"--{name}: there is no folder {file.parent}")
    if args.replay:
        done = replay(args.replay)
        print(f"{done.plans:,} plans: {done.difference or 'all the same'}")
        return int(done.difference is not None)
    if args.cost:
        result = schedule_cost.cost(args.ranks, args.running, args.steps, overlap=args.overlap)
        print(schedule_cost.table(result))
    elif args.peer:
        result = schedule_peer.compare(args.peer, overlap=args.overlap)
        print(schedule_peer.table(result))
    elif args.load_balancing:
        result = _options(args) | load_balancing.compare(args.load_balancing, lambda *run: _compared(args, *run))
        print(load_balancing.table(result))
    else:
        result = _simulate(args)
        print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _simulate(args: argparse.Namespace) -> dict[str, Any]:
    rate = {} if args.rate is None else {"rate": args.rate}
    trace = TRACES[args.trace](num_requests=args.requests, seed=args.seed, **rate)
    simulation = _simulation(args, trace, args.ranks, record=args.record)
    outcome = simulation.run()
    if args.timeline:
        title = f"{args.trace}: {len(outcome.arrivals)} requests on {args.ranks} rank(s)"
        timeline.save(args.timeline, picture(outcome, title))
    return _options(args) | report(simulation, 1e-3 * args.ttft_ms, 1e-3 * args.tpot_ms)


def _compared(
    args: argparse.Namespace, name: str, num_ranks: int, num_requests: int, rate: float, balancing: LoadBalancing
) -> dict[str, Any]:
    """Return the report of one run of a comparison."""
    trace = TRACES[name](num_requests=num_requests, seed=args.seed, rate=rate)
    simulation = _simulation(args, trace, num_ranks, balancing=balancing)
    simulation.run()
    return report(simulation, 1e-3 * args.ttft_ms, 1e-3 * args.tpot_ms)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    options = {name: value if not isinstance(value, Path) else str(value) for name, value in vars(args).items()}
    return {"options": {name: value for name, value in options.items() if name != "command"}}


def _simulation(
    args: argparse.Namespace,
    trace: Poisson,
    num_ranks: int,
    *,
    record: Path | None = None,
    balancing: LoadBalancing | None = None,
) -> Simulation:
    config = SchedulerConfig(
        num_ranks=num_ranks,
        max_num_seqs=args.running,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=trace.max_model_len,
        block_size=16,
        num_blocks=args.blocks,
        max_queued_requests=4096,
        eos_token_ids=(EOS,),
        vocab_size=trace.vocab_size,
        enable_prefix_caching=args.enable_prefix_caching,
        chunked_prefill_size=args.chunked_prefill_size,
    )
    return Simulation(
        trace,
        config,
        model=StepModel(),
        overlap=args.overlap,
        host_time=args.host_time,
        policy=args.scheduling_policy,
        record=record,
        balancing=balancing,
    )


def report(simulation: Simulation, ttft_s: float, tpot_s: float) -> dict[str, Any]:
    """Return a report of a run as JSON values.

    Goodput counts the requests that were answered to their end, with the first token within
    `ttft_s` of the arrival and, after it, `tpot_s` a token on average; out of all but those that
    their clients aborted. `tokens_max_over_least` is the fullest rank's tokens over the least
    possible: the mean, or the tokens of one request where these are more. `spread_oracle_tokens` is
    what the oracle finds with a cache of unlimited size on each rank.

    Raises:
        ValueError: no request was served.
    """
    outcome, config = simulation.outcome, simulation.scheduler.config
    rows = outcome.served
    times = np.array([arrival.time for arrival in outcome.arrivals])
    done = (rows["finish"] == FinishReason.STOP) | (rows["finish"] == FinishReason.LENGTH)
    ttft = rows["first"] - times
    tpot = (rows["last"] - rows["first"]) / np.maximum(rows["count"] - 1, 1)
    good = done & (ttft <= ttft_s) & (tpot <= tpot_s)
    asked = int((rows["finish"] != LEFT).sum())
    if not outcome.seconds:
        raise ValueError(f"none of the {len(rows)} requests was served: {int(rows['rejected'].sum())} were rejected")
    seconds = outcome.start[-1] + outcome.seconds[-1]
    tokens = np.add(outcome.prefill, outcome.decode)
    history = _history(simulation)
    prompt_tokens = sum(len(outcome.arrivals[key].prompt) for key in simulation.ranks.cached)
    return {
        "ranks": config.num_ranks,
        "requests": len(rows),
        "finished": int(done.sum()),
        "rejected": int(rows["rejected"].sum()),
        "aborted": len(rows) - asked,
        "targets_ms": {"ttft": 1e3 * ttft_s, "tpot": 1e3 * tpot_s},
        "goodput": {"share": int(good.sum()) / max(asked, 1), "tokens_per_s": int(rows["count"][good].sum()) / seconds},
        "output_tokens_per_s": int(rows["count"].sum()) / seconds,
        "input_tokens_per_s": prompt_tokens / seconds,
        "ttft_ms": _quantiles(ttft[rows["count"] > 0]),
        "tpot_ms": _quantiles(tpot[rows["count"] > 1]),
        "balance": {
            "tokens_max_over_mean": _imbalance(tokens),
            "tokens_max_over_least": float(
                tokens.max(axis=1).sum() / np.maximum(tokens.mean(axis=1), outcome.largest).sum()
            ),
            "blocks_max_over_mean": _imbalance(np.array(outcome.blocks)),
            "idle_share": 1 - float(np.average(outcome.busy().mean(axis=1), weights=outcome.seconds)),
        },
        "prefix": {
            "prompt_tokens": prompt_tokens,
            "cached_tokens": sum(simulation.ranks.cached.values()),
            "oracle_tokens": oracle_hits(history, config.block_size),
            "spread_oracle_tokens": oracle_hits(history, config.block_size, config.num_ranks),
        },
        "preemptions": simulation.ranks.preemptions,
        "steps": len(outcome.seconds),
        "step_ms": _quantiles(np.array(outcome.seconds)),
        "seconds": seconds,
        "host_us_per_step": 1e6 * outcome.host_s / len(outcome.seconds),
    }


def table(result: dict[str, Any]) -> str:
    """Return the report as text."""
    good, balance, prefix, targets = (result[name] for name in ("goodput", "balance", "prefix", "targets_ms"))
    tokens = prefix["prompt_tokens"]
    lines = [
        f"{result['requests']} requests on {result['ranks']} rank(s): {result['finished']} finished, {result['rejected']} "
        f"rejected, {result['aborted']} aborted by their clients; {result['preemptions']} preemptions",
        f"{result['seconds']:.1f} simulated seconds, {result['steps']:,} steps",
        "",
        f"goodput         {good['share']:.1%} of the requests, {good['tokens_per_s']:,.0f} tokens/s "
        f"(TTFT <= {targets['ttft']:g} ms, TPOT <= {targets['tpot']:g} ms)",
        f"throughput      {result['output_tokens_per_s']:,.0f} output, {result['input_tokens_per_s']:,.0f} input tokens/s",
        f"prefix hits     {prefix['cached_tokens'] / tokens:.1%} of the prompts' tokens; {prefix['oracle_tokens'] / tokens:.1%} "
        f"with unlimited memory, {prefix['spread_oracle_tokens'] / tokens:.1%} on each rank",
        f"max / mean      {balance['tokens_max_over_mean']:.3f} tokens, {balance['blocks_max_over_mean']:.3f} blocks of a rank; "
        f"max / least possible {balance['tokens_max_over_least']:.3f} tokens; ranks wait {balance['idle_share']:.1%} of a step",
        f"scheduler       {result['host_us_per_step']:,.0f} µs of processor time a step",
        "",
        f"{'ms':<16}{'p50':>12}{'p99':>12}{'mean':>12}",
    ]
    for name in ("ttft_ms", "tpot_ms", "step_ms"):
        lines.append(f"{name[:4].upper():<16}" + "".join(map(_number, result[name].values())))
    return "\n".join(lines)


def picture(outcome: Outcome, title: str) -> Figure:
    """Return the timeline. A rank's time in a step is split between prefill and decode by their tokens."""
    prefill, decode = np.array(outcome.prefill, float), np.array(outcome.decode, float)
    seconds = np.array(outcome.seconds)
    tokens = prefill + decode
    busy = outcome.busy()
    prefill_share = busy * prefill / np.maximum(tokens, 1)
    shares = {"prefill": prefill_share, "decode": busy - prefill_share, "idle": 1 - busy}
    return timeline.timeline(shares, np.array(outcome.start), seconds, title)


def _history(simulation: Simulation) -> list[Served]:
    """Return the requests that were computed at all, for the oracle."""
    history = []
    for key in sorted(simulation.ranks.cached):
        row = simulation.outcome.rows[key]
        done = row["finish"] in (FinishReason.STOP, FinishReason.LENGTH)
        beyond = simulation.overlap and row["finish"] == FinishReason.STOP
        computed = np.arange(row["count"] - 1 + beyond)
        history.append(
            Served(
                arrival=simulation.outcome.arrivals[key],
                submitted=float(row["submitted"]),
                computed=simulation.ranks.tokens(np.full(len(computed), key), computed),
                finished=float(row["last"]) if done else None,
            )
        )
    return history


def _imbalance(values: np.ndarray) -> float:
    """Return the largest rank's share over the mean, steps weighted by their tokens or blocks."""
    return float(values.max(axis=1).sum() / values.mean(axis=1).sum())


def _quantiles(seconds: np.ndarray) -> dict[str, float | None]:
    if not len(seconds):
        return dict.fromkeys(("p50", "p99", "mean"))
    p50, p99 = np.quantile(seconds, [0.5, 0.99])
    return {"p50": 1e3 * float(p50), "p99": 1e3 * float(p99), "mean": 1e3 * float(seconds.mean())}


def _number(value: float | None) -> str:
    return f"{'n/a' if value is None else f'{value:,.1f}':>12}"


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(_parser)
    raise SystemExit(main(_parser.parse_args()))
