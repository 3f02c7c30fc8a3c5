"""What the config of a model says, if it has one, or else its modules."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from mui_callback.errors import UnsupportedModelError
from mui_callback.experts.paths import language_model_modules
from mui_callback.forgiving import warn

_POSITIONS = re.compile(r"wpe|(embed_|embedding_)?pos(ition|itions|itional)?(_emb\w*)?")
"""Names of embeddings of positions."""


def text_config(model: nn.Module) -> Any:
    """The config of the language model in a model of transformers; None for other models."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def context_length(model: nn.Module) -> int | None:
    """Tokens that the model was made for, as its config says, or else its embedding of positions; None if neither does.

    To ask an embedding for a position that it does not have is an error that ends the process on a GPU.
    """
    length = getattr(text_config(model), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 1 else _embedded_positions(model)


def longest_sequence(model: nn.Module, asked: int | None) -> int | None:
    """Tokens that longer samples are cut to: what is asked for, or else the context; None if there is neither.

    It is never more than a language model has embeddings of positions.
    """
    context = context_length(model)
    if asked is None or context is None:
        return asked or context
    return asked if _embedded_positions(model) is None else min(asked, context)


def warn_beyond_context(model: nn.Module, asked: int | None) -> None:
    """Say that longer sequences are asked for than the model was made for."""
    context = context_length(model)
    if asked is None or context is None or asked <= context:
        return
    name, longest = type(model).__name__, longest_sequence(model, asked)
    cut = "" if longest == asked else f"; samples are cut to {longest}"
    warn(f"max_length: {asked} tokens are more than the {context} that {name} was made for{cut}")


def _embedded_positions(model: nn.Module) -> int | None:
    modules = ((path.rpartition(".")[2], module) for path, module in language_model_modules(model).items())
    lengths = [m.num_embeddings for name, m in modules if isinstance(m, nn.Embedding) and _POSITIONS.fullmatch(name)]
    return min(lengths, default=None)


def decoder_start(model: nn.Module) -> int | None:
    """Token that the decoder of an encoder-decoder begins with; None for other models.

    Raises:
        UnsupportedModelError: it is an encoder-decoder whose config does not say.
    """
    config: Any = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return None
    token = getattr(config, "decoder_start_token_id", None)
    if not isinstance(token, int):
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected the config of an encoder-decoder to have a decoder_start_token_id, "
            f"got {token!r}"
        )
    return token


def has_16_bits(model: nn.Module) -> bool:
    """Whether any of its weights are in 16 bits or fewer, so that its results are as coarse."""
    return any(p.dtype.itemsize < 4 for p in model.parameters() if p.dtype.is_floating_point)
