"""`python -m expertwire.bench.scheduler.memory CONFIG...`: cache memory of one request, of hybrids and with attention everywhere.

For each config and context: the planner's bytes (`Inspection.cache_bytes`, what `expertwire inspect` says), and those
measured: the blocks of every cache that the real scheduler holds on a simulated rank when it has computed so many tokens, in
steps of 8,192, times the bytes of a block. With attention everywhere, the model's own replaces each recurrent mixer.

O sampled rows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from expertwire.engine.loader import inspection
from expertwire.engine.models.mixer_configs import AttentionConfig
from expertwire.engine.models.model_config import ModelConfig
from expertwire.engine.models.registry import read_model_config
from expertwire.scheduler.config import CacheSpec, SchedulerConfig
from expertwire.scheduler.plan import StepResult
from expertwire.scheduler.request import Request
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.scheduler.scheduler import Scheduler

CONTEXTS = 1024, 8192, 65536, 262144
_BLOCK, _STEP = 16, 8192


def main() -> int:
    """Print a table in Markdown, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path, help="folders with a config.json")
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = [row for path in args.configs for row in rows(path, args.contexts)]
    print("| model | context | hybrid, planned | measured | attention everywhere, planned | measured | times |")
    print("|---|---|---|---|---|---|---|")
    for name, context, *nbytes in found:
        cells = " | ".join(f"{value / 1e6:,.1f} MB" for value in nbytes)
        print(f"| {name} | {context:,} | {cells} | {nbytes[3] / nbytes[1]:.1f} |")
    if args.json:
        fields = "model", "context", "planned", "measured", "attention_planned", "attention_measured"
        args.json.write_text(json.dumps([dict(zip(fields, row, strict=True)) for row in found], indent=1) + "\n")
    return 0


def rows(path: Path, contexts: list[int]) -> Iterator[tuple[str, int, int, int, int, int]]:
    """Yield name, context and bytes: planned and measured, of the model and with attention everywhere."""
    facts = inspection.inspect(path)
    dense = replace(facts, caches=with_attention(read_model_config(path)).cache_specs())
    for context in contexts:
        both = [(sum(each.cache_bytes(context).values()), measured(each.caches, context)) for each in (facts, dense)]
        yield path.name, context, *both[0], *both[1]


def with_attention(config: ModelConfig) -> ModelConfig:
    """Return the model with its first attention in place of every recurrent mixer."""
    kinds = {kind for spec in config.cache_specs() if spec.kind == "state" for kind in spec.writers}
    attention = next(layer.mixer for layer in config.layers if isinstance(layer.mixer, AttentionConfig))
    layers = tuple(
        replace(layer, mixer=attention) if number in kinds else layer for number, layer in enumerate(config.layers)
    )
    return replace(config, layers=layers)


def measured(specs: tuple[CacheSpec, ...], context: int) -> int:
    """Return the bytes of the blocks that a request holds when it has computed `context` tokens."""
    longest = context + 2 * _BLOCK
    config = SchedulerConfig(
        num_ranks=1,
        max_num_seqs=1,
        max_num_batched_tokens=_STEP,
        max_model_len=longest,
        block_size=_BLOCK,
        num_blocks=tuple(spec.most_blocks(_BLOCK, longest, _STEP) + 2 for spec in specs),
        max_queued_requests=1,
        eos_token_ids=(),
        vocab_size=100,
    )
    scheduler = Scheduler(config, specs)
    prompt = np.random.default_rng(0).integers(0, 100, context - 1).astype(np.int32)
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    assert scheduler.submit(Request(key=0, prompt=prompt, params=params, seed=0), 0.0) is None
    computed, sampled = 0, 0
    # The second decode frees what left the windows behind the prompt's last token.
    while sampled < 2:
        plan = scheduler.plan(0.0)
        assert plan is not None, f"nothing to compute at {computed} tokens"
        computed += int(plan.sched_num_S.sum())
        slot_O = plan.sched_slot_S[plan.sched_sample_S == 1]
        token_O = np.full(len(slot_O), 4, np.int32)
        sampled += len(slot_O)
        scheduler.commit(plan, [StepResult.sampled(step=plan.step, rank=0, slot_O=slot_O, token_O=token_O)], 0.0)
    assert computed == context, f"{computed} tokens of {context}"
    used = scheduler.stats()["blocks_used"]
    return sum(sum(used[spec.name]) * spec.bytes_per_block(_BLOCK) for spec in specs)


if __name__ == "__main__":
    raise SystemExit(main())
