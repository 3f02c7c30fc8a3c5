"""One sample of a probe set, as text or as tokens, checked when it is made."""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from mui_callback.errors import ProbeSetError

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ProbeSample:
    """One probe sample as text. The tokens of `response` are the ones that are scored.

    Attributes:
        id: Name of the sample within its task.
        response: Non-empty text to score.
        prompt: Context before the response. If empty, the sample is plain text: every token but the
            first is a response token.
        choices: Empty, or two or more non-empty alternatives for the response.
        answer: Index into `choices` of the right one; None without choices.
        source: Where the sample was read, such as "gsm8k.jsonl:17". Used in messages only.

    Raises:
        ProbeSetError: If a field has the wrong type or value.
    """

    id: str
    response: str
    prompt: str = ""
    choices: tuple[str, ...] = ()
    answer: int | None = None
    source: str = ""

    def __post_init__(self) -> None:
        where = self.where
        _check_text(self.id, "id", where)
        _check_text(self.response, "response", where)
        _check_text(self.prompt, "prompt", where, may_be_empty=True)
        if isinstance(self.choices, str) or not isinstance(self.choices, Sequence):
            fail(where, "`choices` to be a list of 2 or more non-empty strings", self.choices)
        for index, choice in enumerate(self.choices):
            _check_text(choice, f"choices[{index}]", where)
        object.__setattr__(self, "choices", tuple(self.choices))
        object.__setattr__(self, "answer", _check_answer(self.answer, len(self.choices), where))

    @property
    def where(self) -> str:
        """The sample's source and id, for messages."""
        return _where(self.source, self.id)


@dataclass(frozen=True, eq=False)
class TokenChoice:
    """One tokenised alternative of a sample: its prompt followed by one of its choices.

    Attributes:
        input_ids: int64 [T], read-only; as in `TokenSample`.
        scored: bool [T], read-only. True where the token belongs to the choice; as in `TokenSample`.
        n_bytes: UTF-8 bytes of the choice's text, or None where they are not known.
        encoder_ids: int64 [S], read-only, or None; as in `TokenSample`.

    Raises:
        ProbeSetError: If the arrays do not have these types and shapes.
    """

    input_ids: IntArray
    scored: BoolArray
    n_bytes: int | None = None
    encoder_ids: IntArray | None = None

    def __post_init__(self) -> None:
        _check_tokens(self, "choice")


@dataclass(frozen=True, eq=False)
class TokenSample:
    """One probe sample as tokens: prompt and response in one sequence, or, for an encoder-decoder, apart.

    Attributes:
        id: Name of the sample within its task.
        input_ids: int64 [T], read-only. Prompt and response; next to `encoder_ids` the response alone,
            without the token that the decoder starts with: `encode` puts that in front.
        scored: bool [T], read-only. True where the token is a response token. A token is predicted from
            the ones before it, so `scored[0]` is False; next to `encoder_ids` it may be True, for the
            start token will predict it.
        n_bytes: UTF-8 bytes of the response's text, or None where they are not known.
        source: Where the sample was read. Used in messages only.
        choices: Empty, or two or more tokenised alternatives.
        answer: Index into `choices` of the right one; None without choices.
        n_truncated: Number of tokens that the longest sequence of the sample and its choices has lost.
        encoder_ids: int64 [S], read-only. The prompt, for the encoder of an encoder-decoder; None where
            `input_ids` holds it.

    Raises:
        ProbeSetError: If a field has the wrong type, shape or value.
    """

    id: str
    input_ids: IntArray
    scored: BoolArray
    n_bytes: int | None = None
    source: str = ""
    choices: tuple[TokenChoice, ...] = ()
    answer: int | None = None
    n_truncated: int = 0
    encoder_ids: IntArray | None = None

    def __post_init__(self) -> None:
        where = self.where
        _check_text(self.id, "id", where)
        _check_tokens(self, where)
        for choice in self.choices:
            if not isinstance(choice, TokenChoice):
                fail(where, "`choices` to hold TokenChoice objects", choice)
        object.__setattr__(self, "choices", tuple(self.choices))
        object.__setattr__(self, "answer", _check_answer(self.answer, len(self.choices), where))
        if self.n_truncated < 0:
            fail(where, "`n_truncated` to be 0 or more", self.n_truncated)

    @property
    def where(self) -> str:
        """The sample's source and id, for messages."""
        return _where(self.source, self.id)


