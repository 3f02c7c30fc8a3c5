"""The live model as lm-evaluation-harness sees it. To be imported only where the harness is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

from lm_eval.models.huggingface import HFLM
from torch import nn

from mui_callback.benchmarks.sharing import Sharing
from mui_callback.errors import ProbeError
from mui_callback.forgiving import warn
from mui_callback.parallel.weights import common_device


class LiveLM(HFLM):
    """A model of transformers in the middle of its training, and a copy of its tokenizer.

    The harness gives each of its methods all requests of a kind. Where the work is dealt out, every process runs those
    of its own contexts, and all get all answers. Otherwise each runs all of them.

    Args:
        model: the model; held still by whoever calls.
        tokenizer: of transformers.
        sharing: how the processes share out the requests.
        batch_size: requests in a forward pass; halved if memory runs out.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, sharing: Sharing, batch_size: int) -> None:
        self.sharing = sharing
        super().__init__(pretrained=_Live(model, sharing), tokenizer=deepcopy(tokenizer), batch_size=batch_size)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[Any]:
        return self._shared(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[Any]:
        return self._shared(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[Any]:
        return self._shared(super().generate_until, requests)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Any]:
        answers: list[Any] = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        return answers

    def _shared(self, run: Callable[..., list[Any]], requests: Sequence[Any]) -> list[Any]:
        own = self._own(requests)
        answers = self.sharing.together(
            lambda: run([requests[number] for number in own], disable_tqdm=True) if own else [],
            with_less_memory=self._halve_batches,
        )
        if not self.sharing.deals_out:
            return answers
        parts = self.sharing.all_gather((len(requests), dict(zip(own, answers, strict=True))))
        if len({n for n, _ in parts}) > 1:
            raise ProbeError(f"expected the same requests in all processes, got {', '.join(str(n) for n, _ in parts)}")
        whole = {number: answer for _, part in parts for number, answer in part.items()}
        return [whole[number] for number in range(len(requests))]

    def _own(self, requests: Sequence[Any]) -> list[int]:
        """The requests of this process; those with the same context stay together, as the harness runs it once."""
        if not self.sharing.deals_out:
            return list(range(len(requests)))
        context: dict[str, int] = {}
        order = [context.setdefault(request.args[0], len(context)) for request in requests]
        shards = self.sharing.shards
        return [number for number, place in enumerate(order) if place % shards.n == shards.own]

    def _halve_batches(self) -> bool:
        if self.batch_size_per_gpu == 1:
            return False
        self.batch_size_per_gpu //= 2
        warn(f"MUI: out of memory in lm-eval; going on with batches of {self.batch_size_per_gpu} requests")
        return True


class _Live:
    """A stand-in that is no module: the harness calls `eval` and `tie_weights` of modules, which may write to them."""

    def __init__(self, model: nn.Module, sharing: Sharing) -> None:
        self.model: Any = model
        self.device = common_device(model)
        self.config: Any = model.config
        # Those that have finished go on until all have, as each forward needs all processes.
        self._options = {"synced_gpus": True} if sharing.shards.in_step else {}

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.model(*args, **options)

    def generate(self, **options: Any) -> Any:
        return self.model.generate(**options, **self._options)
