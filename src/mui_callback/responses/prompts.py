"""From a task to tokens: gold samples and prompts, as plain text or as the turns of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from mui_callback.errors import ProbeSetError
from mui_callback.forgiving import described
from mui_callback.probe.encode import call_tokenizer, tokenize
from mui_callback.probe.samples import IntArray, ProbeSample, TokenSample
from mui_callback.responses.task import Question, Task


def gold_samples(task: Task, tokenizer: Any, *, chat: bool) -> tuple[ProbeSample | TokenSample, ...]:
    """The samples of a task with their gold responses, for a probe set.

    In a conversation the prompts of the examples and the question are turns of the user, the responses of the examples
    are turns of the model, and the gold response follows what begins the model's turn. Turns have no white space at
    their ends, and neither have the responses and choices that follow. A template has all special tokens itself, so
    that the tokenizer adds none: a begin-of-sequence token is there once, and no end-of-sequence token is scored.

    Args:
        task: of `read_task`.
        tokenizer: of transformers, and with a chat template; without `chat` it is not looked at.
        chat: whether the model converses.

    Returns:
        The text samples of the task, or token samples of a conversation.

    Raises:
        ProbeSetError: the tokenizer has no chat template, or it does not fit the turns.
    """
    if not chat:
        return task.samples
    without_specials = partial(tokenizer, add_special_tokens=False)
    samples = []
    for sample, rendered in zip(task.samples, _conversations(task, tokenizer), strict=True):
        turn = ProbeSample(
            id=sample.id,
            response=sample.response.strip(),
            prompt=rendered,
            choices=tuple(choice.strip() for choice in sample.choices),
            answer=sample.answer,
            source=sample.source,
        )
        samples.append(tokenize(turn, without_specials))
    return tuple(samples)


def prompt_tokens(task: Task, tokenizer: Any, *, chat: bool, encoder_decoder: bool = False) -> tuple[IntArray, ...]:
    """The tokens that a model is to answer, int64 ``[T]`` for each sample.

    An end-of-sequence token that the tokenizer appends is taken away, as nothing would follow it, but for an encoder.

    Args:
        task: of `read_task`.
        tokenizer: of transformers.
        chat: as for `gold_samples`.
        encoder_decoder: whether the prompt is an encoder's.

    Raises:
        ProbeSetError: as for `gold_samples`, or there is no tokenizer, or a sample has no prompt.
    """
    if tokenizer is None:
        raise ProbeSetError(f"task {task.name!r}: expected a tokenizer for what the model is to answer, got none")
    texts: Sequence[str] = [sample.prompt for sample in task.samples]
    if chat:
        texts, tokenizer = _conversations(task, tokenizer), partial(tokenizer, add_special_tokens=False)
    end = None if chat or encoder_decoder else getattr(tokenizer, "eos_token_id", None)
    prompts = []
    for sample, text in zip(task.samples, texts, strict=True):
        ids = call_tokenizer(tokenizer, text, f"{sample.where}: tokenizer")
        if ids.size and ids[-1] == end and not text.endswith(tokenizer.eos_token):
            ids = ids[:-1]
        if not text or not ids.size:
            raise ProbeSetError(f"{sample.where}: expected a prompt: there is nothing to answer")
        prompts.append(ids)
    return tuple(prompts)


def _conversations(task: Task, tokenizer: Any) -> list[str]:
    if not getattr(tokenizer, "chat_template", None):
        raise ProbeSetError(
            f"task {task.name!r}: expected a tokenizer with a chat template, got {type(tokenizer).__name__}"
        )
    return [
        _conversation(question, tokenizer, sample.where)
        for question, sample in zip(task.questions, task.samples, strict=True)
    ]


def _conversation(question: Question, tokenizer: Any, where: str) -> str:
    turns = [turn for prompt, response in question.examples for turn in (("user", prompt), ("assistant", response))]
    messages = [{"role": role, "content": text.strip()} for role, text in (*turns, ("user", question.prompt))]
    if not messages[-1]["content"]:
        raise ProbeSetError(f"{where}: expected a prompt: a conversation begins with a question")
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # of the template
        raise ProbeSetError(f"{where}: the chat template does not take these turns: {described(error)}") from error
