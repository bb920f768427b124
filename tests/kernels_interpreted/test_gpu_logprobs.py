"""Log-probabilities and ranks of given tokens against their reference."""

import pytest
import torch

from expertwire.kernels import sampling
from expertwire.kernels.gpu import logprobs


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_TOKENS", 64)


@pytest.mark.parametrize("vocab", [1, 64, 1000])
def test_log_probabilities_and_ranks(vocab):
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(5, vocab, generator=generator)
    logits[1] = 0.0
    logits[2, 1:] = -torch.inf
    tokens = torch.randint(0, vocab, (5,), generator=generator)
    tokens[2] = 0
    logprob, rank = logprobs.token_logprobs(logits, tokens)
    expected_logprob, expected_rank, *_ = sampling.token_logprobs(logits, tokens, 1)
    torch.testing.assert_close(logprob, expected_logprob)
    assert rank.tolist() == expected_rank.tolist()


def test_no_rows():
    logprob, rank = logprobs.token_logprobs(torch.zeros(0, 100), torch.zeros(0, dtype=torch.int64))
    assert logprob.shape == rank.shape == (0,)
