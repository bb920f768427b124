"""Errors of the control channel."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

ERROR = "_error"  # array of an answer that reports a failure: UTF-8 text
BEAT = "_beat"  # the only array of a message by which a rank says that it works


class ChannelClosed(ConnectionError):
    """The peer closed the connection, died, or stopped reading for too long."""


class RankLost(RuntimeError):
    """A rank's connection has ended.

    Attributes:
        rank: the rank.
        reason: what was seen on its connection.
    """

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank} is lost: {reason}")
        self.rank = rank
        self.reason = reason

    def __reduce__(self) -> tuple[type[RankLost], tuple[int, str]]:
        return RankLost, (self.rank, self.reason)


class RankError(RuntimeError):
    """A rank has reported a failure.

    Attributes:
        rank: the rank.
        message: its error message.
        details: arrays that it sent with the message.
    """

    def __init__(self, rank: int, message: str, details: Mapping[str, np.ndarray] | None = None) -> None:
        super().__init__(f"rank {rank}: {message}")
        self.rank = rank
        self.message = message
        self.details = details or {}

    def __reduce__(self) -> tuple[type[RankError], tuple[int, str, Mapping[str, np.ndarray]]]:
        return RankError, (self.rank, self.message, self.details)


class RankTimeout(TimeoutError):
    """Ranks did not answer in time.

    Attributes:
        ranks: the missing ranks.
    """

    def __init__(self, ranks: tuple[int, ...], what: str) -> None:
        super().__init__(f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} {what}")
        self.ranks = ranks
        self.what = what

    def __reduce__(self) -> tuple[type[RankTimeout], tuple[tuple[int, ...], str]]:
        return RankTimeout, (self.ranks, self.what)
