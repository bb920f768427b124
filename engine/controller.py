"""The controller's process: the one brain. It takes requests from fronts, schedules, and drives the ranks step by step.

Nothing slow happens here: no tokeniser, no tensor, no model. It reports to the process that started it with one JSON object
a line on standard output: {"listening": {"hub", "fronts"}}, then {"ready": ...} or {"failed": {"rank", "message"}}.
"""

from __future__ import annotations

import contextlib
import gc
import json
import select
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from expertwire.comm.control.channel import (
    ChannelClosed,
    ControlHub,
    RankError,
    RankLost,
    RankTimeout,
    SocketChannel,
    listen,
)
from expertwire.engine import messages
from expertwire.engine.config.engine_config import ModelInfo, too_many_branches
from expertwire.engine.frontend.request_options import RequestOptions
from expertwire.engine.kv_cache.cache_sizes import CacheTooSmall
from expertwire.engine.rebalancing import Rebalancing
from expertwire.engine.startup import Orders, Places, scheduler_config, start_ranks
from expertwire.moe.eplb.load import ExpertLoad
from expertwire.moe.eplb.placement import place
from expertwire.scheduler.outputs import StepOutputs
from expertwire.scheduler.plan import StepPlan, StepResult
from expertwire.scheduler.policy import make_policy
from expertwire.scheduler.request import Rejection, Request
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.scheduler.scheduler import Scheduler
from expertwire.scheduler.warm_up import warm_up

# A request's key is its front's number and the id that the front gave it.
_ID_BITS = 40
_ID_MASK = (1 << _ID_BITS) - 1
_KEYS = ("key_O", "prompt_key_I", "routed_key_J")
# How long to wait for the culprit when a rank reports an error that a dead peer may have caused.
_BLAME_S = 1.0
# How long nothing must have happened for the scheduler to be checked.
_QUIET_S = 1.0


# Counters in `Stats`, besides the scheduler's gauges: steps with tokens, tokens computed and sampled, and where time went, in µs:
# planning a step, waiting for the ranks to end the one before it, committing that and answering the fronts; the slowest rank's
# forward pass, beside which all this happens.
_TOTALS = ("steps", "tokens_computed", "tokens_sampled", "plan_us", "wait_us", "commit_us", "deliver_us", "forward_us")


@dataclass(kw_only=True)
class Loop:
    """What the controller has, besides the step in flight."""

    scheduler: Scheduler
    hub: ControlHub
    info: ModelInfo
    fronts: dict[int, SocketChannel] = field(default_factory=dict)  # by the number that keys carry
    num_fronts: int = 0
    asking: list[int] = field(default_factory=list)  # fronts that wait for statistics
    totals: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_TOTALS, 0))
    load: ExpertLoad | None = None  # None: a dense model
    rebalancing: Rebalancing | None = None
    unchecked: bool = False  # whether something has been done since the scheduler's integrity was checked


def controller_main(orders: Orders) -> None:
    """Run until the parent lets go; the entry point of `engine.engine`."""
    listener = listen(orders.fronts_address, orders.token)
    config = orders.config
    hub = ControlHub(config.ep_size, address=orders.hub_address, token=orders.token)
    loop: Loop | None = None
    try:
        _tell(listening={"hub": hub.address, "fronts": listener.address})
        info, places = start_ranks(orders, hub, while_they_load=warm_up)
        policy = make_policy(config.scheduling_policy, aging=config.aging, tenant_weights=config.tenant_weights)
        scheduler = Scheduler(scheduler_config(orders, info), orders.model.cache_specs(), policy)
        loop = Loop(scheduler=scheduler, hub=hub, info=info, load=_expert_load(orders, info, places))
        if config.eplb_step_interval:
            assert loop.load is not None, "a dense model has no experts to move"
            given = loop.load, orders.model, config.quantization, config.eplb_step_interval
            loop.rebalancing = Rebalancing(*given, failure_domains=places.failure_domains)
        collect_when_quiet()
        _tell(ready=info.to_dict())
        flight: StepPlan | None = None
        while True:
            _listen(loop, listener, busy=flight is not None)
            flight = step(loop, flight, config.step_timeout_s)
    except (RankLost, RankTimeout, RankError, CacheTooSmall) as error:
        rank, message = _blame(hub, error)
        if loop is not None:
            for number in list(loop.fronts):
                _send(loop, number, messages.Failure(rank=rank, message=message))
        _tell(failed={"rank": rank, "message": message})
    finally:
        if loop is not None and loop.rebalancing is not None:
            loop.rebalancing.close()
        hub.close()
        listener.close()


def _expert_load(orders: Orders, info: ModelInfo, places: Places) -> ExpertLoad | None:
    if not info.num_experts:
        return None
    redundant = orders.config.num_redundant_experts
    placement = place(info.num_experts, info.ep_size, redundant, info.num_layers, places.domains)
    return ExpertLoad(placement, info.num_layers)


