"""Threshold rules: which of a sample's contributions make its key neurons.

Contributions are ranked as entries (position, expert, neuron); the neurons of the entries that a rule takes are the
sample's key neurons. These are the rules of MUI-Eval (arXiv 2504.07440); arXiv 2509.23933 takes the first, at 0.1 %.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

Kind = Literal["top_fraction", "topscore", "global_topk"]
Rules = str | Sequence[str]
"""A rule, or several, as text: ``"top_fraction=0.001"``."""

_EXPECTED = "expected a rule such as 'top_fraction=0.001', 'topscore=0.9' or 'global_topk=500'"


@dataclass(frozen=True)
class Rule:
    """One rule; as text it is ``kind=value``."""

    kind: Kind
    """``top_fraction``: the k highest entries of each layer, k = max(1, ⌊value · neurons of the layer⌋).
    ``topscore``: the entries of each layer that are at least value times the highest one of the layer.
    ``global_topk``: the `value` highest entries of all layers together."""
    value: float

    def __str__(self) -> str:
        return f"{self.kind}={self.value:.12g}"

    @classmethod
    def parse(cls, text: object) -> Rule:
        """From its text.

        Raises:
            ValueError: it is none, or its value is out of its range: (0, 1] for ``top_fraction`` and ``topscore``, a
                whole number of at least 1 for ``global_topk``.
        """
        kind, _, number = text.partition("=") if isinstance(text, str) else ("", "", "")
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if kind not in get_args(Kind) or value != value:
            raise ValueError(f"rules: {_EXPECTED}, got {text!r}")
        if kind == "global_topk" and not (value >= 1 and value.is_integer()):
            raise ValueError(f"rules: expected a whole number of entries, at least 1, for global_topk, got {number}")
        if kind != "global_topk" and not 0 < value <= 1:
            raise ValueError(f"rules: expected a number in (0, 1] for {kind}, got {number}")
        return cls(cast(Kind, kind), value)

    def n_entries(self, n_neurons: int) -> int:
        """How many of the highest entries of a layer of this many neurons have to be known; for ``topscore``, which
        takes as many as there are, the highest."""
        if self.kind == "global_topk":
            return int(self.value)
        if self.kind == "topscore":
            return 1
        # a product like 0.001 · 3000 may fall short of the whole number by a rounding error
        return max(1, int(self.value * n_neurons + 1e-9))


def parse_rules(rules: Rules) -> tuple[Rule, ...]:
    """One rule or several, each once.

    Raises:
        ValueError: one is none, there is none, or one comes twice.
    """
    one_or_several = rules if isinstance(rules, Iterable) and not isinstance(rules, str) else [rules]
    parsed = tuple(map(Rule.parse, one_or_several))
    if not parsed or len(set(parsed)) < len(parsed):
        raise ValueError(f"rules: expected one rule or several different ones, got {rules!r}")
    return parsed
