"""A callable of the user's as a benchmark, and what it could leave behind in the weights it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mui_callback.benchmarks.base import BenchmarkResult, scores_of
from mui_callback.benchmarks.sharing import Sharing
from mui_callback.errors import ProbeError
from mui_callback.forgiving import described
from mui_callback.parallel.weights import is_dtensor, is_zero3
from mui_callback.probe.checksum import checksum

BenchmarkFunction = Callable[[nn.Module, int], Any]
"""From the model and the number of optimizer steps done to a dict of names to numbers, or to pairs of a number and its
standard error."""


class CallableBenchmark:
    """Calls a function with the live model.

    The model is in eval mode, without gradients, and is to be left as it is; what may be done to it all the same (its
    mode, buffers, hooks of modules, random states, gradients) is put back. In a distributed run the function is called
    in every process, as a model that is spread over processes needs it; what it returns in the main one counts, and the
    others may return anything. A process that has nothing to do waits for the others for five minutes.

    Args:
        function: the callable.
        prefix: put before the names of its scores.
    """

    def __init__(self, function: BenchmarkFunction, prefix: str = "") -> None:
        self.function = function
        self.prefix = prefix

    @property
    def name(self) -> str:
        """The prefix, or else the name of the function or of its class."""
        return self.prefix or getattr(self.function, "__qualname__", type(self.function).__qualname__)

    def run(self, model: nn.Module, step: int, sharing: Sharing) -> BenchmarkResult:
        """Call it.

        Raises:
            ProbeError: it changed weights.
            TypeError: see `scores_of`, as the following.
            ValueError: …
            Exception: whatever it raises itself.
        """
        with _weights_watched(model):
            returned = self.function(model, step)
        return scores_of(returned, self.prefix) if sharing.is_main else {}


@contextmanager
def _weights_watched(model: nn.Module) -> Iterator[None]:
    """Gradients and whether there are to be any are as before afterwards, and writing to weights is an error.

    The counter of versions that torch keeps does not see what is written through ``.data``; a checksum does.

    Raises:
        ProbeError: weights are not what they were.
    """
    parameters = dict(model.named_parameters())
    before = {name: _checksum(parameter) for name, parameter in parameters.items()}
    held = [(parameter, parameter.grad, parameter.requires_grad) for parameter in parameters.values()]
    for parameter in parameters.values():
        parameter.grad = None
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    finally:
        for parameter, grad, requires_grad in held:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
    changed = [name for name, parameter in parameters.items() if _checksum(parameter) != before[name]]
    if changed:
        raised = "" if failure is None else f", and raised {described(failure)}"
        raise ProbeError(
            f"the callable wrote to parameters, which cannot be undone: {', '.join(changed[:3])}{raised}"
        ) from failure
    if failure is not None:
        raise failure


def _checksum(parameter: Any) -> tuple[torch.dtype, int]:
    """Equal for equal bits, of what is in this process."""
    local: Tensor = parameter.to_local() if is_dtensor(parameter) else parameter
    local = parameter.ds_tensor if is_zero3(parameter) else local
    return local.dtype, checksum(local)
