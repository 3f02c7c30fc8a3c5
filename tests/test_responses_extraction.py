"""What is read out of an answer, against examples of all forms and by properties."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mui_callback.responses.extraction import (
    check_extract,
    extract,
    extract_choice,
    extract_number,
    is_same,
    letter,
    normalized,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", "18"),
        ("18.", "18"),
        ("18.0", "18"),
        ("+18", "18"),
        ("0018", "18"),
        ("-3", "-3"),
        ("−3", "-3"),  # noqa: RUF001
        ("-0.0", "0"),
        ("$1,234.50", "1234.5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        (".5", "0.5"),
        ("0.50", "0.5"),
        ("1/2", "0.5"),
        ("-3/4", "-0.75"),
        ("2/6", "1/3"),
        ("1/0", None),
        ("7 or 1/0", "7"),
        ("50%", "50"),
        ("18km", "18"),
        ("x2", None),
        ("no number", None),
        ("", None),
        ("#### 18", "18"),
        ("16 - 3 - 4 = 9\n#### 18\n\nQuestion: 5 apples", "18"),
        ("####18 and 7", "18"),
        ("#### $1,000.00", "1000"),
        ("#### **-7**", "-7"),
        ("#### none\n#### 6", "6"),
        ("####\n12 and 13", "13"),
        ("10 - 3 = 7", "7"),
        ("5-3", "3"),
        ("(5)-3", "3"),
        ("x = -3", "-3"),
        ("1, 2, 3", "3"),
        ("1,2,3", "1"),
        ("1,234,567", "1234567"),
        ("12,34", "12"),
        ("The answer is 18. It is.", "18"),
        ("\\boxed{42}", "42"),
        ("9" * 6000, "9" * 6000),
        ("٣", None),
    ],
)
def test_number(text: str, number: str | None) -> None:
    assert extract_number(text) == number


@given(st.fractions(-(10**9), 10**9, max_denominator=10**6))
def test_a_fraction_is_read_to_its_value(value: Fraction) -> None:
    read = extract_number(f"so it is {value.numerator}/{value.denominator}")
    assert read is not None
    assert Fraction(read) == value


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_a_decimal_is_read_to_its_value(value: object) -> None:
    for written in (f"{value:f}", f"{value:,f}", f"#### {value:,f}"):
        read = extract_number(written)
        assert read is not None
        assert Fraction(read) == Fraction(str(value))
        assert is_same(read, written.removeprefix("#### "))


@given(st.text())
def test_what_was_read_is_read_again(text: str) -> None:
    number = extract_number(text)
    assert number is None or extract_number(number) == number


CITIES = (" Rome", " Paris", " New York", " York")


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("B", 1),
        (" B", 1),
        ("(B)", 1),
        ("B.", 1),
        ("B) Paris", 1),
        ("**B**", 1),
        ("[B]", 1),
        ("B\n\nQuestion: and this?\nAnswer: C", 1),
        ("A", 0),
        ("A is right", 0),
        ("A city in France", None),
        ("A: Rome", 0),
        ("Answer: C", 2),
        ("answer: (C)", 2),
        ("The answer is (D).", 3),
        ("The answer is **D**", 3),
        ("The correct answer is option D", 3),
        ("The answer is a city", None),
        ("I think that it is (C), as (C) is larger", 2),
        ("Either (C) or (D)", None),
        ("Paris", 1),
        (" paris. ", 1),
        ("york", 3),
        ("It is Paris", 1),
        ("It is New York", 2),
        ("Paris or Rome", None),
        ("Parish", None),
        ("E", None),
        ("Because", None),
        ("B-cells", None),
        ("b", None),
        ("", None),
    ],
)
def test_choice(text: str, index: int | None) -> None:
    assert extract_choice(text, CITIES) == index


def test_no_choice_without_choices() -> None:
    assert extract_choice("A", ()) is None


def test_choices_with_the_same_text_have_letters_only() -> None:
    assert extract_choice("yes", ("yes", "Yes", "no")) is None
    assert extract_choice("B", ("yes", "Yes", "no")) == 1


@given(st.integers(2, 26), st.data())
def test_letters_of_all_choices(n_choices: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, n_choices - 1))
    choices = [f"text of {number}" for number in range(n_choices)]
    for form in ("{}", "({})", " {}.", "Answer: {}", "The answer is ({})."):
        assert extract_choice(form.format(letter(index)), choices) == index
    assert extract_choice(f"It is text of {index}", choices) == index


@pytest.mark.parametrize(
    ("kind", "text", "found"),
    [
        ("none", "18", None),
        ("text", " New \n York ", "New York"),
        ("text", " \n", None),
        ("number", "is 18.", "18"),
        ("choice", "(B)", "B"),
        (r"is (\w+)", "it is one, and it is  two", "one"),
        (r"is\s+(\w+)", "it is one, and it is  two", "two"),
        (r"is(?: (\w+))?!", "is one! is!", "one"),
        (r"is (\w+)", "nothing", None),
    ],
)
def test_extract(kind: str, text: str, found: str | None) -> None:
    assert extract(kind, text, CITIES) == found


@pytest.mark.parametrize("kind", ["numbers", r"\w+", "(", "(?:a)"])
def test_what_extracts_nothing_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="task 'sums': expected `extract` to be text, number, choice, none or a reg"):
        check_extract(kind, "sums")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Paris", " paris\n", True),
        ("New  York", "new york", True),
        ("18", "18.0", True),
        ("1,000", "$1000.", True),
        ("0.5", "1/2", True),
        ("18", "81", False),
        ("18 apples", "18", False),
        ("Paris", "Rome", False),
    ],
)
def test_is_same(one: str, other: str, same: bool) -> None:
    assert is_same(one, other) is same
    assert is_same(other, one) is same


@given(st.text())
def test_an_answer_is_the_same_as_itself(text: str) -> None:
    assert is_same(text, text)
    assert is_same(text, normalized(text))
