"""The controller's process: it takes requests from frontends, schedules them, and drives the ranks step by step.

It has no tokenizer, no tensors and no model. It reports to the process that started it on standard output, one JSON object a
line: {"listening": {"hub"}}, then {"ready": ...} or {"failed": {"rank", "message"}}.

L layers, E logical experts; other letters as in `scheduler.outputs`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from expertwire.comm.control.channel import ControlHub, RankError, RankLost, RankTimeout
from expertwire.engine import messages
from expertwire.engine.config.engine_config import ModelInfo
from expertwire.engine.frontend.api import RequestOptions
from expertwire.engine.frontend_hub import FrontendHub
from expertwire.engine.kv_cache.cache_sizes import CacheTooSmall
from expertwire.engine.loader.quantization import expert_bytes
from expertwire.engine.process import raise_descriptor_limit
from expertwire.engine.startup import ControllerArgs, RankDomains, scheduler_config, start_ranks
from expertwire.engine.stats_log import StatsLog
from expertwire.moe.eplb.load import ExpertLoad
from expertwire.moe.eplb.placement import place
from expertwire.moe.eplb.rebalancer import Rebalancer
from expertwire.scheduler.outputs import StepOutputs
from expertwire.scheduler.plan import StepPlan, StepResult
from expertwire.scheduler.policy import make_policy
from expertwire.scheduler.request import Request
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.scheduler.scheduler import Scheduler
from expertwire.scheduler.warm_up import warm_up

_log = logging.getLogger(__name__)
# The scheduler's key of a sequence: the number of its frontend and, in the lower bits, the sequence id.
_ID_BITS = 40
_ID_MASK = (1 << _ID_BITS) - 1
_KEYS = ("key_O", "prompt_key_I", "routed_keys", "failed_keys")
# How long to wait for errors of other ranks when the error of one may be a consequence.
_BLAME_S = 1.0
# Idle time after which the scheduler's integrity is checked and garbage is collected.
_IDLE_S = 1.0
# A rank from which nothing has come for so long is reported to the frontends, whose health checks fail until it goes on.
_SILENT_S = 1.5


# Counters in `Stats`, besides the scheduler's gauges: steps with tokens; tokens computed, sampled, and of these dropped, because
# their requests had ended or given way; and times in µs: to plan a step, to wait for the ranks' results of the step before, to
# commit them, and to send outputs to frontends. `forward_us` is the forward pass of the slowest rank, which overlaps these.
# `groups` has what frontends count (`engine.frontend.groups`).
_COUNTS = ("steps", "tokens_computed", "tokens_sampled", "tokens_dropped")
_TOTALS = (*_COUNTS, "plan_us", "wait_us", "commit_us", "deliver_us", "forward_us")


@dataclass(kw_only=True)
class ControllerState:
    """State of the controller, besides the step in flight."""

    scheduler: Scheduler
    hub: ControlHub
    info: ModelInfo
    frontends: FrontendHub
    awaiting_stats: list[int] = field(default_factory=list)  # numbers of frontends
    totals: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_TOTALS, 0))
    counts: Counter[str] = field(default_factory=Counter)  # of all frontends
    load: ExpertLoad | None = None  # None for a dense model
    rebalancing: Rebalancer | None = None
    stats_log: StatsLog | None = None
    worked_s: float | None = None  # when there was work, by `time.monotonic`; None: not since the last integrity check


def controller_main(args: ControllerArgs, newcomers: int) -> None:
    """Run until the parent process closes the lifeline; entry point of the process.

    Args:
        newcomers: descriptor of the socket over which the parent sends the connections of frontends.
    """
    raise_descriptor_limit()
    frontends = FrontendHub(socket.socket(fileno=newcomers))
    config = args.config
    try:
        hub = ControlHub(config.ep_size, address=args.hub_address, token=args.token)
    except (OSError, ValueError) as error:
        says = error.strerror if isinstance(error, OSError) else str(error)
        _report(failed={"rank": -1, "message": f"the controller {says}{_free_space(args.hub_address)}"})
        return
    state: ControllerState | None = None
    try:
        _report(listening={"hub": hub.address})
        # While the ranks start, load and compile what they run: they wait for this process only when all have done so.
        compiled = ThreadPoolExecutor(1).submit(warm_up)
        info, domains = start_ranks(args, hub)
        compiled.result()
        policy = make_policy(config.scheduling_policy, aging=config.aging)
        scheduler = Scheduler(scheduler_config(args, info), args.model.cache_specs(), policy)
        state = ControllerState(
            scheduler=scheduler, hub=hub, info=info, frontends=frontends, load=_expert_load(args, info, domains)
        )
        if args.log_stats:
            state.stats_log = StatsLog(lambda line: sys.stderr.write(f"{line}\n"))
        if config.eplb_step_interval:
            assert state.load is not None, "a dense model has no experts to move"
            size = expert_bytes(args.model, config.quantization)
            state.rebalancing = Rebalancer(state.load, size, config.eplb_step_interval, domains.failure_domains)
        collect_when_idle()
        frontends.watch(hub.filenos())
        _report(ready=info.to_dict())
        in_flight: StepPlan | None = None
        while True:
            _poll(state, busy=in_flight is not None)
            in_flight = step(state, in_flight, config.step_timeout_s)
    except (RankLost, RankTimeout, RankError, CacheTooSmall) as error:
        rank, message = _blame(hub, error)
        frontends.broadcast(messages.Failure(rank=rank, message=message))
        _report(failed={"rank": rank, "message": message})
    finally:
        if state is not None and state.rebalancing is not None:
            state.rebalancing.close()
        hub.close()
        frontends.close()


def _expert_load(args: ControllerArgs, info: ModelInfo, domains: RankDomains) -> ExpertLoad | None:
    if not info.num_experts:
        return None
    redundant = args.config.num_redundant_experts
    placement = place(info.num_experts, info.ep_size, redundant, info.num_layers, domains.nvlink_domains)
    return ExpertLoad(placement, info.num_layers)


def collect_when_idle() -> None:
    """Turn off automatic cyclic garbage collection; the loop collects when idle.

    With thousands of requests a collection takes 5 to 10 ms every few dozen steps, and finds nothing. What there is now, mostly
    numba's, stays: to look at it takes 45 ms.
    """
    gc.collect()
    gc.freeze()
    gc.disable()


def _free_space(address: str) -> str:
    """Return what is free in the folder of a unix socket, for an error message; "" for other addresses."""
    kind, _, path = address.partition(":")
    if kind != "unix" or path.startswith("@"):
        return ""
    found = os.statvfs(os.path.dirname(path))
    return f" (in its folder, of TMPDIR, {found.f_bavail * found.f_frsize} bytes and {found.f_favail} files are free)"


def _report(**status: Any) -> None:
    sys.stdout.write(json.dumps(status) + "\n")
    sys.stdout.flush()


def _blame(hub: ControlHub, error: RankLost | RankTimeout | RankError | CacheTooSmall) -> tuple[int, str]:
    """Return the rank at fault and the message. A rank that died or stalled is preferred to those that failed in consequence."""
    if isinstance(error, CacheTooSmall):
        return -1, str(error)
    found = [error] if isinstance(error, RankLost) else [error, *_other_errors(hub)]
    for lost in found:
        if isinstance(lost, RankLost):
            return lost.rank, f"rank {lost.rank} has died: {lost.reason}"
    failed = [each for each in found if isinstance(each, RankError)]
    if stalls := [each for each in failed if "stall" in each.details]:
        first = min(stalls, key=lambda each: each.details["stall"].tolist())
        return int(first.details["stall"][-1]), first.message
    if failed:
        return failed[0].rank, str(failed[0])
    assert isinstance(error, RankTimeout), error
    return error.ranks[0], str(error)


def _other_errors(hub: ControlHub) -> Iterator[RankLost | RankError]:
    """Yield the errors of other ranks within `_BLAME_S` seconds."""
    deadline = time.monotonic() + _BLAME_S
    while (left := deadline - time.monotonic()) > 0:
        try:
            hub.collect(left)
        except RankError as another:
            yield another
        except RankLost as lost:
            yield lost
            return
        except RankTimeout:
            return


# ---- the loop


def _poll(state: ControllerState, *, busy: bool) -> None:
    """Handle messages of frontends; wait for them only when there is nothing else to do."""
    moving = state.rebalancing is not None and state.rebalancing.moving
    busy = busy or not state.scheduler.idle or bool(state.awaiting_stats) or moving
    if busy:
        state.worked_s = time.monotonic()
    idle_at = None if state.worked_s is None else state.worked_s + _IDLE_S
    wait_s = 0.0 if busy else None if idle_at is None else max(0.0, idle_at - time.monotonic())
    events, ranks_sent = state.frontends.poll(wait_s)
    if ranks_sent:
        state.hub.poll_lost()
    _beat(state)
    # `poll` returns for every beat, too, which comes in the pauses of a client whose requests follow one another.
    if not (busy or events or ranks_sent) and idle_at is not None and time.monotonic() >= idle_at:
        state.scheduler.check_integrity()
        gc.collect()
        state.worked_s = None
    for number, message in events:
        if message is None:
            _forget(state, number)
            continue
        try:
            _handle(state, number, message)
        except ValueError as error:  # a frontend checks what clients send, so this one has a bug
            _log.error("error: frontend %d is dropped: %s", number, error)
            state.frontends.drop(number)


def _beat(state: ControllerState) -> None:
    """Tell frontends that the controller works, and which ranks are silent."""
    silent = ", ".join(map(str, state.hub.silent(_SILENT_S)))
    problem = f"nothing has come from rank {silent} for over {_SILENT_S:g} s" if silent else ""
    state.frontends.beat(problem)


def _handle(state: ControllerState, number: int, message: messages.Message) -> None:
    match message:
        case messages.Hello():
            welcome = messages.Welcome(model_info=state.info.to_dict(), beats=message.beats)
            state.frontends.send(number, welcome)
        case messages.Submit():
            _submit(state, number, message)
        case messages.Credit():
            for sequence_id, tokens in zip(message.ids.tolist(), message.tokens.tolist(), strict=True):
                state.scheduler.grant(_key(number, sequence_id), tokens)
        case messages.Resume():
            for sequence_id in message.ids.tolist():
                if (outputs := state.scheduler.resume(_key(number, sequence_id))) is not None:
                    state.totals["tokens_dropped"] -= len(outputs.key_O)  # they were only held back
                    _deliver(state, outputs)
        case messages.Abort():
            for sequence_id in message.ids.tolist():
                state.scheduler.abort(_key(number, sequence_id))
        case messages.AbortByName():
            state.frontends.broadcast(message)
        case messages.Count():
            state.counts.update(message.values)
        case messages.CacheFlush():
            state.frontends.send(number, messages.CacheFlush(freed_blocks=state.scheduler.flush_cache()))
        case messages.StatsRequest():
            state.awaiting_stats.append(number)
        case _:
            raise ValueError(f"unexpected message from a frontend: {type(message).__name__}")


def _submit(state: ControllerState, number: int, message: messages.Submit) -> None:
    now, keys = time.monotonic(), [_key(number, sequence_id) for sequence_id in message.sequence_ids.tolist()]
    params, options = SamplingParams.from_dict(message.params), RequestOptions(**message.options)
    assert params.seed is not None, f"sequences {message.sequence_ids} of frontend {number} have no seed"
    without_prompt = replace(params, prompt_logprobs=None)
    num_prompt = len(message.tokens) if message.num_prompt_tokens is None else message.num_prompt_tokens
    group = [
        Request(
            key=key,
            prompt=message.tokens[:num_prompt],
            output=message.tokens[num_prompt:],
            params=without_prompt if branch else params,
            branch=branch,
            seed=params.seed,
            priority=options.priority,
            tenant=options.tenant,
            salt=options.cache_salt,
            deadline=None if options.deadline_s is None else now + options.deadline_s,
            credit=message.credit,
            pause_ids=message.pause_token_ids,
        )
        for branch, key in enumerate(keys, message.first_branch)
    ]
    parent = None if message.parent is None else _key(number, message.parent)
    if (rejection := state.scheduler.submit_group(group, now, parent)) is not None:
        state.frontends.send(number, replace(rejection, key=rejection.key & _ID_MASK))


def step(
    state: ControllerState, in_flight: StepPlan | None, timeout_s: float, *, overlap: bool = True
) -> StepPlan | None:
    """Plan the next step and publish it, then wait for the results of the step in flight and send outputs to frontends.

    So the ranks find the next plan when they finish a step; a new request starts one step later.

    Args:
        in_flight: the step that the ranks are computing, if any.
        overlap: False waits for each step before the next is planned; for measurements only.

    Returns:
        The step that the ranks are computing now, for the next call.
    """
    clock = [time.perf_counter()]
    plan = _plan(state, in_flight)
    if plan is not None:
        state.hub.publish(plan.to_arrays())
    if not overlap:
        in_flight, plan = plan, None
    clock.append(time.perf_counter())
    if in_flight is None:
        return plan
    results = [StepResult.from_arrays(answer) for answer in state.hub.collect(timeout_s, partial(_beat, state))]
    clock.append(time.perf_counter())
    outputs = state.scheduler.commit(in_flight, results, time.monotonic())
    clock.append(time.perf_counter())
    _deliver(state, outputs)
    clock.append(time.perf_counter())
    _count(state, in_flight, results, len(outputs.key_O), clock)
    if state.stats_log is not None and in_flight.num_tokens_P.any():
        state.stats_log.step(state.totals, state.scheduler.stats)
    rows_LE = None
    if in_flight.report_load and state.load is not None:
        rows_LE = np.sum([result.expert_load for result in results], axis=0).reshape(state.load.rows_LE.shape)
        state.load.add(rows_LE)
    if state.rebalancing is not None:
        state.rebalancing.committed(in_flight, results, rows_LE)
    if in_flight.report_load:
        _answer_stats(state)
    return plan


def _plan(state: ControllerState, in_flight: StepPlan | None) -> StepPlan | None:
    """Return the next step, with the experts that move before it."""
    # Who asks for statistics while a step that reports is in flight gets its answer from that one.
    report_load = bool(state.awaiting_stats) and (in_flight is None or not in_flight.report_load)
    now = time.monotonic()
    if state.rebalancing is None:
        return state.scheduler.plan(now, report_load=report_load)
    load_wanted, moves = state.rebalancing.next()
    if moves is not None and len(moves.logical_X):
        state.scheduler.epoch += 1
    return state.scheduler.plan(now, report_load=report_load or load_wanted, moves=moves)


def _deliver(state: ControllerState, outputs: StepOutputs) -> None:
    """Send each frontend the outputs of its sequences."""
    keys = [getattr(outputs, name) for name in _KEYS]
    if not any(map(len, keys)):
        return
    owners = np.unique(np.concatenate(keys) >> _ID_BITS)
    for number in owners.tolist():
        state.frontends.send(number, _outputs_for(number, outputs, all_of_them=len(owners) == 1))


def _outputs_for(number: int, outputs: StepOutputs, *, all_of_them: bool) -> StepOutputs:
    """Return a frontend's part of the outputs, by its own sequence ids."""
    if not all_of_them:
        outputs = outputs.select(*(np.flatnonzero(getattr(outputs, name) >> _ID_BITS == number) for name in _KEYS))
    return replace(outputs, **{name: getattr(outputs, name) & _ID_MASK for name in _KEYS})


