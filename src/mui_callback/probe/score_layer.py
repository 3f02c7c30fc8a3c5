"""From what a layer's experts did to the contributions of its neurons.

Shapes: T positions of the batch (flattened), R scored tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from mui_callback.errors import InterruptedPassError, ProbeError
from mui_callback.experts.base import First, Recorder
from mui_callback.experts.cut import Cut, add_inner
from mui_callback.experts.layer import ExpertLayer
from mui_callback.experts.tail import Tail
from mui_callback.experts.unrecorded import unrecorded
from mui_callback.forgiving import attempt, described
from mui_callback.parallel.processes import out_of_memory
from mui_callback.scoring.contributions import ExpertScores, LayerScores, ScoredTokens, add_conserved
from mui_callback.settings import Activation


class LayerReader:
    """Reads one layer in one forward pass after another.

    Args:
        layer: the layer.
        counts: whether this process counts what it sees of experts that others have as well. Not if another one has
            the same batch.
        activation: see `ProbeSettings`.
        careful: whether to ask the tail in every batch, for a model that does not do the same in all of them.

    Raises:
        UnsupportedModelError: the experts have no such activations that can be read.
    """

    def __init__(
        self, layer: ExpertLayer, *, counts: bool = True, activation: Activation = "product", careful: bool = False
    ) -> None:
        self.layer = layer
        self.careful = careful
        self.activation = activation
        self.tail = Tail(f"layer {layer.shape.layer} ({layer.shape.path})", layer.peers)
        self.recorders: list[Recorder] = []
        self._counted: list[Recorder] = []
        first = First(0, 0)
        for experts in layer.experts:
            recorder = experts.recorder(self.tail, first, activation)
            self.recorders.append(recorder)
            if counts or not experts.spread.peers.is_alone:
                self._counted.append(recorder)
            first = First(first.expert + experts.n_experts, first.neuron + experts.n_experts * experts.width)
        self._counts = counts
        self.can_follow = False
        """Whether it was learned how to know the tokens of all rows without asking the tail."""
        self.is_learned = False
        """Whether that holds for later passes, too, in which only the identity is checked."""
        self.is_proven = False
        """Whether a whole pass went well with what was learned."""

    def clear(self) -> None:
        """Forget the last forward pass."""
        self.tail.clear()
        for recorder in self.recorders:
            recorder.clear()

    def announce(self, tokens: ScoredTokens, readout_RD: Tensor) -> None:
        """Before a forward pass of the layer; see `Recorder.announce`. What is known before needs no recording."""
        for recorder in self.recorders:
            recorder.announce(tokens, readout_RD)

    @property
    def is_followed(self) -> bool:
        """Whether nothing of the present forward pass is recorded."""
        return all(recorder.is_followed for recorder in self.recorders)

    @property
    def is_never_recorded(self) -> bool:
        """Whether it was learned that nothing of any forward pass has to be; False for layers that follow a dispatch,
        though most of their passes do without."""
        return self.can_follow and all(recorder.is_direct for recorder in self.recorders)

    def watch_tail(self) -> list[RemovableHandle]:
        """Hooks on the modules that may be in the tail."""
        scope = self.layer.scope.modules() if self.layer.scope_is_moe else self.layer.scope.children()
        return self.tail.watched(scope, [part for experts in self.layer.experts for part in experts.modules])

    def has_joined(self, x: Tensor) -> bool:
        """Whether a tensor holds the outputs of all experts of the layer."""
        return all(recorder.has_run for recorder in self.recorders) and self.tail.has_joined(x)

    def scores(
        self,
        out: Tensor,
        readouts: Callable[[], Tensor],
        tokens: ScoredTokens,
        readout_RD: Tensor,
        *,
        is_output: bool,
        check: bool = False,
        learn: bool = False,
    ) -> LayerScores:
        """The contributions of the neurons of the layer that are in this process, to the scored tokens that meet here.

        Where experts are spread over processes, all of them make this call, and what goes wrong in one is raised after
        the last collective.

        Args:
            out: where the tail ends, ``[…, D]`` of T positions.
            readouts: makes ``[T, D]``, the unembedding row of the token that each position predicts, zero where none is
                scored; not called where nothing of the pass was recorded.
            tokens: the scored tokens.
            readout_RD: unembedding row of the target of each token that meets in the layer.
            is_output: whether `out` is the output of the experts alone; if not, there is a residual in it.
            check: also compute what the conservation identity compares: always with `learn`, else where a whole pass
                has not shown yet that what was learned in its first batch holds in others.
            learn: if it is not known yet, find out what the tail does, and how little has to be asked of it from then
                on.

        Raises:
            ProbeError: an expert did not run, or not on the positions of the batch, or the tail cannot be transposed.
        """
        with self._together():
            for recorder in self.recorders:
                recorder.meet()
        if check or not self.is_followed:
            self._check_output(out, readout_RD.shape[1], tokens)
        for recorder in self.recorders:
            recorder.check_complete(tokens)
        learns = learn and not self.is_learned
        check = learn or (check and self._is_to_be_proven)
        if is_output and learns:
            self._note_own_bias(out)
        with self._together():
            self._trace(out, readouts, tokens, learns=learns)
        with unrecorded(out.device):
            if check:
                return self._with_sums(out, readouts, tokens, readout_RD, is_output=is_output)
            return LayerScores(self._parts(tokens, readout_RD, self.activation))

    def _with_sums(
        self,
        out: Tensor,
        readouts: Callable[[], Tensor],
        tokens: ScoredTokens,
        readout_RD: Tensor,
        *,
        is_output: bool,
    ) -> LayerScores:
        """The contributions, and what the conservation identity compares; an error is raised after the collective."""
        made, output, unmade = sums = torch.zeros(3, tokens.n_numbers, dtype=torch.float64, device=out.device)
        parts, error = attempt(lambda: self._parts(tokens, readout_RD, self.activation))
        if parts is not None:
            _, error = attempt(
                lambda: self._add_up(parts, made, output, unmade, tokens, readout_RD, is_output=is_output)
            )
        if is_output and self._counts:
            readout_TD = readouts()
            add_inner(output, tokens.number_T, out.detach().reshape(readout_TD.shape), readout_TD)
            for cut, value in self.tail.constants:
                assert cut.token_S is not None
                add_inner(unmade, cut.token_S, value, cut.readout_SD)
        self.layer.peers.add(sums)
        if error is not None:
            raise error
        own = slice(tokens.first, tokens.first + len(tokens.position_R))
        return LayerScores(parts or (), made[own], (output - unmade)[own])

    def _together(self) -> AbstractContextManager[None]:
        """Where the processes that share the experts send each other tensors, so that none may stop alone."""
        return nullcontext() if self.layer.peers.is_alone else self._none_alone()

    @contextmanager
    def _none_alone(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if isinstance(error, ProbeError) and not out_of_memory(error):  # of the model, and so the same in all
                raise
            raise InterruptedPassError(
                f"{self.tail.where}: a process failed where those that share its experts exchange tensors, so that the "
                f"others wait for it in vain and nothing can go on ({described(error)})."
            ) from error

    @property
    def _is_to_be_proven(self) -> bool:
        """Whether nothing is recorded because of what the first batch of this pass showed of how outputs are used."""
        is_direct = any(recorder.is_direct for recorder in self.recorders)
        return is_direct and not self.is_proven and self.activation == "product"

    def _trace(self, out: Tensor, readouts: Callable[[], Tensor], tokens: ScoredTokens, *, learns: bool) -> None:
        """Follow the tail back to the experts, no further than needed."""
        if learns or not self.can_follow:
            self.tail.locate(out, tokens)
        if learns:
            self.tail.locate_constants(out, tokens)
            self._learn(out, tokens)
        if self.can_follow:
            for recorder in self.recorders:
                if recorder.knows_order:
                    recorder.follow(tokens)
        if self.tail.cuts or self.tail.constants:
            self.tail.transpose(out, readouts(), check=learns)

    def _learn(self, out: Tensor, tokens: ScoredTokens) -> None:
        """From what the tail was asked; the same in all processes that share the experts, for collectives are on it."""
        device = tokens.target_R.device
        for recorder in self.recorders:
            recorder.learn(tokens)
            cuts = recorder.cuts
            recorder.is_direct = (
                not self.careful
                and self.layer.scope_is_moe
                and self.layer.peers.is_alone
                and recorder.can_be_direct
                and self.tail.is_straight(out, of=cuts)
            )
        can_follow = all(
            recorder.knows_order or (recorder.trusts_dispatch and self.layer.scope_is_moe)
            for recorder in self.recorders
        )
        # Of outputs with a weight of zero nothing was learned. The identity of later passes could not be checked where
        # constants in the tail are not seen, or rows are multiplied with other activations than those that add up.
        can_stay = can_follow and not self.tail.constants and self.activation == "product"
        was_seen = [(cut.token_S >= 0).any() for cut in self.tail.cuts if cut.token_S is not None]
        stays = torch.stack([torch.tensor(can_stay, device=device), *was_seen]).all()
        flags = torch.stack([torch.tensor(not can_follow, device=device), ~stays]).double()
        self.layer.peers.highest(flags)
        cannot_follow, is_for_now = flags.bool().tolist()
        self.can_follow, self.is_learned = not cannot_follow, not is_for_now

    def _parts(self, tokens: ScoredTokens, readout_RD: Tensor, activation: Activation) -> tuple[ExpertScores, ...]:
        return tuple(recorder.scores(tokens, readout_RD, activation) for recorder in self._counted)

    def _add_up(
        self,
        parts: tuple[ExpertScores, ...],
        made_R: Tensor,
        output_R: Tensor,
        unmade_R: Tensor,
        tokens: ScoredTokens,
        readout_RD: Tensor,
        *,
        is_output: bool,
    ) -> None:
        if self.activation != "product":  # only these add up
            parts = self._parts(tokens, readout_RD, "product")
        for part in parts:
            add_conserved(made_R, part)
        for recorder in self._counted:
            recorder.add_unmade(unmade_R, tokens, readout_RD)
            if not is_output:
                recorder.add_output(output_R, readout_RD)

    def _check_output(self, out: Tensor, width: int, tokens: ScoredTokens) -> None:
        shapes = ((tokens.n_rows, tokens.length), (1, tokens.n_rows * tokens.length), (tokens.n_rows * tokens.length,))
        if out.shape[:-1] not in shapes or out.shape[-1] != width:
            raise ProbeError(
                f"{self.tail.where}: expected an output [{tokens.n_rows}, {tokens.length}, {width}] for "
                f"{tokens.n_rows} samples of {tokens.length} positions and the width of the language-model head, got "
                f"{list(out.shape)}. Models that have the positions first cannot be probed."
            )

    def _note_own_bias(self, out: Tensor) -> None:
        bias = getattr(self.layer.scope, "bias", None)
        if isinstance(bias, Tensor):
            self.tail.constants.append((Cut(out), bias))
