"""From a probe set to token samples, and from those to padded batches."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from mui_callback.errors import ProbeSetError
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.probe.samples import (
    BoolArray,
    IntArray,
    ProbeSample,
    TokenChoice,
    TokenSample,
    fail,
    integers,
)

Tokenizer = Callable[[str], Sequence[int] | Mapping[str, Any]]
"""A function from a text to token ids; or to a mapping of "input_ids", as transformers' tokenizers are."""

_Tokens = TypeVar("_Tokens", TokenSample, TokenChoice)


@dataclass(frozen=True, eq=False)
class EncodedProbeSet:
    """A probe set as tokens, N samples in all.

    Attributes:
        task_names: The names of the tasks, in order.
        samples: The N samples, task by task.
        task_of_sample: int64 [N], index into `task_names`.
        n_truncated: Number of samples that were longer than the maximum, in themselves or in a choice.
        n_unscored: Number of samples with no response token.
    """

    task_names: tuple[str, ...]
    samples: tuple[TokenSample, ...]
    task_of_sample: IntArray
    n_truncated: int
    n_unscored: int


@dataclass(frozen=True, eq=False)
class Batch:
    """B sequences, padded on the right with id 0 to T tokens, and the R tokens among them to score.

    Attributes:
        input_ids: int64 [B, T].
        attention_mask: int64 [B, T], 1 for tokens and 0 for padding.
        sample: int64 [B], index of each row's sequence among those that were batched.
        flat_position: int64 [R], row * T + (t - 1): where the prediction of scored token t is made. Scored
            tokens are ordered by row, then by position.
        row: int64 [R], the scored token's row.
        order: int64 [R], 0, 1, 2, ... within each row: the token's rank among the row's scored tokens.
        target: int64 [R], the scored token's id.
    """

    input_ids: IntArray
    attention_mask: IntArray
    sample: IntArray
    flat_position: IntArray
    row: IntArray
    order: IntArray
    target: IntArray

    @property
    def n_scored_max(self) -> int:
        """The largest number of scored tokens of a row, 1 or more."""
        return int(self.order.max()) + 1


def encode(
    probe_set: ProbeSet,
    tokenizer: Tokenizer | None = None,
    max_length: int | None = None,
    *,
    vocab_size: int | None = None,
) -> EncodedProbeSet:
    """Tokenise a probe set.

    A sample's tokens are those of prompt + response. Its response tokens are the ones after the longest
    common prefix with the tokens of the prompt alone, so a token that spans the boundary is a response
    token. Without a prompt every token but the first is one. An end-of-sequence token that the tokenizer
    appends is scored, as it is trained on. Choices are tokenised in the same way.

    `n_bytes` counts the whole response, and so also a first token that nothing predicts. A sequence longer
    than `max_length` loses tokens from the left, and its `n_bytes` where that reaches into the response; one
    warning lists such samples.

    Args:
        probe_set: The samples.
        tokenizer: Needed unless all samples are token samples.
        max_length: The longest sequence to keep, in tokens, 2 or more; None for no limit.
        vocab_size: If given, token ids must be less than this.

    Raises:
        ProbeSetError: If a text sample comes without a tokenizer, the tokenizer returns no token ids, or
            an id is not in the vocabulary.
    """
    if max_length is not None and max_length < 2:
        fail("max_length", "None or 2 or more tokens", max_length)
    samples: list[TokenSample] = []
    too_long: list[str] = []
    for sample in (sample for task in probe_set.tasks.values() for sample in task):
        tokens = tokenize(sample, tokenizer) if isinstance(sample, ProbeSample) else sample
        if vocab_size is not None:
            _check_vocabulary(tokens, vocab_size)
        longest = max(len(sequence.input_ids) for sequence in _sequences(tokens))
        if max_length is not None and longest > max_length:
            too_long.append(f"{tokens.where}: {longest} tokens > {max_length}")
            tokens = _truncate(tokens, max_length)
        _check_choices(tokens)
        samples.append(tokens)
    if too_long:
        shown = "\n".join(too_long[:3] + ["..."] * (len(too_long) > 3))
        counts = f"{len(too_long)} of {len(samples)} probe samples"
        warnings.warn(f"{counts} are too long and were cut from the left:\n{shown}", stacklevel=2)
    sizes = [len(task) for task in probe_set.tasks.values()]
    return EncodedProbeSet(
        task_names=probe_set.task_names,
        samples=tuple(samples),
        task_of_sample=np.repeat(np.arange(len(sizes), dtype=np.int64), sizes),
        n_truncated=len(too_long),
        n_unscored=sum(not sample.scored.any() for sample in samples),
    )


