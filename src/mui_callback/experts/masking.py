"""A model without some of its neurons: what they write is zero for every token.

What is set to zero are activations on their way to the down projection; no weight is written to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from mui_callback.errors import ProbeError
from mui_callback.experts.base import Experts
from mui_callback.experts.layer import ExpertLayer, layout_of
from mui_callback.metrics.utilization import BoolArray


@contextmanager
def masked(layers: Sequence[ExpertLayer], is_masked: BoolArray, device: torch.device) -> Iterator[None]:
    """Inside, the activations of some neurons are zero; to be entered under `torch.no_grad`.

    Whether any of their neurons is masked or not, experts behind transformers' experts interface run as they do when
    they are read, so that losses under different masks differ by what is masked and not by rounding. The layers cannot
    be read at the same time.

    Args:
        layers: the layers of the model.
        is_masked: bool ``[neurons]``, numbered as in the `ExpertLayout` of the layers.
        device: where the model computes.

    Raises:
        ValueError: `is_masked` has another shape or dtype.
        ProbeError: on leaving, if a layer has run, but not its experts in a way that can be masked.
    """
    n_neurons = layout_of(layers).n_neurons
    if is_masked.shape != (n_neurons,) or is_masked.dtype != bool:
        raise ValueError(f"is_masked: expected bool [{n_neurons}], got {is_masked.dtype} {list(is_masked.shape)}")
    rest = torch.tensor(is_masked, device=device)
    seen: set[ExpertLayer | Experts] = set()
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.scope.register_forward_pre_hook(partial(_note, seen, layer)))
            for experts in layer.experts:
                own, rest = rest.tensor_split([experts.n_experts * experts.width])
                is_masked_EI = own.view(experts.n_experts, experts.width)
                stack.enter_context(experts.masked(is_masked_EI, partial(_note, seen, experts)))
        yield
    for layer in layers:
        not_run = [experts.path for experts in layer.experts if experts not in seen]
        if layer in seen and not_run:
            raise ProbeError(
                f"{layer.shape.path} ran without calling {', '.join(not_run)} in a way that can be masked: the down "
                "projection was not used, or in no linear map and no matrix product."
            )


def _note(seen: set[ExpertLayer | Experts], what: ExpertLayer | Experts, *_: object) -> None:
    seen.add(what)
