"""Adding up a batch on the device.

Shapes: B samples of the batch, Q tasks, E experts (of a layer, or of several), k key entries of a sample, c entries of
a chunk, L layers, R scored tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from mui_callback.scoring.contributions import LayerScores, Responses, identity_error
from mui_callback.scoring.device_counts import DeviceCounts
from mui_callback.scoring.layer_rows import LayerRows, Parts, alike, can_wait, n_bytes
from mui_callback.scoring.meeting import Meeting
from mui_callback.scoring.rows import joined
from mui_callback.scoring.select import NeuronScores, neurons_above, thresholds
from mui_callback.scoring.topk import Candidates, Finalists, merge_candidates

_SCANNED_TOGETHER = 3 * 2**27
"""Bytes of layers that wait for each other, as to look at them together takes fewer kernels."""
_RANKED_TOGETHER = 2**26
"""Bytes of finalists that wait for those of other layers, as to rank them together takes fewer operators."""


class BatchCounts:
    """Adds the samples of one batch to the counts of the pass.

    Args:
        counts: those of the pass.
        responses: the scored tokens of the batch.
        sample_B: number of each sample, int64 ``[B]``.
        meetings: for each layer, who else's tokens come to its experts; None where nobody's.
    """

    def __init__(
        self, counts: DeviceCounts, responses: Responses, sample_B: Tensor, meetings: Sequence[Meeting | None]
    ) -> None:
        self.counts = counts
        self.responses = responses
        self.sample_B = sample_B
        self.meetings = meetings
        self._unscanned: dict[int, Parts] = {}
        """By layer, contributions that are looked at together with those of the next layers."""
        self._n_bytes = 0
        """Of these."""
        self._alike: Hashable = None
        """What the next layer has to have in common with them."""
        self._use: dict[int, list[tuple[list[int], Tensor]]] = {}
        """By identity of the meeting: layers, and `LayerRows.use` of these."""
        self._n_not_finite = torch.zeros((), dtype=torch.int64, device=counts.device)
        self._unranked: dict[tuple[int, ...], Finalists] = {}
        """By layers, whose samples come one after the other."""
        self._found: dict[int, Candidates] = {}
        self._above: dict[int, NeuronScores] = {}
        """By layer, neurons that the loosest of the rules ``topscore`` may take."""

    def add_layer(self, layer: int, scores: LayerScores) -> None:
        """Take the contributions of one layer, or of what of it is in this process.

        They are counted with those of the next layers, at the latest after the last one.
        """
        if scores.parts:  # none where another process counts
            self._scan_later(layer, scores.parts)
        if layer == len(self.meetings) - 1:  # behind it come the logits, which take most memory of all
            self.scan()
        if scores.made_R is not None:
            counts = self.counts
            errors = counts.later_error if layer in counts.checked else counts.identity_error
            errors[layer] = identity_error(scores)
            counts.checked.add(layer)

    def scan(self) -> None:
        """Look at what waits, if anything does."""
        if not self._unscanned:
            return
        layers, parts_L = zip(*self._unscanned.items(), strict=True)
        self._unscanned, self._alike, self._n_bytes = {}, None, 0
        counts, shape, meeting = self.counts, self.counts.layout.layers[layers[0]], self.meetings[layers[0]]
        responses = self._responses_in(layers[0])
        rows = LayerRows.of(parts_L, responses, shape.n_experts)
        self._n_not_finite += rows.found.n_not_finite
        self._use.setdefault(id(meeting), []).append((list(layers), rows.use(responses)))
        if counts.topscore:
            # where the highest score is negative, the loosest rule is the one with the highest ratio
            of_rules = [thresholds(marks.rule.value, rows.highest_LB) for marks in counts.topscore]
            for number, (layer, loosest_B) in enumerate(zip(layers, torch.stack(of_rules).amin(0), strict=True)):
                self._above[layer] = neurons_above(rows, number, shape.n_neurons, loosest_B)
        self._unranked[layers] = rows.finalists(counts.k[layers[0]], shape.n_neurons)
        if sum(one.score_Bkc.nbytes for one in self._unranked.values()) > _RANKED_TOGETHER:
            self._rank_all()

    def finish(self) -> None:
        """After the last layer and `scan`: every process finds the key neurons of its own samples.

        Whoever shares experts with others sends them no scores but their samples' best candidates.
        """
        self._rank_all()
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

    def _scan_later(self, layer: int, parts: Parts) -> None:
        """For layers that are alike, as many as may be in memory together."""
        shape, tokens = self.counts.layout.layers[layer], self._responses_in(layer)
        own = (alike(parts), id(self.meetings[layer]), shape.n_experts, shape.n_neurons, self.counts.k[layer])
        if own != self._alike:
            self.scan()
        self._alike = own
        self._unscanned[layer] = parts
        self._n_bytes += n_bytes(parts, tokens, shape.n_experts)
        if not can_wait(parts) or self._n_bytes >= _SCANNED_TOGETHER:
            self.scan()

    def _responses_in(self, layer: int) -> Responses:
        """The scored tokens that meet there."""
        meeting = self.meetings[layer]
        return self.responses if meeting is None else meeting.responses

    def _rank_all(self) -> None:
        """The highest entries of all layers that wait, together where they have equally many samples and chunks."""
        groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for layers, finalists in self._unranked.items():
            n_samples, n_chunks = len(finalists.place_Bk) // len(layers), finalists.place_Bk.shape[1]
            groups.setdefault((n_samples, n_chunks, self.counts.k[layers[0]]), []).append(layers)
        for (n_samples, _, k), together in groups.items():
            found = Finalists.joined([self._unranked[layers] for layers in together]).entries(k)
            by_layer = zip(torch.split(found.score, n_samples), torch.split(found.place, n_samples), strict=True)
            numbers = [layer for layers in together for layer in layers]
            self._found |= {layer: Candidates(*own) for layer, own in zip(numbers, by_layer, strict=True)}
        self._unranked = {}

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
            number_E, is_of_E2 = counts.experts_of(tuple(layers))
            counts.totals.index_add_(1, number_E, total_QE2)
            counts.sample_mass.index_add_(0, sample_B, use_BE2[..., 0] @ is_of_E2)
