"""What a layer does with the outputs of its experts, recorded so that it can be transposed.

Between the down projection of an expert and the output of its layer lie a routing weight, an output bias, a gate, a
scaling factor, a norm, a projection out of a latent space, the sum over experts: the *tail*. It is linear in the
outputs of the experts, and autograd transposes it. Applied to the unembedding row of the target, the transpose gives
the *readout* in front of it, so that for any architecture

    G · ⟨W_d[:, j], W_head[y]⟩ = ⟨W_d[:, j], readout⟩.

Shapes: T positions of the batch (flattened), S rows of one output (token and expert), D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mui_callback.errors import ProbeError
from mui_callback.experts.codewords import SLACK, codewords, read_codewords, unlikeness
from mui_callback.experts.cut import Cut
from mui_callback.experts.linear import is_linear
from mui_callback.experts.norms import channel_scale, is_norm
from mui_callback.experts.straight import leads_straight
from mui_callback.parallel.peers import Peers
from mui_callback.scoring.contributions import ScoredTokens

_BASE = 16
"""Of the digits that are sent through a tail."""


class Tail:
    """The tail of one layer, in one forward pass after another.

    Where experts are spread over processes, the tail holds the collectives that carry their outputs back, and so does
    its transpose: all of the processes have to make the same calls.

    Args:
        where: the layer, for messages.
        peers: the processes that the tail reaches over.
    """

    def __init__(self, where: str, peers: Peers) -> None:
        self.where = where
        self.peers = peers
        self.moves_rows = False
        """Whether a codeword that is sent through arrives as one, at the last pass of the tail."""
        self.is_weighting = False
        """Whether rows are moved and weighted, all channels alike, and nothing else, at the last pass of the tail."""
        self.clear()

    def clear(self) -> None:
        """Forget the last forward pass."""
        self.is_mixed: Tensor | None = None
        """Whether a row came that is of no one token."""
        self.complaint: str | None = None
        """What is wrong with where its rows come from; to be raised when no process waits for another."""
        self.cuts: list[Cut] = []
        self.constants: list[tuple[Cut, Tensor]] = []
        """Biases ``[D]`` of linear maps in the tail, and where they were added; no neuron made them."""

    def cut(self, out: Tensor) -> Cut:
        """The output of experts from which on operations are recorded; go on with ``cut.value`` or a copy."""
        torch.set_grad_enabled(True)
        cut = Cut(out.detach().requires_grad_())
        self.cuts.append(cut)
        return cut

    def watched(self, scope: Iterable[nn.Module], experts: Iterable[nn.Module]) -> list[RemovableHandle]:
        """Hooks on those modules that need care in a tail: norms, and linear maps with a bias outside of experts."""
        handles, inside = [], {module for expert in experts for module in expert.modules()}
        for module in scope:
            if is_norm(module):
                handles.append(module.register_forward_hook(self._hold_scale))
            elif module not in inside and is_linear(module):
                inside |= set(module.modules())  # what an adapter wraps is part of it
                if getattr(module, "bias", None) is not None:
                    handles.append(module.register_forward_hook(self._note_bias))
        return handles

    def _is_inside(self, x: object) -> bool:
        return bool(self.cuts) and torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad

    def _hold_scale(self, norm: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        """Let a norm pass for the scaling of channels that it amounts to at its present input.

        The value is that of the norm to the bit; only what autograd sees is linear.
        """
        if not args or not self._is_inside(args[0]):
            return None
        with torch.no_grad():
            scale = channel_scale(out, args[0])
        scaled = args[0] * scale
        return out.detach() + (scaled - scaled.detach()).to(out.dtype)

    def _note_bias(self, linear: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if args and self._is_inside(args[0]):
            assert isinstance(linear.bias, Tensor)
            self.constants.append((Cut(out), linear.bias))

    def has_joined(self, x: Tensor) -> bool:
        """Whether the tensor holds the outputs of all cuts so far."""
        return bool(self.cuts) and _leaves_behind(x) >= {id(cut.value) for cut in self.cuts}

    def transpose(self, out: Tensor, readout_TD: Tensor, *, check: bool = False) -> None:
        """Set the readout of every constant, and of those cuts whose weight is not known.

        Args:
            out: output of the layer, ``[…, D]`` of T positions.
            readout_TD: unembedding row of the token that each position predicts, zero where none is scored.
            check: whether to make sure that the tail is linear.

        Raises:
            ProbeError: the outputs of the experts did not reach the output of the layer in a way that was recorded,
                or the tail is not linear.
        """
        cuts = [cut for cut in self.cuts if cut.weight_S is None]
        cuts += [cut for cut, _ in self.constants]
        readouts = self._seen_from(out, cuts, readout_TD, create_graph=check)
        if check:
            leaves = {id(cut.value) for cut in self.cuts}
            if any(_leaves_behind(readout) & leaves for readout in readouts):
                raise ProbeError(
                    f"{self.where}: what follows its experts is not linear in their outputs, so these cannot be told "
                    "apart. Is another module than the down projection taken for it? `register_adapter` can name it."
                )
        for cut, readout in zip(cuts, readouts, strict=True):
            cut.readout = readout.detach()

    def is_straight(self, out: Tensor, *, of: Sequence[Cut]) -> bool:
        """Whether it hands on the outputs at some cuts as they are; see `leads_straight`."""
        return not self.constants and all(leads_straight(cut.value, out) for cut in of)

    def locate(self, out: Tensor, tokens: ScoredTokens) -> None:
        """Set the token of each row of each cut and, where the tail moves and weights rows and does nothing else, its
        weight. To be called before `transpose`.

        The transposed tail carries the number of the token to the rows: as a codeword of signs over the channels, which
        arrives as it is if all that happens on the way is that rows are moved and weighted. If not, and there is but
        one process, its digits are sent one after the other. What goes to several tokens is a `complaint`.

        Args:
            out: output of the layer, ``[…, D]`` of T positions.
            tokens: the scored tokens of those.
        """
        cuts = self.cuts
        n_bits = tokens.n_bits
        seen = self._sent_codewords(out, cuts, tokens)
        self._learn(seen, n_bits)
        if not self.moves_rows and self.peers.is_alone:
            for cut, token_S in zip(cuts, self._tokens_by_digits(out, cuts, tokens), strict=True):
                cut.token_S = token_S
            return
        code_SD = torch.cat([code_SD[:, : 1 + n_bits] for code_SD in seen])
        number_S, is_word_S = read_codewords(code_SD, n_bits)
        self.is_mixed = ~is_word_S.all()
        sizes = [cut.n_rows for cut in cuts]
        for cut, token_S in zip(cuts, torch.split(number_S.where(is_word_S, -1), sizes), strict=True):
            cut.token_S = token_S
        if self.is_weighting:
            for cut, weight_S in zip(cuts, torch.split(code_SD[:, 0].float(), sizes), strict=True):
                cut.weight_S = weight_S

    def _learn(self, seen: Sequence[Tensor], n_bits: int) -> None:
        """What the tail does to codewords; the same for all processes that it reaches over."""
        n_narrow = sum(n_bits >= code_SD.shape[1] for code_SD in seen)
        unlike = torch.stack([unlikeness(code_SD, (SLACK, 0)) for code_SD in seen]).sum(0) + n_narrow
        has_words = torch.stack([code_SD.any() for code_SD in seen]).any()  # from nothing, nothing can be learned
        flags = torch.stack([*unlike.unbind(), has_words]).double()
        self.peers.highest(flags)
        does_not_move, does_not_weight, was_seen = flags.bool().tolist()
        self.moves_rows, self.is_weighting = not does_not_move, was_seen and not does_not_weight

    def raise_if_mixed(self, *, is_mixed: bool) -> None:
        """To be called when no process waits for another.

        Args:
            is_mixed: the value of `self.is_mixed`, on the host.

        Raises:
            ProbeError: it cannot be told where rows go to.
        """
        if self.complaint is not None:
            raise ProbeError(self.complaint)
        if is_mixed:
            raise ProbeError(
                f"{self.where}: what its experts put out is changed in another way than by a weight on its way from "
                "other processes, so that it cannot be told which token it is for."
            )

    def _tokens_by_digits(self, out: Tensor, cuts: Sequence[Cut], tokens: ScoredTokens) -> list[Tensor]:
        """The token of each row of each cut, one digit of its number at a time: every digit is sent along a fixed
        direction, and read off as a multiple of what 1 becomes. Digits are small enough to be exact in half precision,
        whichever the tail computes in.
        """
        number_T = tokens.number_T + 1
        direction_D = torch.arange(out.shape[-1], device=out.device).mul(2654435761).bitwise_right_shift(16) % 2 * 2 - 1

        def sent(value_T: Tensor) -> list[Tensor]:
            seen = self._sent(out, cuts, value_T[:, None] * direction_D)
            return [grad.double() for grad in seen]

        ones = sent((number_T > 0).long())
        squares = [one_SD.square().sum(-1) for one_SD in ones]
        numbers = [torch.zeros_like(square_S, dtype=torch.int64) for square_S in squares]
        weight, largest = 1, tokens.n_numbers
        while weight <= largest:
            for number_S, one_SD, square_S, digit_SD in zip(
                numbers, ones, squares, sent(number_T // weight % _BASE), strict=True
            ):
                digit_S = ((digit_SD * one_SD).sum(-1) / square_S).nan_to_num_()
                rest_S = (digit_SD - digit_S[:, None] * one_SD).square().sum(-1)
                is_mixed_S = (digit_S - digit_S.round()).abs() > 0.2
                is_mixed_S |= rest_S > 0.01 * digit_S.clamp(min=1).square() * square_S
                if is_mixed_S.any():
                    self.complaint = (
                        f"{self.where}: an expert's output goes to several tokens at once (as in a soft mixture of "
                        "experts), so no token can be said to have used it."
                    )
                number_S += digit_S.round().long() * weight
            weight *= _BASE
        return [number_S - 1 for number_S in numbers]

    def _sent(self, out: Tensor, cuts: Sequence[Cut], value_TD: Tensor) -> list[Tensor]:
        seen = self._seen_from(out, cuts, value_TD.to(out.dtype), retain_graph=True)
        return [grad.reshape(-1, grad.shape[-1]) for grad in seen]

    def locate_constants(self, out: Tensor, tokens: ScoredTokens) -> None:
        """Set the token of each row of what no neuron made; one row for each position of the batch is in order."""
        number_T = tokens.number_T
        cuts = [cut for cut, _ in self.constants]
        if all(cut.n_rows == len(number_T) for cut in cuts):
            numbers = [number_T] * len(cuts)
        else:
            numbers = self._numbers(out, cuts, tokens)
        for cut, number_S in zip(cuts, numbers, strict=True):
            cut.token_S = number_S

    def _numbers(self, out: Tensor, cuts: Sequence[Cut], tokens: ScoredTokens) -> list[Tensor]:
        found = [read_codewords(code_SD, tokens.n_bits) for code_SD in self._sent_codewords(out, cuts, tokens)]
        if all(bool(is_word_S.all()) for _, is_word_S in found) or not self.peers.is_alone:
            return [number_S.where(is_word_S, -1) for number_S, is_word_S in found]
        return self._tokens_by_digits(out, cuts, tokens)

    def _sent_codewords(self, out: Tensor, cuts: Sequence[Cut], tokens: ScoredTokens) -> list[Tensor]:
        words_TD = codewords(tokens.number_T, tokens.n_bits, out.shape[-1], out.dtype)
        return self._sent(out, cuts, words_TD)

    def _seen_from(
        self,
        out: Tensor,
        cuts: Sequence[Cut],
        sent_TD: Tensor,
        *,
        retain_graph: bool | None = None,
        create_graph: bool = False,
    ) -> list[Tensor]:
        values = [cut.value for cut in cuts]
        if not values:
            return []
        if not out.requires_grad:
            raise ProbeError(
                f"{self.where}: the outputs of its experts do not reach its output in a way that autograd can follow. "
                "Does its forward run in torch.inference_mode, or detach them?"
            )
        sent = sent_TD.to(out.dtype).view_as(out)
        try:
            with torch.enable_grad(), self.peers.counting():
                seen = torch.autograd.grad(
                    out, values, sent, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
                )
        except RuntimeError as error:
            raise ProbeError(f"{self.where}: what follows its experts cannot be transposed: {error}") from error
        return [torch.zeros_like(value) if grad is None else grad for grad, value in zip(seen, values, strict=True)]


def _leaves_behind(x: Tensor) -> set[int]:
    """Identities of the leaves of autograd that a tensor was computed from."""
    found: set[int] = set()
    seen: set[object] = set()
    stack: list[object] = [x.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        stack += [following for following, _ in getattr(node, "next_functions", ())]
    return found