def collect_when_quiet() -> None:
    """Leave garbage in circles to the moments when nothing happens. With thousands of requests that come and go, looking for it
    takes 5 to 10 ms every few dozen steps, and none is made."""
    gc.collect()
    gc.disable()


def _tell(**status: Any) -> None:
    sys.stdout.write(json.dumps(status) + "\n")
    sys.stdout.flush()


def _blame(hub: ControlHub, error: RankLost | RankTimeout | RankError | CacheTooSmall) -> tuple[int, str]:
    """The rank at fault and what to say. An error may be the wake of another rank's death, or of its stall: that one is named."""
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
    """What the other ranks report within a little while."""
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


def _listen(loop: Loop, listener: Any, *, busy: bool) -> None:
    """Take in what the fronts say; waits only when there is nothing else to do."""
    moving = loop.rebalancing is not None and loop.rebalancing.moving
    busy = busy or not loop.scheduler.idle or bool(loop.asking) or moving
    by_descriptor = {channel.fileno(): number for number, channel in loop.fronts.items()}
    watched = [listener.fileno(), *by_descriptor, *loop.hub.filenos()]
    # A front that is slow to read has left some of its messages with us.
    behind = [descriptor for descriptor, number in by_descriptor.items() if loop.fronts[number].pending]
    loop.unchecked |= busy
    wait_s = 0 if busy else _QUIET_S if loop.unchecked else None
    readable, writable, _ = select.select(watched, behind, [], wait_s)
    if not busy and not (readable or writable):
        loop.scheduler.check_integrity()
        gc.collect()
        loop.unchecked = False
    for descriptor in writable:
        _flush(loop, by_descriptor[descriptor])
    for descriptor in readable:
        if descriptor == listener.fileno():
            _accept(loop, listener)
        elif (number := by_descriptor.get(descriptor)) is not None:
            if number in loop.fronts:
                _receive(loop, number)
        else:
            loop.hub.poll_lost()


def _accept(loop: Loop, listener: Any) -> None:
    while (channel := listener.accept(0)) is not None:
        loop.fronts[loop.num_fronts] = channel
        loop.num_fronts += 1


def _receive(loop: Loop, number: int) -> None:
    channel = loop.fronts[number]
    try:
        while (arrays := channel.recv(0)) is not None:
            _handle(loop, number, messages.decode(arrays))
    except (ChannelClosed, ValueError):
        _forget(loop, number)


def _handle(loop: Loop, number: int, message: messages.Message) -> None:
    match message:
        case messages.Hello():
            _send(loop, number, messages.Welcome(model_info=loop.info.to_dict()))
        case messages.Submit():
            _submit(loop, number, message)
        case messages.Abort():
            for request_id in message.ids.tolist():
                loop.scheduler.abort(_key(number, request_id))
        case messages.AskStats():
            loop.asking.append(number)
        case _:
            raise ValueError(f"a front does not send {type(message).__name__}")


def _submit(loop: Loop, number: int, message: messages.Submit) -> None:
    now, keys = time.monotonic(), [_key(number, request_id) for request_id in message.ids_B.tolist()]
    if (reason := too_many_branches(len(keys), loop.scheduler.config)) is not None:
        return _reject(loop, number, [Rejection(key, "INVALID_ARGUMENT", reason) for key in keys])
    params, options = SamplingParams.from_dict(message.params), RequestOptions(**message.options)
    assert params.seed is not None, f"requests {message.ids_B} of front {number} have no seed"
    of_others = replace(params, prompt_logprobs=None)
    rejections = []
    for branch, key in enumerate(keys):
        request = Request(
            key=key,
            prompt=message.tokens,
            params=of_others if branch else params,
            branch=branch,
            seed=params.seed,
            priority=options.priority,
            tenant=options.tenant,
            salt=options.cache_salt,
            deadline=None if options.deadline_s is None else now + options.deadline_s,
        )
        if (rejection := loop.scheduler.submit(request, now)) is not None:
            rejections.append(rejection)
    _reject(loop, number, rejections)


def _reject(loop: Loop, number: int, rejections: list[Rejection]) -> None:
    for rejection in rejections:
        _send(loop, number, replace(rejection, key=rejection.key & _ID_MASK))


def step(loop: Loop, flight: StepPlan | None, timeout_s: float, *, overlap: bool = True) -> StepPlan | None:
    """Plan a step and send it to the ranks, then wait for the results of the one before it, which they are computing, and answer.

    So the ranks go from step to step without waiting for the controller. A new request starts one step later for it.

    Args:
        flight: the step that the ranks compute, if any.
        overlap: False waits for each step before the next is planned; only measurements want that.

    Returns:
        The step that the ranks compute now, for the next call.
    """
    clock = [time.perf_counter()]
    plan = _plan(loop)
    if plan is not None:
        loop.hub.publish(plan.to_arrays())
    if not overlap:
        flight, plan = plan, None
    clock.append(time.perf_counter())
    if flight is None:
        return plan
    results = [StepResult.from_arrays(answer) for answer in loop.hub.collect(timeout_s)]
    clock.append(time.perf_counter())
    outputs = loop.scheduler.commit(flight, results, time.monotonic())
    clock.append(time.perf_counter())
    _deliver(loop, outputs)
    clock.append(time.perf_counter())
    _count(loop, flight, results, clock)
    rows_LE = None
    if flight.report_load and loop.load is not None:
        rows_LE = np.sum([result.expert_load for result in results], axis=0).reshape(loop.load.rows_LE.shape)
        loop.load.add(rows_LE)
    if loop.rebalancing is not None:
        loop.rebalancing.committed(flight, results, rows_LE)
    if flight.report_load:
        _answer_stats(loop)
    return plan


