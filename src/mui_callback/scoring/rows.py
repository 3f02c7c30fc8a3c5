"""Contributions of rows of neurons, kept as the factors that they are products of.

A row is one token in one expert. The products of all rows are never in memory together: one pass over the factors
finds what is added up and the highest of each chunk of neurons, and from then on only the chunks that may hold key
neurons are multiplied again.

Shapes: S rows, I neurons of an expert, C chunks of neurons of a row, M chunks that are chosen, c neurons of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mui_callback.fused import scores
from mui_callback.fused.available import can_run

CHUNK = 64
"""Neurons of a chunk."""
NOTHING = float("-inf")
"""Score of an entry that does not exist."""
_AT_ONCE = 2**24
"""Products that are in memory together, where no kernel fuses what is done with them."""
_IN_CACHE = 2**17
"""The same on a CPU, where what is done next finds them in the cache of its core."""
_INNER = 2**22
"""Products that are in memory together where rows are multiplied with rows."""


@dataclass(frozen=True)
class Summary:
    """What one pass over the contributions finds."""

    mass_S: Tensor
    """Σ |f| over the finite ones of the row, float32."""
    highest_SC: Tensor
    """The highest finite one of each chunk, float32; `NOTHING` if there is none."""
    n_not_finite: Tensor
    """How many are NaN or infinite, and do not count; int64 scalar."""


@dataclass(frozen=True)
class Contributions:
    """f = G · a_j · ⟨W_d[:, j], readout⟩ of each row, in float32."""

    act: Tensor
    """Activations a_j that feed the down projection, of any floating-point type, ``[…, I]``."""
    projected_SI: Tensor
    """⟨W_d[:, j], readout⟩, of any floating-point type."""
    weight_S: Tensor | None = None
    """Routing weights G, float32; None where the readout holds them already."""
    is_row_S: Tensor | None = None
    """False where no expert was chosen: nothing of such a row counts. None if all are rows."""
    act_row_S: Tensor | None = None
    """Where the activations of each row are, int64; None if they are in order."""
    is_lent: bool = False
    """Whether the activations are the model's, which may write to them once their layer is over."""

    @property
    def n_rows(self) -> int:
        """S."""
        return self.projected_SI.shape[0]

    @property
    def width(self) -> int:
        """I."""
        return self.projected_SI.shape[1]

    @property
    def n_chunks(self) -> int:
        """C; the last chunk of a row may be shorter."""
        return -(-self.width // CHUNK)

    @cached_property
    def is_fused(self) -> bool:
        """Whether there are kernels for them; asked several times in each layer."""
        return can_run(self.act, self.projected_SI)

    @cached_property
    def factors(self) -> scores.Factors:
        """What the kernels take."""
        return scores.Factors(self.act, self.act_row_S, self.projected_SI, self.weight_S, self.is_row_S)

    def summary(self) -> Summary:
        """One pass over all of them; a second one if some do not count, which on a CPU is seen from the sums."""
        if self._may_all_count:
            found = self._summary(all_count=True)
            if found.mass_S.isfinite().all():
                return found
        return self._summary(all_count=False)

    def _summary(self, *, all_count: bool) -> Summary:
        device = self.act.device
        mass_S = torch.empty(self.n_rows, dtype=torch.float32, device=device)
        highest_SC = torch.empty(self.n_rows, self.n_chunks, dtype=torch.float32, device=device)
        n_not_finite = torch.zeros((), dtype=torch.int64, device=device)
        for rows in self._pieces():
            score_SI = counted_SI = self._products(rows)
            if not all_count:
                is_bad_SI = ~score_SI.isfinite()
                if self.is_row_S is not None:
                    is_bad_SI &= self.is_row_S[rows, None]
                n_not_finite += is_bad_SI.sum()
                score_SI = self._masked(score_SI, rows)
                counted_SI = score_SI.masked_fill(score_SI == NOTHING, 0)
            if self.width % CHUNK:
                score_SI = torch.nn.functional.pad(score_SI, (0, -self.width % CHUNK), value=NOTHING)
            torch.amax(score_SI.view(len(score_SI), self.n_chunks, CHUNK), -1, out=highest_SC[rows])
            torch.sum(counted_SI.abs_(), -1, out=mass_S[rows])
        return Summary(mass_S, highest_SC, n_not_finite)

    def of_chunks(self, row_M: Tensor, chunk_M: Tensor) -> Tensor:
        """The contributions of the neurons of some chunks, float32 ``[M, c]``; `NOTHING` for what does not count.

        Args:
            row_M: row of each chunk.
            chunk_M: number of each chunk in its row.
        """
        act_row_M = row_M if self.act_row_S is None else self.act_row_S[row_M]
        score_Mc = _chunks_at(self.act, act_row_M, chunk_M).float()
        score_Mc = score_Mc * _chunks_at(self.projected_SI, row_M, chunk_M).float()
        if self.weight_S is not None:
            score_Mc *= self.weight_S[row_M, None]
        is_entry_Mc = score_Mc.isfinite() & (_columns(chunk_M) < self.width)
        if self.is_row_S is not None:
            is_entry_Mc &= self.is_row_S[row_M, None]
        return score_Mc.masked_fill_(~is_entry_Mc, NOTHING)

    def sums(self) -> Tensor:
        """Σ f over the finite ones of each row, float64 ``[S]``, added up in float32."""
        if self.is_fused:
            return scores.sums(self.factors).double()
        if self._may_all_count:
            sum_S = self._sums(all_count=True)
            if sum_S.isfinite().all():
                return sum_S.double()
        return self._sums(all_count=False).double()

    def _sums(self, *, all_count: bool) -> Tensor:
        sum_S = torch.empty(self.n_rows, dtype=torch.float32, device=self.act.device)
        for rows in self._pieces():
            score_SI = self._products(rows)
            counted_SI = score_SI if all_count else self._masked(score_SI, rows).nan_to_num_(neginf=0.0)
            torch.sum(counted_SI, -1, out=sum_S[rows])
        return sum_S

    @property
    def _may_all_count(self) -> bool:
        """Whether to look for what does not count only after it was found in a sum, which a GPU would be waited for."""
        return self.is_row_S is None and self.act.device.type == "cpu"

    def all(self) -> Tensor:
        """All of them, float32 ``[S, I]``; `NOTHING` for what does not count."""
        return self._masked(self._products(slice(None)), slice(None))

    def _pieces(self) -> Iterator[slice]:
        size = max(1, (_IN_CACHE if self.act.device.type == "cpu" else _AT_ONCE) // max(self.width, 1))
        for start in range(0, self.n_rows, size):
            yield slice(start, start + size)

    def _products(self, rows: slice) -> Tensor:
        act_SI = self.act[rows] if self.act_row_S is None else rows_at(self.act, self.act_row_S[rows])
        score_SI = act_SI.float() * self.projected_SI[rows].float()
        return score_SI if self.weight_S is None else score_SI.mul_(self.weight_S[rows, None])

    def _masked(self, score_SI: Tensor, rows: slice) -> Tensor:
        is_entry_SI = score_SI.isfinite()
        if self.is_row_S is not None:
            is_entry_SI &= self.is_row_S[rows, None]
        return score_SI.masked_fill_(~is_entry_SI, NOTHING)


def _chunks_at(x_SI: Tensor, row_M: Tensor, chunk_M: Tensor) -> Tensor:
    """Neurons of some chunks of some rows, ``[M, c]``; anything beyond the last neuron of a row."""
    n_chunks, rest = divmod(x_SI.shape[1], CHUNK)
    if rest:
        return x_SI[row_M[:, None], _columns(chunk_M).clamp(max=x_SI.shape[1] - 1)]
    return x_SI.view(len(x_SI), n_chunks, CHUNK)[row_M, chunk_M.clamp(max=n_chunks - 1)]


def _columns(chunk_M: Tensor) -> Tensor:
    """The neurons of some chunks by their number in a row, int64 ``[M, c]``."""
    return chunk_M[:, None] * CHUNK + torch.arange(CHUNK, device=chunk_M.device)


def rows_at(x: Tensor, row_M: Tensor) -> Tensor:
    """``x[row_M]``, by whichever operator is the faster one on the device."""
    return x[row_M] if x.is_cuda else x.index_select(0, row_M)


def inner(one_MD: Tensor, other_MD: Tensor) -> Tensor:
    """Their inner products row by row, float32 ``[M]``; some rows at a time, for the products take twice the memory."""
    size = max(1, _INNER // max(one_MD.shape[1], 1))
    pairs = zip(torch.split(one_MD, size), torch.split(other_MD, size), strict=True)
    return joined([(one.float() * other.float()).sum(-1) for one, other in pairs])


def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """One tensor, or several behind one another; one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
