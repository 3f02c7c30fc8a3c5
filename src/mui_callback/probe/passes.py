"""One process' part of a probe: its batches go through the frozen model, and counts come out.

Where processes exchange tensors in the forward pass of the model, all of them make the same number of passes, and what
goes wrong with reading one is raised after the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch
from torch import nn

from mui_callback.errors import InterruptedPassError
from mui_callback.experts.capacity import Capacities, let_all_pass
from mui_callback.experts.layer import ExpertLayer
from mui_callback.forgiving import attempt, described
from mui_callback.layout import ExpertLayout
from mui_callback.parallel.shards import Shards
from mui_callback.parallel.weights import engines_at_rest
from mui_callback.probe.batches import Batch
from mui_callback.probe.below_autograd import BelowAutograd
from mui_callback.probe.capture import Reading, instrument
from mui_callback.probe.choice_plan import ChoicePlan, Part
from mui_callback.probe.choice_runs import ChoiceRuns, PromptSharing
from mui_callback.probe.encode import EncodedProbeSet
from mui_callback.probe.freeze import frozen
from mui_callback.probe.head import LanguageModelHead, token_losses
from mui_callback.probe.model_config import has_16_bits
from mui_callback.probe.rounds import Round
from mui_callback.probe.score_layer import LayerReader
from mui_callback.scoring.batch_counts import BatchCounts
from mui_callback.scoring.device_counts import DeviceCounts
from mui_callback.settings import ProbeSettings

Rounds = Sequence[tuple[Batch, ...]]
"""What all shards run, one batch each at a time."""


OnBatch = Callable[[int, int], None]
"""Told after each batch how many are done, and how many there are."""


@dataclass(frozen=True)
class Passed:
    """What a process counted."""

    counts: DeviceCounts
    is_coarse: bool
    """Whether the forward pass was in 16 bits."""
    readers: Sequence[LayerReader]
    """Who have learned how the layers are read."""


@dataclass(frozen=True)
class ProbePass:
    """Everything that a pass needs.

    Args:
        model: the model, whose experts are in `layers`.
        layers: the layers that are read.
        layout: their numbering.
        encoded: the samples.
        shards: which of them are whose.
        settings: how it is made.
        device: where the model computes.
        reading: reads the layers.
        sharing: whether prompts are run once for all of their choices.
    """

    model: nn.Module
    layers: tuple[ExpertLayer, ...]
    layout: ExpertLayout
    encoded: EncodedProbeSet
    shards: Shards
    settings: ProbeSettings
    device: torch.device
    reading: Reading
    sharing: PromptSharing

    def run(self, rounds: Rounds, choices: ChoicePlan, on_batch: OnBatch | None = None) -> Passed:
        """What this process counts.

        Args:
            rounds: batches of samples.
            choices: their choices.
            on_batch: see `OnBatch`.

        Raises:
            InterruptedPassError: the model failed where other processes wait for this one.
            Exception: whatever else went wrong.
        """
        capacities = Capacities(self.layers)
        with frozen(self.model), engines_at_rest(self.model):
            let_all_pass(self.model)
            head = LanguageModelHead(self.model)  # found anew: a resized vocabulary has another one
            counts = DeviceCounts(
                self.layout,
                self.encoded.task_of_sample,
                n_tasks=len(self.encoded.task_names),
                n_choices=len(self.encoded.choices),
                rules=self.settings.parsed_rules,
                device=self.device,
            )
            told = count(1)
            n_rounds = len(rounds) + len([*choices.in_full(self.shards.own)])
            running = _Running(
                self, head, counts, capacities, lambda: on_batch(next(told), n_rounds) if on_batch else None
            )
            with nobody_left_waiting(self.shards):
                running.samples(rounds)
                running.choices(choices.parts[self.shards.own])
            if self.reading.error is not None:
                raise self.reading.error
            counts.head_error.copy_(head.error)
            return Passed(counts, head.is_coarse or has_16_bits(self.model), self.reading.readers)


@dataclass(frozen=True)
class _Running:
    """A pass that is under way."""

    of: ProbePass
    head: LanguageModelHead
    counts: DeviceCounts
    capacities: Capacities
    tell: Callable[[], None]
    """Called after each round."""

    def samples(self, rounds: Rounds) -> None:
        """Read the layers in every batch; what goes wrong in that is kept.

        The identity is checked in the first batch, whose samples are the shortest, and in the last, where it is new how
        a layer is read.
        """
        reading = self.of.reading
        below_autograd = BelowAutograd(self.of.model, self.of.shards)
        with instrument(reading):
            for number, batches in enumerate(rounds):
                if self._takes_part(batches):
                    with below_autograd.batch(may_record=not reading.is_never_recorded):
                        self._read(batches, is_first=number == 0, is_last=number == len(rounds) - 1)
                self.tell()

    def choices(self, parts: Sequence[Part]) -> None:
        """Only the losses are wanted."""
        shards, counts = self.of.shards, self.counts
        runs = ChoiceRuns(self.head, self.of.sharing, counts.device)
        for inputs, logits_RV in runs.run(parts):
            if shards.counts:
                loss_R, _ = token_losses(logits_RV, inputs.tokens.target_R)
                counts.add_choices(inputs.sample_B[inputs.tokens.row_R], loss_R)
            del logits_RV  # the next ones are made before they are handed on
            self.tell()

    def _takes_part(self, batches: tuple[Batch, ...]) -> bool:
        """Whether this process makes a forward pass: not without samples, unless others need it."""
        return self.of.shards.in_step or not batches[self.of.shards.own].is_stand_in

    def _read(self, batches: tuple[Batch, ...], *, is_first: bool, is_last: bool) -> None:
        shards, counts = self.of.shards, self.counts
        now = Round.of(batches, shards, self.of.layers, self.head, counts.device, self.of.settings.alignment)
        tokens = now.inputs.tokens
        batch_counts = BatchCounts(counts, tokens, now.inputs.sample_B, now.meetings)
        is_token_T = now.inputs.attention_mask.flatten().bool() & (not batches[shards.own].is_stand_in)
        with (
            self.of.reading.batch(
                *(now.tokens, now.readout_RD, now.readout, batch_counts.add_layer),
                check=is_first or is_last,
                learn=is_first,
            ),
            self.capacities.counted(is_token_T, counts.add_dropped),
        ):
            logits_RV = self.head.logits(now.inputs, now.readout_RD if is_first else None)
        if shards.counts:
            losses, error = attempt(partial(token_losses, logits_RV, tokens.target_R))
            self.of.reading.note(error)
            if losses is not None:
                batch_counts.add_predictions(*losses)
        del logits_RV  # the largest of all, and ranking takes memory of its own
        _, error = attempt(batch_counts.scan)
        self.of.reading.note(error)
        batch_counts.finish()


@contextmanager
def nobody_left_waiting(shards: Shards) -> Iterator[None]:
    """For forward passes: what goes wrong inside ends every process, if the others wait for this one.

    Raises:
        InterruptedPassError: in place of any other exception, where processes exchange tensors.
    """
    try:
        yield
    except Exception as error:
        if shards.in_step and not isinstance(error, InterruptedPassError):
            raise InterruptedPassError(
                f"process {shards.rank} of {shards.world.n} failed in a forward pass in which the processes exchange "
                f"tensors, so that the others wait for it in vain and nothing can go on ({described(error)})."
            ) from error
        raise
