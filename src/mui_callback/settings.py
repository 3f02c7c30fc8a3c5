"""How a probe is made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ProbeSettings:
    """The settings of a probe; what was measured with other ones cannot be compared.

    Raises:
        ValueError: a value is out of its range.
    """

    top_fraction: float = 0.001
    """A sample's key neurons of a layer are those of its k highest contributions; k is this share of the layer's
    neurons, rounded down, at least 1."""
    key_expert_frequency: float = 0.6
    """η_expert: activated frequency from which an expert is a key expert."""
    max_length: int | None = None
    """Tokens that longer samples are cut to, from the left (responses of an encoder-decoder from the right); None for
    the context length of the model."""
    batch_tokens: int = 8192
    """Positions in a forward pass, padding included. Memory depends on it; what is measured does not, but for the
    rounding of the model's own forward."""
    dense: bool = False
    """Whether the MLP of each layer without experts is probed too, as a layer of one routed expert: all layers of a
    dense model, the dense layers of one with MoE layers."""

    def __post_init__(self) -> None:
        for name in ("top_fraction", "key_expert_frequency"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value <= 1:
                raise ValueError(f"{name}: expected a number in (0, 1], got {value!r}")
        if not _is_whole(self.batch_tokens) or self.batch_tokens < 1:
            raise ValueError(f"batch_tokens: expected a positive number of tokens, got {self.batch_tokens!r}")
        if self.max_length is not None and (not _is_whole(self.max_length) or self.max_length < 2):
            raise ValueError(f"max_length: expected None or a number of tokens of at least 2, got {self.max_length!r}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
