"""Request traces for `bench schedule`, each a pure function of its fields, the seed included.

    poisson       arrivals without memory; prompts and outputs of log-normal lengths
    bursty        the same rate in bursts: gamma-distributed gaps of a coefficient of variation `cv` above 1
    long-context  poisson, in which a share of the prompts is tens of thousands of tokens long
    tenants       poisson; tenants of Zipf popularity, each with a system prompt and a priority of its own
    multi-turn    sessions that begin with one system prompt; a turn's prompt is the one before, its answer and new text

The default lengths have the ratio of prompt to output tokens, 3.6, that DeepSeek published of a day
of its traffic (open-infra-index, day 6; 56 % of its prompt tokens were cache hits, which
`multi-turn` is for). `oracle_hits` says what a prefix cache of unlimited size could have saved; it
shares no code with the scheduler's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Log-normal token counts, cut to [low, high]."""

    median: float
    sigma: float
    low: int = 1
    high: int

    def draw(self, generator: np.random.Generator) -> int:
        value = self.median * np.exp(self.sigma * generator.standard_normal())
        return int(np.clip(value, self.low, self.high))


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrival:
    """One request.

    Args:
        time: seconds since the trace began.
        prompt: i32 [length]; token 0 is the end of sequence and never in it.
        output_len: tokens after which the model ends the answer: by itself if fewer than `max_tokens`.
        abort_at: when its client goes away.
        session: in `multi-turn`, -1 elsewhere.
        turn: of the session, from 0.
    """

    time: float
    prompt: np.ndarray
    output_len: int
    max_tokens: int
    tenant: str = ""
    priority: int = 0
    abort_at: float | None = None
    session: int = -1
    turn: int = 0


@dataclass(frozen=True, kw_only=True)
class Poisson:
    """Arrivals without memory, and what the other traces have in common.

    Args:
        num_requests: in all.
        rate: requests a second, on average. prompt, output: lengths in tokens; `output.high` is
        every request's `max_tokens`.
        abort_share: requests whose client goes away, within `patience_s` (mean of an exponential)
        of the arrival.
        vocab_size: token ids are in [1, vocab_size).
        max_model_len: prompt and `max_tokens` together; longer prompts are cut.
    """

    num_requests: int = 1000
    rate: float = 20.0
    seed: int = 0
    prompt: Lengths = field(default_factory=lambda: Lengths(median=600, sigma=1.1, low=4, high=16384))
    output: Lengths = field(default_factory=lambda: Lengths(median=220, sigma=0.8, high=2048))
    abort_share: float = 0.0
    patience_s: float = 2.0
    vocab_size: int = 32000
    max_model_len: int = 40960

    def __post_init__(self) -> None:
        if self.num_requests < 1:
            raise ValueError(f"num_requests must be an integer >= 1, got {self.num_requests}")
        if not self.rate > 0:
            raise ValueError(f"rate must be a number > 0, got {self.rate}")

    def arrivals(self) -> list[Arrival]:
        """Return all arrivals that do not wait for an output, in order of time."""
        generator = np.random.default_rng(self.seed)
        times = np.cumsum(self._gaps(generator))
        return [self._arrival(generator, float(time)) for time in times]

    def follow_up(self, arrival: Arrival, answer: np.ndarray, now: float) -> Arrival | None:
        """Return the client's next request after `arrival` was answered (i32 [length]) at `now`, or None."""
        return None

    def _gaps(self, generator: np.random.Generator) -> np.ndarray:
        return generator.exponential(1 / self.rate, self.num_requests)

    def _prompt_len(self, generator: np.random.Generator) -> int:
        return self.prompt.draw(generator)

    def _arrival(self, generator: np.random.Generator, time: float) -> Arrival:
        length = min(self._prompt_len(generator), self.max_model_len - self.output.high)
        return self._ask(generator, time, self._text(generator, length))

    def _text(self, generator: np.random.Generator, length: int) -> np.ndarray:
        return generator.integers(1, self.vocab_size, length, dtype=np.int32)

    def _ask(self, generator: np.random.Generator, time: float, prompt: np.ndarray, **more: object) -> Arrival:
        output_len = self.output.draw(generator)
        leaves = generator.random() < self.abort_share
        patience = generator.exponential(self.patience_s)
        return Arrival(
            time=time,
            prompt=prompt,
            output_len=output_len,
            max_tokens=self.output.high,
            abort_at=time + patience if leaves else None,
            **more,  # type: ignore[arg-type]
        )


@dataclass(frozen=True, kw_only=True)
class Bursty(Poisson):
    """The same mean rate; gaps are gamma-distributed with a standard deviation of `cv` times their mean."""

    cv: float = 4.0

    def _gaps(self, generator: np.random.Generator) -> np.ndarray:
        shape = 1 / self.cv**2
        return generator.gamma(shape, 1 / (self.rate * shape), self.num_requests)


@dataclass(frozen=True, kw_only=True)
class LongContext(Poisson):
    """A share of the prompts is long."""

    rate: float = 8.0
    long_share: float = 0.1
    long: Lengths = field(default_factory=lambda: Lengths(median=20000, sigma=0.4, low=8192, high=38000))

    def _prompt_len(self, generator: np.random.Generator) -> int:
        lengths = self.long if generator.random() < self.long_share else self.prompt
        return lengths.draw(generator)


