"""What the scheduler is told about the engine: `SchedulerConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from expertwire.scheduler.checks import is_int


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Sizes of the ranks' slot tables, caches and steps.

    Args:
        num_ranks: data-parallel ranks, each with slots and blocks of its own.
        max_num_seqs: slots on one rank.
        max_num_batched_tokens: token budget of one step on one rank. Also bounds the requests that run at once, as each of
            them gets at least one token a step.
        max_model_len: prompt and output tokens of one request at most.
        block_size: tokens in a block, the same in every cache but those of states.
        num_blocks: on one rank in each cache, including block 0, the null block, which is never handed out: one number for all
            caches, or one for each, in the order of the `CacheSpec`s.
        max_queued_requests: requests that may wait.
        eos_token_ids: end-of-sequence ids; any of them ends an output.
        vocab_size: token ids are in [0, vocab_size).
        enable_prefix_caching: keep blocks of finished requests for later ones that begin alike.
        prefix_secret: of the names by which prefixes are found; whoever knows it could make up prompts that pass for others.
        chunked_prefill_size: prompt tokens of one step on a rank that also decodes, so that no decode waits for more; None:
            `max_num_batched_tokens`.
        max_queued_requests_per_tenant: requests of one tenant that may wait; None: `max_queued_requests`.

    Raises:
        ValueError: names the field and the values it allows.
    """

    num_ranks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    num_blocks: int | tuple[int, ...]
    max_queued_requests: int
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    enable_prefix_caching: bool = True
    prefix_secret: int = 0
    chunked_prefill_size: int | None = None
    max_queued_requests_per_tenant: int | None = None

    def __post_init__(self) -> None:
        for field, low in (
            ("num_ranks", 1),
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("max_model_len", 2),
            ("block_size", 1),
            ("max_queued_requests", 1),
            ("vocab_size", 1),
        ):
            value = getattr(self, field)
            if not is_int(value) or value < low:
                raise ValueError(f"{field} must be an integer >= {low}, got {value!r}")
        for field, low in (("chunked_prefill_size", 1), ("max_queued_requests_per_tenant", 1)):
            value = getattr(self, field)
            if value is not None and (not is_int(value) or value < low):
                raise ValueError(f"{field} must be an integer >= {low} or None, got {value!r}")
        each = self.num_blocks if isinstance(self.num_blocks, tuple) else (self.num_blocks,)
        if not each or not all(is_int(value) and value >= 2 for value in each):
            raise ValueError(
                f"num_blocks must be an integer >= 2, or a tuple of one for each cache, got {self.num_blocks!r}"
            )

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)