def tokenize(sample: ProbeSample, tokenizer: Tokenizer | None) -> TokenSample:
    """Tokenise one text sample and its choices, as `encode` describes.

    Raises:
        ProbeSetError: If there is no tokenizer, or it does not return token ids.
    """
    if tokenizer is None:
        raise ProbeSetError(f"{sample.where}: expected a tokenizer for this text sample: pass tokenizer=")
    where = f"{sample.where}: tokenizer"
    prompt_ids = _call(tokenizer, sample.prompt, where) if sample.prompt else np.empty(0, dtype=np.int64)

    def continued(text: str) -> tuple[IntArray, BoolArray, int]:
        input_ids = _call(tokenizer, sample.prompt + text, where)
        scored = np.arange(len(input_ids)) >= _common_prefix(input_ids, prompt_ids)
        scored[:1] = False
        return input_ids, scored, len(text.encode())

    return TokenSample(
        sample.id,
        *continued(sample.response),
        source=sample.source,
        choices=tuple(TokenChoice(*continued(choice)) for choice in sample.choices),
        answer=sample.answer,
    )


def make_batches(sequences: Sequence[TokenSample | TokenChoice], batch_tokens: int) -> list[Batch]:
    """Batch sequences of similar length.

    Sequences are sorted by length (ties by index) and packed greedily. One without a scored token has
    nothing to score and is in no batch.

    Args:
        sequences: The sequences to batch.
        batch_tokens: The most tokens (B * T, with padding) of a batch, 1 or more. A longer sequence makes
            a batch of its own.

    Raises:
        ProbeSetError: If `batch_tokens` is less than 1.
    """
    if batch_tokens < 1:
        fail("batch_tokens", "1 or more tokens", batch_tokens)
    scored = [index for index, sequence in enumerate(sequences) if sequence.scored.any()]
    packs: list[list[int]] = []
    for index in sorted(scored, key=lambda index: len(sequences[index].input_ids)):
        width = len(sequences[index].input_ids)
        if packs and (len(packs[-1]) + 1) * width <= batch_tokens:
            packs[-1].append(index)
        else:
            packs.append([index])
    return [_pad(sequences, pack) for pack in packs]


def _sequences(sample: TokenSample) -> tuple[TokenSample | TokenChoice, ...]:
    return (sample, *sample.choices)


def _call(tokenizer: Tokenizer, text: str, where: str) -> IntArray:
    output = tokenizer(text)
    ids = output.get("input_ids") if isinstance(output, Mapping) else output
    return integers(ids, where, "input_ids")


def _common_prefix(first: IntArray, second: IntArray) -> int:
    shorter = min(len(first), len(second))
    differ = np.flatnonzero(first[:shorter] != second[:shorter])
    return int(differ[0]) if differ.size else shorter


def _truncate(sample: TokenSample, max_length: int) -> TokenSample:
    cut = max(len(sequence.input_ids) for sequence in _sequences(sample)) - max_length
    return replace(
        _keep_last(sample, max_length),
        choices=tuple(_keep_last(choice, max_length) for choice in sample.choices),
        n_truncated=sample.n_truncated + cut,
    )


def _keep_last(tokens: _Tokens, max_length: int) -> _Tokens:
    scored = tokens.scored[-max_length:].copy()
    scored[:1] = False
    whole = scored.sum() == tokens.scored.sum()
    return replace(
        tokens,
        input_ids=tokens.input_ids[-max_length:],
        scored=scored,
        n_bytes=tokens.n_bytes if whole else None,
    )


def _check_choices(sample: TokenSample) -> None:
    """A choice that nothing predicts would have likelihood 1, and win."""
    for index, choice in enumerate(sample.choices):
        if not choice.scored.any():
            raise ProbeSetError(
                f"{sample.where}: expected every choice to have a token to score, but choice {index} has none"
                " (without a prompt, the first token is predicted by nothing)"
            )


def _check_vocabulary(sample: TokenSample, vocab_size: int) -> None:
    for sequence in _sequences(sample):
        largest = int(sequence.input_ids.max(initial=0))
        if largest >= vocab_size:
            raise ProbeSetError(
                f"{sample.where}: expected token ids below the model's vocabulary size {vocab_size},"
                f" got {largest}: tokenizer and model do not match"
            )


def _pad(sequences: Sequence[TokenSample | TokenChoice], pack: list[int]) -> Batch:
    shape = (len(pack), len(sequences[pack[-1]].input_ids))
    input_ids = np.zeros(shape, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    scored = np.zeros(shape, dtype=np.bool_)
    for row, index in enumerate(pack):
        length = len(sequences[index].input_ids)
        input_ids[row, :length] = sequences[index].input_ids
        attention_mask[row, :length] = 1
        scored[row, :length] = sequences[index].scored
    rows, positions = np.nonzero(scored)
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        sample=np.array(pack, dtype=np.int64),
        flat_position=rows * shape[1] + positions - 1,
        row=rows,
        order=(scored.cumsum(axis=1, dtype=np.int64) - 1)[scored],
        target=input_ids[scored],
    )
