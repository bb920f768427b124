"""The columns of a `SessionResponse`."""

from __future__ import annotations

from collections.abc import Sequence

from expertwire.deploy.grpc.messages import FINISH_REASONS, add_logprobs
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.frontend.api import Update
from expertwire.engine.frontend.token_columns import Tokens


class Columns:
    """Entries of a message, one a branch with news.

    Args:
        with_text: whether there is a column of texts.
    """

    def __init__(self, *, with_text: bool) -> None:
        self._with_text = with_text
        self._keys: list[int] = []
        self._branches: list[int] = []
        self._num_tokens: list[int] = []
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._finish_reasons: list[pb.FinishReason] = []
        self._details: list[pb.SessionDetails] = []

    def add(self, key: int, update: Update) -> None:
        """Add an update of a request without its prompt's log-probabilities."""
        reason = pb.FINISH_REASON_UNSPECIFIED if update.finish_reason is None else FINISH_REASONS[update.finish_reason]
        self._add(key, update.branch, update.token_ids, update.text, reason)
        if update.logprobs is None and update.stop_reason is None and update.expert_load is None:
            return
        details = pb.SessionDetails(entry=len(self._keys) - 1)
        if update.logprobs is not None:
            add_logprobs(details.logprobs, update.logprobs)
        if isinstance(update.stop_reason, str):
            details.stop_string = update.stop_reason
        elif update.stop_reason is not None:
            details.stop_token_id = update.stop_reason
        details.expert_load.extend(pb.ExpertLoad(tokens=tokens) for tokens in update.expert_load or ())
        self._details.append(details)

    def add_chunk(self, key: int, chunk: pb.Chunk) -> None:
        """Add a chunk of a stream."""
        self._add(key, chunk.branch, chunk.token_ids, chunk.text, chunk.finish_reason)
        details = pb.SessionDetails(logprobs=chunk.logprobs, expert_load=chunk.expert_load)
        if stop := chunk.WhichOneof("stop_reason"):
            setattr(details, stop, getattr(chunk, stop))
        if details.ListFields():
            details.entry = len(self._keys) - 1
            self._details.append(details)

    def add_details(self, key: int, details: pb.SessionDetails) -> None:
        """Add what there is to say of a request apart from its tokens."""
        self._add(key, 0, (), "", pb.FINISH_REASON_UNSPECIFIED)
        details.entry = len(self._keys) - 1
        self._details.append(details)

    def add_tokens(self, tokens: Tokens) -> None:
        """Add tokens of branches that go on."""
        self._keys += tokens.keys.tolist()
        self._branches += tokens.branches.tolist()
        self._num_tokens += tokens.num_tokens.tolist()
        self._token_ids += tokens.token_ids.tolist()
        if self._with_text:
            self._texts += tokens.texts or [""] * len(tokens.keys)
        self._finish_reasons += [pb.FINISH_REASON_UNSPECIFIED] * len(tokens.keys)

    def message(self, ends: Sequence[pb.SessionEnd]) -> pb.SessionResponse:
        """Return the message, with the ends of requests."""
        return pb.SessionResponse(
            keys=self._keys,
            branches=self._branches,
            num_tokens=self._num_tokens,
            token_ids=self._token_ids,
            texts=self._texts,
            finish_reasons=self._finish_reasons,
            details=self._details,
            ends=ends,
        )

    def _add(self, key: int, branch: int, token_ids: Sequence[int], text: str, reason: pb.FinishReason) -> None:
        self._keys.append(key)
        self._branches.append(branch)
        self._num_tokens.append(len(token_ids))
        self._token_ids.extend(token_ids)
        if self._with_text:
            self._texts.append(text)
        self._finish_reasons.append(reason)
