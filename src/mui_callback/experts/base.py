"""What all kinds of experts have in common, however their weights are kept.

Shapes: R scored tokens, E experts, I neurons of an expert, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from mui_callback.experts.cut import Cut
from mui_callback.experts.expert_parallelism import Spread
from mui_callback.experts.tail import Tail
from mui_callback.scoring.contributions import ExpertScores, ScoredTokens
from mui_callback.settings import Activation


class First(NamedTuple):
    """Numbers in the layer that some experts begin with."""

    expert: int
    neuron: int


class Experts(Protocol):
    """Experts of one layer that are kept and run in the same way: all routed ones, or some shared ones."""

    @property
    def path(self) -> str:
        """Module path, for messages."""

    @property
    def layout(self) -> str:
        """How the weights are kept, in words."""

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Modules in which nothing is recorded until the down projection is reached: the experts, as far as known."""

    @property
    def spread(self) -> Spread:
        """Which of them are in this process."""

    @property
    def n_experts(self) -> int:
        """Number of experts, those of other processes included."""

    @property
    def width(self) -> int:
        """Neurons of each expert."""

    def recorder(self, tail: Tail, first: First, activation: Activation) -> Recorder:
        """What reads these experts.

        Raises:
            UnsupportedModelError: they have no activations of this kind that can be read.
        """

    def masked(self, is_masked_EI: Tensor, note_use: Callable[[], None]) -> AbstractContextManager[None]:
        """A context in which the activations of some neurons are zero, for forward passes without gradients.

        Args:
            is_masked_EI: which, bool ``[E, I]`` for all E experts, those of other processes included.
            note_use: called whenever some of the experts run.
        """


class Recorder(Protocol):
    """Reads experts in one forward pass after another."""

    def attached(self) -> AbstractContextManager[None]:
        """Whatever has to be in the model while it is read."""

    def clear(self) -> None:
        """Forget the last forward pass."""

    @property
    def has_run(self) -> bool:
        """Whether the experts ran since."""

    def check_complete(self, tokens: ScoredTokens) -> None:
        """Raises `ProbeError` if the experts did not run, or not on the positions of the batch."""

    @property
    def knows_order(self) -> bool:
        """Whether it was learned that the rows are the positions of the batch, in order."""

    @property
    def trusts_dispatch(self) -> bool:
        """Whether it was learned that the router tells which rows are whose."""

    @property
    def cuts(self) -> Sequence[Cut]:
        """Where the tail begins behind these experts, in the last forward pass."""

    @property
    def can_be_direct(self) -> bool:
        """Whether it could do without the tail, if that hands on the outputs as they are."""

    is_direct: bool
    """Whether it was learned that it does, so that the readout of each token is the unembedding row of its target."""

    def announce(self, tokens: ScoredTokens, readout_RD: Tensor) -> None:
        """Before a forward pass: which tokens meet in the layer, for those who do without the tail.

        Args:
            tokens: the scored tokens.
            readout_RD: unembedding row of the target of each token that meets in the layer.
        """

    @property
    def is_followed(self) -> bool:
        """Whether nothing of the present forward pass is recorded, as all that is wanted was announced."""

    def meet(self) -> None:
        """Whatever the processes that share the experts tell each other once they have left the layer; all of them make
        this call."""

    def follow(self, tokens: ScoredTokens) -> None:
        """Set the token of each row, of one that knows the order, without asking the tail."""

    def learn(self, tokens: ScoredTokens) -> None:
        """From what the tail was asked, learn how to do without; make sure of what is taken for granted."""

    def scores(self, tokens: ScoredTokens, readout_RD: Tensor, activation: Activation) -> ExpertScores:
        """The contributions of the neurons to the scored tokens, after the rows were located or the tail transposed.

        Args:
            tokens: the scored tokens.
            readout_RD: unembedding row of the target of each token that meets in the layer.
            activation: which activations; ``"gate"`` only for a recorder that was made for it.
        """

    def add_output(self, output_R: Tensor, readout_RD: Tensor) -> None:
        """Add ⟨output of the experts, readout⟩ of each token to float64 ``[R]``."""

    def add_unmade(self, unmade_R: Tensor, tokens: ScoredTokens, readout_RD: Tensor) -> None:
        """Add what no neuron made of that: output biases, experts that pass their input on."""
