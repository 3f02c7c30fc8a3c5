"""Choices, run for the logits of their tokens; where a model can, after a prompt that is run once for all of them.

Shapes: B choices, prompts of P positions, S positions of what follows them; R scored tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mui_callback.forgiving import attempt, described, logger
from mui_callback.parallel.processes import out_of_memory
from mui_callback.parallel.shards import Shards
from mui_callback.probe.batches import Batch, only
from mui_callback.probe.call import ModelCall
from mui_callback.probe.choice_plan import Part
from mui_callback.probe.device_batch import DeviceBatch, to_device
from mui_callback.probe.head import LanguageModelHead
from mui_callback.probe.model_config import has_16_bits
from mui_callback.probe.samples import IntArray
from mui_callback.probe.shared_prompts import Followers, PromptGroup
from mui_callback.probe.verification import ROUNDING, ROUNDING_OF_FLOAT32

_T = TypeVar("_T")

_NEEDED = {"past_key_values", "position_ids", "attention_mask", "use_cache"}
"""What the forward of a model takes that can go on after a prompt."""

_OF_LENGTH = ("dynamic", "longrope")
"""Types of rotary embeddings whose factors depend on the length of the sequence."""

_PLAIN = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
"""Layers of transformers' caches that hold keys and values of positions, or nothing."""


@dataclass
class PromptSharing:
    """Whether prompts are run once for all of their choices, as far as it is known of a model."""

    is_possible: bool
    """Whether choices are dealt out for it; the same in all processes."""
    refused: str = ""
    """Why it is not done in this process; empty as long as nothing speaks against it."""

    @classmethod
    def of(cls, model: nn.Module, shards: Shards) -> PromptSharing:
        """Of a model of which nothing is known yet.

        Processes that exchange tensors in a forward pass have to make the same ones, so that none may do it otherwise.
        """
        call, config = ModelCall(model), getattr(model, "config", None)
        is_decoder = hasattr(config, "model_type") and not getattr(config, "is_encoder_decoder", False)
        is_decoder = is_decoder and not _depends_on_length(config)
        return cls(is_decoder and not shards.in_step and (call.takes_any or call.names >= _NEEDED))

    @property
    def is_on(self) -> bool:
        """Whether it is to be done now."""
        return self.is_possible and not self.refused

    def refuse(self, reason: str) -> None:
        """Not to be tried again."""
        self.refused = reason
        logger.info("MUI: each choice is run with its prompt, since the model does not go on after one: %s", reason)


