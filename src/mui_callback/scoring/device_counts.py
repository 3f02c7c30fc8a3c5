"""Adding up a probe pass on the device.

Shapes: N samples of the probe, B samples of a batch, Q tasks, E experts (of a layer, or of all), k key entries of a
sample, S rows of scores, W neurons of a row, e experts of a row, R scored tokens, C choices of all samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mui_callback.counts import ProbeCounts, n_bytes
from mui_callback.layout import ExpertLayout
from mui_callback.parallel.peers import Peers
from mui_callback.scoring.contributions import ExpertScores, LayerScores, Responses, identity_error
from mui_callback.scoring.meeting import Meeting
from mui_callback.scoring.select import key_entries_per_sample, select_key_entries
from mui_callback.scoring.topk import NOTHING, Candidates, merge_candidates


class DeviceCounts:
    """The counts of a pass while it runs; nothing reaches the host before `to_host`.

    Args:
        layout: the layers that are probed.
        task_of_sample: int64 ``[N]``.
        n_tasks: Q.
        n_choices: C.
        top_fraction: share of a layer's neurons that are a sample's key entries.
        device: where the counts are kept.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        task_of_sample: NDArray[np.int64],
        *,
        n_tasks: int,
        n_choices: int,
        top_fraction: float,
        device: torch.device,
    ) -> None:
        self.layout = layout
        self.device = device
        self.n_tasks = n_tasks
        self.task_of_sample = torch.from_numpy(task_of_sample).to(device)
        self.k = [key_entries_per_sample(layer.n_neurons, top_fraction) for layer in layout.layers]
        self.experts = _slices([layer.n_experts for layer in layout.layers])
        self.bytes = _slices([n_bytes(layer.n_neurons) for layer in layout.layers])
        # One neuron, of one expert, behind the last stands for none.
        self.expert_of_neuron = [
            torch.repeat_interleave(torch.tensor([*layer.widths, 1], device=device)) for layer in layout.layers
        ]

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.key_neurons = zeros(torch.uint8, n_tasks, self.bytes[-1].stop)
        self.activated = zeros(torch.int64, n_tasks, layout.n_experts)
        self.mass = zeros(torch.float64, n_tasks, layout.n_experts)
        self.routed = zeros(torch.int64, n_tasks, layout.n_experts)
        self.loss = zeros(torch.float64, len(task_of_sample))
        self.correct = zeros(torch.int64, len(task_of_sample))
        self.choice_loss = zeros(torch.float64, n_choices)
        self.not_finite = zeros(torch.int64, 1)
        self.dropped = zeros(torch.int64, len(layout.layers))
        self.assigned = zeros(torch.int64, len(layout.layers))
        self.identity_error = zeros(torch.float64, len(layout.layers)).fill_(float("nan"))
        self.head_error = zeros(torch.float64, 1).fill_(float("nan"))

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
        peers.unite(self.key_neurons)
        summed = [self.activated, self.mass, self.routed, self.loss, self.correct, self.choice_loss]
        summed += [self.not_finite, self.dropped, self.assigned]
        flat = torch.cat([tensor.flatten().to(torch.float64) for tensor in summed])  # exact for counts below 2^53
        peers.add(flat)
        for tensor, total in zip(summed, torch.split(flat, [tensor.numel() for tensor in summed]), strict=True):
            tensor.copy_(total.view_as(tensor))
        errors = torch.cat([self.identity_error, self.head_error]).nan_to_num(nan=float("-inf"))
        peers.highest(errors)
        errors = errors.where(errors.isfinite(), float("nan"))
        self.identity_error.copy_(errors[:-1])
        self.head_error.copy_(errors[-1:])

    def to_host(self) -> ProbeCounts:
        """Everything at once: one transfer."""
        tensors: dict[str, Tensor] = {field.name: getattr(self, field.name) for field in fields(ProbeCounts)}
        flat = torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors.values()]).cpu()
        parts = torch.split(flat, [tensor.numel() * tensor.element_size() for tensor in tensors.values()])
        arrays = {
            name: part.clone().view(tensor.dtype).view(tensor.shape).numpy()
            for part, (name, tensor) in zip(parts, tensors.items(), strict=True)
        }
        return ProbeCounts(**arrays)


