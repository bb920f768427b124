"""`expertwire bench balance`: spread of experts' rows over ranks after rebalancing.

A placement is made from one window of tokens and scored on the next: rows of the fullest rank over
the mean rank's, each row going where `moe.Placement` sends it. Beside it: experts where a fresh
engine puts them (static), the published algorithm of others (`balance_peer`), whose replicas get
equal shares, and a lower bound for any placement and any shares, even if the next window were
known. "planned" is what the placements would give if the first window came again.

L layers, E experts, P ranks, T tokens, K experts a token, N routed rows, Q the period with
which tokens rotate through replicas.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from expertwire.bench.scheduler import balance_peer, balance_routing
from expertwire.bench.serving import throughput
from expertwire.moe.eplb.algorithm import rebalance
from expertwire.moe.eplb.placement import TURNS, Placement, place

STEP_TOKENS = 128  # of one rank in one step, at most
SPARE = 1 / 8  # redundant slots, of the experts
SHAPE_61 = (61, 256)  # layers and experts of the model whose rebalance is timed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    for name, default, text in (
        ("--tokens", 131072, "tokens in each of the two windows"),
        ("--layers", 8, "layers drawn at random from each power law"),
        ("--seed", 0, "seed of the routing"),
    ):
        parser.add_argument(name, type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[8, 32, 72], metavar="N", help="numbers of ranks (default: 8 32 72)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")


def main(args: argparse.Namespace) -> int:
    """Measure, print and write."""
    if args.json and not args.json.parent.is_dir():
        raise ValueError(f"--json: there is no folder {args.json.parent}")
    for name, low in (("tokens", 1024), ("layers", 1)):
        if getattr(args, name) < low:
            raise ValueError(f"--{name} must be at least {low}, got {getattr(args, name)}")
    shape = (args.layers, args.tokens, 8)
    sources: dict[str, Callable[[], np.ndarray]] = {
        "power law 1.01": lambda: balance_routing.power_law(1.01, shape, 256, args.seed),
        "power law 1.2": lambda: balance_routing.power_law(1.2, shape, 256, args.seed),
        "zipf 1.01": lambda: balance_routing.zipf(1.01, shape, 256, args.seed),
        "zipf 1.2": lambda: balance_routing.zipf(1.2, shape, 256, args.seed),
        "demo model": lambda: balance_routing.recorded(args.tokens, args.seed),
    }
    rows = []
    for name, draw in sources.items():
        ids_2LTK = draw()
        num_experts = 1 + int(ids_2LTK.max())
        for num_ranks in args.ranks:
            rows.append({"routing": name} | compare(ids_2LTK, num_experts, num_ranks))
    result = {"machine": throughput.machine("cpu"), "tokens": args.tokens, "rows": rows}
    result |= {"rebalance_s": timed(args.ranks, args.seed)}
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def num_slots(num_experts: int, num_ranks: int) -> int:
    """Return the number of physical experts: an eighth more, equally many on every rank, and two at least."""
    return num_ranks * max(2, math.ceil(num_experts * (1 + SPARE) / num_ranks))


def compare(ids_2LTK: np.ndarray, num_experts: int, num_ranks: int) -> dict[str, Any]:
    """Return max over mean of the ranks' rows, the mean and the worst of all layers, and the distance to the bound."""
    load_2LE = np.stack([[np.bincount(i.ravel(), minlength=num_experts) for i in window] for window in ids_2LTK])
    slots = num_slots(num_experts, num_ranks)
    static = place(num_experts, num_ranks, slots - num_experts, num_layers=load_2LE.shape[1])
    ours = rebalance(load_2LE[0], static, slack=0.0)
    again = rebalance(load_2LE[1], ours)
    theirs = Placement(
        num_logical=num_experts,
        phy2log=np.stack([balance_peer.balance(load_E, slots, num_ranks) for load_E in load_2LE[0]]),
        rank_offsets=static.rank_offsets,
    )
    bound_L = lower_bound(load_2LE[1], slots, num_ranks)
    scores = {
        "static": _spread(_routed(ids_2LTK[1], static)),
        "theirs": _spread(_routed(ids_2LTK[1], theirs)),
        "ours": _spread(_routed(ids_2LTK[1], ours)),
        "bound": bound_L,
        "ours planned": _spread(ours.rank_load(load_2LE[0])),
        "theirs planned": _spread(theirs.rank_load(load_2LE[0])),
        "a step": _spread_of_steps(ids_2LTK[1], ours),
    }
    result = {name: {"mean": float(values.mean()), "worst": float(values.max())} for name, values in scores.items()}
    return {
        "ranks": num_ranks,
        "experts": num_experts,
        "slots": slots,
        **result,
        "over_bound": float((scores["ours"] / bound_L).max()),
        "over_theirs": float(scores["ours"].mean() / scores["theirs"].mean()),
        "over_theirs_planned": float((scores["ours planned"] / scores["theirs planned"]).max()),
        "moved": _moved(static, ours),
        "moved_again": _moved(ours, again),
    }


