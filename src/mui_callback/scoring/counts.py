"""What a probe pass counts, on the device while it runs and on the host afterwards.

Counts and sets are merged by sum and union over samples, batches, layers and processes; ratios are taken from them
once, at the end.

Shapes: N samples of the probe, T tasks, L layers, E experts of all layers, C choices of all samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mui_callback.layout import ExpertLayout
from mui_callback.scoring import bits
from mui_callback.scoring.contributions import ExpertScores, LayerScores, ScoredTokens
from mui_callback.scoring.topk import NOTHING, Candidates, merge_candidates, top_entries


@dataclass(frozen=True, eq=False)
class ProbeCounts:
    """The counts of one pass, on the host."""

    key_neurons: NDArray[np.uint8]
    """U(task), the union of the samples' key neurons, as packed bits ``[T, bytes]``; each layer begins at a byte."""
    activated: NDArray[np.int64]
    """Samples in which the expert owns at least one key neuron, ``[T, E]``."""
    mass: NDArray[np.float64]
    """Σ \\|f\\| over the response tokens of the task's samples and the neurons of the expert, ``[T, E]``."""
    routed: NDArray[np.int64]
    """Response tokens that the router sends to the expert (all of them for a shared expert), ``[T, E]``."""
    loss: NDArray[np.float64]
    """Σ negative log-likelihood of the sample's response tokens, in nats, ``[N]``."""
    correct: NDArray[np.int64]
    """Response tokens of the sample that are the model's first choice, ``[N]``."""
    choice_loss: NDArray[np.float64]
    """Σ negative log-likelihood of each choice of each sample, in nats, ``[C]``."""
    not_finite: NDArray[np.int64]
    """Contributions that were not finite, ``[1]``."""