def is_integer(value: object) -> bool:
    """Whether `value` is an integer number (Python's or NumPy's), which a bool is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def fail(where: str, expected: str, came: object) -> NoReturn:
    """Raise the `ProbeSetError` that says where, what was expected and what came instead."""
    shown = "None" if came is None else f"{type(came).__name__} {reprlib.repr(came)}"
    raise ProbeSetError(f"{where}: expected {expected}, got {shown}")


def first_few(items: Sequence[str]) -> list[str]:
    """What a message names of many: the first three, and dots for the others."""
    return [*items[:3], *["..."] * (len(items) > 3)]


def integers(values: Any, where: str, name: str, kinds: str = "iu") -> IntArray:
    """Copy integers from a list, an array or a tensor of any device.

    Args:
        values: Integers of shape [T] or [1, T].
        where: Names the sample in messages.
        name: Names the values in messages.
        kinds: The NumPy kinds of number to accept ("b" is bool).

    Returns:
        int64 [T], read-only.

    Raises:
        ProbeSetError: If the values are not integers of such a shape.
    """
    expected = f"`{name}` to be integers of shape [T] or [1, T]"
    try:
        array = np.asarray(values.detach().cpu().numpy() if hasattr(values, "detach") else values)
    except (TypeError, ValueError):  # a type that NumPy lacks, a ragged list
        fail(where, expected, values)
    if array.ndim == 2 and array.shape[0] == 1:
        array = array[0]
    # NumPy reads an empty list as floats.
    if array.ndim != 1 or (array.size and array.dtype.kind not in kinds):
        fail(where, expected, values)
    array = array.astype(np.int64)
    array.setflags(write=False)
    return array


def _where(source: str, sample_id: object) -> str:
    return f"{source} (id {sample_id!r})" if source else f"probe sample {sample_id!r}"


def _check_text(value: object, name: str, where: str, *, may_be_empty: bool = False) -> None:
    if not isinstance(value, str) or not (value or may_be_empty):
        fail(where, f"`{name}` to be a {'' if may_be_empty else 'non-empty '}string", value)
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which no text contains
        fail(where, f"`{name}` to be text that UTF-8 can encode", value)


def _check_answer(answer: int | None, n_choices: int, where: str) -> int | None:
    if n_choices == 0:
        if answer is not None:
            fail(where, "`choices` next to `answer`", None)
        return None
    if n_choices == 1:
        raise ProbeSetError(f"{where}: expected `choices` to hold 2 or more alternatives, got 1")
    if answer is None:
        fail(where, "`answer` next to `choices`", None)
    if not is_integer(answer) or not 0 <= answer < n_choices:
        fail(where, f"`answer` to be an index into the {n_choices} choices", answer)
    return int(answer)


def _token_ids(values: Any, where: str, name: str) -> IntArray:
    ids = integers(values, where, name)
    if (ids < 0).any():
        fail(where, "token ids to be 0 or more", int(ids.min()))
    return ids


def _check_tokens(tokens: TokenSample | TokenChoice, where: str) -> None:
    input_ids = _token_ids(tokens.input_ids, where, "input_ids")
    scored = np.array(tokens.scored)
    if scored.shape != input_ids.shape or (scored.size and scored.dtype != np.bool_):
        fail(where, f"`scored` to be bool of shape {input_ids.shape}", tokens.scored)
    if tokens.encoder_ids is not None:
        encoder_ids = _token_ids(tokens.encoder_ids, where, "encoder_ids")
        if scored.any() and not encoder_ids.size:
            raise ProbeSetError(f"{where}: expected `encoder_ids` to hold 1 or more tokens, got none")
        object.__setattr__(tokens, "encoder_ids", encoder_ids)
    elif scored.size and scored[0]:
        raise ProbeSetError(f"{where}: expected scored[0] to be False: nothing predicts the first token")
    scored = scored.astype(np.bool_)
    scored.setflags(write=False)
    object.__setattr__(tokens, "input_ids", input_ids)
    object.__setattr__(tokens, "scored", scored)
    if tokens.n_bytes is not None and not (is_integer(tokens.n_bytes) and tokens.n_bytes >= 0):
        fail(where, "`n_bytes` to be None or 0 or more", tokens.n_bytes)