@dataclass
class ChoiceRuns:
    """Runs the batches of choices of one pass.

    In every pass the first batch that follows the prompts of a group is checked: some of its choices are run in full,
    too. If the logits differ by more than rounding, or anything fails, memory for example, prompts are not shared any
    more.

    Args:
        head: of the model.
        sharing: what is known of it, for all passes.
        device: where the model computes.
    """

    head: LanguageModelHead
    sharing: PromptSharing
    device: torch.device
    _is_checked: bool = field(default=False, init=False)

    def run(self, parts: Iterable[Part]) -> Iterator[tuple[DeviceBatch, Tensor]]:
        """Of each batch what was run, which says where its scored tokens are, and their logits, ``[R, V]``.

        Raises:
            Exception: whatever the model raises when choices are run in full.
        """
        for part in parts:
            yield from [self._in_full(part)] if isinstance(part, Batch) else self._group(part)

    def _group(self, group: PromptGroup) -> Iterator[tuple[DeviceBatch, Tensor]]:
        self._is_checked = False
        cache = self._unless_it_fails(lambda: self._cache(group.prompts))
        for followers in group.followers:
            found = self._unless_it_fails(partial(self._after, group.prompts, cache, followers))
            if found is None:
                cache = None  # which takes up memory
                found = self._in_full(followers.batch)
            yield found
            del found

    def _in_full(self, batch: Batch) -> tuple[DeviceBatch, Tensor]:
        inputs = to_device(batch, self.device)
        return inputs, self.head.logits(inputs)

    def _unless_it_fails(self, action: Callable[[], _T]) -> _T | None:
        if not self.sharing.is_on:
            return None
        result, error = attempt(action)
        if error is not None:
            self.sharing.refuse(described(error))
            if out_of_memory(error):
                del error  # its traceback holds the tensors of the pass
                torch.cuda.empty_cache()
        return result

    def _cache(self, prompts: Batch) -> Any:
        """What a model keeps of prompts for those that go on."""
        inputs = to_device(prompts, self.device)
        cache = self.head.cache(Continued(**vars(inputs), position_ids=_positions(inputs.attention_mask), past=None))
        if not _is_of_keys_and_values(cache):
            raise TypeError(f"expected a cache of keys and values alone, got {_described(cache)}")
        return cache

    def _after(self, prompts: Batch, cache: Any, one: Followers) -> tuple[DeviceBatch, Tensor]:
        """A batch that follows prompts.

        Raises:
            ValueError: it is the first, and its logits are not right.
        """
        rest = to_device(one.rest, self.device)
        mask = torch.cat([self._move(prompts.attention_mask[one.prompt]), rest.attention_mask], dim=1)
        inputs = Continued(
            **{**vars(rest), "attention_mask": mask},
            position_ids=_positions(mask)[:, prompts.attention_mask.shape[1] :],
            past=_rows_of(cache, self._move(one.prompt)),
        )
        logits_RV = self.head.logits(inputs)
        if not self._is_checked:
            self._check(one, prompts.attention_mask.sum(axis=1)[one.prompt], logits_RV)
        return rest, logits_RV

    def _check(self, one: Followers, length_B: IntArray, logits_RV: Tensor) -> None:
        """Compare the logits after the shortest prompt and after the longest with those of a run in full.

        What counts is how far that of the typical token is off, relative to how far it is from all being equal.
        """
        is_coarse = has_16_bits(self.head.model) or torch.is_autocast_enabled(self.device.type)
        limit = ROUNDING if is_coarse else ROUNDING_OF_FLOAT32
        ends = np.unique(one.prompt[[length_B.argmin(), length_B.argmax()]])
        rows = np.flatnonzero(np.isin(one.prompt, ends))
        is_compared_R = np.isin(one.rest.row, rows)
        _, expected = self._in_full(only(one.batch, rows))
        expected, came = expected.float(), logits_RV[self._move(is_compared_R)].float()
        size_R = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
        error_R = ((came - expected).norm(dim=-1) / size_R).cpu().numpy()
        prompt_R = one.prompt[one.rest.row[is_compared_R]]
        for error in (float(np.median(error_R[prompt_R == prompt])) for prompt in ends):
            if not error <= limit:
                raise ValueError(f"its logits differ from those in full by {error:.2g}; {limit:g} can be rounding")
        self._is_checked = True

    def _move(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


@dataclass(frozen=True)
class Continued(DeviceBatch):
    """A batch that goes on where others have ended, P positions before, or that others go on after."""

    position_ids: Tensor
    """int64 ``[B, S]``, as the tokens are counted; `attention_mask` is ``[B, P + S]``."""
    past: Any
    """The cache of what comes before; None if nothing does."""

    @property
    def model_inputs(self) -> dict[str, Any]:
        """What the model is called with."""
        past = {} if self.past is None else {"past_key_values": self.past}
        return {**super().model_inputs, "position_ids": self.position_ids, "use_cache": True, **past}


def _depends_on_length(config: Any) -> bool:
    """Whether the rotary factors of a model are others where a sequence is longer, so that its keys cannot be kept."""
    parts = [config, getattr(config, "text_config", None)]
    values = [getattr(part, name, None) for part in parts for name in ("rope_parameters", "rope_scaling")]
    while values:
        value = values.pop()
        if isinstance(value, Mapping):
            values += value.values()
        elif value in _OF_LENGTH:
            return True
    return False


def _positions(mask: Tensor) -> Tensor:
    """The number of each token among those of its row; padding has that of a neighbour."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _is_of_keys_and_values(cache: Any) -> bool:
    """Whether the rows of a cache can be taken apart: no more is in it than keys and values of each position.

    A recurrent state is not of a position, and what else models keep has rules of its own.
    """
    kinds = sys.modules.get("transformers.cache_utils")
    plain = [getattr(kinds, name, None) for name in _PLAIN]
    return type(cache) is getattr(kinds, "DynamicCache", None) and all(type(layer) in plain for layer in cache.layers)


def _rows_of(cache: Any, row_B: Tensor) -> Any:
    """Some rows of a cache, in another one that can be added to."""
    taken = copy.copy(cache)
    taken.layers = [copy.copy(layer) for layer in cache.layers]
    taken.batch_select_indices(row_B)
    return taken


def _described(cache: Any) -> str:
    return ", ".join(dict.fromkeys(type(part).__name__ for part in (cache, *getattr(cache, "layers", ()))))
