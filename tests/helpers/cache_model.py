"""A model without weights whose next token depends on all that its caches hold for it: a wrong block anywhere gives another text.

Each cache keeps a hash of the tokens up to a position; the next token is a hash of the sums of those that a token sees. So tokens
can be told without any cache (`text`). The scheduler, the slots and the runner are the real ones.
"""

from collections import deque
from types import SimpleNamespace

import numpy as np
import torch

from expertwire.engine.kv_cache import caches as named_caches
from expertwire.kernels.ops import attention
from expertwire.scheduler.config import CacheSpec, SchedulerConfig
from expertwire.scheduler.request import Request
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.scheduler.scheduler import Scheduler

VOCAB, BLOCK = 101, 4
_TENSORS = (((1,), torch.int64), ((2, 1), torch.int64))  # of a token in a layer


def spec(kind, window=None):
    return CacheSpec(
        name=f"{kind} {window}", kind=kind, bytes_per_token=8, writers=(0, 2), readers=(0, 2), window=window
    )


SPECS = (spec("latent"), spec("window", 6), spec("index"), spec("window", 11))
SIZES = {"max_model_len": 64, "block_size": BLOCK}


def _hash(state, token):
    return (state * 1_000_003 + token + 1) % 2**31


def _token(sums):
    return sum((i + 1) * total for i, total in enumerate(sums)) % VOCAB


def text(prompt, num_tokens):
    """Return the tokens that the model generates after the prompt."""
    tokens, states = list(prompt), [0]
    for token in tokens:
        states.append(_hash(states[-1], token))
    for _ in range(num_tokens):
        seen = [states[max(1, len(states) - (spec.window or len(states))) :] for spec in SPECS]
        tokens.append(_token([sum(states) for states in seen]))
        states.append(_hash(states[-1], tokens[-1]))
    return tokens[len(prompt) :]


