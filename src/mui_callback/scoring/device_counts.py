"""Adding up a probe pass on the device.

Shapes: N samples of the probe, B samples of a batch, Q tasks, E experts (of a layer, or of all), k key entries of a
sample, L layers, R scored tokens, C choices of all samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mui_callback.counts import ProbeCounts
from mui_callback.layout import ExpertLayout
from mui_callback.parallel.peers import Peers
from mui_callback.rules import Rule
from mui_callback.scoring.key_marks import KeyMarks, entries_needed


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
