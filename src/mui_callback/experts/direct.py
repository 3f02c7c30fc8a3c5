"""Experts that see every position, and whose outputs are part of the layer's output as they are.

Nothing has to be asked of the tail for them, so nothing is recorded: they are multiplied while the layer runs.

Shapes: R scored tokens, S positions, I neurons of a down projection, D model width.
"""

from __future__ import annotations

from torch import Tensor

from mui_callback.errors import ProbeError
from mui_callback.experts.called_rows import CalledRows
from mui_callback.experts.cut import add_inner
from mui_callback.experts.down import Product
from mui_callback.experts.located import rows_at_positions
from mui_callback.scoring.contributions import ScoredTokens
from mui_callback.scoring.rows import Contributions, joined, rows_at


class DirectRows:
    """The contributions of such experts of one layer in one forward pass.

    Args:
        tokens: the scored tokens.
        readout_RD: unembedding row of the target of each.
    """

    def __init__(self, tokens: ScoredTokens, readout_RD: Tensor) -> None:
        self._tokens = tokens
        self._readout_RD = readout_RD
        self._experts: list[int] = []
        self._factors: list[tuple[Tensor, Tensor]] = []
        self._biases: list[Tensor] = []

    @property
    def have_come(self) -> bool:
        """Whether any have run."""
        return bool(self._experts)

    def add(self, expert: int, product: Product, act_SI: Tensor) -> None:
        """Multiply what one down projection has for the scored tokens.

        Args:
            expert: number of the down projection in the layer.
            product: the product.
            act_SI: its activations.

        Raises:
            ProbeError: it is not one of all positions, or of another kind than in the first batch.
        """
        n_positions = self._tokens.n_rows * self._tokens.length
        if len(act_SI) != n_positions or product.weight is None:
            raise ProbeError(
                f"expected shared experts to see all {n_positions} positions of the batch in a plain product, as in "
                f"the first one, got {len(act_SI)} rows"
            )
        self._experts.append(expert)
        self._factors.append(
            (rows_at(act_SI, self._tokens.position_R), product.projected(self._readout_RD, self._tokens.position_R))
        )
        if product.bias is not None:
            self._biases.append(product.bias)

    def rows(self) -> tuple[CalledRows, Contributions]:
        """All of them, after the last product."""
        act, projected = zip(*self._factors, strict=True)
        return rows_at_positions(self._experts, self._tokens), Contributions(joined(act), joined(projected))

    def add_biases(self, unmade_R: Tensor) -> None:
        """Add ⟨output bias, readout⟩ of all of them to float64 ``[R]``."""
        for bias in self._biases:
            add_inner(unmade_R, self._tokens.own_numbers, bias, self._readout_RD)
