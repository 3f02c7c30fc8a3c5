"""What an answer comes to: the number, the choice or the text in it, and when two of them are the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from string import ascii_uppercase

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_NUMBER = re.compile(
    # not within a word or another number; a sign only where it takes nothing away from what comes before it
    rf"(?<![\w.,])(?P<sign>(?<![\w)])[-−+])?(?:[$€£](?P<sign2>[-−])?)?"  # noqa: RUF001
    rf"(?:(?P<top>[0-9]{{1,18}})/(?P<bottom>[0-9]{{1,18}})(?![/0-9])"
    rf"|(?P<whole>{_DIGITS})(?:\.(?P<part>[0-9]+))?|\.(?P<only_part>[0-9]+))"
)
_MARK = "####"
_KINDS = ("text", "number", "choice", "none")


def check_extract(kind: str, task: str) -> None:
    """Check what `TaskConfig.extract` says.

    Raises:
        ValueError: it is neither the name of a kind nor a regular expression with a group.
    """
    if kind in _KINDS:
        return
    expected = f"task {task!r}: expected `extract` to be {', '.join(_KINDS)} or a regular expression with a group"
    try:
        groups = re.compile(kind).groups
    except re.error as error:
        raise ValueError(f"{expected}, got {kind!r} ({error})") from error
    if not groups:
        raise ValueError(f"{expected}, got {kind!r}")


def extract(kind: str, text: str, choices: Sequence[str] = ()) -> str | None:
    """Extract from a text what `TaskConfig.extract` says.

    Args:
        kind: of `TaskConfig.extract`.
        text: an answer.
        choices: alternatives; what is extracted with ``"choice"`` is the letter of one of them.

    Returns:
        None where the text has no such thing.
    """
    if kind == "none":
        return None
    if kind == "text":
        return normalized(text) or None
    if kind == "number":
        return extract_number(text)
    if kind == "choice":
        index = extract_choice(text, choices)
        return None if index is None else letter(index)
    found = [match[1] for match in re.finditer(kind, text) if match[1] is not None]
    return normalized(found[-1]) or None if found else None


def extract_number(text: str) -> str | None:
    """The number right after the first ``####`` that has one, or else the last number of the text.

    A number may have a sign, one of the signs $, € and £, commas between thousands and a decimal point; ``1/2`` is a
    half. A dot at the end of a sentence is no part of it, nor is a unit or a percent sign. There are no exponents.

    Returns:
        In plain digits, so that ``18``, ``18.0`` and ``+18.`` give the same; a fraction that has no finite decimals in
        lowest terms; None without a number.
    """
    for part in text.split(_MARK)[1:]:
        after = part.lstrip(" \t*:=")
        if (match := _NUMBER.match(after)) and (number := _plain(match)) is not None:
            return number
    numbers = (_plain(match) for match in _NUMBER.finditer(text))
    return next((number for number in reversed([*numbers]) if number is not None), None)


def extract_choice(text: str, choices: Sequence[str]) -> int | None:
    """Index of the choice that a text names. The first of these that says something decides:

    - the text is one of the choices, but for case, white space and a dot at the end;
    - it begins with a letter: ``C``, ``(C)``, ``C.``, ``C) Paris``, ``**C**``;
    - the first letter after "answer", as in "Answer: C" and "the answer is (C)";
    - letters in parentheses, all of them the same;
    - the only choice whose text is in it as words; one that is a part of another choice that is there does not count.

    Letters are capital, from A. A and I are none where they are words, as in "A cat".

    Returns:
        None where it names none or several.
    """
    named = [_words(choice) for choice in choices]
    if named.count(_words(text)) == 1:
        return named.index(_words(text))
    letters = ascii_uppercase[: len(choices)]
    if not letters:
        return None
    one = rf"(?:(?![AI][ \t]+(?!is\b)\w)[{letters}](?![\w'’-]))"  # noqa: RUF001
    said = re.match(rf"[\s*(\[]*({one})", text) or re.search(
        rf"\b[Aa]nswer(?:\s+is)?[\s:*]*(?:option\s+|choice\s+)?[\s*(\[]*({one})", text
    )
    if said:
        return letters.index(said[1])
    in_parentheses = set(re.findall(rf"\(([{letters}])\)", text))
    if in_parentheses:
        return letters.index(in_parentheses.pop()) if len(in_parentheses) == 1 else None
    words = f" {_words(text)} "
    there = [index for index, name in enumerate(named) if name and _has_words(words, name)]
    largest = [
        index
        for index in there
        if not any(named[index] != named[other] and _has_words(named[other], named[index]) for other in there)
    ]
    return largest[0] if len(largest) == 1 else None


def letter(index: int) -> str:
    """Of a choice, from A; of one after the 26th, its number from 1."""
    return ascii_uppercase[index] if index < len(ascii_uppercase) else str(index + 1)


def is_same(one: str, other: str) -> bool:
    """Whether two answers are the same number, or the same text but for case and white space."""
    if normalized(one).casefold() == normalized(other).casefold():
        return True
    numbers = [_whole_number(one), _whole_number(other)]
    return numbers[0] is not None and numbers[0] == numbers[1]


def normalized(text: str) -> str:
    """Without white space at the ends, and single spaces elsewhere."""
    return " ".join(text.split())


def _plain(match: re.Match[str]) -> str | None:
    """A number in plain digits; None for a fraction of zero parts. No integers are made of long ones: it takes long."""
    is_negative = "-" in (sign := (match["sign"] or "") + (match["sign2"] or "")) or "−" in sign  # noqa: RUF001
    if match["top"]:
        top, bottom = int(match["top"]), int(match["bottom"])
        if not bottom:
            return None
        digits = _decimals(Fraction(top, bottom))
    else:
        whole = (match["whole"] or "").replace(",", "").lstrip("0") or "0"
        part = (match["part"] or match["only_part"] or "").rstrip("0")
        digits = f"{whole}.{part}" if part else whole
    return f"-{digits}" if is_negative and digits != "0" else digits


def _decimals(value: Fraction) -> str:
    """Of a fraction in [0, ∞), in lowest terms where they do not end."""
    places = next((places for places in range(64) if 10**places % value.denominator == 0), None)
    if places is None:
        return str(value)
    digits = str(value.numerator * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{digits[:-places]}.{digits[-places:]}" if places else digits


def _whole_number(text: str) -> str | None:
    match = _NUMBER.fullmatch(text.strip().removesuffix("."))
    return _plain(match) if match else None


def _words(text: str) -> str:
    return normalized(text).casefold().removesuffix(".")


def _has_words(text: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None
