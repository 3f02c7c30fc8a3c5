"""The model that bare weights are of: from a config of transformers, or from a function of the user's."""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mui_callback.loading import DType, ModelLoadError, ModelSource, load_random, load_skeleton, load_tokenizer

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


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
        of_state = floating.most_common(1)[0][0]
        if self.is_function:
            model = self._made().to(of_state if dtype == "auto" else getattr(torch, dtype))
        else:
            model = load_random(self.source, dtype=_named(of_state) if dtype == "auto" else dtype)
        prefix = _prefix(set(model.state_dict()), set(state), where)
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        _load(model, own, where)
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


def _named(dtype: torch.dtype) -> DType:
    name: Any = str(dtype).removeprefix("torch.")
    return name if name in ("float32", "bfloat16", "float16") else "float32"


def _prefix(wanted: set[str], there: set[str], where: str) -> str:
    """What the names of the state have before those of the model; the one under which most of them are found."""
    some = min(wanted)
    prefixes = {name.removesuffix(some) for name in there if name.endswith(some)}
    prefixes |= {name.removesuffix(max(wanted)) for name in there if name.endswith(max(wanted))}
    if not prefixes:
        raise ModelLoadError(f"{where}: expected weights such as {some}, found {', '.join(sorted(there)[:3])} …")
    return max(prefixes, key=lambda prefix: (sum(prefix + name in there for name in wanted), -len(prefix)))


def _load(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    own = model.state_dict()
    tied = {id_: name for name, tensor in own.items() if name in state and (id_ := _identity(tensor))}
    wrong = [f"{name} is missing" for name, one in own.items() if name not in state and _identity(one) not in tied]
    wrong += [
        f"{name} is {[*state[name].shape]}, not {[*tensor.shape]}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if wrong:
        raise ModelLoadError(f"{where}: {len(wrong)} weights do not fit {type(model).__name__}: {'; '.join(wrong[:3])}")
    extra = sorted(state.keys() - own.keys())
    if extra:
        shown = ", ".join(extra[:3]) + (" …" if len(extra) > 3 else "")
        warnings.warn(f"{where}: {type(model).__name__} leaves out {len(extra)} tensors: {shown}", stacklevel=3)
    model.load_state_dict(state, strict=False)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are tied."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()
