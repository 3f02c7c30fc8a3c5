"""How a probe is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mui_callback.rules import Rule, Rules, parse_rules

Activation = Literal["product", "gate"]
Alignment = Literal["next", "same"]


@dataclass(frozen=True)
class ProbeSettings:
    """The settings of a probe; what was measured with other ones cannot be compared.

    Raises:
        ValueError: a value is out of its range.
    """

    rules: Rules = "top_fraction=0.001"
    """Which contributions make a sample's key neurons, see `Rule`; kept as a tuple. The first rule is that of the
    report's metrics, more are counted in the same pass."""
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
    activation: Activation = "product"
    """``"product"``: a_j is what feeds the down projection. ``"gate"``: act(x·W_g)[j] without the up factor, as the
    reference code of arXiv 2504.07440 has it; contributions then do not add up to the layer's output."""
    alignment: Alignment = "next"
    """``"next"``: a position is scored against the token that it predicts. ``"same"``: against the token at it, as the
    reference code of arXiv 2504.07440 does."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(map(str, parse_rules(self.rules))))
        frequency = self.key_expert_frequency
        if not isinstance(frequency, int | float) or not 0 < frequency <= 1:
            raise ValueError(f"key_expert_frequency: expected a number in (0, 1], got {frequency!r}")
        for name, choices in (("activation", get_args(Activation)), ("alignment", get_args(Alignment))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, got {getattr(self, name)!r}")
        if not _is_whole(self.batch_tokens) or self.batch_tokens < 1:
            raise ValueError(f"batch_tokens: expected a positive number of tokens, got {self.batch_tokens!r}")
        if self.max_length is not None and (not _is_whole(self.max_length) or self.max_length < 2):
            raise ValueError(f"max_length: expected None or a number of tokens of at least 2, got {self.max_length!r}")

    @property
    def parsed_rules(self) -> tuple[Rule, ...]:
        """`rules`, parsed."""
        return parse_rules(self.rules)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
