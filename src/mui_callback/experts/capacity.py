"""Routers with a limited capacity: DeepSpeed's, which drop tokens that an expert has no place for.

What is dropped depends on the batch that a token comes in, in evaluation as in training, and some choose at random. A
probe lets every token pass, and counts how many would not have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mui_callback.experts.layer import ExpertLayer

_SETTINGS = {"drop_tokens": False, "use_rts": False, "top2_2nd_expert_sampling": False, "min_capacity": 0}
"""Of DeepSpeed's TopKGate: what lets every token pass and leaves nothing to chance."""

Consumer = Callable[[int, Tensor, Tensor], None]
"""Takes the position of a layer, and how many pairs of token and expert would be dropped, of how many."""


def routers(module: nn.Module) -> list[Any]:
    """The routers in a module whose capacity may be limited."""
    return [part for part in module.modules() if all(hasattr(part, name) for name in (*_SETTINGS, "capacity_factor"))]


def let_all_pass(model: nn.Module) -> None:
    """No router drops a token or draws random numbers any more; whoever freezes the model puts back what was set."""
    for router in routers(model):
        for name, value in _SETTINGS.items():
            setattr(router, name, value)


class Capacities:
    """Counts what the routers of some layers would drop with the capacity that they have in training.

    To be made before `let_all_pass`.

    Args:
        layers: the layers.
    """

    def __init__(self, layers: Sequence[ExpertLayer]) -> None:
        self._routers = [
            (index, router, _Capacity(router.capacity_factor * router.k, router.min_capacity))
            for index, layer in enumerate(layers)
            for router in routers(layer.scope)
            if router.drop_tokens
        ]

    @contextmanager
    def counted(self, is_token_T: Tensor, consume: Consumer) -> Iterator[None]:
        """Whatever the routers choose inside is counted.

        Args:
            is_token_T: whether each position of the batch is a token and no padding, bool ``[T]``.
            consume: takes the counts of each layer.
        """
        with ExitStack() as stack:
            for index, router, capacity in self._routers:
                count = partial(capacity.count, is_token_T, partial(consume, index))
                stack.enter_context(router.register_forward_hook(count))
            yield


@dataclass(frozen=True)
class _Capacity:
    """Of the experts of one layer."""

    factor: float
    """Places of an expert, as a multiple of the tokens over the experts."""
    least: int

    def count(
        self, is_token_T: Tensor, consume: Callable[[Tensor, Tensor], None], router: Any, args: Any, out: Any
    ) -> None:
        """After a router's forward, which says the K experts of each token in the fourth of seven outputs."""
        if len(out) != 7 or out[3].shape[1] != len(is_token_T):
            return
        expert_KT, n_experts = out[3], len(router.wg.weight)
        chosen_KT = expert_KT.long().where(is_token_T & (expert_KT >= 0), n_experts)
        chosen_E = torch.zeros(n_experts + 1, dtype=torch.int64, device=chosen_KT.device)
        chosen_E = chosen_E.index_add_(0, chosen_KT.flatten(), torch.ones_like(chosen_KT.flatten()))[:-1]
        places = (is_token_T.sum().double() / n_experts * self.factor).ceil().long().clamp(min=self.least)
        consume((chosen_E - places).clamp(min=0).sum(), chosen_E.sum())
