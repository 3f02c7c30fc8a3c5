"""Where the tail of a layer begins (see `experts.tail`), and what is known of the rows there.

Shapes: T positions of the batch (flattened), R scored tokens, S rows of one output (token and expert), P rows that
go to scored tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mui_callback.scoring.contributions import ScoredTokens
from mui_callback.scoring.rows import inner, rows_at


@dataclass(eq=False)
class Cut:
    """An output of experts, at which the tail begins."""

    value: Tensor
    """``[…, D]``: a leaf of autograd, or a tensor in the tail."""
    token_S: Tensor | None = None
    """Number of the scored token that each row goes to, int64 ``[S]``, -1 where there is none; set by `Tail.locate`, or
    by who knows it otherwise."""
    weight_S: Tensor | None = None
    """What the tail multiplies each row with, float32 ``[S]``, where it does nothing else; set by `Tail.locate`."""
    readout: Tensor | None = None
    """In the shape of `value`; set by `Tail.transpose`."""

    @property
    def n_rows(self) -> int:
        """S."""
        return self.value.numel() // self.value.shape[-1]

    @property
    def value_SD(self) -> Tensor:
        """The output, ``[S, D]``."""
        return self.value.detach().reshape(-1, self.value.shape[-1])

    @property
    def readout_SD(self) -> Tensor:
        """The unembedding row of each row's target as seen from here, ``[S, D]``."""
        assert self.readout is not None
        return self.readout.reshape(-1, self.readout.shape[-1])

    def is_in_order(self, tokens: ScoredTokens) -> bool:
        """Whether the rows, once they are located, are the positions of the batch in order, once or several times."""
        assert self.token_S is not None
        number_T = tokens.number_T
        if len(self.token_S) % len(number_T) or not len(tokens.position_R):
            return False
        expected_S = number_T.repeat(len(self.token_S) // len(number_T))
        # a row that is weighted with zero says nothing
        return not bool(((self.token_S != expected_S) & (self.token_S >= 0)).any())

    def readouts_of(self, place_P: Tensor, readout_RD: Tensor) -> tuple[Tensor, Tensor | None]:
        """The readout of rows that go to a scored token, ``[P, D]``, and what to multiply it with, ``[P]``.

        Args:
            place_P: which rows.
            readout_RD: unembedding row of the target of each scored token.
        """
        if self.weight_S is not None and self.token_S is not None:
            return rows_at(readout_RD, self.token_S[place_P]), self.weight_S[place_P]
        return rows_at(self.readout_SD, place_P), None

    def all_readouts(self, readout_RD: Tensor) -> Tensor:
        """The same for all rows, weighted; anything for rows that go to no scored token."""
        if self.weight_S is None or self.token_S is None:
            return self.readout_SD
        if not len(readout_RD):
            return self.value_SD
        return readout_RD[self.token_S.clamp(min=0)] * self.weight_S[:, None]


def add_inner(sum_R: Tensor, token_S: Tensor, value_SD: Tensor, readout_SD: Tensor) -> None:
    """Add ⟨value, readout⟩ of each row to the sum of its token; rows of token -1 are left out."""
    if len(sum_R):
        inner_S = inner(value_SD.detach().expand_as(readout_SD), readout_SD).to(sum_R.dtype)
        sum_R.index_add_(0, token_S.clamp(min=0), inner_S.where(token_S >= 0, 0))