class BatchCounts:
    """Adds the samples of one batch to the counts of the pass; see `DeviceCounts.batch`."""

    def __init__(
        self, counts: DeviceCounts, responses: Responses, sample_B: Tensor, meetings: Sequence[Meeting | None]
    ) -> None:
        self.counts = counts
        self.responses = responses
        self.sample_B = sample_B
        self.task_B = counts.task_of_sample[sample_B]
        self.meetings = meetings
        self.found: dict[int, Candidates] = {}

    def add_layer(self, layer: int, scores: LayerScores) -> None:
        """Count the key neurons and the contributions of one layer, or of what of it is in this process."""
        n_neurons, k = self.counts.layout.layers[layer].n_neurons, self.counts.k[layer]
        meeting = self.meetings[layer]
        responses = self.responses if meeting is None else meeting.responses
        task_B = self.task_B if meeting is None else self.counts.task_of_sample[meeting.sample_B]
        task_R = task_B[responses.row_R]
        for part in scores.parts:
            self._add_mass(layer, part, task_R)
            self.counts.not_finite += part.n_not_finite
        if scores.parts:  # none where another process counts
            self.found[layer] = select_key_entries(scores, responses, n_neurons, k)
        if scores.made_R is not None:
            self.counts.identity_error[layer] = identity_error(scores)

    def finish(self) -> None:
        """After the last layer: every process finds the key neurons of its own samples.

        Whoever shares experts with others sends them no scores but their samples' best candidates.
        """
        together: dict[int, list[int]] = {}
        for layer, meeting in enumerate(self.meetings):
            if meeting is None:
                if layer in self.found:
                    self._add_key_neurons(layer, self.found[layer])
            else:
                together.setdefault(id(meeting), []).append(layer)
        for layers in together.values():
            meeting = self.meetings[layers[0]]
            assert meeting is not None
            sizes = [self.counts.k[layer] for layer in layers]
            found = [
                self.found.get(layer) or Candidates.none(len(meeting.sample_B), k, self.sample_B.device)
                for layer, k in zip(layers, sizes, strict=True)
            ]
            received = meeting.exchange(found)
            if received:
                for layer, parts in zip(layers, received, strict=True):
                    self._add_key_neurons(layer, merge_candidates(parts, self.counts.k[layer]))

    def add_predictions(self, loss_R: Tensor, is_correct_R: Tensor) -> None:
        """Loss (nats) and whether the first choice was right, for each scored token."""
        sample_R = self.sample_B[self.responses.row_R]
        self.counts.loss.index_add_(0, sample_R, loss_R.to(torch.float64))
        self.counts.correct.index_add_(0, sample_R, is_correct_R.long())
        self.counts.not_finite += (~loss_R.isfinite()).sum()

    def _add_key_neurons(self, layer: int, found: Candidates) -> None:
        counts, shape = self.counts, self.counts.layout.layers[layer]
        neuron_Bk = torch.where(found.score > NOTHING, found.place % shape.n_neurons, shape.n_neurons)
        union_QN = counts.key_neurons.new_zeros(counts.n_tasks, shape.n_neurons + 1, dtype=torch.bool)
        union_QN[self.task_B[:, None].expand_as(neuron_Bk), neuron_Bk] = True
        counts.key_neurons[:, counts.bytes[layer]] |= pack(union_QN[:, :-1])

        owns_BE = counts.activated.new_zeros(neuron_Bk.shape[0], shape.n_experts + 1)
        owns_BE.scatter_(1, counts.expert_of_neuron[layer][neuron_Bk], 1)
        counts_QE = counts.activated.new_zeros(counts.n_tasks, shape.n_experts)
        counts.activated[:, counts.experts[layer]] += counts_QE.index_add_(0, self.task_B, owns_BE[:, :-1])

    def _add_mass(self, layer: int, part: ExpertScores, task_R: Tensor) -> None:
        counts, n_experts = self.counts, self.counts.layout.layers[layer].n_experts
        # A row holds one routed expert, or the shared experts of a fused MLP side by side.
        mass_SW = part.score_SW.masked_fill(part.score_SW == NOTHING, 0).abs_()
        mass_Se = mass_SW.view(*mass_SW.shape[:1], mass_SW.shape[1] // part.expert_width, part.expert_width).sum(-1)
        first_S = counts.expert_of_neuron[layer][part.first_neuron_S]
        expert_Se = first_S[:, None] + torch.arange(mass_Se.shape[1], device=first_S.device)
        task_S = task_R[part.token_S]
        place = (task_S[:, None] * n_experts + expert_Se).flatten()
        uses_Se = torch.ones_like(expert_Se) if part.is_row_S is None else part.is_row_S[:, None].expand_as(expert_Se)

        for total, amount_Se in ((counts.mass, mass_Se), (counts.routed, uses_Se)):
            sums = total.new_zeros(counts.n_tasks * n_experts)
            sums.index_add_(0, place, amount_Se.flatten().to(total.dtype))
            total[:, counts.experts[layer]] += sums.view(counts.n_tasks, -1)


def pack(member: Tensor) -> Tensor:
    """A set as bool ``[…, n]`` to packed bits, uint8 ``[…, ceil(n / 8)]``; `counts.unpack` is the inverse."""
    padded = torch.nn.functional.pad(member, (0, -member.shape[-1] % 8))
    octets = padded.view(*padded.shape[:-1], -1, 8).to(torch.uint8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=member.device)
    return torch.sum(octets * weights, dim=-1, dtype=torch.uint8)


def _slices(sizes: Sequence[int]) -> list[slice]:
    ends = np.cumsum(sizes)
    return [slice(int(end - size), int(end)) for size, end in zip(sizes, ends, strict=True)]