def _count(
    state: ControllerState, plan: StepPlan, results: list[StepResult], num_outputs: int, clock: list[float]
) -> None:
    totals = state.totals
    totals["steps"] += bool(plan.num_tokens_P.any())
    totals["tokens_computed"] += int(plan.num_tokens_P.sum())
    num_sampled = sum(len(result.token_O) for result in results)
    totals["tokens_sampled"] += num_sampled
    totals["tokens_dropped"] += num_sampled - num_outputs
    totals["forward_us"] += max(result.forward_us for result in results)
    for name, start, end in zip(("plan_us", "wait_us", "commit_us", "deliver_us"), clock, clock[1:], strict=False):
        totals[name] += int((end - start) * 1e6)


def _answer_stats(state: ControllerState) -> None:
    """Send the scheduler's gauges, the totals and `ExpertLoad.summary` to the frontends that asked."""
    load = {"expert_load": [[]] * state.info.num_layers} if state.load is None else state.load.summary()
    values = {**state.scheduler.stats(), **state.totals, **load, "groups": dict(state.counts)}
    if state.rebalancing is not None:
        values["rebalancing"] = {"epoch": state.scheduler.epoch, **state.rebalancing.stats()}
    for number in state.awaiting_stats:
        state.frontends.send(number, messages.Stats(values=values))
    state.awaiting_stats.clear()


def _forget(state: ControllerState, number: int) -> None:
    """Abort the requests of a frontend that has gone."""
    state.awaiting_stats = [n for n in state.awaiting_stats if n != number]
    for key in state.scheduler.unfinished():
        if key >> _ID_BITS == number:
            state.scheduler.abort(key)


def _key(number: int, sequence_id: int) -> int:
    with contextlib.suppress(TypeError):
        if 0 <= sequence_id < 1 << _ID_BITS:
            return number << _ID_BITS | sequence_id
    raise ValueError(f"a sequence id must be in [0, 2**{_ID_BITS}), got {sequence_id!r}")
