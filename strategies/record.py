"""The log of a group's run, from which every decision can be made again.

A log is a sequence of events, one JSON object a line. `Recorded` is a strategy that writes them; `replay` reads them. Tokens are
written once: an event has what came since the last decision.

    group     num_prompt_tokens, forced_texts, strategy (as `registry.strategy_to_dict` or any description)
    started   branch, label, parent, num_shared, forced, text
    tokens    branch, token_ids, logprobs (if known), text (what was appended) or whole_text (where earlier text changed)
    paused    branch, num_tokens
    status    branch, status, finish_reason, answer
    scored    branch, num_tokens, value, verifier_tokens
    scoring   branch, scoring
    decided   elapsed_s, actions
    selected  elapsed_s, selection
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from expertwire.strategies.base import (
    Action,
    Branch,
    Finish,
    Fork,
    Group,
    Needs,
    Prune,
    Resume,
    Score,
    Selection,
    Start,
    Status,
    Strategy,
    Verify,
)

Event = dict[str, Any]

_ACTIONS = (Start, Fork, Prune, Resume, Verify, Finish)


class ReplayMismatch(Exception):
    """A strategy decided otherwise than the log says."""


@dataclass
class Recorded:
    """A strategy that decides as another one and writes down what it was told and what it decided. For one group only.

    Args:
        strategy: the one that decides.
        sink: is given each line, without its end.
        description: of the strategy, for the log.
    """

    strategy: Strategy
    sink: Callable[[str], None]
    description: object = None
    _last: Group | None = field(default=None, init=False)

    @property
    def needs(self) -> Needs:
        """The needs of the strategy."""
        return self.strategy.needs

    def decide(self, group: Group) -> Sequence[Action]:
        """Return the strategy's decision, and write it down."""
        actions = list(self.strategy.decide(group))
        self._write(group, {"event": "decided", "actions": [action_to_dict(action) for action in actions]})
        return actions

    def select(self, group: Group) -> Selection:
        """Return the strategy's selection, and write it down."""
        selection = self.strategy.select(group)
        self._write(group, {"event": "selected", "selection": asdict(selection)})
        return selection

    def _write(self, group: Group, decision: Event) -> None:
        for event in [*events_between(self._last, group, self.description), {**decision, "elapsed_s": group.elapsed_s}]:
            self.sink(json.dumps(event, ensure_ascii=False))
        self._last = group


@dataclass(frozen=True)
class Decision:
    """A moment of a log: the group that the strategy was shown, and what it decided: actions, or at the end a selection."""

    group: Group
    actions: tuple[Action, ...] | None
    selection: Selection | None = None


def decisions_of(lines: Iterable[str]) -> Iterator[Decision]:
    """Yield the decisions of a log in their order.

    Raises:
        ValueError: a line is no event of a log.
    """
    group: Group | None = None
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            kind = event["event"]
            if kind == "group":
                texts = tuple(tuple(text) for text in event["forced_texts"])
                group = Group(num_prompt_tokens=event["num_prompt_tokens"], forced_texts=texts)
                continue
            if group is None:
                raise ValueError("a log begins with the event 'group'")
            if kind == "decided":
                group = replace(group, elapsed_s=event["elapsed_s"])
                yield Decision(group, tuple(action_from_dict(action) for action in event["actions"]))
            elif kind == "selected":
                group = replace(group, elapsed_s=event["elapsed_s"])
                selection = event["selection"]
                yield Decision(group, None, Selection(**{**selection, "branches": tuple(selection["branches"])}))
            else:
                group = apply_event(group, event)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"line {number} is no event of a group's log: {error}") from error


def replay(lines: Iterable[str], strategy: Strategy) -> list[Decision]:
    """Make every decision of a log again, and return them.

    Raises:
        ReplayMismatch: the strategy decides or selects otherwise; says where.
        ValueError: a line is no event of a log.
    """
    decisions = []
    for number, decision in enumerate(decisions_of(lines)):
        expected: object = decision.actions
        found: object = None
        if decision.actions is not None:
            found = tuple(strategy.decide(decision.group))
        else:
            expected, found = decision.selection, strategy.select(decision.group)
        if expected != found:
            raise ReplayMismatch(f"decision {number}: the log has {expected}, the strategy says {found}")
        decisions.append(decision)
    return decisions


