"""What is probed where nobody says with which samples."""

from __future__ import annotations

from torch import nn

from mui_callback.errors import ProbeSetError
from mui_callback.probe.encode import Tokenizer
from mui_callback.probe.model_config import decoder_start
from mui_callback.probe.probe_set import ProbeSet


def check_probe_set(probe_set: object) -> None:
    """Raises TypeError for what is neither a probe set nor None."""
    if not isinstance(probe_set, ProbeSet | None):
        raise TypeError(
            f"probe_set: expected a ProbeSet, as ProbeSet.from_jsonl and others make it, or None, got {probe_set!r:.80}"
        )


def builtin_for(model: nn.Module, tokenizer: Tokenizer | None, hint: str) -> ProbeSet:
    """The built-in probe set, as far as a model can take it.

    Raises:
        ProbeSetError: there is no tokenizer for it; the message ends with the hint.
    """
    if tokenizer is None:
        raise ProbeSetError(f"there is nothing to probe with: {hint}")
    return ProbeSet.builtin(only_with_prompt=decoder_start(model) is not None)