class DeviceCounts:
    """Adds up a pass on the device; nothing reaches the host before `to_host`.

    Args:
        layout: the layers that are probed.
        task_of_sample: int64 ``[N]``.
        n_tasks: T.
        n_choices: C.
        top_fraction: share of a layer's neurons that are a sample's key neurons.
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
        self.k = [key_neurons_per_sample(layer.n_neurons, top_fraction) for layer in layout.layers]
        self.task_of_sample = torch.from_numpy(task_of_sample).to(device)
        self.task_B = self.sample_B = self.task_of_sample[:0]
        sizes = [layer.n_experts for layer in layout.layers]
        self._expert_slices = _slices(sizes)
        self._byte_slices = _slices([bits.n_bytes(layer.n_neurons) for layer in layout.layers])
        self._expert_of_neuron = [
            torch.repeat_interleave(torch.tensor([*layer.widths, 1], device=device)) for layer in layout.layers
        ]
        n_experts, n_samples = sum(sizes), len(task_of_sample)

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.key_neurons = zeros(torch.uint8, n_tasks, self._byte_slices[-1].stop)
        self.activated = zeros(torch.int64, n_tasks, n_experts)
        self.mass = zeros(torch.float64, n_tasks, n_experts)
        self.routed = zeros(torch.int64, n_tasks, n_experts)
        self.loss = zeros(torch.float64, n_samples)
        self.correct = zeros(torch.int64, n_samples)
        self.choice_loss = zeros(torch.float64, n_choices)
        self.not_finite = zeros(torch.int64, 1)

    def start_batch(self, tokens: ScoredTokens, sample_B: Tensor) -> None:
        """The samples that the following scores belong to, int64 ``[B]``."""
        self.tokens = tokens
        self.sample_B = sample_B
        self.task_B = self.task_of_sample[sample_B]

    def add_layer(self, layer: int, scores: LayerScores) -> None:
        """Count the key neurons of one layer in the samples of the batch."""
        tokens, n_neurons = self.tokens, self.layout.layers[layer].n_neurons
        found = []
        for part in scores.parts:
            score_SW = self._only_finite(part.score_SW, part.is_row_S)
            order_S = tokens.order_R[part.token_S]
            found.append(
                top_entries(
                    score_SW,
                    tokens.row_R[part.token_S],
                    order_S * part.rows_per_token + part.rank_S,
                    order_S * n_neurons + part.first_neuron_S,
                    n_samples=tokens.n_rows,
                    n_slots=tokens.n_orders * part.rows_per_token,
                    k=self.k[layer],
                )
            )
            self._add_mass(layer, part, score_SW)
        self._add_key_neurons(layer, merge_candidates(found, self.k[layer]))

    def _only_finite(self, score_SW: Tensor, is_row_S: Tensor | None) -> Tensor:
        is_finite_SW = score_SW.isfinite()
        self.not_finite += score_SW.numel() - is_finite_SW.sum()
        score_SW = score_SW.masked_fill_(~is_finite_SW, NOTHING)
        return score_SW if is_row_S is None else score_SW.masked_fill_(~is_row_S.unsqueeze(-1), NOTHING)

    def _add_mass(self, layer: int, part: ExpertScores, score_SW: Tensor) -> None:
        n_experts, experts = self.layout.layers[layer].n_experts, self._expert_slices[layer]
        # A row holds one routed expert, or the shared experts of a fused MLP side by side.
        mass_SW = score_SW.masked_fill(score_SW == NOTHING, 0).abs_()
        mass_Se = mass_SW.view(score_SW.shape[0], -1, part.expert_width).sum(-1)
        first_S = self._expert_of_neuron[layer][part.first_neuron_S]
        expert_Se = first_S[:, None] + torch.arange(mass_Se.shape[1], device=first_S.device)
        task_S = self.task_B[self.tokens.row_R[part.token_S]]
        place = (task_S[:, None] * n_experts + expert_Se).flatten()
        uses_Se = torch.ones_like(expert_Se) if part.is_row_S is None else part.is_row_S[:, None].expand_as(expert_Se)

        mass = self.mass.new_zeros(self.n_tasks * n_experts)
        mass.index_add_(0, place, mass_Se.flatten().to(mass.dtype))
        self.mass[:, experts] += mass.view(self.n_tasks, -1)
        routed = self.routed.new_zeros(self.n_tasks * n_experts)
        routed.index_add_(0, place, uses_Se.flatten().to(routed.dtype))
        self.routed[:, experts] += routed.view(self.n_tasks, -1)

    def _add_key_neurons(self, layer: int, found: Candidates) -> None:
        shape = self.layout.layers[layer]
        # Entries that are none go to one neuron, of one expert, behind the last; both are cut off.
        neuron_Bk = torch.where(found.score > NOTHING, found.place % shape.n_neurons, shape.n_neurons)
        union_TN = self.key_neurons.new_zeros(self.n_tasks, shape.n_neurons + 1, dtype=torch.bool)
        union_TN[self.task_B[:, None].expand_as(neuron_Bk), neuron_Bk] = True
        self.key_neurons[:, self._byte_slices[layer]] |= bits.pack(union_TN[:, :-1])

        owns_BE = self.activated.new_zeros(neuron_Bk.shape[0], shape.n_experts + 1)
        owns_BE.scatter_(1, self._expert_of_neuron[layer][neuron_Bk], 1)
        counts_TE = self.activated.new_zeros(self.n_tasks, shape.n_experts)
        self.activated[:, self._expert_slices[layer]] += counts_TE.index_add_(0, self.task_B, owns_BE[:, :-1])

    def add_predictions(self, loss_R: Tensor, is_correct_R: Tensor) -> None:
        """Loss (nats) and whether the first choice was right, for each scored token of the batch."""
        sample_R = self.sample_B[self.tokens.row_R]
        self.loss.index_add_(0, sample_R, loss_R.to(torch.float64))
        self.correct.index_add_(0, sample_R, is_correct_R.long())

    def add_choices(self, choice_R: Tensor, loss_R: Tensor) -> None:
        """Loss (nats) of each scored token of a batch of choices, and the choice that it belongs to."""
        self.choice_loss.index_add_(0, choice_R, loss_R.to(torch.float64))

    def to_host(self) -> ProbeCounts:
        """Everything at once: one transfer."""
        names = [field.name for field in fields(ProbeCounts)]
        tensors: list[Tensor] = [getattr(self, name) for name in names]
        flat = torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors]).cpu()
        parts = torch.split(flat, [tensor.numel() * tensor.element_size() for tensor in tensors])
        arrays = {
            name: part.clone().view(tensor.dtype).view(tensor.shape).numpy()
            for name, part, tensor in zip(names, parts, tensors, strict=True)
        }
        return ProbeCounts(**arrays)


def key_neurons_per_sample(n_neurons: int, top_fraction: float) -> int:
    """k = max(1, ⌊fraction · neurons of the layer⌋), the entries of a layer that make a sample's key neurons."""
    # a product like 0.001 · 3000 may fall short of the whole number by a rounding error
    return max(1, int(top_fraction * n_neurons + 1e-9))


def _slices(sizes: Sequence[int]) -> list[slice]:
    ends = np.cumsum(sizes)
    return [slice(int(end - size), int(end)) for size, end in zip(sizes, ends, strict=True)]
