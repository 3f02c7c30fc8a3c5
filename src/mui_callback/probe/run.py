"""One probe pass: a frozen model, its expert layers and a probe set go in, a report comes out."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from torch import nn

from mui_callback.experts.discover import find_expert_layers, layout_of
from mui_callback.probe.capture import Reading, instrument
from mui_callback.probe.device_batch import to_device
from mui_callback.probe.encode import EncodedProbeSet, Tokenizer, encode, make_batches
from mui_callback.probe.freeze import frozen
from mui_callback.probe.head import LanguageModelHead, token_losses
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.report import MUIReport, ProbeSettings, SampleTable
from mui_callback.scoring.counts import DeviceCounts


class MUIProbe:
    """Measures a probe set on a language model with MoE layers, as often as wanted.

    The model is used as it is, in whatever state of training; nothing about it is different afterwards.

    Args:
        model: a causal language model of transformers whose experts use transformers' experts interface. May be
            wrapped by `torch.compile`; the original module is what runs.
        probe_set: the samples.
        tokenizer: a transformers tokenizer, or a function from text to token ids. Not needed for samples that are
            tokens already.
        top_fraction: share of a layer's neurons whose contributions make a sample's key neurons (0.1 %).
        key_expert_frequency: activated frequency from which an expert is a key expert (η_expert).
        batch_tokens: positions in a forward pass, padding included. Results do not depend on it; memory does.
        max_length: longer samples are cut from the left; None for the context length of the model.

    Raises:
        NoExpertsError: the model has no MoE layer.
        UnsupportedModelError: its experts or its head cannot be read.
        ProbeSetError: the samples do not fit the tokenizer or the model.
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        probe_set: ProbeSet,
        *,
        tokenizer: Tokenizer | None = None,
        top_fraction: float = 0.001,
        key_expert_frequency: float = 0.6,
        batch_tokens: int = 8192,
        max_length: int | None = None,
    ) -> None:
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.probe_set = probe_set
        self.layers = find_expert_layers(self.model)
        self.layout = layout_of(self.layers)
        self._head = LanguageModelHead(self.model)
        if max_length is None:
            max_length = _context_length(self.model)
        self.settings = ProbeSettings(top_fraction, key_expert_frequency, probe_set.fingerprint, max_length)
        self._encoded = encode(probe_set, tokenizer, max_length, vocab_size=self._head.weight_VD.shape[0])
        self._choices = [choice for sample in self._encoded.samples for choice in sample.choices]
        self._batches = make_batches(self._encoded.samples, batch_tokens)
        self._choice_batches = make_batches(self._choices, batch_tokens)

    def measure(self) -> MUIReport:
        """Run the probe set through the model and count.

        Raises:
            ProbeError: the experts did not run in a way that can be read.
        """
        start = time.perf_counter()
        device = self._head.weight_VD.device
        counts = DeviceCounts(
            self.layout,
            self._encoded.task_of_sample,
            n_tasks=len(self._encoded.task_names),
            n_choices=len(self._choices),
            top_fraction=self.settings.top_fraction,
            device=device,
        )
        reading = Reading(self.layers, counts.add_layer)
        with frozen(self.model):
            with instrument(reading):
                for batch in self._batches:
                    inputs = to_device(batch, device)
                    counts.start_batch(inputs.tokens, inputs.sample_B)
                    with reading.batch(inputs.tokens, self._head.rows(inputs.tokens.target_R)):
                        logits_RV = self._head.logits(inputs)
                    counts.add_predictions(*token_losses(logits_RV, inputs.tokens.target_R))
            for batch in self._choice_batches:
                inputs = to_device(batch, device)
                loss_R, _ = token_losses(self._head.logits(inputs), inputs.tokens.target_R)
                counts.add_choices(inputs.sample_B[inputs.tokens.row_R], loss_R)
            on_host = counts.to_host()
        return MUIReport(
            layout=self.layout,
            task_names=self._encoded.task_names,
            settings=self.settings,
            sample_table=_sample_table(self._encoded),
            counts=on_host,
            seconds=time.perf_counter() - start,
        )


def _context_length(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(text_config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 1 else None


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