def lower_bound(load_LE: np.ndarray, num_physical: int, num_ranks: int) -> np.ndarray:
    """Return the max over mean that no placement beats, whatever the shares: [L].

    The largest of three bounds. 1, the mean. That every expert has so many replicas that none exceeds the rank's rows. And, for
    the h hottest experts: they have at most R = S - E + h replicas, so they lie on m <= R ranks,
    the other slots of which, m * S / P - R at least, hold whole experts, at best the coldest.
    """
    per_rank, num_experts = num_physical // num_ranks, load_LE.shape[1]
    bounds = []
    for load_E in np.sort(load_LE, axis=1)[:, ::-1].astype(float):
        mean = load_E.sum() / num_ranks
        cold = np.concatenate([[0.0], load_E[::-1].cumsum()])
        best = mean
        for h in range(1, num_experts + 1):
            m = np.arange(1, min(num_physical - num_experts + h, num_ranks) + 1)
            beside = np.clip(m * per_rank - (num_physical - num_experts + h), 0, num_experts - h)
            best = max(best, float(((load_E[:h].sum() + cold[beside]) / m).min()))
        bounds.append(max(best, _pieces_bound(load_E, num_physical)) / mean)
    return np.array(bounds)


def _pieces_bound(load_E: np.ndarray, num_physical: int) -> float:
    low, high = 0.0, float(load_E.max())
    for _ in range(50):
        middle = (low + high) / 2
        fits = np.ceil(load_E / middle).sum() <= num_physical
        low, high = (low, middle) if fits else (middle, high)
    return low


def _routed(ids_LTK: np.ndarray, placement: Placement, steps: bool = False) -> np.ndarray:
    """Return the rows of every rank, [L, P], or [L, steps, P] for whole steps with equally many tokens on every rank."""
    num_ranks = placement.num_ranks
    tokens = min(STEP_TOKENS, ids_LTK.shape[1] // num_ranks)
    num_steps = ids_LTK.shape[1] // (tokens * num_ranks)
    number_T = np.arange(num_steps * num_ranks * tokens)
    home_T, turn_T = number_T // tokens % num_ranks, number_T % tokens % TURNS
    step_T = number_T // (tokens * num_ranks) if steps else np.zeros_like(number_T)
    num_steps, rows = num_steps if steps else 1, []
    for layer, ids_TK in enumerate(ids_LTK[:, : len(number_T)]):
        table_PQE = np.stack([placement.log2phy(home, layer) for home in range(placement.num_ranks)])
        physical_TK = table_PQE[home_T[:, None], turn_T[:, None] % table_PQE.shape[1], ids_TK]
        flat = placement.rank_of_X[physical_TK] + num_ranks * step_T[:, None]
        rows.append(np.bincount(flat.ravel(), minlength=num_steps * num_ranks))
    return np.stack(rows).reshape(len(rows), *([num_steps] if steps else []), num_ranks)


def _spread(rows_LP: np.ndarray) -> np.ndarray:
    return rows_LP.max(axis=1) / rows_LP.mean(axis=1)


def _spread_of_steps(ids_LTK: np.ndarray, placement: Placement) -> np.ndarray:
    """Return the mean over single steps of max over mean: [L]."""
    rows_LNP = _routed(ids_LTK, placement, steps=True)
    return (rows_LNP.max(axis=2) / rows_LNP.mean(axis=2)).mean(axis=1)


def _moved(before: Placement, after: Placement) -> float:
    """Return the share of physical experts whose logical expert changes."""
    return float((before.phy2log != after.phy2log).mean())


def timed(all_ranks: list[int], seed: int) -> dict[str, float]:
    """Return the seconds of one rebalance of 61 layers of 256 experts, from the static placement, by ranks; the best of three."""
    rng, seconds = np.random.default_rng(seed), {}
    load_LE = np.exp(rng.random(SHAPE_61) * np.log(6553.6))
    for num_ranks in all_ranks:
        static = place(SHAPE_61[1], num_ranks, num_slots(SHAPE_61[1], num_ranks) - SHAPE_61[1], SHAPE_61[0])
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            rebalance(load_LE, static)
            taken.append(time.perf_counter() - start)
        seconds[str(num_ranks)] = min(taken)
    return seconds


def table(result: dict[str, Any]) -> str:
    """Return the comparison as text."""
    lines = [
        f"{'routing':<16}{'ranks':>5}{'slots':>6}{'static':>9}{'theirs':>9}{'ours':>9}{'worst':>8}{'bound':>8}{'/bound':>8}"
        f"{'/theirs':>9}{'planned':>9}{'a step':>8}{'moved':>8}{'again':>7}"
    ]
    for row in result["rows"]:
        means = "".join(f"{row[name]['mean']:>9.3f}" for name in ("static", "theirs", "ours"))
        lines.append(
            f"{row['routing']:<16}{row['ranks']:>5}{row['slots']:>6}{means}{row['ours']['worst']:>8.3f}"
            f"{row['bound']['mean']:>8.3f}{row['over_bound']:>8.3f}{row['over_theirs']:>9.3f}"
            f"{row['over_theirs_planned']:>9.3f}{row['a step']['mean']:>8.2f}{row['moved']:>8.1%}{row['moved_again']:>7.1%}"
        )
    times = ", ".join(f"{seconds:.2f} s on {ranks} ranks" for ranks, seconds in result["rebalance_s"].items())
    lines.append(f"one rebalance of {SHAPE_61[0]} layers x {SHAPE_61[1]} experts: {times}")
    return "\n".join(lines)
