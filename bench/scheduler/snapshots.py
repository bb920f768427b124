"""`python -m expertwire.bench.scheduler.snapshots`: prefix hits of a hybrid in conversations, by the number of its snapshots.

The real scheduler serves turns of conversations on one simulated rank, one after the other. A prompt is the conversation so far
and a new question; one conversation in `--turns` ends with each turn, and another takes its place. Whose turn it is: after random
pauses ("random"), or everybody's in a fixed order ("in order"), the worst case for the least recently used. Blocks of attention
are enough for all conversations, so what is missing are states; the sizes are states for each open conversation, the one of the
running request among them.

Hit rates are shares of prompt tokens: `attention` is that of a model with attention alone, `hybrid` what the scheduler finds, and
`oracle` that of one which knows the trace: of what a request leaves it keeps the deepest state alone, and evicts the one that
saves the fewest tokens for the time until its next use.

O sampled rows.
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from expertwire.scheduler.config import CacheSpec, SchedulerConfig
from expertwire.scheduler.plan import StepResult
from expertwire.scheduler.request import Request
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.scheduler.scheduler import Scheduler

_BLOCK, _CHUNK, _STEP, _VOCABULARY = 16, 64, 512, 32_000
# System prompts, and the least and most tokens of a question and an answer.
SHAPES = {
    "chat": ((1536,), (100, 300), (40, 100)),
    "documents": ((200, 1000, 4000), (50, 2000), (50, 120)),
}
_FULL = CacheSpec(name="full", kind="full", bytes_per_token=1, writers=(0,), readers=(0,))
_STATE = CacheSpec(
    name="state", kind="state", bytes_per_token=1, writers=(1,), readers=(1,), snapshot_every=512, chunk_size=_CHUNK
)


@dataclass(frozen=True)
class Turn:
    """Which conversation goes on; tokens that its prompt shares with all of its system prompt, and of prompt and answer."""

    conversation: int
    num_system: int
    prompt: np.ndarray
    num_answer: int


def main() -> int:
    """Print a table in Markdown, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=32, help="open at once (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="of a conversation, on average (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1, 1.5, 2, 4])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    print(
        "| trace | turns | states per conversation | attention | hybrid | oracle | hybrid / attention | hybrid / oracle |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        for in_order in (False, True):
            turns = make_trace(shape, args.conversations, args.turns, args.requests, in_order=in_order)
            attention = hit_rate(turns, (_FULL,), 2)
            for size in args.sizes:
                num_states = int(size * args.conversations)
                hybrid = hit_rate(turns, (_FULL, _STATE), num_states)
                rates = attention, hybrid, oracle(turns, num_states)
                rows.append((shape, "in order" if in_order else "random", size, *(round(rate, 4) for rate in rates)))
                cells = " | ".join(f"{rate:.1%}" for rate in (*rates, hybrid / rates[0], hybrid / rates[2]))
                print(f"| {' | '.join(map(str, rows[-1][:3]))} | {cells} |", flush=True)
    if args.json:
        fields = "trace", "turns", "states_per_conversation", "attention", "hybrid", "oracle"
        args.json.write_text(json.dumps([dict(zip(fields, row, strict=True)) for row in rows], indent=1) + "\n")
    return 0


def make_trace(shape: str, num_open: int, num_turns: int, num_requests: int, *, in_order: bool) -> list[Turn]:
    """Return the turns of conversations; answers are token 4."""
    system, question, answer = SHAPES[shape]
    generator = np.random.default_rng(0)
    systems = [generator.integers(5, _VOCABULARY, num).astype(np.int32) for num in system]
    waiting: list[tuple[float, int]] = []
    histories: dict[int, tuple[int, np.ndarray]] = {}
    turns: list[Turn] = []

    def pause() -> float:
        return 1 if in_order else float(generator.exponential(num_open))

    def begin(time: float) -> None:
        number, text = len(histories), systems[generator.integers(len(systems))]
        histories[number] = len(text), text
        heapq.heappush(waiting, (time + pause(), number))

    for _ in range(num_open):
        begin(0)
    while len(turns) < num_requests:
        time, number = heapq.heappop(waiting)
        num_system, text = histories[number]
        new = generator.integers(5, _VOCABULARY, generator.integers(*question)).astype(np.int32)
        turns.append(Turn(number, num_system, np.concatenate((text, new)), int(generator.integers(*answer))))
        text = np.concatenate((turns[-1].prompt, np.full(turns[-1].num_answer, 4, np.int32)))
        histories[number] = num_system, text
        if generator.random() < 1 / num_turns:
            begin(time)
        else:
            heapq.heappush(waiting, (time + pause(), number))
    return turns


def hit_rate(turns: Sequence[Turn], specs: tuple[CacheSpec, ...], num_states: int) -> float:
    """Return the share of prompt tokens that the real scheduler finds, with so many states."""
    longest = max(len(turn.prompt) + turn.num_answer for turn in turns)
    num_full = sum((len(turn.prompt) + turn.num_answer) // _BLOCK + 2 for turn in turns)
    config = SchedulerConfig(
        num_ranks=1,
        max_num_seqs=1,
        max_num_batched_tokens=_STEP,
        max_model_len=longest,
        block_size=_BLOCK,
        num_blocks=(num_full, num_states + 1)[: len(specs)],
        max_queued_requests=1,
        eos_token_ids=(),
        vocab_size=_VOCABULARY,
    )
    scheduler = Scheduler(config, specs)
    found = 0
    for key, turn in enumerate(turns):
        params = SamplingParams(max_tokens=turn.num_answer, ignore_eos=True)
        assert scheduler.submit(Request(key=key, prompt=turn.prompt, params=params, seed=0), 0.0) is None
        first = True
        while (plan := scheduler.plan(0.0)) is not None:
            if first and len(plan.sched_start_S):
                found, first = found + int(plan.sched_start_S[0]), False
            slot_O = plan.sched_slot_S[plan.sched_sample_S == 1]
            token_O = np.full(len(slot_O), 4, np.int32)
            scheduler.commit(plan, [StepResult.sampled(step=plan.step, rank=0, slot_O=slot_O, token_O=token_O)], 0.0)
    return found / sum(len(turn.prompt) for turn in turns)


def oracle(turns: Sequence[Turn], num_states: int) -> float:
    """Return the share of prompt tokens found with so many states by someone who knows the trace."""
    uses: dict[tuple[str, int], list[int]] = defaultdict(list)
    for at, turn in enumerate(turns):
        uses["own", turn.conversation].append(at)
        uses["system", turn.num_system].append(at)
    depths: dict[tuple[str, int], int] = {}
    found = 0
    for at, turn in enumerate(turns):
        own, system = ("own", turn.conversation), ("system", turn.num_system)
        found += depths.get(own, depths.get(system, 0))
        depths[system] = turn.num_system // _CHUNK * _CHUNK
        depths[own] = (len(turn.prompt) + turn.num_answer - 1) // _CHUNK * _CHUNK
        worth = {}
        for key, depth in depths.items():
            later = [use for use in uses[key] if use > at]
            base = turns[uses[key][0]].num_system if key[0] == "own" else 0
            worth[key] = (depth - base) / (later[0] - at) if later else 0
        for key in sorted(worth, key=lambda key: worth[key])[: max(len(depths) - num_states, 0)]:
            del depths[key]
    return found / sum(len(turn.prompt) for turn in turns)


if __name__ == "__main__":
    raise SystemExit(main())