class CacheModel:
    """See the module. Two layers write, in parallel; the second one's caches hold the hash and one."""

    config = SimpleNamespace(num_labels=0)

    def __init__(self, ops):
        names = {"rank": 0, "device": "cpu", "all_to_alls": (), "exchange_tokens": None}
        self.context = SimpleNamespace(ops=ops, **names)

    def allocate(self, *, num_blocks, block_size, max_model_len):
        return [
            named_caches.make(spec, num, block_size, dict.fromkeys(spec.writers, _TENSORS), "cpu")
            for spec, num in zip(SPECS, num_blocks, strict=True)
        ]

    def forward(self, batches, caches):
        return torch.cat([self._forward(batch, caches) for batch in batches])

    def _forward(self, batch, caches):
        metadata = batch.attention_metadata
        out = torch.zeros(len(batch.token_ids_T), 1)
        for i, begin, end, length in attention.each_sequence(metadata[0]):
            if begin < end and metadata[0].slot_mapping[begin] >= 0:
                assert batch.positions_T[begin:end].tolist() == [*range(length - end + begin, length)]
                self._check_slid(batch, i, length - end + begin)
                before = self._seen(metadata[0], caches[0], i, length - end + begin - 1)
                self._write(batch, caches, begin, end, before[-1] if before else 0)
                for row in range(begin, end):
                    position = length - end + row
                    seen = [self._seen(*pair, i, position) for pair in zip(metadata, caches, strict=True)]
                    out[row] = _token([sum(held) for held in seen])
        return out

    def _write(self, batch, caches, begin, end, state):
        for row in range(begin, end):
            state = _hash(state, int(batch.token_ids_T[row]))
            for cache, rows in zip(caches, batch.attention_metadata, strict=True):
                at = int(rows.slot_mapping[row])
                assert at >= BLOCK, "a token goes to the null block"
                for more, layer in enumerate(cache.spec.writers):
                    for tensor in cache.layers[layer]:
                        tensor[at // BLOCK, at % BLOCK] = state + more

    def _check_slid(self, batch, i, start):
        for spec, rows in zip(SPECS, batch.attention_metadata, strict=True):
            first = 0 if spec.window is None else max(start - spec.window + 1, 0) // BLOCK
            assert not rows.block_table[i, :first].any(), "a block that slid out is not the null block"

    def _seen(self, rows, cache, i, position):
        """Return the cached numbers that a token of sequence i attends to."""
        first = 0 if cache.spec.window is None else max(position - cache.spec.window + 1, 0)
        table = rows.block_table[i].tolist()
        seen = []
        for p in range(first, position + 1):
            assert table[p // BLOCK], "a token sees the null block"
            held = {
                int(number) - more
                for more, layer in enumerate(cache.spec.writers)
                for tensor in cache.layers[layer]
                for number in tensor[table[p // BLOCK], p % BLOCK].flatten()
            }
            assert len(held) == 1, f"the layers' tensors are at odds: {held}"
            seen.append(held.pop())
        return seen

    def logits(self, x_XD):
        return torch.nn.functional.one_hot(x_XD[:, 0].long(), VOCAB).float()

    def take_expert_load(self):
        return torch.zeros(0, dtype=torch.int64)


class Server:
    """A scheduler and one rank; collects tokens by request. `options`: of the scheduler."""

    def __init__(self, runner, num_blocks, *, depth=1, **options):
        defaults = {
            "num_ranks": 1,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 16,
            "max_queued_requests": 99,
            "eos_token_ids": (),
            "vocab_size": VOCAB,
        }
        self.config = SchedulerConfig(num_blocks=num_blocks, **SIZES, **{**defaults, **options})
        self.scheduler, self.runner, self.depth = Scheduler(self.config, SPECS), runner, depth
        self.flight, self.tokens, self.num_copies = deque(), {}, 0

    def submit(self, request):
        assert self.scheduler.submit(request, 0.0) is None
        self.tokens[request.key] = []

    def fork(self, key, child):
        child.output = np.array(self.tokens[key], np.int32)
        child.tokens = np.concatenate((child.prompt, child.output))
        assert self.scheduler.submit_group([child], 0.0, key) is None
        self.tokens[child.key] = list(self.tokens[key])

    def step(self):
        plan = self.scheduler.plan(0.0)
        if plan is not None:
            self.num_copies += len(plan.copy_to_M)
            self.flight.append((plan, self.runner.launch(plan)))
        if len(self.flight) == self.depth or plan is None:
            plan, launched = self.flight.popleft()
            outputs = self.scheduler.commit(plan, [launched.finish()], 0.0)
            for key, token in zip(outputs.key_O.tolist(), outputs.token_O.tolist(), strict=True):
                self.tokens[key].append(token)

    def drain(self):
        for _ in range(20_000):
            if self.scheduler.idle:
                break
            self.step()
        assert self.scheduler.idle, "it does not end"
        self.scheduler.check_integrity()
        assert not any(sum(used) for used in self.scheduler.stats()["blocks_used"].values())


def request(key, length, num_tokens, *, shared=0):
    """A prompt of its own behind `shared` tokens that all have."""
    prompt = np.random.default_rng(key).integers(0, VOCAB, length)
    prompt[:shared] = np.arange(shared)[:length] % VOCAB
    params = SamplingParams(temperature=0, max_tokens=num_tokens)
    return Request(key=key, prompt=prompt.astype(np.int32), params=params, seed=0)


def serve(runner, num_blocks, *, depth=1, num_requests=12):
    """Requests with common prefixes, one of them forked, until all are answered rightly: the scheduler's counters."""
    server = Server(runner, num_blocks, depth=depth)
    requests = [request(key, 3 + 11 * key % 37, 3 + 7 * key % 17, shared=20 * (key % 2)) for key in range(num_requests)]
    parent = requests[2]
    child = request(parent.key, len(parent.prompt), 9)
    child.key = 99
    for each in requests:
        server.submit(each)
    while len(server.tokens[parent.key]) < 2:
        server.step()
    server.fork(parent.key, child)
    server.drain()
    for each in (*requests, child):
        expected = text(each.prompt.tolist(), each.params.max_tokens)
        assert server.tokens[each.key] == expected, f"request {each.key}"
    return server.scheduler.stats() | {"num_copies": server.num_copies}
