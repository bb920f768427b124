"""Steps without requests: for warm-up, for measuring memory and for the capture of CUDA graphs.

Their tokens belong to no slot on a GPU, where such tokens store nothing; on a CPU they are written to the null block.

C KV cache groups, S sequences, W entries of a block table, P ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from expertwire.engine.kv_cache.caches import NamedCache
from expertwire.engine.models.decoder import Decoder
from expertwire.engine.runner.batch import prompt_batch
from expertwire.engine.runner.cuda_graphs import GraphSize
from expertwire.engine.runner.input_batch import InputBatch
from expertwire.engine.runner.micro_batch import PackedInputs, no_tokens, split_tokens
from expertwire.engine.runner.staging import Upload


class DummySteps:
    """Runs dummy steps of a rank, in as many micro-batches as real ones; all ranks run the same ones together.

    Args:
        is_padded: whether batches name their valid tokens, as those of a captured step do.
    """

    def __init__(
        self,
        model: Decoder,
        caches: Sequence[NamedCache],
        batch: InputBatch,
        *,
        num_ranks: int,
        num_micro_batches: int,
        is_padded: bool,
        upload: Upload,
    ) -> None:
        self._model, self._caches, self._batch, self._is_padded, self._upload = model, caches, batch, is_padded, upload
        self._rank, self._num_ranks, self._num_micro_batches = model.context.rank, num_ranks, num_micro_batches

    def inputs(self, num_tokens: int) -> list[PackedInputs]:
        """Return the inputs of each micro-batch, in memory of their own, as a graph keeps them."""
        return [self._inputs(num) for [num] in split_tokens([num_tokens], self._num_micro_batches)]

    def _inputs(self, num_tokens: int) -> PackedInputs:
        [words] = self._upload(no_tokens(num_tokens))
        return PackedInputs(words.clone(), num_tokens)

    def run_padded(self, size: GraphSize, inputs: list[PackedInputs]) -> Tensor:
        """Run a step with the bounds of a graph: all that it captures. `inputs`: of each micro-batch.

        Where an all-to-all takes the ranks' numbers of tokens as they are, and not as bounds, these are the same on all ranks,
        which run this together: a rank that expected more rows than it is sent would wait for ever.
        """
        batches, batch = [], self._batch
        tokens_P = (
            size.tokens_P(self._rank, self._num_ranks) if self._is_padded else [size.num_tokens] * self._num_ranks
        )
        for given, num_tokens_P in zip(inputs, split_tokens(tokens_P, self._num_micro_batches), strict=True):
            num = num_tokens_P[self._rank]
            tables_CSW = batch.block_tables.index_select(1, given.slot_S(num))
            longest, most = tables_CSW.shape[2] * batch.block_size, min(num, batch.max_num_seqs)
            made = batch.batch_of(
                given,
                tables_CSW,
                num_tokens_P,
                is_padded=self._is_padded,
                max_decodes=most if size.is_mixed else num,
                max_prefills=max(1, min(num // 2, most)) if size.is_mixed else 0,
                max_prefill_tokens=num if size.is_mixed else 0,
                max_seq_len=longest,
                max_prefill_len=longest if size.is_mixed else 0,
            )
            batches.append(made)
        return self._model.forward(batches, self._caches)

    def run_prompt(self, num_tokens: int) -> None:
        """Run tokens as if they were the last ones of a long prompt; where kernels differ by that, then all of a prompt."""
        inputs, tables_CSW = self._inputs(num_tokens), self._batch.block_tables[:, :1]
        most = tables_CSW.shape[2] * self._batch.block_size
        for longest in (most, min(num_tokens, most)) if self._model.context.ops.fast else (most,):
            self._run_one(inputs, tables_CSW, 0, longest)

    def run_short_decode(self) -> Tensor:
        """Run a decode with one key, alone: its keys are not split, which is another kernel. Return its hidden state."""
        return self._run_one(self._inputs(1), self._batch.block_tables[:, :1], 1, 1)

    def _run_one(self, inputs: PackedInputs, tables_CSW: Tensor, num_decodes: int, max_seq_len: int) -> Tensor:
        """Run a step of one sequence; the same in each micro-batch."""
        batch = self._batch.batch_of(
            inputs,
            tables_CSW,
            [inputs.num_tokens] * self._num_ranks,
            is_padded=self._is_padded,
            max_decodes=num_decodes,
            max_prefills=1 - num_decodes,
            max_prefill_tokens=0 if num_decodes else inputs.num_tokens,
            max_seq_len=max_seq_len,
            max_prefill_len=0 if num_decodes else max_seq_len,
        )
        return self._model.forward([batch] * self._num_micro_batches, self._caches)

    def run_in_null_block(self, num_tokens: int) -> Tensor:
        """Run a prompt of so many tokens that are stored in the null block, on a CPU. Return the hidden states."""
        null_CW = np.zeros((len(self._caches), num_tokens), np.int32)
        num_tokens_P, device = [num_tokens] * self._num_ranks, self._model.context.device
        batch = prompt_batch([0] * num_tokens, 0, null_CW, self._batch.block_size, num_tokens_P, device)
        return self._model.forward([batch] * self._num_micro_batches, self._caches)
