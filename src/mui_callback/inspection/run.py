"""`mui-callback inspect`: the expert layers of a model, what a probe of it costs, and whether it is read right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from torch import nn
from transformers.utils import logging as transformers_logging

from mui_callback.errors import ProbeError
from mui_callback.experts.discover import find_expert_layers
from mui_callback.inspection.cost import cost_of
from mui_callback.inspection.describe import describe
from mui_callback.inspection.screen import parameters, show_checks, show_cost, show_layers
from mui_callback.loading import load_skeleton, load_tokenizer
from mui_callback.model_options import ModelOptions
from mui_callback.probe.encode import Tokenizer, encode
from mui_callback.probe.head import LanguageModelHead
from mui_callback.probe.model_config import context_length
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.probe.run import MUIProbe
from mui_callback.probe.samples import TokenSample
from mui_callback.probe.verification import Verification
from mui_callback.settings import ProbeSettings

_VERIFIED_TOKENS = 48


def inspect_model(
    options: ModelOptions,
    *,
    probe: Path | None = None,
    verify: bool = False,
    console: Console,
) -> bool:
    """Print what there is to say about a model.

    Args:
        options: the model, and the settings of the probe whose cost is counted.
        probe: a JSONL file of samples; without it the built-in probe set.
        verify: load the weights, run a few tokens, and say per layer how well the conservation identity holds.
        console: where to print.

    Returns:
        Whether every layer is read right, as far as that was to be verified.

    Raises:
        MUIError: the model cannot be loaded, or has no layer that can be probed.
    """
    probe_set = None if probe is None else ProbeSet.from_jsonl({probe.stem: probe})
    transformers_logging.set_verbosity_error()
    if not console.is_terminal:
        transformers_logging.disable_progress_bar()
    source, settings = options.source, options.settings
    skeleton, tokenizer = load_skeleton(source, dtype=options.dtype), load_tokenizer(source)
    layers = find_expert_layers(skeleton, dense=settings.dense)
    described = describe(skeleton, layers, settings.parsed_rules[0])
    size = parameters(sum(parameter.numel() for parameter in skeleton.parameters()))
    console.print(f"[bold]{escape(str(source))}[/]: {type(skeleton).__name__}, {size}", highlight=False)
    checks = None
    complaints: list[str] = []
    if verify:
        model = options.load()
        try:
            checks = _verify(model, tokenizer, settings)
            complaints = checks.complaints
        except ProbeError as error:
            complaints = [str(error)]
    if checks is None:
        show_layers(console, described, settings.parsed_rules[0])
    else:
        show_checks(console, described, settings.parsed_rules[0], checks)
    cost = cost_of(skeleton, layers, described, tokenizer, settings, probe_set)
    show_cost(console, cost, probe, has_tokenizer=tokenizer is not None)
    for complaint in complaints:
        console.print(f"[red]wrong:[/] {complaint}", highlight=False)
    return not complaints


def _verify(model: nn.Module, tokenizer: Tokenizer | None, settings: ProbeSettings) -> Verification:
    probe = MUIProbe(
        model,
        ProbeSet({"verify": _few_tokens(model, tokenizer)}),
        rules=settings.rules,
        dense=settings.dense,
    )
    return probe.verify()


def _few_tokens(model: nn.Module, tokenizer: Tokenizer | None) -> list[TokenSample]:
    """Two samples: the begin of a text, or random tokens where there is no tokenizer."""
    vocabulary = LanguageModelHead(model).shape[0]
    if tokenizer is None:
        ids = np.random.default_rng(0).integers(0, vocabulary, 2 * _VERIFIED_TOKENS)
    else:
        text = next(iter(ProbeSet.builtin().tasks.values()))
        encoded = encode(ProbeSet({"verify": text}), tokenizer, vocab_size=vocabulary)
        ids = np.concatenate([sample.input_ids for sample in encoded.samples])
    half = min(_VERIFIED_TOKENS, len(ids) // 2, context_length(model) or _VERIFIED_TOKENS)
    scored = np.arange(half) >= min(4, half - 1)  # the first tokens are a prompt
    return [TokenSample(str(n), ids[n * half : (n + 1) * half], scored) for n in range(2)]
