"""The model's own answers: greedy, in batches, with nothing of the model changed.

Shapes: B prompts of a batch, P tokens of each with padding, R tokens of the longest answer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from mui_callback.errors import ProbeSetError, UnsupportedModelError
from mui_callback.forgiving import attempt, warn
from mui_callback.parallel.processes import out_of_memory
from mui_callback.parallel.weights import common_device, engines_at_rest
from mui_callback.probe.freeze import frozen
from mui_callback.probe.model_config import decoder_start, longest_sequence, text_config
from mui_callback.probe.samples import IntArray, fail, first_few
from mui_callback.probe.unwrap import unwrapped
from mui_callback.responses.answers import GeneratedAnswer, judged
from mui_callback.responses.prompts import prompt_tokens
from mui_callback.responses.stopping import Ends, StopTexts
from mui_callback.responses.task import Task
from mui_callback.settings import ProbeSettings


def generate_answers(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    *,
    chat: bool = False,
    batch_tokens: int = ProbeSettings.batch_tokens,
    max_length: int | None = ProbeSettings.max_length,
    on_batch: Callable[[int], None] = lambda n: None,
) -> tuple[GeneratedAnswer, ...]:
    """Ask a model all questions of a task.

    Each token is the likeliest one: whatever the generation config of the model says of sampling, beams and penalties
    is left aside, but its end-of-sequence tokens and its use of a cache are not. Prompts of similar length share a
    forward pass. A batch is exact in float32 up to rounding; where two tokens are as likely but for that, it can choose
    the other one.

    A prompt that leaves no place for an answer in the context loses tokens from the left; one warning lists such.

    Args:
        model: of transformers; held still, and left as it was.
        tokenizer: of transformers.
        task: of `read_task`.
        chat: whether the questions are turns of a conversation; see `gold_samples`.
        batch_tokens: positions of a batch, padding and the longest possible answers included; halved if memory runs
            out.
        max_length: tokens of prompt and answer together; None for the context length of the model.
        on_batch: told the number of answers of each batch.

    Returns:
        One answer for each sample, in their order, `judged`.

    Raises:
        ProbeSetError: a sample has no prompt, the tokenizer does not fit the model, or the context is too short.
        UnsupportedModelError: the model cannot generate, or its weights are on several devices.
    """
    if batch_tokens < 1:
        fail("batch_tokens", "1 or more tokens", batch_tokens)
    inner = unwrapped(model)
    writer = _Writer(inner, tokenizer, task)
    whole = prompt_tokens(task, tokenizer, chat=chat, encoder_decoder=writer.start is not None)
    writer.check_vocabulary(whole, task)
    prompts = _shortened(whole, task, writer.longest_prompt(max_length))
    answers: dict[int, GeneratedAnswer] = {}
    left = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))  # what needs most memory is known first
    with frozen(model), engines_at_rest(model):  # it puts the generation config back
        writer.take_plain_config()
        while left:
            width = len(prompts[left[0]]) + task.config.max_new_tokens
            pack = left[: max(1, batch_tokens // width)]
            found, error = attempt(partial(writer.write, [prompts[index] for index in pack]))
            if found is None:
                assert error is not None
                if len(pack) == 1 or not out_of_memory(error):
                    raise error
                del error  # its traceback holds the tensors of the pass
                torch.cuda.empty_cache()
                batch_tokens = width * (len(pack) // 2)
                warn(f"MUI: out of memory in task {task.name!r}; going on with batches of {batch_tokens} tokens")
                continue
            for index, ids in zip(pack, found, strict=True):
                n_truncated = len(whole[index]) - len(prompts[index])
                answers[index] = writer.answer(task.samples[index].id, prompts[index], ids, n_truncated)
            left = left[len(pack) :]
            on_batch(len(pack))
    return judged([answers[index] for index in range(len(prompts))], task)


class _Writer:
    """A model that answers prompts."""

    def __init__(self, model: Any, tokenizer: Any, task: Task) -> None:
        generates = getattr(model, "can_generate", lambda: hasattr(model, "generate"))
        if not generates() or not hasattr(model, "generation_config"):
            raise UnsupportedModelError(
                f"{type(model).__name__}: expected a model of transformers with `generate`, to have its answers"
            )
        self.model = model
        self.device = common_device(model)
        self.start = decoder_start(model)
        self.max_new_tokens = task.config.max_new_tokens
        self.ends = Ends(tokenizer, frozenset(_end_tokens(model, tokenizer)), tuple(task.config.stop))
        self.vocab_size: int = text_config(model).vocab_size
        pads = _integers([getattr(tokenizer, "pad_token_id", None), model.generation_config.pad_token_id])
        self.pad = next((pad for pad in [*pads, *sorted(self.ends.tokens)] if pad < self.vocab_size), 0)

    def longest_prompt(self, max_length: int | None) -> int | None:
        """Tokens of a prompt that leave place for an answer; None for no limit."""
        limit = longest_sequence(self.model, max_length)
        if limit is None:
            return None
        if limit <= self.max_new_tokens:
            fail("max_new_tokens", f"fewer tokens than the context of {limit}", self.max_new_tokens)
        return limit - self.max_new_tokens if self.start is None else limit

    def check_vocabulary(self, prompts: Sequence[IntArray], task: Task) -> None:
        """An id that an embedding does not have is an error that ends the process on a GPU."""
        for sample, prompt in zip(task.samples, prompts, strict=True):
            if (largest := int(prompt.max())) >= self.vocab_size:
                raise ProbeSetError(
                    f"{sample.where}: expected token ids below the model's vocabulary size {self.vocab_size},"
                    f" got {largest}: tokenizer and model do not match"
                )

    def take_plain_config(self) -> None:
        """Give the model a generation config that says nothing but what is asked for.

        Where one says nothing, transformers takes what the model's own says, so that it is not enough to pass one.
        """
        from transformers import GenerationConfig

        self.model.generation_config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=sorted(self.ends.tokens) or None,
            pad_token_id=self.pad,
            decoder_start_token_id=self.start,
            use_cache=self.model.generation_config.use_cache,
        )

    def write(self, prompts: Sequence[IntArray]) -> list[IntArray]:
        """What follows each prompt, int64 ``[R]``, with whatever comes after its end."""
        length = max(map(len, prompts))
        ids_BP = np.full((len(prompts), length), self.pad, dtype=np.int64)
        mask_BP = np.zeros_like(ids_BP)
        for row, prompt in enumerate(prompts):
            # A decoder goes on at the right end; an encoder may count positions from the left.
            place = slice(length - len(prompt), None) if self.start is None else slice(len(prompt))
            ids_BP[row, place], mask_BP[row, place] = prompt, 1
        n_before = length if self.start is None else 1
        before = prompts if self.start is None else [np.array([], dtype=np.int64)] * len(prompts)
        written = self.model.generate(
            input_ids=torch.from_numpy(ids_BP).to(self.device),
            attention_mask=torch.from_numpy(mask_BP).to(self.device),
            generation_config=self.model.generation_config,
            stopping_criteria=[StopTexts(self.ends, before, n_before)] if self.ends.stop else [],
        )
        return [*written[:, n_before:].cpu().numpy()]

    def answer(self, sample_id: str, prompt: IntArray, written: IntArray, n_truncated: int) -> GeneratedAnswer:
        """What was written, up to where it ends."""
        before = prompt if self.start is None else prompt[:0]
        response, text, ended = self.ends.cut(written, before)
        n_bytes = self.ends.n_bytes(response, before)
        return GeneratedAnswer(sample_id, prompt, response, text, n_bytes, ended, n_truncated)


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """All that anyone says: chat models end a turn with another token than a text."""
    said = [getattr(one, "eos_token_id", None) for one in (model.generation_config, text_config(model), tokenizer)]
    return [token for one in said for token in _integers(one if isinstance(one, list | tuple) else [one])]


def _integers(values: Iterable[Any]) -> list[int]:
    return [value for value in values if isinstance(value, int)]


def _shortened(prompts: Sequence[IntArray], task: Task, longest: int | None) -> list[IntArray]:
    too_long = [
        f"{sample.where}: {len(prompt)} tokens > {longest}"
        for prompt, sample in zip(prompts, task.samples, strict=True)
        if longest is not None and len(prompt) > longest
    ]
    if too_long:
        shown = "\n".join(first_few(too_long))
        counts = f"{len(too_long)} of {len(prompts)} prompts of task {task.name!r}"
        warnings.warn(f"{counts} are too long and were cut from the left:\n{shown}", stacklevel=3)
    return [prompt if longest is None else prompt[-longest:] for prompt in prompts]
