"""From a probe set to token samples."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar, cast

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
    first_few,
    integers,
)
from mui_callback.probe.token_cache import remembered

Tokenizer = Callable[[str], Sequence[int] | Mapping[str, Any]]
"""A function from a text to token ids; or to a mapping of "input_ids", as transformers' tokenizers are."""

_Tokens = TypeVar("_Tokens", TokenSample, TokenChoice)


@dataclass(frozen=True, eq=False)
class EncodedProbeSet:
    """A probe set as tokens, N samples in all.

    Attributes:
        task_names: The names of the tasks, in order.
        samples: The N samples, task by task. Those for an encoder-decoder begin with the start token.
        task_of_sample: int64 [N], index into `task_names`.
        n_truncated: Number of samples that were longer than the maximum, in themselves or in a choice.
    """

    task_names: tuple[str, ...]
    samples: tuple[TokenSample, ...]
    task_of_sample: IntArray
    n_truncated: int

    @property
    def choices(self) -> list[TokenChoice]:
        """The choices of all samples, in order."""
        return [choice for sample in self.samples for choice in sample.choices]


def encode(
    probe_set: ProbeSet,
    tokenizer: Tokenizer | None = None,
    max_length: int | None = None,
    *,
    vocab_size: int | None = None,
    decoder_start: int | None = None,
) -> EncodedProbeSet:
    """Tokenise a probe set; with a fast tokenizer of transformers once on this machine, see `token_cache`.

    A sample's tokens are those of prompt + response. Its response tokens are the ones after the longest
    common prefix with the tokens of the prompt alone, so a token that spans the boundary is a response
    token. Without a prompt every token but the first is one. An end-of-sequence token that the tokenizer
    appends is scored, as it is trained on. Choices are tokenised in the same way.

    `n_bytes` counts the whole response, and so also a first token that nothing predicts. A sequence longer
    than `max_length` loses tokens from the left, and its `n_bytes` where that reaches into the response; one
    warning lists such samples.

    For an encoder-decoder prompt and response are tokenised apart, each with the end-of-sequence token that
    the tokenizer appends; the response as a target, if the tokenizer knows targets. A token sample that is
    one sequence is parted at its first scored token. The prompt is the encoder's, and the decoder gets
    `decoder_start` and the response, all of whose tokens are predicted. A prompt that is too long loses
    tokens from the left too, but the decoder's sequence from the right: nothing of it is context only, and
    without its beginning the rest would be predicted from something else than in training.

    Args:
        probe_set: The samples.
        tokenizer: Needed unless all samples are token samples.
        max_length: The longest sequence to keep, in tokens, 2 or more; None for no limit.
        vocab_size: If given, token ids must be less than this.
        decoder_start: The token that the decoder of an encoder-decoder starts with; None for a causal model.

    Raises:
        ProbeSetError: If a text sample comes without a tokenizer, the tokenizer returns no token ids, an
            id is not in the vocabulary, an encoder has no prompt, or a prompt has no encoder.
    """
    if max_length is not None and max_length < 2:
        fail("max_length", "None or 2 or more tokens", max_length)
    samples: list[TokenSample] = []
    too_long: list[str] = []
    with remembered(tokenizer, probe_set) as asked:
        for sample in chain.from_iterable(probe_set.tasks.values()):
            tokens = sample
            if isinstance(tokens, ProbeSample):
                tokens = tokenize(tokens, asked, encoder_decoder=decoder_start is not None)
            if decoder_start is not None:
                tokens = _start_decoder(tokens, decoder_start)
            elif any(sequence.encoder_ids is not None for sequence in _sequences(tokens)):
                raise ProbeSetError(
                    f"{tokens.where}: expected prompt and response in one sequence, and `labels` as long as"
                    " `input_ids`, as the model is not an encoder-decoder; got them apart, or labels of another length"
                )
            if vocab_size is not None:
                _check_vocabulary(tokens, vocab_size)
            longest = max(map(len, _parts(tokens)))
            if max_length is not None and longest > max_length:
                too_long.append(f"{tokens.where}: {longest} tokens > {max_length}")
                tokens = _truncate(tokens, max_length)
            _check_choices(tokens)
            samples.append(tokens)
    if too_long:
        shown = "\n".join(first_few(too_long))
        counts = f"{len(too_long)} of {len(samples)} probe samples"
        side = "from the left" if decoder_start is None else "(prompts from the left, responses from the right)"
        warnings.warn(f"{counts} are too long and were cut {side}:\n{shown}", stacklevel=2)
    sizes = [len(task) for task in probe_set.tasks.values()]
    return EncodedProbeSet(
        task_names=probe_set.task_names,
        samples=tuple(samples),
        task_of_sample=np.repeat(np.arange(len(sizes), dtype=np.int64), sizes),
        n_truncated=len(too_long),
    )


