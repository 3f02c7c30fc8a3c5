"""Losses of samples by a model without some of its neurons.

Shapes: J neurons of the model, B samples of a batch, R scored tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mui_callback.errors import InterruptedPassError
from mui_callback.experts.capacity import let_all_pass
from mui_callback.experts.layer import ExpertLayer
from mui_callback.experts.masking import masked
from mui_callback.forgiving import attempt
from mui_callback.metrics.utilization import BoolArray, IntArray
from mui_callback.parallel.shards import Shards
from mui_callback.parallel.weights import common_device, engines_at_rest
from mui_callback.probe.batches import make_rounds
from mui_callback.probe.device_batch import to_device
from mui_callback.probe.encode import EncodedProbeSet
from mui_callback.probe.freeze import frozen
from mui_callback.probe.head import LanguageModelHead, token_losses
from mui_callback.probe.passes import Rounds, nobody_left_waiting


@dataclass(frozen=True, eq=False)
class Trial:
    """Some samples, and the neurons that the model does without."""

    sample: IntArray
    """Numbers of the samples in the probe set, each once."""
    is_masked: BoolArray
    """``[J]``."""


@dataclass(frozen=True)
class LossPass:
    """One process' part of some trials.

    Args:
        model: the model, whose experts are in `layers`.
        layers: the layers whose neurons are masked.
        encoded: the samples.
        shards: which of them are whose.
        batch_tokens: positions in a forward pass.
    """

    model: nn.Module
    layers: tuple[ExpertLayer, ...]
    encoded: EncodedProbeSet
    shards: Shards
    batch_tokens: int

    def run(self, trials: Sequence[Trial]) -> Tensor:
        """Loss of each sample of each trial, one trial after the other: float64, 0 where another process has it.

        Raises:
            InterruptedPassError: the model failed where other processes wait for this one.
            Exception: whatever else went wrong first; after the last trial, if others wait for this process in it.
        """
        device, sizes = common_device(self.model), [len(trial.sample) for trial in trials]
        loss = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        errors: list[Exception] = []
        with frozen(self.model), engines_at_rest(self.model):
            let_all_pass(self.model)
            head = LanguageModelHead(self.model)
            for trial, own in zip(trials, torch.split(loss, sizes), strict=True):
                _, error = attempt(partial(self._add_losses, trial, head, own))
                if error is not None:
                    if isinstance(error, InterruptedPassError) or not self.shards.in_step:
                        raise error
                    errors.append(error)
        if errors:
            raise errors[0]
        return loss

    def _add_losses(self, trial: Trial, head: LanguageModelHead, loss: Tensor) -> None:
        with masked(self.layers, trial.is_masked, loss.device), nobody_left_waiting(self.shards):
            for batches in self._rounds(trial):
                batch = batches[self.shards.own]
                if batch.is_stand_in and not self.shards.in_step:
                    continue
                inputs = to_device(batch, loss.device)
                logits_RV = head.logits(inputs)
                if self.shards.counts:
                    loss_R, _ = token_losses(logits_RV, inputs.tokens.target_R)
                    loss.index_add_(0, inputs.sample_B[inputs.tokens.row_R], loss_R.to(loss.dtype))

    def _rounds(self, trial: Trial) -> Rounds:
        samples = [self.encoded.samples[number] for number in trial.sample]
        return make_rounds(samples, self.batch_tokens, self.shards.n)