@dataclass(frozen=True, kw_only=True)
class Tenants(Poisson):
    """Tenant i = 0, 1, ... sends a share proportional to (i + 1) ** -zipf, behind its own system prompt.

    Args:
        system_tokens: of each tenant's system prompt.
        num_priorities: tenant i has priority i modulo this.
    """

    num_tenants: int = 50
    zipf: float = 1.1
    system_tokens: int = 256
    num_priorities: int = 2

    def shares(self) -> np.ndarray:
        """Return the tenants' shares: f64 [num_tenants], which sum to 1."""
        weights = np.arange(1, self.num_tenants + 1) ** -self.zipf
        return weights / weights.sum()

    def _arrival(self, generator: np.random.Generator, time: float) -> Arrival:
        tenant = int(generator.choice(self.num_tenants, p=self.shares()))
        system = self._text(np.random.default_rng((self.seed, tenant)), self.system_tokens)
        length = min(self._prompt_len(generator), self.max_model_len - self.output.high - self.system_tokens)
        prompt = np.concatenate([system, self._text(generator, length)])
        return self._ask(generator, time, prompt, tenant=f"tenant {tenant}", priority=tenant % self.num_priorities)


@dataclass(frozen=True, kw_only=True)
class MultiTurn(Poisson):
    """Sessions of `turns` turns, or fewer if the next prompt would be too long.

    `num_requests` and `rate` count turns, so sessions begin at `rate / turns` a second.

    Args:
        system_tokens: of the one system prompt.
        user: tokens of the text that a turn adds.
        think_s: mean of the exponential time between an answer and the next turn.
    """

    turns: int = 5
    system_tokens: int = 512
    user: Lengths = field(default_factory=lambda: Lengths(median=100, sigma=0.8, low=4, high=2048))
    think_s: float = 5.0

    def arrivals(self) -> list[Arrival]:
        generator = np.random.default_rng(self.seed)
        sessions = max(1, self.num_requests // self.turns)
        times = np.cumsum(generator.exponential(self.turns / self.rate, sessions))
        system = self._text(generator, self.system_tokens)
        return [self._turn(session, 0, float(time), system) for session, time in enumerate(times)]

    def follow_up(self, arrival: Arrival, answer: np.ndarray, now: float) -> Arrival | None:
        context = np.concatenate([arrival.prompt, answer])
        room = self.max_model_len - self.output.high - self.user.high
        if arrival.turn + 1 == self.turns or len(context) > room:
            return None
        return self._turn(arrival.session, arrival.turn + 1, now, context)

    def _turn(self, session: int, turn: int, time: float, context: np.ndarray) -> Arrival:
        # One generator a turn, so that what a session says does not depend on when others are answered.
        generator = np.random.default_rng((self.seed, session, turn))
        if turn:
            time += float(generator.exponential(self.think_s))
        prompt = np.concatenate([context, self._text(generator, self.user.draw(generator))])
        return self._ask(generator, time, prompt, session=session, turn=turn)


TRACES: Mapping[str, Callable[..., Poisson]] = {
    "poisson": Poisson,
    "bursty": Bursty,
    "long-context": LongContext,
    "tenants": Tenants,
    "multi-turn": MultiTurn,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Served:
    """A request with its outcome.

    Args:
        computed: i32, what of its answer was computed, and not only sampled: all but the last
            token; that one too, if it ended by itself and the next step had been planned already.
        finished: when; None if it was aborted.
    """

    arrival: Arrival
    submitted: float
    computed: np.ndarray
    finished: float | None


def oracle_hits(history: Iterable[Served], block_size: int, num_caches: int = 1) -> int:
    """Return the prompt tokens that a prefix cache of unlimited size would find.

    With several caches, sessions are dealt out to them in turn, and so are requests without a
    session: what many have in common must be computed once in each.

    Whole blocks only, and never a prompt's last token, which has to be computed. An answer is known
    from its end on. Prefixes are shared within one tenant. An upper bound: a real cache has a
    prompt's blocks only after it has computed them, and only on the rank that has.
    """
    events: list[tuple[float, int, int, Served]] = []
    owners: dict[int, str] = {}
    for order, served in enumerate(history):
        session = served.arrival.session
        owners[order] = f"{(session if session >= 0 else order) % num_caches} {served.arrival.tenant}"
        events.append((served.submitted, 1, order, served))
        if served.finished is not None:
            events.append((served.finished, 0, order, served))
    known: set[bytes] = set()
    hits = 0
    for _, is_submission, order, served in sorted(events, key=lambda event: event[:3]):
        prompt = served.arrival.prompt
        if is_submission:
            chain = list(_chain(prompt, block_size, owners[order]))
            usable = chain[: (len(prompt) - 1) // block_size]
            hits += block_size * next((i for i, block in enumerate(usable) if block not in known), len(usable))
        else:
            chain = list(_chain(np.concatenate([prompt, served.computed]), block_size, owners[order]))
        known.update(chain)
    return hits


def _chain(tokens: np.ndarray, block_size: int, owner: str) -> Iterator[bytes]:
    """Return a hash for each full block, chained over all blocks before it."""
    name = hashlib.blake2b(owner.encode(), digest_size=16).digest()
    data = np.ascontiguousarray(tokens, np.int32).tobytes()
    for end in range(4 * block_size, len(data) + 1, 4 * block_size):
        name = hashlib.blake2b(name + data[end - 4 * block_size : end], digest_size=16).digest()
        yield name
