"""One probe pass: a frozen model, its expert layers and a probe set go in, a report comes out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from mui_callback.errors import InterruptedPassError, ProbeError
from mui_callback.experts.discover import find_expert_layers
from mui_callback.experts.layer import layout_of
from mui_callback.forgiving import attempt
from mui_callback.metrics.utilization import FloatArray
from mui_callback.parallel.processes import Processes, in_words
from mui_callback.parallel.shards import Shards
from mui_callback.parallel.weights import common_device
from mui_callback.probe.ablation import AblationReport, What, ablate
from mui_callback.probe.agreement import Agreement
from mui_callback.probe.batches import half_of_largest, make_rounds
from mui_callback.probe.capture import Reading
from mui_callback.probe.choice_plan import ChoicePlan
from mui_callback.probe.choice_runs import PromptSharing
from mui_callback.probe.encode import Tokenizer, encode
from mui_callback.probe.freeze import frozen
from mui_callback.probe.head import LanguageModelHead
from mui_callback.probe.learned import Learned
from mui_callback.probe.losses import LossPass, Trial
from mui_callback.probe.model_config import decoder_start, longest_sequence, warn_beyond_context
from mui_callback.probe.outcome import Outcome
from mui_callback.probe.passes import OnBatch, Passed, ProbePass, Rounds
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.probe.score_layer import LayerReader
from mui_callback.probe.tabled import tabled
from mui_callback.probe.unwrap import unwrapped
from mui_callback.probe.verification import ROUNDING, ROUNDING_OF_FLOAT32, Verification
from mui_callback.report import MUIReport
from mui_callback.rules import Rules
from mui_callback.sample_table import SampleTable
from mui_callback.settings import Activation, Alignment, ProbeSettings


class MUIProbe:
    """Measures a probe set on a language model with MoE layers, as often as wanted.

    The model is used as it is, in whatever state of training; nothing about it is different afterwards.
    In a distributed run every process has a probe of the same samples, and measures at the same time (see `measure`).

    Args:
        model: a causal language model or an encoder-decoder, of transformers or plain torch, whose experts can be found
            (see "Models" in the README). What `torch.compile`, DDP, accelerate or a
            DeepSpeed engine wrapped around it is taken off: the original module is what runs.
        probe_set: the samples.
        tokenizer: a transformers tokenizer, or a function from text to token ids. Not needed for samples that are
            tokens already.
        rules: which contributions make key neurons, see `ProbeSettings`, as the parameters that follow.
        key_expert_frequency: η_expert.
        batch_tokens: positions in a forward pass.
        max_length: tokens that longer samples are cut to.
        dense: also probe the MLP of each layer without experts, as a layer of one expert.
        activation: ``"gate"`` leaves out the up factor.
        alignment: ``"same"`` scores a position against the token at it.

    Raises:
        NoExpertsError: the model has no MoE layer, and `dense` is off.
        UnsupportedModelError: its experts or its head cannot be read, its weights are on several devices, or they are
            divided among processes in a way that is not known.
        ProbeSetError: the samples do not fit the tokenizer or the model.
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        probe_set: ProbeSet,
        *,
        tokenizer: Tokenizer | None = None,
        rules: Rules = ProbeSettings.rules,
        key_expert_frequency: float = ProbeSettings.key_expert_frequency,
        batch_tokens: int = ProbeSettings.batch_tokens,
        max_length: int | None = ProbeSettings.max_length,
        dense: bool = ProbeSettings.dense,
        activation: Activation = ProbeSettings.activation,
        alignment: Alignment = ProbeSettings.alignment,
    ) -> None:
        settings = ProbeSettings(rules, key_expert_frequency, max_length, batch_tokens, dense, activation, alignment)
        self.model = unwrapped(model)
        self.probe_set = probe_set
        self.on_batch: OnBatch | None = None
        """To be set by whoever shows how far a pass is."""
        with frozen(self.model):  # some weights are computed when they are looked at
            self.layers = find_expert_layers(self.model, dense=dense)
            vocab_size = LanguageModelHead(self.model).shape[0]
        self.layout = layout_of(self.layers)
        self._device = common_device(self.model)
        warn_beyond_context(self.model, max_length)
        self.settings = replace(settings, max_length=longest_sequence(self.model, max_length))
        self._encoded = encode(
            probe_set,
            tokenizer,
            self.settings.max_length,
            vocab_size=vocab_size,
            decoder_start=decoder_start(self.model),
        )
        self._sample_table = tabled(self._encoded)
        self._agreement = Agreement(self.model, self.layers, self._described())
        self._use(self._agreement.shards)

    def halve_batches(self) -> bool:
        """Go on with batches of half the size, so that a pass needs less memory; False if each is a single sample."""
        half = half_of_largest(chain(chain.from_iterable(self._rounds), self._choices.in_full()))
        if half is not None:
            self._make_batches(half)
        return half is not None

    def wait_for_device(self) -> None:
        """Wait until the device has done what it was given before, so that nobody takes it for time in a probe."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def measure(self) -> MUIReport:
        """Run the probe set through the model and count.

        In a distributed run all processes make this call; the samples are dealt out to them, and each returns the
        report of the whole.

        Raises:
            ProbeError: the experts did not run in a way that can be read: their contributions do not add up to the
                output of their layer, or some did not run at all. Or another process failed.
            DesynchronizedError: not all processes made this call.
            InterruptedPassError: the model failed in the middle of a forward pass in which the processes wait for each
                other, so that they cannot go on.
        """
        outcome = self.try_measure()
        if outcome.report is None:
            raise outcome.error or ProbeError(in_words(outcome.failures))
        return outcome.report

    def try_measure(self) -> Outcome:
        """The same, where it is to be known of every process whether it failed.

        Raises:
            DesynchronizedError: see `measure`, as the following.
            InterruptedPassError: …
        """
        processes = self._agreed()
        self.wait_for_device()
        start, sent = time.perf_counter(), self._sent
        if self._learned.is_used:
            outcome = self._outcome(processes, start, sent)
            if not outcome.is_misread:
                return outcome
            # what was learned before does not hold any more
        outcome = self._outcome(processes, start, sent)
        if outcome.is_misread and self._learned.be_careful():
            outcome = self._outcome(processes, start, sent)
        return outcome

    def _outcome(self, processes: Processes, start: float, sent: int) -> Outcome:
        """See `try_measure`, of one pass."""
        passed, error = attempt(lambda: self._one_pass(self._rounds, self._choices, self._learned.take))
        if isinstance(error, InterruptedPassError):
            raise error
        failures = processes.gather_failures(error)
        if failures or passed is None:
            return Outcome(error=error, failures=failures)
        report, error = attempt(lambda: self._report(passed, start, sent))
        failures = processes.gather_failures(error)
        if failures or report is None:
            return Outcome(error=error, failures=failures)
        self._learned.keep(passed.readers)  # in all processes or in none, as they exchange tensors to learn
        return Outcome(report)

    def _report(self, passed: Passed, start: float, sent: int) -> MUIReport:
        """What all processes counted.

        Raises:
            ProbeError: contributions do not add up; in all processes.
        """
        counts = passed.counts
        counts.merge(self._shards.world)
        n_bytes = torch.tensor([self._sent - sent, float(passed.is_coarse)], dtype=torch.float64, device=self._device)
        self._shards.world.add(n_bytes)
        report = MUIReport(
            layout=self.layout,
            task_names=self._encoded.task_names,
            settings=self.settings,
            probe_set=self.probe_set.fingerprint,
            sample_table=self._sample_table,
            counts=counts.to_host(),
            comm_bytes=int(n_bytes[0]),
            seconds=time.perf_counter() - start,
        )
        rounding = ROUNDING if n_bytes[1] else ROUNDING_OF_FLOAT32
        worst = np.fmax(report.counts.identity_error, counts.later_error.cpu().numpy())
        checked = replace(report.counts, identity_error=worst)
        Verification.of(self.layout, checked, report.tokens, rounding).raise_if_wrong()
        return report

    @property
    def sample_table(self) -> SampleTable:
        """What is known of the samples without running them."""
        return self._sample_table

    @property
    def shards(self) -> Shards:
        """Which process runs what."""
        return self._shards

    def losses(self, trials: Sequence[Trial]) -> list[FloatArray]:
        """Run some of the samples without some of the neurons, for their losses alone; nothing is read.

        In a distributed run all processes make this call with the same trials, and get the same losses.

        Returns:
            For each trial Σ negative log-likelihood of the response tokens of each of its samples, in nats, float64
            ``[number of its samples]``.

        Raises:
            ProbeError: the experts did not run in a way that can be masked, or another process failed.
            DesynchronizedError: see `measure`, as the following.
            InterruptedPassError: …
        """
        processes = self._agreed()
        self._device = common_device(self.model)
        one = LossPass(self.model, self.layers, self._encoded, self._shards, self.settings.batch_tokens)
        loss, error = attempt(lambda: one.run(trials))
        if isinstance(error, InterruptedPassError):
            raise error
        processes.raise_everywhere(error)
        assert loss is not None
        self._shards.world.add(loss)
        return [own.numpy() for own in torch.split(loss.cpu(), [len(trial.sample) for trial in trials])]

    def ablate(
        self,
        report: MUIReport,
        *,
        what: What = "neurons",
        tasks: Sequence[str] | None = None,
        draws: int = 3,
        level: float = 0.95,
        seed: int = 0,
    ) -> AblationReport:
        """Check that what a report calls key is key; see `mui_callback.probe.ablation.ablate`."""
        return ablate(self, report, what=what, tasks=tasks, draws=draws, level=level, seed=seed)

    def agree(self, processes: Processes | None = None) -> None:
        """Make sure that all processes probe one model with one probe set; a process alone has nothing to do.

        Processes that train models of their own probe them by themselves. Without this call, the first `measure`
        makes it.

        Args:
            processes: how they talk to each other.

        Raises:
            UnsupportedModelError: they have different layers.
            ProbeSetError: they have different probe sets.
            DesynchronizedError: not all of them made this call.
        """
        self._agreement.reach(processes)
        self._use(self._agreement.shards)

    def verify(self, *, rounding: float | None = None) -> Verification:
        """Run the first batch only, and say how well every layer conserves its output.

        Args:
            rounding: relative error that is accepted; by default what the precision of the forward explains.

        Raises:
            ProbeError: the experts did not run in a way that can be read at all.
        """
        first = self._rounds[:1]
        passed = self._one_pass(first, ChoicePlan.none(self._shards), lambda device: self._learned.anew())
        n_tokens = sum(len(batch.target) for batch in chain.from_iterable(first))
        explained = ROUNDING if passed.is_coarse else ROUNDING_OF_FLOAT32
        counts = passed.counts.to_host()
        return Verification.of(self.layout, counts, n_tokens, explained if rounding is None else rounding)

    def _agreed(self) -> Processes:
        """How the processes talk to each other, once they agree about what is probed now."""
        processes = self._agreement.renewed()
        if self._agreement.shards is not self._shards:
            self._use(self._agreement.shards)
        return processes

    def _use(self, shards: Shards) -> None:
        self._shards = shards
        self._learned = Learned(self._new_readers, self._device)
        self._sharing = PromptSharing.of(self.model, shards)
        self._make_batches(self.settings.batch_tokens)

    def _described(self) -> dict[str, Any]:
        return {
            "probe set": [self.probe_set.fingerprint, asdict(self.settings), len(self._encoded.samples)],
            "layers": [[asdict(layer) for layer in self.layout.layers], len(list(self.model.parameters()))],
        }

    @property
    def _sent(self) -> int:
        """Bytes that this process has sent in all probes so far."""
        return self._shards.traffic.sent + sum(layer.peers.traffic.sent for layer in self.layers)

    def _one_pass(
        self, rounds: Rounds, choices: ChoicePlan, readers: Callable[[torch.device], Sequence[LayerReader]]
    ) -> Passed:
        self._device = common_device(self.model)
        reading = Reading(readers(self._device))
        one = ProbePass(
            model=self.model,
            layers=self.layers,
            layout=self.layout,
            encoded=self._encoded,
            shards=self._shards,
            settings=self.settings,
            device=self._device,
            reading=reading,
            sharing=self._sharing,
        )
        return one.run(rounds, choices, self.on_batch)

    def _new_readers(self, careful: bool) -> tuple[LayerReader, ...]:
        """Who know nothing yet.

        Raises:
            UnsupportedModelError: the model cannot be read.
        """
        return tuple(
            LayerReader(layer, counts=self._shards.counts, activation=self.settings.activation, careful=careful)
            for layer in self.layers
        )

    def _make_batches(self, batch_tokens: int) -> None:
        self.settings = replace(self.settings, batch_tokens=batch_tokens)
        self._rounds = make_rounds(self._encoded.samples, batch_tokens, self._shards.n)
        self._choices = ChoicePlan.of(self._encoded, batch_tokens, self._shards, share=self._sharing.is_possible)
