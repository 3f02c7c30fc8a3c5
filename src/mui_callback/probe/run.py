"""One probe pass: a frozen model, its expert layers and a probe set go in, a report comes out."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from mui_callback.counts import ProbeCounts
from mui_callback.errors import UnsupportedModelError
from mui_callback.experts.discover import find_expert_layers
from mui_callback.experts.layer import layout_of
from mui_callback.probe.batches import Batch, make_batches
from mui_callback.probe.capture import Reading, instrument
from mui_callback.probe.device_batch import to_device
from mui_callback.probe.encode import EncodedProbeSet, Tokenizer, encode
from mui_callback.probe.freeze import frozen
from mui_callback.probe.head import LanguageModelHead, token_losses
from mui_callback.probe.model_config import context_length, decoder_start
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.probe.unwrap import unwrapped
from mui_callback.probe.verification import ROUNDING, ROUNDING_OF_FLOAT32, Verification
from mui_callback.report import MUIReport, SampleTable
from mui_callback.scoring.device_counts import DeviceCounts
from mui_callback.settings import ProbeSettings


class MUIProbe:
    """Measures a probe set on a language model with MoE layers, as often as wanted.

    The model is used as it is, in whatever state of training; nothing about it is different afterwards.

    Args:
        model: a causal language model or an encoder-decoder, of transformers or plain torch, whose experts can be found
            (see "Models" in the README). What `torch.compile`, DDP, accelerate or a
            DeepSpeed engine wrapped around it is taken off: the original module is what runs.
        probe_set: the samples.
        tokenizer: a transformers tokenizer, or a function from text to token ids. Not needed for samples that are
            tokens already.
        top_fraction: see `ProbeSettings`, as the four that follow.
        key_expert_frequency: η_expert.
        batch_tokens: positions in a forward pass.
        max_length: tokens that longer samples are cut to.
        dense: also probe the MLP of each layer without experts, as a layer of one expert.

    Raises:
        NoExpertsError: the model has no MoE layer, and `dense` is off.
        UnsupportedModelError: its experts or its head cannot be read, or its weights are on several devices.
        ProbeSetError: the samples do not fit the tokenizer or the model.
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        probe_set: ProbeSet,
        *,
        tokenizer: Tokenizer | None = None,
        top_fraction: float = ProbeSettings.top_fraction,
        key_expert_frequency: float = ProbeSettings.key_expert_frequency,
        batch_tokens: int = ProbeSettings.batch_tokens,
        max_length: int | None = ProbeSettings.max_length,
        dense: bool = ProbeSettings.dense,
    ) -> None:
        settings = ProbeSettings(top_fraction, key_expert_frequency, max_length, batch_tokens, dense)
        self.model = unwrapped(model)
        self.probe_set = probe_set
        with frozen(self.model):  # some weights are computed when they are looked at
            self.layers = find_expert_layers(self.model, dense=dense)
            vocab_size = LanguageModelHead(self.model).weight_VD.shape[0]
        self.layout = layout_of(self.layers)
        self._device = _common_device(self.model)
        self.settings = replace(settings, max_length=max_length or context_length(self.model))
        self._encoded = encode(
            probe_set,
            tokenizer,
            self.settings.max_length,
            vocab_size=vocab_size,
            decoder_start=decoder_start(self.model),
        )
        self._sample_table = _sample_table(self._encoded)
        self._make_batches(batch_tokens)

    def halve_batches(self) -> bool:
        """Go on with batches of half the size, so that a pass needs less memory; False if each is a single sample."""
        largest = max(
            (batch.n_positions for batch in (*self._batches, *self._choice_batches) if len(batch.sample) > 1), default=1
        )
        if largest > 1:
            self._make_batches(largest // 2)
        return largest > 1

    def wait_for_device(self) -> None:
        """Wait until the device has done what it was given before, so that nobody takes it for time in a probe."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def measure(self) -> MUIReport:
        """Run the probe set through the model and count.

        Raises:
            ProbeError: the experts did not run in a way that can be read: their contributions do not add up to the
                output of their layer, or some did not run at all.
        """
        self.wait_for_device()
        start = time.perf_counter()
        counts, rounding = self._count(self._batches, self._choice_batches)
        n_tokens = int(self._sample_table.n_tokens.sum())
        Verification.of(self.layout, counts, n_tokens, rounding).raise_if_wrong()
        return MUIReport(
            layout=self.layout,
            task_names=self._encoded.task_names,
            settings=self.settings,
            probe_set=self.probe_set.fingerprint,
            sample_table=self._sample_table,
            counts=counts,
            seconds=time.perf_counter() - start,
        )

    def verify(self, *, rounding: float | None = None) -> Verification:
        """Run the first batch only, and say how well every layer conserves its output.

        Args:
            rounding: relative error that is accepted; by default what the precision of the forward explains.

        Raises:
            ProbeError: the experts did not run in a way that can be read at all.
        """
        first = self._batches[:1]
        counts, explained = self._count(first, [])
        n_tokens = sum(len(batch.target) for batch in first)
        return Verification.of(self.layout, counts, n_tokens, explained if rounding is None else rounding)

    def _make_batches(self, batch_tokens: int) -> None:
        self.settings = replace(self.settings, batch_tokens=batch_tokens)
        self._batches = make_batches(self._encoded.samples, batch_tokens)
        self._choice_batches = make_batches(self._encoded.choices, batch_tokens)

    def _count(self, batches: list[Batch], choice_batches: list[Batch]) -> tuple[ProbeCounts, float]:
        """The counts of a pass, and the relative error of the identity that its precision explains."""
        self._device = _common_device(self.model)
        with frozen(self.model):
            head = LanguageModelHead(self.model)  # found anew: a resized vocabulary has another one
            counts = DeviceCounts(
                self.layout,
                self._encoded.task_of_sample,
                n_tasks=len(self._encoded.task_names),
                n_choices=len(self._encoded.choices),
                top_fraction=self.settings.top_fraction,
                device=self._device,
            )
            self._run_samples(batches, head, counts)
            self._run_choices(choice_batches, head, counts)
            counts.head_error.copy_(head.error)
            is_coarse = head.under_autocast or _has_16_bits(self.model)
            return counts.to_host(), ROUNDING if is_coarse else ROUNDING_OF_FLOAT32

    def _run_samples(self, batches: list[Batch], head: LanguageModelHead, counts: DeviceCounts) -> None:
        reading = Reading(self.layers)
        with instrument(reading):
            for number, batch in enumerate(batches):
                inputs = to_device(batch, self._device)
                batch_counts = counts.batch(inputs.tokens, inputs.sample_B)
                readout_RD = head.rows(inputs.tokens.target_R)
                is_first = number == 0
                with reading.batch(inputs.tokens, readout_RD, batch_counts.add_layer, check=is_first):
                    logits_RV = head.logits(inputs, check=is_first)
                batch_counts.add_predictions(*token_losses(logits_RV, inputs.tokens.target_R))

    def _run_choices(self, batches: list[Batch], head: LanguageModelHead, counts: DeviceCounts) -> None:
        for batch in batches:
            inputs = to_device(batch, self._device)
            loss_R, _ = token_losses(head.logits(inputs), inputs.tokens.target_R)
            counts.add_choices(inputs.sample_B[inputs.tokens.row_R], loss_R)


def _common_device(model: nn.Module) -> torch.device:
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) != 1 or devices[0].startswith(("mps", "meta")):
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected all weights on one CPU or CUDA device, got them on {', '.join(devices)}"
        )
    return torch.device(devices[0])


def _has_16_bits(model: nn.Module) -> bool:
    return any(p.dtype.itemsize < 4 for p in model.parameters() if p.dtype.is_floating_point)


def _sample_table(encoded: EncodedProbeSet) -> SampleTable:
    samples = encoded.samples
    n_choices = [len(sample.choices) for sample in samples]
    lengths = [
        # one unit for all choices of a sample
        [
            choice.n_bytes if all(c.n_bytes for c in sample.choices) else int(choice.scored.sum())
            for choice in sample.choices
        ]
        for sample in samples
    ]
    return SampleTable(
        id=tuple(sample.id for sample in samples),
        task=encoded.task_of_sample,
        n_tokens=np.array([sample.scored.sum() for sample in samples], dtype=np.int64),
        n_bytes=np.array([-1 if sample.n_bytes is None else sample.n_bytes for sample in samples], dtype=np.int64),
        truncated=np.array([sample.n_truncated > 0 for sample in samples], dtype=np.bool_),
        answer=np.array([-1 if sample.answer is None else sample.answer for sample in samples], dtype=np.int64),
        choice_sample=np.repeat(np.arange(len(samples)), n_choices),
        choice_length=np.array([length for sample in lengths for length in sample], dtype=np.int64),
    )
