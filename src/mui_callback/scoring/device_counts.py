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
from mui_callback.scoring.contributions import ExpertScores, LayerScores, ScoredTokens, identity_error
from mui_callback.scoring.select import key_entries_per_sample, select_key_entries
from mui_callback.scoring.topk import NOTHING, Candidates


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
        self.identity_error = zeros(torch.float64, len(layout.layers)).fill_(float("nan"))
        self.head_error = zeros(torch.float64, 1).fill_(float("nan"))

    def batch(self, tokens: ScoredTokens, sample_B: Tensor) -> BatchCounts:
        """The counter of one batch of samples, whose numbers are int64 ``[B]``."""
        return BatchCounts(self, tokens, sample_B)

    def add_choices(self, choice_R: Tensor, loss_R: Tensor) -> None:
        """Loss (nats) of each scored token of a batch of choices, and the choice that it belongs to."""
        self.choice_loss.index_add_(0, choice_R, loss_R.to(torch.float64))

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
    """Adds the samples of one batch to the counts of the pass."""

    def __init__(self, counts: DeviceCounts, tokens: ScoredTokens, sample_B: Tensor) -> None:
        self.counts = counts
        self.tokens = tokens
        self.sample_B = sample_B
        self.task_B = counts.task_of_sample[sample_B]

    def add_layer(self, layer: int, scores: LayerScores) -> None:
        """Count the key neurons and the contributions of one layer."""
        n_neurons, k = self.counts.layout.layers[layer].n_neurons, self.counts.k[layer]
        self._add_key_neurons(layer, select_key_entries(scores, self.tokens, n_neurons, k))
        for part in scores.parts:
            self._add_mass(layer, part)
            self.counts.not_finite += part.n_not_finite
        if scores.output_R is not None:
            self.counts.identity_error[layer] = identity_error(scores)

    def add_predictions(self, loss_R: Tensor, is_correct_R: Tensor) -> None:
        """Loss (nats) and whether the first choice was right, for each scored token."""
        sample_R = self.sample_B[self.tokens.row_R]
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

    def _add_mass(self, layer: int, part: ExpertScores) -> None:
        counts, n_experts = self.counts, self.counts.layout.layers[layer].n_experts
        # A row holds one routed expert, or the shared experts of a fused MLP side by side.
        mass_SW = part.score_SW.masked_fill(part.score_SW == NOTHING, 0).abs_()
        mass_Se = mass_SW.view(*mass_SW.shape[:1], mass_SW.shape[1] // part.expert_width, part.expert_width).sum(-1)
        first_S = counts.expert_of_neuron[layer][part.first_neuron_S]
        expert_Se = first_S[:, None] + torch.arange(mass_Se.shape[1], device=first_S.device)
        task_S = self.task_B[self.tokens.row_R[part.token_S]]
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
