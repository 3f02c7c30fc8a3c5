"""The rows of all kinds of experts of a layer behind one another, so that they are looked at together.

Shapes: S rows, C chunks of neurons of the widest rows, M chunks that are chosen, c neurons of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mui_callback.scoring.contributions import ExpertScores
from mui_callback.scoring.rows import CHUNK, NOTHING, Contributions, joined


@dataclass(frozen=True)
class LayerRows:
    """What one pass over the contributions of a layer found, and the contributions of chosen chunks."""

    parts: tuple[Contributions, ...]
    token_S: Tensor
    """See `ExpertScores`, as the two that follow."""
    expert_S: Tensor
    first_neuron_S: Tensor
    rank_S: Tensor
    """Orders the rows of a token by expert, those of all kinds together."""
    rows_per_token: int
    mass_S: Tensor
    """See `Summary`, as the two that follow."""
    highest_SC: Tensor
    n_not_finite: Tensor

    @classmethod
    def of(cls, parts: Sequence[ExpertScores]) -> LayerRows:
        """Of one kind of experts or of several, in the order of their neurons."""
        summaries = [part.rows.summary() for part in parts]
        ranks, first_rank = [], 0
        for part in parts:
            ranks.append(part.rank_S + first_rank if first_rank else part.rank_S)
            first_rank += part.rows_per_token
        return cls(
            tuple(part.rows for part in parts),
            joined([part.token_S for part in parts]),
            joined([part.expert_S for part in parts]),
            joined([part.first_neuron_S for part in parts]),
            joined(ranks),
            first_rank,
            joined([summary.mass_S for summary in summaries]),
            joined(_padded([summary.highest_SC for summary in summaries])),
            torch.stack([summary.n_not_finite for summary in summaries]).sum(),
        )

    @property
    def n_rows(self) -> int:
        """S."""
        return len(self.token_S)

    @property
    def n_chunks(self) -> int:
        """C."""
        return self.highest_SC.shape[1]

    @property
    def is_row_S(self) -> Tensor | None:
        """False for what is no row, see `Contributions`; None if all are."""
        if all(part.is_row_S is None for part in self.parts):
            return None
        all_true = [torch.ones(part.n_rows, dtype=torch.bool, device=part.act_SI.device) for part in self.parts]
        own = [
            part.is_row_S if part.is_row_S is not None else true
            for part, true in zip(self.parts, all_true, strict=True)
        ]
        return joined(own)

    def of_chunks(self, row_M: Tensor, chunk_M: Tensor) -> Tensor:
        """See `Contributions.of_chunks`."""
        parts = [part for part in self.parts if part.n_rows]
        score_Mc, first = None, 0
        for part in parts:
            row_of_part_M = row_M if len(parts) == 1 else (row_M - first).clamp(0, part.n_rows - 1)
            found_Mc = part.of_chunks(row_of_part_M, chunk_M)
            score_Mc = found_Mc if score_Mc is None else found_Mc.where((row_M >= first)[:, None], score_Mc)
            first += part.n_rows
        if score_Mc is None:
            return self.highest_SC.new_zeros(0, CHUNK)
        return score_Mc


def _padded(parts: Sequence[Tensor]) -> list[Tensor]:
    n_chunks = max(part.shape[1] for part in parts)
    return [
        F.pad(part, (0, n_chunks - part.shape[1]), value=NOTHING) if part.shape[1] < n_chunks else part
        for part in parts
    ]
