"""What the scheduler is told about the engine: `SchedulerConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from expertwire.scheduler.checks import is_int


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Sizes of the ranks' slot tables, caches and steps.

    Args:
        num_ranks: data-parallel ranks, each with slots and blocks of its own.
        max_running: slots on one rank.
        max_num_tokens: token budget of one step on one rank. Also bounds the requests that run at once, as each of them gets
            at least one token a step.
        max_model_len: prompt and output tokens of one request at most.
        block_size: tokens in a block, the same in every cache but those of states.
        num_blocks: on one rank in each cache, including block 0, the null block, which is never handed out: one number for all
            caches, or one for each, in the order of the `CacheSpec`s.
        max_waiting: requests that may wait.
        eos_token_ids: end-of-sequence ids; any of them ends an output.
        vocab_size: token ids are in [0, vocab_size).
        prefix_cache: keep blocks of finished requests for later ones that begin alike.
        prefix_secret: of the names by which prefixes are found; whoever knows it could make up prompts that pass for others.
        chunk_tokens: prompt tokens of one step on a rank that also decodes, so that no decode waits for more; None:
            `max_num_tokens`.
        max_waiting_per_tenant: requests of one tenant that may wait; None: `max_waiting`.

    Raises:
        ValueError: names the field and the values it allows.
    """

    num_ranks: int
    max_running: int
    max_num_tokens: int
    max_model_len: int
    block_size: int
    num_blocks: int | tuple[int, ...]
    max_waiting: int
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    prefix_cache: bool = True
    prefix_secret: int = 0
    chunk_tokens: int | None = None
    max_waiting_per_tenant: int | None = None

    def __post_init__(self) -> None:
        for field, low in (
            ("num_ranks", 1),
            ("max_running", 1),
            ("max_num_tokens", 1),
            ("max_model_len", 2),
            ("block_size", 1),
            ("max_waiting", 1),
            ("vocab_size", 1),
        ):
            value = getattr(self, field)
            if not is_int(value) or value < low:
                raise ValueError(f"{field} must be an integer >= {low}, got {value!r}")
        for field, low in (("chunk_tokens", 1), ("max_waiting_per_tenant", 1)):
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
