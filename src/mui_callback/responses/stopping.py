"""Where an answer ends: end-of-sequence tokens, and texts that stop it.

Shapes: B answers of a batch, T tokens of each so far, with what came before.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mui_callback.probe.samples import IntArray
from mui_callback.responses.answers import Ending

_MARK = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for the first bytes of a character."""


@dataclass(frozen=True)
class Ends:
    """What ends an answer, and how its tokens read as text."""

    tokenizer: Any
    tokens: frozenset[int]
    """Those that end a sequence."""
    stop: tuple[str, ...]
    """Texts that end an answer and are no part of it."""

    def text(self, ids: IntArray, before: IntArray) -> str:
        """The text of tokens; the last of those before them tells whether they begin with a space."""
        anchor = self._decoded(before[-1:])
        whole = self._decoded(np.concatenate([before[-1:], ids]))
        return whole[len(anchor) :] if whole.startswith(anchor) else self._decoded(ids)

    def stop_in(self, text: str) -> int | None:
        """Where the first stop text begins."""
        return min((at for stop in self.stop if (at := text.find(stop)) >= 0), default=None)

    def cut(self, ids: IntArray, before: IntArray) -> tuple[IntArray, str, Ending]:
        """An answer of what was generated: its tokens, its text and what ended it.

        A token that spans the beginning of a stop text is kept, as a part of the answer is in it, and so is an
        end-of-sequence token that is not the only one.
        """
        ended: Ending = "length"
        n = next((place for place, token in enumerate(ids.tolist()) if token in self.tokens), None)
        content = ids[:n]
        text = self.text(content, before)
        if (at := self.stop_in(text)) is not None:
            kept = bisect_left(range(len(content)), at, key=lambda size: self._n_complete(content[:size], before))
            return content[:kept], text[:at], "stop"
        if n is not None:
            ended, ids = "eos", ids[: n + 1 if n else 0]
        return ids, text, ended

    def n_bytes(self, ids: IntArray, before: IntArray) -> int | None:
        """UTF-8 bytes of what tokens say, but for an end-of-sequence token; None where it is no text."""
        content = ids[:-1] if ids.size and int(ids[-1]) in self.tokens else ids
        text = self.text(content, before)
        return None if _MARK in text else len(text.encode())

    def _n_complete(self, ids: IntArray, before: IntArray) -> int:
        """Characters of which all bytes are there."""
        return len(self.text(ids, before).rstrip(_MARK))

    def _decoded(self, ids: IntArray) -> str:
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(ids.tolist(), **options))


class StopTexts:
    """A stopping criterion of transformers: answers in which a stop text is have ended.

    Args:
        ends: with one stop text or more.
        before: what comes before each answer, B arrays.
        n_before: length of that with its padding.
    """

    def __init__(self, ends: Ends, before: Sequence[IntArray], n_before: int) -> None:
        self._ends = ends
        self._before = before
        self._n_before = n_before
        self._is_done = [False] * len(before)
        # A token says a byte at least, but for special ones.
        self._window = max(len(stop.encode()) for stop in ends.stop) + 8

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Which answers have ended, bool ``[B]``.

        Args:
            input_ids: int64 ``[B, T]``.
            scores: not looked at.
        """
        generated = input_ids[:, self._n_before :].cpu().numpy()
        for row, (ids, before) in enumerate(zip(generated, self._before, strict=True)):
            self._is_done[row] = self._is_done[row] or int(ids[-1]) in self._ends.tokens or self._stops(ids, before)
        return torch.tensor(self._is_done, device=input_ids.device)

    def _stops(self, ids: IntArray, before: IntArray) -> bool:
        """The end is looked at first, since the whole is longer with each token."""
        tail = self._ends.text(ids[-self._window :], np.concatenate([before, ids[: -self._window]]))
        if self._ends.stop_in(tail) is None:
            return False
        return self._ends.stop_in(self._ends.text(ids, before)) is not None
