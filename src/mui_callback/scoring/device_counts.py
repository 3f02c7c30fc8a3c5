"""Adding up a probe pass on the device.

Shapes: N samples of the probe, B samples of a batch, Q tasks, E experts (of a layer, or of all), k key entries of a
sample, L layers, R scored tokens, C choices of all samples.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mui_callback.counts import ProbeCounts
from mui_callback.layout import ExpertLayout
from mui_callback.parallel.peers import Peers
from mui_callback.rules import Rule
from mui_callback.scoring.contributions import LayerScores, Responses, identity_error
from mui_callback.scoring.key_marks import KeyMarks, entries_needed
from mui_callback.scoring.layer_rows import LayerRows, Parts, alike, can_wait, n_bytes
from mui_callback.scoring.meeting import Meeting
from mui_callback.scoring.rows import joined
from mui_callback.scoring.select import NeuronScores, neurons_above, thresholds
from mui_callback.scoring.topk import Candidates, Finalists, merge_candidates

_WAITING = 2**28
"""Bytes of contributions that wait for those of other layers, as to look at them together takes fewer kernels."""
_PENDING = 2**26
"""Bytes of finalists that wait for those of other layers, as to rank them together takes fewer operators."""


class DeviceCounts:
    """The counts of a pass while it runs; with rules that take a fixed number of entries, nothing reaches the host
    before `to_host`.

    Args:
        layout: the layers that are probed.
        task_of_sample: int64 ``[N]``.
        n_tasks: Q.
        n_choices: C.
        rules: which entries make key neurons.
        device: where the counts are kept.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        task_of_sample: NDArray[np.int64],
        *,
        n_tasks: int,
        n_choices: int,
        rules: Sequence[Rule],
        device: torch.device,
    ) -> None:
        self.layout = layout
        self.device = device
        self.n_tasks = n_tasks
        self.task_of_sample = torch.from_numpy(task_of_sample).to(device)
        self.k = [entries_needed(rules, layer.n_neurons) for layer in layout.layers]
        self._experts: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self.marks = [KeyMarks(rule, layout, device) for rule in rules]

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.totals = zeros(torch.float64, n_tasks, layout.n_experts, 2)
        """Contribution mass and number of rows of each task in each expert."""
        self.sample_mass = zeros(torch.float64, len(task_of_sample), 2)
        self.loss = zeros(torch.float64, len(task_of_sample))
        self.correct = zeros(torch.int64, len(task_of_sample))
        self.choice_loss = zeros(torch.float64, n_choices)
        self.not_finite = zeros(torch.int64, 1)
        self.dropped = zeros(torch.int64, len(layout.layers))
        self.assigned = zeros(torch.int64, len(layout.layers))
        self.identity_error = zeros(torch.float64, len(layout.layers)).fill_(float("nan"))
        self.later_error = torch.full_like(self.identity_error, float("nan"))
        """The same in a later batch, where a layer was checked in one; not reported."""
        self.head_error = zeros(torch.float64, 1).fill_(float("nan"))
        self.checked: set[int] = set()
        """Layers whose error in the first batch is known."""

    @property
    def topscore(self) -> list[KeyMarks]:
        """The rules that take entries by their score."""
        return [marks for marks in self.marks if marks.rule.kind == "topscore"]

    @property
    def by_rank(self) -> list[KeyMarks]:
        """The rules that take a fixed number of entries."""
        return [marks for marks in self.marks if marks.rule.kind != "topscore"]

    def experts_of(self, layers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Numbers of the experts of some layers, int64 ``[E]``, and 1 where one is routed or shared, ``[E, 2]``."""
        if layers not in self._experts:
            bounds = np.cumsum([0, *(layer.n_experts for layer in self.layout.layers)])
            number_E = np.concatenate([np.arange(bounds[layer], bounds[layer + 1]) for layer in layers])
            is_shared_E = self.layout.is_shared[number_E]
            is_of_E2 = np.stack([~is_shared_E, is_shared_E], axis=1).astype(np.float64)
            self._experts[layers] = (
                torch.from_numpy(number_E).to(self.device),
                torch.from_numpy(is_of_E2).to(self.device),
            )
        return self._experts[layers]

    def batch(self, responses: Responses, sample_B: Tensor, meetings: Sequence[Meeting | None]) -> BatchCounts:
        """The counter of one batch of samples.

        Args:
            responses: the scored tokens of the batch.
            sample_B: number of each sample, int64 ``[B]``.
            meetings: for each layer, who else's tokens come to its experts; None where nobody's.
        """
        return BatchCounts(self, responses, sample_B, meetings)

    def add_choices(self, choice_R: Tensor, loss_R: Tensor) -> None:
        """Loss (nats) of each scored token of a batch of choices, and the choice that it belongs to."""
        self.choice_loss.index_add_(0, choice_R, loss_R.to(torch.float64))

    def add_dropped(self, layer: int, dropped: Tensor, assigned: Tensor) -> None:
        """Pairs of token and expert that the capacity of training would drop, of those that the router chose."""
        self.dropped[layer] += dropped
        self.assigned[layer] += assigned

    def merge(self, peers: Peers) -> None:
        """Add up what all processes counted, so that each has the counts of the whole."""
        if peers.is_alone:
            return
        for marks in self.marks:
            marks.merge(peers)
        summed = [self.totals, self.sample_mass, self.loss, self.correct, self.choice_loss]
        summed += [self.not_finite, self.dropped, self.assigned]
        flat = torch.cat([tensor.flatten().to(torch.float64) for tensor in summed])  # exact for counts below 2^53
        peers.add(flat)
        for tensor, total in zip(summed, torch.split(flat, [tensor.numel() for tensor in summed]), strict=True):
            tensor.copy_(total.view_as(tensor))
        kinds = [self.identity_error, self.later_error, self.head_error]
        errors = torch.cat(kinds).nan_to_num(nan=float("-inf"))
        peers.highest(errors)
        errors = errors.where(errors.isfinite(), float("nan"))
        for kind, highest in zip(kinds, torch.split(errors, [len(kind) for kind in kinds]), strict=True):
            kind.copy_(highest)

    def to_host(self) -> ProbeCounts:
        """Everything, after the last batch."""
        mass, routed = self.totals.unbind(-1)
        arrays = {
            name: tensor.cpu().numpy()
            for name, tensor in {
                "mass": mass.contiguous(),
                "routed": routed.long(),
                "sample_mass": self.sample_mass,
                "loss": self.loss,
                "correct": self.correct,
                "choice_loss": self.choice_loss,
                "dropped": self.dropped,
                "assigned": self.assigned,
                "not_finite": self.not_finite,
                "identity_error": self.identity_error,
                "head_error": self.head_error,
            }.items()
        }
        return ProbeCounts(key_sets=tuple(marks.sets(len(self.loss)) for marks in self.marks), **arrays)


class BatchCounts:
    """Adds the samples of one batch to the counts of the pass; see `DeviceCounts.batch`."""

    def __init__(
        self, counts: DeviceCounts, responses: Responses, sample_B: Tensor, meetings: Sequence[Meeting | None]
    ) -> None:
        self.counts = counts
        self.responses = responses
        self.sample_B = sample_B
        self.meetings = meetings
        self._waiting: dict[int, Parts] = {}
        """By layer, contributions that are looked at together with those of the next layers."""
        self._waiting_for: Hashable = None
        """What the next layer has to have in common with them."""
        self._use: dict[int, list[tuple[list[int], Tensor]]] = {}
        """By identity of the meeting: layers, and `LayerRows.use` of these."""
        self._n_not_finite = torch.zeros((), dtype=torch.int32, device=counts.device)
        self._pending: dict[tuple[int, ...], Finalists] = {}
        """By layers, whose samples come one after the other."""
        self._found: dict[int, Candidates] = {}
        self._above: dict[int, NeuronScores] = {}
        """By layer, neurons that the loosest of the rules ``topscore`` may take."""

    def add_layer(self, layer: int, scores: LayerScores) -> None:
        """Count the key neurons and the contributions of one layer, or of what of it is in this process."""
        if scores.parts:  # none where another process counts
            self._wait(layer, scores.parts)
        if scores.made_R is not None:
            counts = self.counts
            errors = counts.later_error if layer in counts.checked else counts.identity_error
            errors[layer] = identity_error(scores)
            counts.checked.add(layer)

    def finish(self) -> None:
        """After the last layer: every process finds the key neurons of its own samples.

        Whoever shares experts with others sends them no scores but their samples' best candidates.
        """
        self._look_at_waiting()
        self._rank_pending()
        self._add_totals()
        alone: dict[int, Candidates] = {}
        together: dict[int, list[int]] = {}
        for layer, meeting in enumerate(self.meetings):
            if meeting is None:
                if layer in self._found:
                    alone[layer] = self._found[layer]
            else:
                together.setdefault(id(meeting), []).append(layer)
        self._mark_above({layer: found.score[:, 0] for layer, found in alone.items()}, self.sample_B)
        for layers in together.values():
            alone |= self._met(layers)
        for marks in self.counts.by_rank:
            marks.add_entries(self.sample_B, dict(sorted(alone.items())))

    def add_predictions(self, loss_R: Tensor, is_correct_R: Tensor) -> None:
        """Loss (nats) and whether the first choice was right, for each scored token."""
        sample_R = self.sample_B[self.responses.row_R]
        self.counts.loss.index_add_(0, sample_R, loss_R.to(torch.float64))
        self.counts.correct.index_add_(0, sample_R, is_correct_R.long())
        self.counts.not_finite += (~loss_R.isfinite()).sum()

    def _met(self, layers: Sequence[int]) -> dict[int, Candidates]:
        """The highest entries of this process' own samples in layers in which they meet others'."""
        meeting = self.meetings[layers[0]]
        assert meeting is not None
        sizes = [self.counts.k[layer] for layer in layers]
        found = {
            layer: self._found.get(layer) or Candidates.none(len(meeting.sample_B), k, self.sample_B.device)
            for layer, k in zip(layers, sizes, strict=True)
        }
        if self.counts.topscore:
            highest_BL = torch.stack([candidates.score[:, 0] for candidates in found.values()], dim=1)
            meeting.peers.highest(highest_BL)
            self._mark_above(dict(zip(layers, highest_BL.unbind(1), strict=True)), meeting.sample_B)
        received = meeting.exchange(list(found.values()))
        if not received:
            return {}
        return {layer: merge_candidates(parts, k) for layer, parts, k in zip(layers, received, sizes, strict=True)}

    def _mark_above(self, highest_B: dict[int, Tensor], sample_B: Tensor) -> None:
        """What the rules ``topscore`` take of this process' experts, given the highest score of each sample."""
        for marks in self.counts.topscore:
            for layer, highest in highest_B.items():
                if layer in self._above:
                    threshold_B = thresholds(marks.rule.value, highest)
                    marks.add_neurons(sample_B, layer, self._above[layer].at_least(threshold_B))

    def _wait(self, layer: int, parts: Parts) -> None:
        """For layers that are alike, as many as may be in memory together."""
        shape = self.counts.layout.layers[layer]
        kind = (alike(parts), id(self.meetings[layer]), shape.n_experts, shape.n_neurons, self.counts.k[layer])
        if kind != self._waiting_for:
            self._look_at_waiting()
        self._waiting_for = kind
        self._waiting[layer] = parts
        is_last = layer == len(self.meetings) - 1  # behind it come the logits, which take most memory of all
        if is_last or not can_wait(parts) or sum(map(n_bytes, self._waiting.values())) >= _WAITING:
            self._look_at_waiting()

    def _look_at_waiting(self) -> None:
        if not self._waiting:
            return
        layers, parts_L = zip(*self._waiting.items(), strict=True)
        self._waiting, self._waiting_for = {}, None
        counts, shape, meeting = self.counts, self.counts.layout.layers[layers[0]], self.meetings[layers[0]]
        responses = self.responses if meeting is None else meeting.responses
        rows = LayerRows.of(parts_L, responses, shape.n_experts, self._n_not_finite)
        self._use.setdefault(id(meeting), []).append((list(layers), rows.use(responses)))
        if counts.topscore:
            # where the highest score is negative, the loosest rule is the one with the highest ratio
            of_rules = [thresholds(marks.rule.value, rows.highest_LB) for marks in counts.topscore]
            for number, (layer, loosest_B) in enumerate(zip(layers, torch.stack(of_rules).amin(0), strict=True)):
                self._above[layer] = neurons_above(rows, number, shape.n_neurons, loosest_B)
        self._pending[layers] = rows.finalists(counts.k[layers[0]], shape.n_neurons)
        if sum(one.score_Bkc.nbytes for one in self._pending.values()) > _PENDING:
            self._rank_pending()

    def _rank_pending(self) -> None:
        """The highest entries of all layers that wait, together where they have equally many samples and chunks."""
        groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for layers, finalists in self._pending.items():
            n_samples, n_chunks = len(finalists.place_Bk) // len(layers), finalists.place_Bk.shape[1]
            groups.setdefault((n_samples, n_chunks, self.counts.k[layers[0]]), []).append(layers)
        for (n_samples, _, k), together in groups.items():
            found = Finalists.joined([self._pending[layers] for layers in together]).entries(k)
            parts = zip(torch.split(found.score, n_samples), torch.split(found.place, n_samples), strict=True)
            numbers = [layer for layers in together for layer in layers]
            self._found |= {layer: Candidates(*part) for layer, part in zip(numbers, parts, strict=True)}
        self._pending = {}

    def _add_totals(self) -> None:
        """Mass and rows of each sample in each expert of all layers, and of these what is kept."""
        counts = self.counts
        counts.not_finite += self._n_not_finite
        for found in self._use.values():
            layers = [layer for some, _ in found for layer in some]
            use_BE2 = joined([use for _, use in found], dim=1)
            meeting = self.meetings[layers[0]]
            sample_B = self.sample_B if meeting is None else meeting.sample_B
            is_of_QB = counts.task_of_sample[sample_B] == torch.arange(counts.n_tasks, device=counts.device)[:, None]
            total_QE2 = (is_of_QB.double() @ use_BE2.flatten(1)).view(counts.n_tasks, *use_BE2.shape[1:])
            number_E, is_shared_E2 = counts.experts_of(tuple(layers))
            counts.totals.index_add_(1, number_E, total_QE2)
            counts.sample_mass.index_add_(0, sample_B, use_BE2[..., 0] @ is_shared_E2)
