"""A rank's persistent input batch: what it keeps of running requests, from admission to release, so that a plan need only name
changes.

Each request has a slot. Its tokens and block tables are on the model's device, so that sampled tokens need not visit the host
before the next step reads them; the host keeps what it knows without asking: token counts and sampling parameters.

T tokens of a step, S sequences of a step, O sampled rows, C KV cache groups, W entries of a block table, P ranks, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from expertwire.engine.runner.batch import ForwardBatch, OnRouted
from expertwire.engine.runner.micro_batch import MicroBatch, PackedInputs
from expertwire.engine.runner.thinking import Thinking
from expertwire.kernels.ops.attention import AttentionMetadata
from expertwire.kernels.registry import Ops
from expertwire.scheduler.config import CacheSpec
from expertwire.scheduler.plan import RankPlan
from expertwire.scheduler.sampling_params import SAMPLING_DTYPE

_NONE = np.zeros(0, np.int32)
_PENALTIES = {
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}  # and what they are without effect


class InputBatch:
    """The slots of a rank.

    Args:
        max_num_seqs: number of slots.
        max_model_len: tokens of one request.
        block_size: tokens in a block.
        specs: of the KV cache groups.
        device: of the tables.
        ops: which look up rows of the tables and change logits.
        thinking: controls the reasoning of slots; None if no request asks for that.

    Attributes:
        token_ids: i32 [slots, max_model_len + 1], on the device.
        block_tables: i32 [C, slots, W], on the device; padded with whatever earlier requests left.
        num_tokens: i64 [slots], known tokens.
        sampling: [slots], sampling parameters (`SAMPLING_DTYPE`).
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        specs: Sequence[CacheSpec],
        device: str,
        ops: Ops,
        thinking: Thinking | None = None,
    ) -> None:
        self.max_num_seqs, self.block_size, self._ops, self._thinking = max_num_seqs, block_size, ops, thinking
        self.num_tokens = np.zeros(max_num_seqs, np.int64)
        self.sampling = np.zeros(max_num_seqs, SAMPLING_DTYPE)
        self._bans = [_NONE] * max_num_seqs
        self._bias: list[tuple[np.ndarray, np.ndarray]] = [(_NONE, _NONE)] * max_num_seqs
        self._is_penalized = np.zeros(max_num_seqs, bool)
        self._has_lists = np.zeros(max_num_seqs, bool)  # whether the slot has bans or biases
        self._windows = [(group, spec.window) for group, spec in enumerate(specs) if spec.window is not None]
        self._num_followed = 0  # tokens at most of the leaders whose followers are admitted
        self._num_slid = np.zeros((len(specs), max_num_seqs), np.int64)  # blocks of a slot that slid out of its window
        self.token_ids = torch.zeros((max_num_seqs, max_model_len + 1), dtype=torch.int32, device=device)
        assert self.token_ids.numel() < 2**31, (
            f"{max_num_seqs} slots of {max_model_len} tokens: indices must fit 32 bits"
        )
        # Rows of whole 16 bytes, so that the tables of all groups are aligned alike: kernels are compiled apart for others.
        shape = len(specs), max_num_seqs, -(-max_model_len // (4 * block_size)) * 4
        self.block_tables = torch.zeros(shape, dtype=torch.int32, device=device)
        assert self.block_tables.numel() < 2**31, f"block tables {shape}: indices must fit 32 bits"

    # ---- changes by a plan

    def update(self, plan: RankPlan) -> list[np.ndarray]:
        """Release and admit on the host, and return the arrays to upload for `write`: indices and values of blocks, indices of
        blocks that slid out of their windows, indices and values of tokens, slots of followers and of their leaders, and what
        `Thinking.admit` returns."""
        self.num_tokens[plan.release_slot] = 0
        follows = plan.admit_source_A != plan.admit_slot_A
        followers, leaders = plan.admit_slot_A[follows], plan.admit_source_A[follows]
        starts, tokens = [_NONE], [_NONE]
        for i, slot in enumerate(plan.admit_slot_A.tolist()):
            self.num_tokens[slot] = len(plan.admit_tokens[i])
            lists = plan.admit_bans[i], plan.admit_bias_ids[i], plan.admit_bias_values[i]
            self.set_sampling(slot, plan.admit_sampling_A[i], *lists)
            starts.append(self.token_index(np.array(slot), np.arange(len(plan.admit_tokens[i]))))
            tokens.append(plan.admit_tokens[i])
        self.num_tokens[followers] = self.num_tokens[leaders]
        self._num_followed = int(self.num_tokens[leaders].max(initial=0))
        self._num_slid[:, plan.admit_slot_A] = 0
        assert (plan.sched_start_S + plan.sched_num_S <= self.num_tokens[plan.sched_slot_S]).all(), (
            "a plan computes tokens that are not known"
        )
        return [
            self._block_index(plan.block_cache_B, plan.block_slot_B, plan.block_index_B),
            plan.block_id_B.astype(np.int32),
            self._block_index(*self._slide(plan)),
            np.concatenate(starts).astype(np.int64),
            np.concatenate(tokens).astype(np.int32),
            followers.astype(np.int64),
            leaders.astype(np.int64),
            *([] if self._thinking is None else self._thinking.admit(plan)),
        ]

    def write(self, changes: Sequence[Tensor]) -> None:
        """Set blocks and tokens on the device; `changes` as `update` returned them, uploaded."""
        at_block, block_ids, at_slid, at_token, tokens, followers, leaders, *states = changes
        # A released slot keeps its blocks, which nothing reads before they are set anew.
        if at_block.numel():
            self.block_tables.view(-1).index_copy_(0, at_block, block_ids)
        if at_token.numel():
            self.token_ids.view(-1).index_copy_(0, at_token, tokens)
        if self._thinking is not None:
            self._thinking.write(*states)
        if followers.numel():
            self._follow(followers, leaders)
            if at_block.numel():  # last blocks are the followers' own
                self.block_tables.view(-1).index_copy_(0, at_block, block_ids)
        if at_slid.numel():
            self.block_tables.view(-1).index_fill_(0, at_slid, 0)

    def _follow(self, followers: Tensor, leaders: Tensor) -> None:
        """Start the followers with what their leaders know: tokens, blocks and the state of their reasoning."""
        num_blocks = -(-self._num_followed // self.block_size)
        for table in (self.token_ids[:, : self._num_followed], *self.block_tables[:, :, :num_blocks]):
            table.index_copy_(0, followers, table.index_select(0, leaders))
        if self._thinking is not None:
            self._thinking.follow(followers, leaders)

    def append(self, slot_O: np.ndarray, at_O: Tensor, token_O: Tensor) -> None:
        """Write sampled tokens at these indices of `token_ids` on the device (`token_index`)."""
        self.num_tokens[slot_O] += 1
        self.token_ids.view(-1).index_copy_(0, at_O, token_O.int())

    def token_index(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return the indices of tokens in `token_ids` seen as one row: i64."""
        return slots.astype(np.int64) * self.token_ids.shape[1] + positions

    def _block_index(self, groups: np.ndarray, slots: np.ndarray, entries: np.ndarray) -> np.ndarray:
        """Return the indices of entries of `block_tables` seen as one row: i64."""
        _, num_slots, width = self.block_tables.shape
        return (groups.astype(np.int64) * num_slots + slots) * width + entries

    def _slide(self, plan: RankPlan) -> np.ndarray:
        """Return the entries that slide out of their windows with this plan, once each: groups, slots and entries, i64.

        The scheduler gives their blocks to others and does not name them in the plan.
        """
        if not self._windows:
            return np.zeros((3, 0), np.int64)
        found = []
        slot_S, start_S = plan.sched_slot_S, plan.sched_start_S.astype(np.int64)
        for group, window in self._windows:
            slid_S, before_S = np.maximum(start_S - window + 1, 0) // self.block_size, self._num_slid[group, slot_S]
            num_S = slid_S - before_S
            entries = np.arange(num_S.sum()) - np.repeat(np.cumsum(num_S) - num_S - before_S, num_S)
            found.append(np.stack((np.full_like(entries, group), np.repeat(slot_S, num_S), entries)))
            self._num_slid[group, slot_S] = slid_S
        return np.concatenate(found, axis=1)

    # ---- what the model gets

    def forward_batch(
        self,
        inputs: PackedInputs,
        micro_batch: MicroBatch,
        num_tokens_P: Sequence[int],
        *,
        is_padded: bool,
        on_routed: OnRouted | None,
    ) -> ForwardBatch:
        """Return the batch of a micro-batch of the plan.

        Args:
            inputs: the same, packed and uploaded.
            is_padded: whether the batch names its valid tokens, as a captured one does, though all are.
            on_routed: see `ForwardBatch`.
        """
        num_sequences, num, seq_len_S = len(micro_batch.slot_S), micro_batch.num_decodes, micro_batch.seq_len_S
        return self.batch_of(
            inputs,
            self.block_tables.index_select(1, inputs.slot_S(num_sequences)),
            num_tokens_P,
            is_padded=is_padded,
            on_routed=on_routed,
            max_decodes=num,
            max_prefills=num_sequences - num,
            max_prefill_tokens=micro_batch.num_tokens - num,
            max_seq_len=_longest(seq_len_S),
            max_prefill_len=_longest(seq_len_S[num:]),
        )

    def batch_of(
        self,
        inputs: PackedInputs,
        tables_CSW: Tensor,
        num_tokens_P: Sequence[int],
        *,
        is_padded: bool,
        max_decodes: int,
        max_prefills: int,
        max_prefill_tokens: int,
        max_seq_len: int,
        max_prefill_len: int,
        on_routed: OnRouted | None = None,
    ) -> ForwardBatch:
        """Return the batch of `inputs`; the bounds are those of `AttentionMetadata`."""
        num_sequences = tables_CSW.shape[1]
        seq_lens, cu_seqlens_q = inputs.seq_lens(num_sequences), inputs.cu_seqlens_q(num_sequences)
        token_ids_T, positions_T, mapping_CT = self._ops.prepare_inputs(
            inputs.slot_T, inputs.position_T, self.token_ids, self.block_tables, self.block_size
        )
        return ForwardBatch(
            token_ids_T=token_ids_T,
            positions_T=positions_T,
            attention_metadata=tuple(
                AttentionMetadata(
                    num_decodes=inputs.num_decodes,
                    max_decodes=max_decodes,
                    max_prefills=max_prefills,
                    max_prefill_tokens=max_prefill_tokens,
                    max_seq_len=max_seq_len,
                    max_prefill_len=max_prefill_len,
                    cu_seqlens_q=cu_seqlens_q,
                    seq_lens=seq_lens,
                    block_table=table_SW,
                    slot_mapping=mapping_T,
                )
                for mapping_T, table_SW in zip(mapping_CT.unbind(), tables_CSW.unbind(), strict=True)
            ),
            num_tokens_P=num_tokens_P,
            is_long_T=inputs.is_long_T,
            num_valid=inputs.num_valid if is_padded else None,
            on_routed=on_routed,
        )

    # ---- penalties, biases and bans

    def set_sampling(
        self, slot: int, record: np.void, bans: np.ndarray, bias_ids: np.ndarray, bias_values: np.ndarray
    ) -> None:
        """Set a slot's sampling parameters, bans and biases; copies, as a plan's memory is reused."""
        self.sampling[slot] = record
        self._is_penalized[slot] = any(record[name] != default for name, default in _PENALTIES.items())
        self._bans[slot], self._bias[slot] = bans.copy(), (bias_ids.copy(), bias_values.copy())
        self._has_lists[slot] = len(bans) + len(bias_ids) > 0

    def logit_changes(self, slot_O: np.ndarray) -> list[np.ndarray]:
        """Return the arrays to upload for `change_logits`: of the rows with penalties the row, slot, length of the prompt, number
        of known tokens and the three parameters; then rows, tokens and values of what is added. Nothing if nothing changes."""
        if not (self._is_penalized[slot_O].any() or self._has_lists[slot_O].any()):
            return []
        state, penalized = self.sampling[slot_O], np.flatnonzero(self._is_penalized[slot_O]).astype(np.int32)
        slots = slot_O[penalized].astype(np.int32)
        parameters = [self.sampling[name][slots].astype(np.float32) for name in _PENALTIES]
        lengths = self.sampling["prompt_len"][slots].astype(np.int32), self.num_tokens[slots].astype(np.int32)
        rows, tokens, values = [_NONE], [_NONE], [np.zeros(0, np.float32)]
        for row in np.flatnonzero(self._has_lists[slot_O]).tolist():
            slot, record = int(slot_O[row]), state[row]
            is_banned = self.num_tokens[slot] - record["prompt_len"] < record["min_tokens"]
            bans, (ids, numbers) = self._bans[slot] if is_banned else _NONE, self._bias[slot]
            free = ~np.isin(ids, bans)
            tokens += [bans, ids[free]]
            rows.append(np.full(len(bans) + int(free.sum()), row, np.int32))
            values += [np.full(len(bans), -np.inf), numbers[free]]
        added = np.concatenate(rows), np.concatenate(tokens).astype(np.int32), np.concatenate(values).astype(np.float32)
        return [penalized, slots, *lengths, *parameters, *added]

    def change_logits(self, logits_OV: Tensor, changes: Sequence[Tensor], slot_O: np.ndarray) -> None:
        """Apply penalties, then biases and bans, in place; `changes` as `logit_changes` returned them, uploaded."""
        if not changes:
            return
        rows, slots, prompt_lens, num_known, *parameters, at_row, at_token, values = changes
        if rows.numel():
            most = int(self.num_tokens[slot_O].max())
            self._ops.penalize(logits_OV, rows, slots, prompt_lens, num_known, parameters, self.token_ids, most)
        if at_row.numel():
            self._ops.add_to_logits(logits_OV, at_row, at_token, values)


def _longest(seq_len_S: np.ndarray) -> int:
    return int(seq_len_S.max()) if len(seq_len_S) else 1
