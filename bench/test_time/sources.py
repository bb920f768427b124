"""Tokens of simulated branches: sampled now, or read from a bank of branches that were sampled before.

Branch i of a problem draws as a function of (problem's seed, i, position) alone, so that a branch which begins at the prompt is
the same in every run, and strategies that only start, prune and vote can be compared on one bank.

S sequences of a step, V vocabulary.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from expertwire.bench.test_time.network import Network
from expertwire.deploy.demo_task import EOS, WORDS, Problem

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
TOKEN_IDS = {word: token_id for token_id, word in enumerate(WORDS)}
EOS_ID = TOKEN_IDS[EOS]


@dataclass(frozen=True)
class Asked:
    """A test problem with the seed of its draws."""

    problem: Problem
    seed: int

    @property
    def max_tokens(self) -> int:
        """Return the most output tokens of a branch: size - 1 steps of at most size + 6 words each."""
        size = len(self.problem.numbers)
        return size * (size + 6)


class Source(Protocol):
    """Tokens of rows; a row is a branch of one of the problems given to `open`."""

    def open(self, asked: Sequence[Asked]) -> None:
        """Forget all rows, and begin with these problems."""
        ...

    def start(self, row: int, group: int, branch: int, greedy: bool) -> None:
        """Begin a row at the prompt of problem `group`."""
        ...

    def fork(self, parent: int, row: int, branch: int, token_ids: Sequence[int], greedy: bool) -> None:
        """Begin a row that continues another one after its first tokens; `token_ids` are all that it has."""
        ...

    def release(self, row: int) -> None:
        """Forget a row: it is neither advanced nor forked any more."""
        ...

    def advance(self, rows: Ints) -> tuple[Ints, Floats]:
        """Return one more token of each row, and its log-probability before the temperature."""
        ...


class Sampler:
    """Samples with a network, 0.7 being the temperature of all measurements of the demo models."""

    def __init__(self, folder: Path, *, temperature: float = 0.7, max_positions: int = 128) -> None:
        self.network = Network(folder, max_positions)
        self._temperature = temperature

    def open(self, asked: Sequence[Asked]) -> None:
        """Compute the prompts, each in a slot of its own; all have the same length."""
        self._seeds = [one.seed for one in asked]
        prompts = np.array([[TOKEN_IDS[word] for word in one.problem.prompt.split()] for one in asked])
        self._num_prompts, self._prompt_length = prompts.shape
        self._rows: list[tuple[int, int, bool, int]] = []  # seed, branch, greedy, output tokens
        self._last: list[int] = []  # the token that the network has not seen
        self._slots: list[int] = []  # of rows, in the network's cache
        self._free: list[int] = []  # slots of released rows, a heap
        self._copies: dict[int, int] = {}  # from slots, by the slots to which they are still to be copied
        self.num_slots = self._capacity = self._num_prompts
        self.network.reserve(self._capacity)
        slots = torch.arange(self._num_prompts)
        for t in range(self._prompt_length - 1):
            self.network.step(torch.from_numpy(prompts[:, t]), torch.full_like(slots, t), slots)
        self._prompt_last = prompts[:, -1].tolist()

    def start(self, row: int, group: int, branch: int, greedy: bool) -> None:
        """Begin a row at a prompt."""
        self._add(row, group, (self._seeds[group], branch, greedy, 0), self._prompt_last[group])

    def fork(self, parent: int, row: int, branch: int, token_ids: Sequence[int], greedy: bool) -> None:
        """Begin a row with another one's cache; tokens that its parent has not are computed."""
        seed, _, _, length = self._rows[parent]
        assert self._slots[parent] >= 0, f"row {parent} was released"
        self._add(row, self._slots[parent], (seed, branch, greedy, len(token_ids)), token_ids[-1])
        missing = range(min(length, len(token_ids)) - 1, len(token_ids) - 1)
        if missing:
            self._copy()
        for t in missing:
            position, slot = torch.tensor([self._prompt_length + t]), torch.tensor([self._slots[row]])
            self.network.step(torch.tensor([token_ids[t]]), position, slot)

    def release(self, row: int) -> None:
        """Forget a row, whose slot another one will take."""
        if self._slots[row] >= 0:
            heapq.heappush(self._free, self._slots[row])
            self._slots[row] = -1

    def advance(self, rows: Ints) -> tuple[Ints, Floats]:
        """Sample by inversion of the distribution function at a number that is a hash of (seed, branch, position)."""
        self._copy()
        slots = np.array(self._slots)[rows]
        rows, slots = rows[(order := slots.argsort())], slots[order]
        states = [self._rows[row] for row in rows]
        seeds, branches, greedy, lengths = (np.array(column) for column in zip(*states, strict=True))
        ids_S = torch.tensor([self._last[row] for row in rows])
        positions_S = torch.from_numpy(self._prompt_length - 1 + lengths)
        logprobs_SV = self.network.step(ids_S, positions_S, torch.from_numpy(slots))
        cumulative_SV = (logprobs_SV / self._temperature).softmax(-1).double().cumsum(-1)
        draws_S = torch.from_numpy(uniform(seeds, branches, lengths)) * cumulative_SV[:, -1]
        drawn_S = (cumulative_SV <= draws_S[:, None]).sum(-1)
        tokens_S = torch.where(torch.from_numpy(greedy), logprobs_SV.argmax(-1), drawn_S)
        logprobs_S = logprobs_SV.gather(1, tokens_S[:, None])[:, 0]
        for row, token in zip(rows.tolist(), tokens_S.tolist(), strict=True):
            seed, branch, is_greedy, length = self._rows[row]
            self._rows[row], self._last[row] = (seed, branch, is_greedy, length + 1), token
        back = order.argsort()
        return tokens_S.numpy()[back], logprobs_S.numpy()[back]

    def _add(self, row: int, source: int, state: tuple[int, int, bool, int], last: int) -> None:
        assert row == len(self._rows), f"row {row} is not the next one, {len(self._rows)}"
        if self._free:
            slot = heapq.heappop(self._free)
        else:
            slot, self.num_slots = self.num_slots, self.num_slots + 1
        if source in self._copies or slot in self._copies:
            self._copy()
        self._copies[slot] = source
        self._rows.append(state)
        self._last.append(last)
        self._slots.append(slot)

    def _copy(self) -> None:
        if self.num_slots > self._capacity:
            self._capacity = max(self.num_slots, self._capacity * 3 // 2)
            self.network.reserve(self._capacity)
        if self._copies:
            longest = self._prompt_length + max(length for _, _, _, length in self._rows)
            self.network.copy(list(self._copies.values()), list(self._copies), longest)
            self._copies = {}


class Bank:
    """Branches from the prompt, sampled before; they cannot be forked.

    Attributes:
        asked: the problems.
        tokens: [problems, branches + 1, positions], EOS included and 0 behind it; the last branch is the greedy one.
        logprobs: of the tokens, before the temperature.
    """

    def __init__(self, asked: Sequence[Asked], tokens: NDArray[np.int16], logprobs: Floats) -> None:
        self.asked, self.tokens, self.logprobs = asked, tokens, logprobs
        self._index = {one: i for i, one in enumerate(asked)}

    @classmethod
    def sample(cls, sampler: Sampler, asked: Sequence[Asked], branches: int, *, at_once: int = 100) -> Bank:
        """Sample branches of every problem, and a greedy one."""
        shape = (len(asked), branches + 1, asked[0].max_tokens)
        tokens, logprobs = np.zeros(shape, np.int16), np.zeros(shape, np.float32)
        for begin in range(0, len(asked), at_once):
            some = asked[begin : begin + at_once]
            sampler.open(some)
            for row, (group, branch) in enumerate(np.ndindex(len(some), branches + 1)):
                sampler.start(row, group, branch, greedy=branch == branches)
            rows = np.arange(len(some) * (branches + 1))
            for t in range(shape[2]):
                drawn, of_drawn = sampler.advance(rows)
                groups, branch_ids = np.divmod(rows, branches + 1)
                tokens[begin + groups, branch_ids, t], logprobs[begin + groups, branch_ids, t] = drawn, of_drawn
                rows = rows[drawn != EOS_ID]
                if not len(rows):
                    break
        return cls(asked, tokens, logprobs)

    @classmethod
    def load(cls, path: Path, asked: Sequence[Asked]) -> Bank:
        """Read the bank of these problems from a file."""
        arrays = np.load(path)
        assert len(asked) == len(arrays["tokens"]), f"{path} is the bank of other problems"
        return cls(asked, arrays["tokens"], arrays["logprobs"].astype(np.float32))

    def save(self, path: Path) -> None:
        """Write the tokens and their log-probabilities, these in fp16."""
        np.savez_compressed(path, tokens=self.tokens, logprobs=self.logprobs.astype(np.float16))

    def texts(self, branch: int) -> list[str]:
        """Return the text of one branch of every problem; -1 is the greedy one."""
        ends = (self.tokens[:, branch] == EOS_ID).argmax(-1)
        lengths = np.where((self.tokens[:, branch] == EOS_ID).any(-1), ends, self.tokens.shape[2])
        return [
            " ".join(WORDS[token] for token in row[:n]) for row, n in zip(self.tokens[:, branch], lengths, strict=True)
        ]

    def lengths(self, branch: int) -> Ints:
        """Return the output tokens of one branch of every problem, EOS included."""
        has_end = (self.tokens[:, branch] == EOS_ID).any(-1)
        return np.where(has_end, (self.tokens[:, branch] == EOS_ID).argmax(-1) + 1, self.tokens.shape[2])

    def open(self, asked: Sequence[Asked]) -> None:
        """Find the problems in the bank."""
        self._problems = [self._index[one] for one in asked]
        self._rows: list[tuple[int, int]] = []
        self._lengths = np.zeros(0, np.int64)

    def start(self, row: int, group: int, branch: int, greedy: bool) -> None:
        """Begin a row with a branch of the bank."""
        assert row == len(self._rows), f"row {row} is not the next one, {len(self._rows)}"
        assert branch < self.tokens.shape[1] - 1, f"branch {branch} of {self.tokens.shape[1] - 1}"
        self._rows.append((self._problems[group], -1 if greedy else branch))

    def fork(self, parent: int, row: int, branch: int, token_ids: Sequence[int], greedy: bool) -> None:
        """Raise: a bank has no branches but those from the prompt."""
        raise ValueError("a bank has no forks: searches over steps need a Sampler")

    def release(self, row: int) -> None:
        """Do nothing: a row of a bank costs nothing."""

    def advance(self, rows: Ints) -> tuple[Ints, Floats]:
        """Read the next tokens."""
        if len(self._lengths) < len(self._rows):
            self._lengths = np.pad(self._lengths, (0, len(self._rows) - len(self._lengths)))
            self._where = np.array(self._rows)
        problems, branches = self._where[rows].T
        at = self._lengths[rows]
        self._lengths[rows] += 1
        return self.tokens[problems, branches, at].astype(np.int64), self.logprobs[problems, branches, at]


def uniform(seeds: Ints, branches: Ints, positions: Ints) -> NDArray[np.float64]:
    """Return numbers in [0, 1) by (seed, branch, position): splitmix64 of their combination."""
    with np.errstate(over="ignore"):
        x = np.zeros(len(seeds), np.uint64)
        for part in (seeds, branches, positions):
            x = (x ^ part.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
