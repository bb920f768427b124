"""The tokens by which ranks know a model's reasoning."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

_MOST = 32  # tokens that the end of a prompt may have, with white space


@dataclass(frozen=True, kw_only=True)
class ThinkingIds:
    """Token ids around and within reasoning, as `Tokenizer.thinking_ids` finds them.

    Args:
        start: those that open it; the first one comes once.
        end: the one that closes it.
        wait: the one that stands for "Wait"; None if the vocabulary has none.
        spaces: those of white space, which may follow `start` at the end of a prompt.
        sentence_ends: those whose text ends a sentence.
    """

    start: tuple[int, ...]
    end: int
    wait: int | None
    spaces: tuple[int, ...]
    sentence_ends: tuple[int, ...]

    def fits(self, vocab_size: int) -> bool:
        """Return whether a model with this vocabulary can write the delimiters."""
        return max(*self.start, self.end) < vocab_size

    def opens(self, prompt: np.ndarray) -> bool:
        """Return whether a prompt, i32, ends with the start of reasoning, so that the output begins within it."""
        tokens = prompt[-_MOST:].tolist()
        while tokens and tokens[-1] in self.spaces:
            tokens.pop()
        return tuple(tokens[-len(self.start) :]) == self.start

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the fields as arrays, for a message; `from_arrays` reads them back."""
        values = dataclasses.asdict(self) | {"end": (self.end,), "wait": () if self.wait is None else (self.wait,)}
        return {f"thinking_{name}": np.array(value, np.int64) for name, value in values.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> ThinkingIds | None:
        """Return the inverse of `to_arrays`; None if they are not there."""
        if "thinking_start" not in arrays:
            return None
        fields = {field.name: tuple(arrays[f"thinking_{field.name}"].tolist()) for field in dataclasses.fields(cls)}
        [end], wait = fields.pop("end"), fields.pop("wait")
        return cls(**fields, end=end, wait=wait[0] if wait else None)