def tokenize(sample: ProbeSample, tokenizer: Tokenizer | None, *, encoder_decoder: bool = False) -> TokenSample:
    """Tokenise one text sample and its choices, as `encode` describes, but without a start token.

    Raises:
        ProbeSetError: If there is no tokenizer, it does not return token ids, or an encoder has no prompt.
    """
    if tokenizer is None:
        raise ProbeSetError(f"{sample.where}: expected a tokenizer for this text sample: pass tokenizer=")
    where = f"{sample.where}: tokenizer"
    prompt_ids = call_tokenizer(tokenizer, sample.prompt, where) if sample.prompt else np.empty(0, dtype=np.int64)
    if encoder_decoder and not prompt_ids.size:
        raise ProbeSetError(f"{sample.where}: expected a prompt: an encoder-decoder needs one for its encoder")

    def continued(text: str) -> tuple[IntArray, BoolArray, int]:
        input_ids = call_tokenizer(tokenizer, sample.prompt + text, where)
        scored = np.arange(len(input_ids)) >= _common_prefix(input_ids, prompt_ids)
        scored[:1] = False
        return input_ids, scored, len(text.encode())

    def apart(text: str) -> tuple[IntArray, BoolArray, int]:
        input_ids = call_tokenizer(_for_targets(tokenizer), text, where)
        return input_ids, np.ones(len(input_ids), dtype=np.bool_), len(text.encode())

    read, encoder_ids = (apart, prompt_ids) if encoder_decoder else (continued, None)
    return TokenSample(
        sample.id,
        *read(sample.response),
        source=sample.source,
        choices=tuple(TokenChoice(*read(choice), encoder_ids) for choice in sample.choices),
        answer=sample.answer,
        encoder_ids=encoder_ids,
    )


def _sequences(sample: TokenSample) -> tuple[TokenSample | TokenChoice, ...]:
    return (sample, *sample.choices)


def _parts(sample: TokenSample) -> list[IntArray]:
    """All token ids of a sample, as the model gets them: of each sequence, and of its encoder."""
    parts = [ids for sequence in _sequences(sample) for ids in (sequence.input_ids, sequence.encoder_ids)]
    return [ids for ids in parts if ids is not None]


def _for_targets(tokenizer: Any) -> Tokenizer:
    """The tokenizer for what a decoder writes, which can differ: NLLB's names another language in it."""
    try:
        parameters = inspect.signature(tokenizer).parameters
    except (TypeError, ValueError):  # not everything that can be called says how
        return cast("Tokenizer", tokenizer)
    return (lambda text: tokenizer(text_target=text)) if "text_target" in parameters else tokenizer


def call_tokenizer(tokenizer: Tokenizer, text: str, where: str) -> IntArray:
    """Token ids of a text, int64 [T].

    Raises:
        ProbeSetError: If the tokenizer returns something else; names what `where` says.
    """
    output = tokenizer(text)
    ids = output.get("input_ids") if isinstance(output, Mapping) else output
    return integers(ids, where, "input_ids")


def _common_prefix(first: IntArray, second: IntArray) -> int:
    shorter = min(len(first), len(second))
    differ = np.flatnonzero(first[:shorter] != second[:shorter])
    return int(differ[0]) if differ.size else shorter


def _start_decoder(sample: TokenSample, start: int) -> TokenSample:
    return replace(_started(sample, start), choices=tuple(_started(choice, start) for choice in sample.choices))


def _started(tokens: _Tokens, start: int) -> _Tokens:
    encoder_ids, response, scored = tokens.encoder_ids, tokens.input_ids, tokens.scored
    if encoder_ids is None:
        first = int(np.flatnonzero(scored).min(initial=len(scored)))
        encoder_ids, response, scored = response[:first], response[first:], scored[first:]
    return replace(
        tokens,
        input_ids=np.append(start, response),
        scored=np.append(False, scored),
        encoder_ids=encoder_ids,
    )


def _truncate(sample: TokenSample, max_length: int) -> TokenSample:
    return replace(
        _shorten(sample, max_length),
        choices=tuple(_shorten(choice, max_length) for choice in sample.choices),
        n_truncated=sample.n_truncated + max(map(len, _parts(sample))) - max_length,
    )


def _shorten(tokens: _Tokens, max_length: int) -> _Tokens:
    encoder_ids = tokens.encoder_ids
    kept = slice(-max_length, None) if encoder_ids is None else slice(max_length)
    scored = tokens.scored[kept].copy()
    scored[:1] = False
    whole = scored.sum() == tokens.scored.sum()
    return replace(
        tokens,
        input_ids=tokens.input_ids[kept],
        scored=scored,
        n_bytes=tokens.n_bytes if whole else None,
        encoder_ids=None if encoder_ids is None else encoder_ids[-max_length:],
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
    largest = max(int(ids.max(initial=0)) for ids in _parts(sample))
    if largest >= vocab_size:
        raise ProbeSetError(
            f"{sample.where}: expected token ids below the model's vocabulary size {vocab_size},"
            f" got {largest}: tokenizer and model do not match"
        )
