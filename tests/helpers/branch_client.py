"""A frontend without text: it submits groups of branches, forks and resumes them, and collects what comes by sequence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from expertwire.deploy.runtime import make_launcher, with_model_folder
from expertwire.engine import messages
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.engine import Engine
from expertwire.engine.frontend.api import RequestOptions
from expertwire.scheduler.outputs import FinishReason, Rejection, StepOutputs
from expertwire.scheduler.sampling_params import SamplingParams


class BranchClient:
    """One channel to an engine.

    Attributes:
        tokens, logprobs: of each sequence so far, without those that it began with.
        finish: of the sequences that have ended.
        paused: sequences that wait for `resume`.
        routed: tokens that went to an expert, summed over all, by sequence.
    """

    def __init__(self, engine: Engine) -> None:
        self._channel = engine.connect()
        self._num_sequences = 0
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[float]] = {}
        self.finish: dict[int, FinishReason] = {}
        self.paused: set[int] = set()
        self.routed: dict[int, int] = {}
        self._stats: list[messages.Stats] = []
        self._send(messages.Hello())

    def submit(self, tokens: Sequence[int], params: SamplingParams, count: int = 1, **fields: object) -> list[int]:
        """Submit a group; `fields` are others of `Submit`. Return the sequences' ids."""
        ids = list(range(self._num_sequences, self._num_sequences + count))
        self._num_sequences += count
        for sequence in ids:
            self.tokens[sequence], self.logprobs[sequence] = [], []
        message = messages.Submit(
            sequence_ids=np.array(ids, np.int64),
            params=params.to_dict(),
            options=RequestOptions().to_dict(),
            tokens=np.array(tokens, np.int32),
            **fields,
        )
        self._send(message)
        return ids

    def resume(self, *ids: int) -> None:
        self.paused -= set(ids)
        self._send(messages.Resume(ids=np.array(ids, np.int64)))

    def abort(self, *ids: int) -> None:
        self._send(messages.Abort(ids=np.array(ids, np.int64)))

    def run(self, *ids: int, resumes: bool = True) -> None:
        """Take messages until these sequences (none: all) have ended, or, unless it `resumes` them, are paused."""
        ids = ids or tuple(self.tokens)
        while any(sequence not in self.finish and (resumes or sequence not in self.paused) for sequence in ids):
            self.take()
            if resumes and self.paused:
                self.resume(*self.paused)

    def take(self) -> None:
        """Take one message."""
        arrays = self._channel.recv(60.0)
        assert arrays is not None, "the engine says nothing"
        message = messages.decode(arrays)
        assert not isinstance(message, Rejection | messages.Failure), message
        if isinstance(message, messages.Stats):
            self._stats.append(message)
        if not isinstance(message, StepOutputs):
            return
        rows = message.key_O.tolist(), message.token_O.tolist(), message.logprob_O.tolist(), message.finish_O.tolist()
        for sequence, token, logprob, finish in zip(*rows, strict=True):
            assert sequence not in self.finish, f"{sequence} has ended"
            assert sequence not in self.paused, f"{sequence} is paused"
            self.tokens[sequence].append(token)
            self.logprobs[sequence].append(logprob)
            if finish == FinishReason.PAUSED:
                self.paused.add(sequence)
            elif finish:
                self.finish[sequence] = FinishReason(finish)
        for sequence, num in zip(message.routed_keys.tolist(), message.routed_tokens.tolist(), strict=True):
            self.routed[sequence] = self.routed.get(sequence, 0) + num

    def bits(self, sequence: int) -> tuple[list[int], bytes]:
        """Return a sequence's tokens and log-probabilities, for comparison bit by bit."""
        return self.tokens[sequence], np.array(self.logprobs[sequence], np.float32).tobytes()

    def stats(self) -> dict:
        """Return the engine's counters."""
        self._stats.clear()
        self._send(messages.StatsRequest())
        while not self._stats:
            self.take()
        return self._stats[0].values

    def close(self) -> None:
        self._channel.close()

    def _send(self, message: messages.Message) -> None:
        self._channel.send(messages.encode(message))


@contextlib.contextmanager
def branch_client(folder, **options: object) -> Iterator[BranchClient]:
    """Yield a client with an engine of its own."""
    config = with_model_folder(EngineConfig(model=str(folder), launcher="local", threads_per_rank=1, **options))
    with Engine(config, make_launcher(config), ()) as engine, contextlib.closing(BranchClient(engine)) as client:
        yield client
