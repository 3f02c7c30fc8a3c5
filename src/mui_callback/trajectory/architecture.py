"""The model that bare weights are of: from a config of transformers, or from a function of the user's."""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mui_callback.loading import (
    DType,
    ModelLoadError,
    ModelSource,
    check_fit,
    load_skeleton,
    load_state,
    load_tokenizer,
)

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts of names that come from how a model was run: ``torch.compile``, FSDP, checkpointing of activations."""


@dataclass(frozen=True)
class Architecture:
    """How a model is made without its weights.

    Args:
        source: a directory, a config or a hub id; or ``module:function``.
    """

    source: ModelSource

    @property
    def is_function(self) -> bool:
        """Whether a function of the user's makes the model."""
        return bool(_FUNCTION.fullmatch(self.source.name))

    def skeleton(self, *, dtype: DType) -> nn.Module:
        """Modules and shapes, on the meta device where transformers makes them."""
        return self._made() if self.is_function else load_skeleton(self.source, dtype=dtype)

    def tokenizer(self) -> Any | None:
        """None where a function makes the model."""
        return None if self.is_function else load_tokenizer(self.source)

    def with_weights(self, state: Mapping[str, Tensor], *, dtype: DType, device: str, where: str) -> nn.Module:
        """The model with weights, in eval mode.

        Names in the state may have a prefix, such as the attribute of a LightningModule that the model is.

        Args:
            state: weights by name.
            dtype: of the weights; ``"auto"`` for that of most of the state.
            device: that the model goes to.
            where: names the state in messages.

        Raises:
            ModelLoadError: the model cannot be made, or a weight is missing or has another shape.
        """
        floating = Counter(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
        if not floating:
            raise ModelLoadError(f"{where}: expected weights, found none")
        kind = floating.most_common(1)[0][0] if dtype == "auto" else getattr(torch, dtype)
        if not self.is_function:
            wanted = load_skeleton(self.source).state_dict()
            return load_state(self.source, _own(state, wanted, where), dtype=kind, device=device, where=where)
        model = self._made().to(kind)
        _load(model, _own(state, model.state_dict(), where), where)
        return model.to(device).eval()

    def _made(self) -> nn.Module:
        module_name, _, function_name = self.source.name.partition(":")
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            make: Callable[[], Any] = getattr(importlib.import_module(module_name), function_name)
            model = make()
        except Exception as error:
            raise ModelLoadError(f"{self.source.name}: {type(error).__name__}: {error}") from error
        if not isinstance(model, nn.Module):
            raise ModelLoadError(f"{self.source.name}: expected a torch module, got {type(model).__name__}")
        return model


def _own(state: Mapping[str, Tensor], wanted: Collection[str], where: str) -> dict[str, Tensor]:
    """What is of the model: all under the prefix at which most of it is found, without the prefix."""
    plain = {_WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    n_found = Counter(name[: len(name) - len(rest)] for name in plain for rest in _endings(name) if rest in wanted)
    if not n_found:
        raise ModelLoadError(f"{where}: expected weights such as {min(wanted)}, found {', '.join(sorted(plain)[:3])} …")
    best, *others = sorted(n_found, key=lambda prefix: (-n_found[prefix], len(prefix), prefix))
    if others and n_found[others[0]] == n_found[best]:
        warnings.warn(f"{where}: has the model at {best!r} and at {others[0]!r}; the first is taken", stacklevel=3)
    return {name.removeprefix(best): tensor for name, tensor in plain.items() if name.startswith(best)}


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _load(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    own = model.state_dict()
    there = {_identity(tensor) for name, tensor in own.items() if name in state}  # of tied ones, one is enough
    check_fit(
        model,
        where,
        missing=[name for name, tensor in own.items() if name not in state and _identity(tensor) not in there],
        mismatched=[
            (name, state[name].shape, tensor.shape)
            for name, tensor in own.items()
            if name in state and state[name].shape != tensor.shape
        ],
        unexpected=state.keys() - own.keys(),
    )
    model.load_state_dict(state, strict=False)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are tied."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()