def events_between(before: Group | None, after: Group, description: object = None) -> Iterator[Event]:
    """Yield the events that lead from one view of a group to a later one; `before` is None for the first."""
    if before is None:
        yield {
            "event": "group",
            "num_prompt_tokens": after.num_prompt_tokens,
            "forced_texts": [list(text) for text in after.forced_texts],
            "strategy": description,
        }
    known = len(before.branches) if before is not None else 0
    for branch in after.branches:
        if branch.index >= known:
            yield {
                "event": "started",
                "branch": branch.index,
                "label": branch.label,
                "parent": branch.parent,
                "num_shared": branch.num_shared,
                "forced": list(branch.token_ids[branch.num_shared - branch.num_forced : branch.num_shared]),
            }
            old = _begun(branch)
        else:
            assert before is not None
            old = before.branches[branch.index]
        yield from _news(old, branch)


def _begun(branch: Branch) -> Branch:
    """Return a branch as it is when it starts, with the tokens it shares, and without text."""
    return Branch(
        index=branch.index,
        parent=branch.parent,
        num_shared=branch.num_shared,
        num_forced=branch.num_forced,
        label=branch.label,
        token_ids=branch.token_ids[: branch.num_shared],
        logprobs=branch.logprobs[: branch.num_shared],
        step_ends=tuple(end for end in branch.step_ends if end <= branch.num_shared - branch.num_forced),
    )


def _news(old: Branch, new: Branch) -> Iterator[Event]:
    about: Event = {"branch": new.index}
    token_ids, logprobs = new.token_ids[len(old.token_ids) :], new.logprobs[len(old.logprobs) :]
    if token_ids or new.text != old.text:
        appends = new.text.startswith(old.text)
        text = {"text": new.text[len(old.text) :]} if appends else {"whole_text": new.text}
        yield {"event": "tokens", **about, "token_ids": list(token_ids), "logprobs": list(logprobs), **text}
    for end in new.step_ends[len(old.step_ends) :]:
        yield {"event": "paused", **about, "num_tokens": end}
    ended = (new.status, new.finish_reason, new.answer)
    if ended != (old.status, old.finish_reason, old.answer):
        status = {"status": new.status.value, "finish_reason": new.finish_reason, "answer": new.answer}
        yield {"event": "status", **about, **status}
    for score in new.scores[len(old.scores) :]:
        yield {"event": "scored", **about, **asdict(score)}
    if new.scoring != old.scoring:
        yield {"event": "scoring", **about, "scoring": new.scoring}


def apply_event(group: Group, event: Event) -> Group:
    """Return the group after an event about one of its branches.

    Raises:
        ValueError: the event is not known.
    """
    index = event["branch"]
    if event["event"] == "started":
        if index != len(group.branches):
            raise ValueError(f"branch {index} started after {len(group.branches)} branches")
        return replace(group, branches=(*group.branches, _started(group, event)))
    branch = _after(group.branches[index], event)
    return replace(group, branches=(*group.branches[:index], branch, *group.branches[index + 1 :]))


def _started(group: Group, event: Event) -> Branch:
    branch = Branch(index=event["branch"], label=event["label"])
    if event["parent"] is None:
        return branch
    parent, forced = group.branches[event["parent"]], tuple(event["forced"])
    count = event["num_shared"] - len(forced)
    return replace(
        branch,
        parent=parent.index,
        num_shared=event["num_shared"],
        num_forced=len(forced),
        token_ids=(*parent.token_ids[:count], *forced),
        logprobs=(*parent.logprobs[:count], *(0.0 for _ in forced)) if parent.logprobs else (),
        step_ends=tuple(end for end in parent.step_ends if end <= count),
    )


def _after(branch: Branch, event: Event) -> Branch:
    match event["event"]:
        case "tokens":
            return replace(
                branch,
                token_ids=(*branch.token_ids, *event["token_ids"]),
                logprobs=(*branch.logprobs, *event["logprobs"]),
                text=event["whole_text"] if "whole_text" in event else branch.text + event["text"],
            )
        case "paused":
            return replace(branch, step_ends=(*branch.step_ends, event["num_tokens"]))
        case "status":
            status = Status(event["status"])
            return replace(branch, status=status, finish_reason=event["finish_reason"], answer=event["answer"])
        case "scored":
            fields = ("num_tokens", "value", "verifier_tokens")
            return replace(branch, scores=(*branch.scores, Score(**{name: event[name] for name in fields})))
        case "scoring":
            return replace(branch, scoring=event["scoring"])
    raise ValueError(f"the event {event['event']!r} is not known")


def action_to_dict(action: Action) -> dict[str, Any]:
    """Return an action as JSON's types."""
    return {"action": type(action).__name__.lower(), **asdict(action)}


def action_from_dict(values: dict[str, Any]) -> Action:
    """Return the action that `action_to_dict` made this of."""
    kinds: dict[str, Callable[..., Action]] = {kind.__name__.lower(): kind for kind in _ACTIONS}
    fields = {name: tuple(value) if name == "forced" else value for name, value in values.items() if name != "action"}
    return kinds[values["action"]](**fields)
