"""Activations of stacked experts that a kernel knows how to make."""

from __future__ import annotations

from typing import Any

from mui_callback.fused.experts import Gate

_SILU = ("SiLU", "SiLUActivation")


def known_gate(module: Any) -> Gate | None:
    """How an experts module of transformers makes activations of its up projection, if it is one of the two ways that
    are known to the letter; None for all others, which are asked themselves."""
    make = getattr(type(module), "_apply_gate", None)
    home = getattr(make, "__module__", None)
    if home == "transformers.integrations.moe" and type(getattr(module, "act_fn", None)).__name__ in _SILU:
        return Gate()
    if home == "transformers.models.gpt_oss.modeling_gpt_oss":
        return Gate(is_interleaved=True, alpha=float(module.alpha), limit=float(module.limit))
    return None
