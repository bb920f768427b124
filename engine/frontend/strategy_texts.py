"""The tokens of a strategy's texts: those at which its branches pause, and those that it forces."""

from __future__ import annotations

import numpy as np

from expertwire.engine.frontend.frontend import Frontend
from expertwire.strategies.base import Needs

MAX_PAUSE_IDS = 65_536
_MAX_STEP_TEXTS = 64  # whose tokens are remembered


class StrategyTexts:
    """Tokenises what strategies name as texts, and remembers the vocabulary's tokens that end a step."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._pause_ids: dict[str, np.ndarray] = {}  # by the text of a step's end

    def tokenized(self, needs: Needs) -> tuple[np.ndarray, tuple[tuple[int, ...], ...]]:
        """Return the ids after which branches pause, i32 ascending, and the ids of each of the forced texts.

        Raises:
            ValueError: there is no tokenizer, or too many tokens have the text.
        """
        tokenizer = self._frontend.tokenizer
        if tokenizer is None and (needs.step_text or needs.forced_texts):
            raise ValueError("this strategy needs a tokenizer, and the model has none")
        if tokenizer is None or not needs.step_text:
            ids = np.zeros(0, np.int32)
        elif (found := self._pause_ids.get(needs.step_text)) is not None:
            ids = found
        else:
            ids = tokenizer.vocabulary_text.ids_with(needs.step_text)
            ids = ids[ids < self._frontend.model_info.vocab_size]
            if not 0 < len(ids) <= MAX_PAUSE_IDS:
                text = f"step_text must be in at least 1 and at most {MAX_PAUSE_IDS} tokens of the vocabulary"
                raise ValueError(f"{text}, got {needs.step_text!r:.100}, which is in {len(ids)}")
            if len(self._pause_ids) >= _MAX_STEP_TEXTS:
                self._pause_ids.clear()
            self._pause_ids[needs.step_text] = ids
        if tokenizer is None:
            return ids, ()
        return ids, tuple(tuple(tokenizer.encode(text, False)) for text in needs.forced_texts)
