"""What a checkpoint is to a study: whose it is, what it is called, and where in training it was taken."""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256

from mui_callback.file_names import plain_name

_NUMBER, _END = r"(\d+(?:\.\d+)?)", r"(?![a-z\d]|[.,]\d)"
"""A number, and what does not follow it: what would make it another one."""
_STEP = re.compile(
    rf"(?:^|[^a-z])(?:checkpoint|global_?step|step|iter(?:ation)?)[-_=]?{_NUMBER}([KM])?{_END}", re.IGNORECASE
)
_TOKENS = re.compile(
    rf"(?:^|[^a-z])tokens[-_=]?{_NUMBER}([KMBT])?{_END}|(?<![a-z\d.]){_NUMBER}([KMBT])[-_]?tokens(?![-_=]?\d)",
    re.IGNORECASE,
)
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class CheckpointId:
    """The name of one checkpoint in a study."""

    model: str
    """Name of the model in the study."""
    label: str
    """What tells it from the others of the model: a revision, a directory, a file."""
    step: int | None = None
    """Optimizer steps done; None where nothing says it."""
    tokens: float | None = None
    """Tokens trained on; None where nothing says it."""

    @classmethod
    def named(cls, model: str, label: str, *, tokens_per_step: float | None = None) -> CheckpointId:
        """With step and tokens as the label has them, as ``step120000-tokens503B`` and ``checkpoint-500`` do.

        Args:
            model: name of the model in the study.
            label: what tells it from the others.
            tokens_per_step: for labels with steps only.
        """
        step = None
        if found := _STEP.search(label):
            step = round(float(found[1]) * _UNITS[(found[2] or "").upper()])
        tokens = None if step is None or tokens_per_step is None else step * tokens_per_step
        if in_label := _TOKENS.search(label):
            number, unit = in_label[1] or in_label[3], in_label[2] or in_label[4] or ""
            tokens = float(number) * _UNITS[unit.upper()]
        return cls(model, label, step, tokens)

    @property
    def slug(self) -> str:
        """A name for files: readable, and different for each checkpoint of a study."""
        readable = plain_name(f"{self.model}--{self.label}", 80)
        return f"{readable}-{sha256(repr((self.model, self.label)).encode()).hexdigest()[:8]}"

    def __str__(self) -> str:
        return f"{self.model} {self.label}"


def in_tokens(value: float) -> str:
    """A number of tokens as model names have it, such as 5.03T."""
    size, unit = next(((size, unit) for unit, size in reversed(_UNITS.items()) if abs(value) >= size), (1.0, ""))
    # 999.9 of a unit would be 1e+03
    return f"{value / size:.0f}{unit}" if value / size >= 999.5 else f"{value / size:.3g}{unit}"
