"""The model that a command is about: where it is, how it is loaded and how it is probed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mui_callback.settings import ProbeSettings

if TYPE_CHECKING:
    from torch import nn

    from mui_callback.loading import ModelSource


@dataclass(frozen=True)
class ModelOptions:
    """What all commands that probe a model can be told about it.

    Args:
        model: a directory, a config as a JSON file, or a hub id.
        revision: branch, tag or commit of a hub id.
        random_weights: draw the weights from the config, and read no checkpoint.
        dtype: of the weights.
        device: that the model runs on.
        rules: which contributions make a sample's key neurons: top_fraction=0.001, topscore=0.9 or global_topk=500.
        batch_tokens: positions in a forward pass; memory depends on it.
        max_length: tokens that longer samples are cut to; without it the model's context.
        dense: also the MLPs of layers without experts.
        trust_remote_code: run Python code that comes with the model. Never done unless this is given.
        allow_pickle: read weights that are in a pickle; without it only safetensors are read.

    Raises:
        ValueError: a setting of the probe is out of its range.
    """

    model: str
    revision: str | None = None
    random_weights: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "cpu"
    rules: str = "top_fraction=0.001"
    batch_tokens: int = ProbeSettings.batch_tokens
    max_length: int | None = ProbeSettings.max_length
    dense: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        _ = self.settings  # raises

    @property
    def settings(self) -> ProbeSettings:
        """Of the probe."""
        return ProbeSettings(
            rules=self.rules, max_length=self.max_length, batch_tokens=self.batch_tokens, dense=self.dense
        )

    @property
    def source(self) -> ModelSource:
        """Where the model is, and what reading it may do."""
        from mui_callback.loading import ModelSource

        return ModelSource(self.model, self.revision, self.trust_remote_code, self.allow_pickle)

    def load(self) -> nn.Module:
        """The model with its weights, in eval mode.

        Raises:
            MUIError: it cannot be read, or not safely.
        """
        from mui_callback.loading import load_pretrained, load_random

        load = load_random if self.random_weights else load_pretrained
        return load(self.source, dtype=self.dtype, device=self.device)