def _plan(loop: Loop) -> StepPlan | None:
    """The next step, with what moves before it."""
    now, report_load = time.monotonic(), bool(loop.asking)
    if loop.rebalancing is None:
        return loop.scheduler.plan(now, report_load=report_load)
    also, moves = loop.rebalancing.next()
    if moves is not None and len(moves.logical_S):
        loop.scheduler.epoch += 1
    return loop.scheduler.plan(now, report_load=report_load or also, moves=moves)


def _deliver(loop: Loop, outputs: StepOutputs) -> None:
    """Send each front its requests' share of a step's outputs."""
    keys = [getattr(outputs, name) for name in _KEYS]
    if not any(map(len, keys)):
        return
    owners = np.unique(np.concatenate(keys) >> _ID_BITS)
    for number in owners.tolist():
        if number in loop.fronts:
            _send(loop, number, _outputs_for(number, outputs, alone=len(owners) == 1))


def _outputs_for(number: int, outputs: StepOutputs, *, alone: bool) -> StepOutputs:
    """A front's share, under its own ids."""
    values = dict(vars(outputs))
    if not alone:
        rows = {name[-1]: np.flatnonzero(values[name] >> _ID_BITS == number) for name in _KEYS}
        tops = _take(values, rows["O"], "top_offsets_O1", ("top_ids", "top_logprobs"))
        tops |= _take(values, rows["I"], "prompt_top_offsets_I1", ("prompt_top_ids", "prompt_top_logprobs"))
        values |= {name: value[rows[name[-1]]] for name, value in values.items() if name.endswith(("_O", "_I", "_J"))}
        values |= tops
    return StepOutputs(**values | {name: values[name] & _ID_MASK for name in _KEYS})


def _take(values: dict[str, Any], rows: np.ndarray, offsets: str, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Some rows of ragged arrays, with their offsets."""
    starts, counts = values[offsets][:-1][rows], np.diff(values[offsets])[rows]
    new_offsets = np.concatenate(([0], np.cumsum(counts)))
    index = np.arange(new_offsets[-1]) + np.repeat(starts - new_offsets[:-1], counts)
    return {offsets: new_offsets.astype(np.int32), **{name: values[name][index] for name in names}}


def _count(loop: Loop, plan: StepPlan, results: list[StepResult], clock: list[float]) -> None:
    totals = loop.totals
    totals["steps"] += bool(plan.num_tokens_P.any())
    totals["tokens_computed"] += int(plan.num_tokens_P.sum())
    totals["tokens_sampled"] += sum(len(result.token_O) for result in results)
    totals["forward_us"] += max(result.forward_us for result in results)
    for name, start, end in zip(("plan_us", "wait_us", "commit_us", "deliver_us"), clock, clock[1:], strict=False):
        totals[name] += int((end - start) * 1e6)


def _answer_stats(loop: Loop) -> None:
    """Statistics: the scheduler's gauges, the totals, and `ExpertLoad.summary`."""
    load = {"expert_load": [[]] * loop.info.num_layers} if loop.load is None else loop.load.summary()
    values = {**loop.scheduler.stats(), **loop.totals, **load}
    if loop.rebalancing is not None:
        values["rebalancing"] = {"epoch": loop.scheduler.epoch, **loop.rebalancing.stats()}
    for number in loop.asking:
        _send(loop, number, messages.Stats(values=values))
    loop.asking.clear()


def _send(loop: Loop, number: int, message: messages.Message) -> None:
    if number in loop.fronts:
        try:
            loop.fronts[number].send(messages.encode(message))
        except ChannelClosed:
            _forget(loop, number)


def _flush(loop: Loop, number: int) -> None:
    try:
        loop.fronts[number].flush()
    except ChannelClosed:
        _forget(loop, number)


def _forget(loop: Loop, number: int) -> None:
    """A front is gone: so are its requests."""
    loop.fronts.pop(number).close()
    loop.asking = [n for n in loop.asking if n != number]
    for key in loop.scheduler.unfinished():
        if key >> _ID_BITS == number:
            loop.scheduler.abort(key)


def _key(number: int, request_id: int) -> int:
    with contextlib.suppress(TypeError):
        if 0 <= request_id < 1 << _ID_BITS:
            return number << _ID_BITS | request_id
    raise ValueError(f"request id must be in [0, 2**{_ID_BITS}), got {request_id!r}")
