"""Calling a model with what its forward takes, whether it is one of transformers or not."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from mui_callback.errors import ProbeError

_OPTIONS = {"use_cache": False, "output_router_logits": False, "return_dict": True}
"""Asked of models that know them, unless the inputs say otherwise."""


class ModelCall:
    """Calls a model with token ids.

    Args:
        model: a model of transformers, wrapped or not, or any module from token ids to logits.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        inner = model
        while isinstance(getattr(inner, "module", None), nn.Module):  # wrappers for data parallelism
            inner = inner.module  # type: ignore[assignment]
        parameters = inspect.signature(type(inner).forward).parameters
        self.names = set(parameters) - {"self"}
        config = getattr(inner, "config", None)
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        self.takes_any = takes_any and hasattr(config, "model_type")

    def __call__(self, inputs: dict[str, Any]) -> Any:
        """The output of the model; a mask that it does not take is left out, since samples are padded on the right.

        Raises:
            ProbeError: it is no model that takes token ids.
        """
        known = {name: value for name, value in {**_OPTIONS, **inputs}.items() if self.takes_any or name in self.names}
        if "input_ids" in known:
            return self.model(**known)
        if len(inputs) > 2:
            raise ProbeError(
                f"{type(self.model).__name__}: expected a forward that takes {', '.join(inputs)}, "
                f"got one that takes {', '.join(sorted(self.names))}"
            )
        return self.model(inputs["input_ids"], **known)
