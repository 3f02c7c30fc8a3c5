"""Tokenising a probe set and batching it, against plain loops and hand-made token ids."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.loss.loss_utils import ForCausalLMLoss

from mui_callback.errors import ProbeSetError
from mui_callback.probe.encode import Tokenizer, encode, make_batches, tokenize
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.probe.samples import ProbeSample, TokenChoice, TokenSample

BOS, EOS = 256, 257
BYT5 = transformers.ByT5Tokenizer()


def byte_ids(text: str) -> list[int]:
    return list(text.encode())


def token_sample(ids: Sequence[int], scored: Sequence[bool], **fields: Any) -> TokenSample:
    return TokenSample("t", np.array(ids), np.array(scored), **fields)


def boundary_bpe() -> tokenizers.Tokenizer:
    """A byte-pair encoding of "a", "b" and "ab"."""
    model = tokenizers.models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")])
    return tokenizers.Tokenizer(model)


def scored_positions(tokens: TokenSample | TokenChoice) -> list[int]:
    return np.flatnonzero(tokens.scored).tolist()


# Which tokens are response tokens


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "response", "input_ids", "scored"),
    [
        (byte_ids, "ab", "cd", [97, 98, 99, 100], [2, 3]),
        (byte_ids, "", "abc", [97, 98, 99], [1, 2]),
        (byte_ids, "ab", "é", [97, 98, 0xC3, 0xA9], [2, 3]),
        (lambda text: [BOS, *byte_ids(text)], "a", "bc", [BOS, 97, 98, 99], [2, 3]),
        (lambda text: [BOS, *byte_ids(text)], "", "bc", [BOS, 98, 99], [1, 2]),
        (lambda text: [*byte_ids(text), EOS], "ab", "c", [97, 98, 99, EOS], [2, 3]),
        (lambda text: {"input_ids": byte_ids(text)}, "a", "b", [97, 98], [1]),
        (lambda text: {"input_ids": torch.tensor([byte_ids(text)])}, "a", "b", [97, 98], [1]),
        (lambda text: np.array(byte_ids(text)), "a", "b", [97, 98], [1]),
        # A token across the boundary counts as response; at the start there is nothing to predict it from.
        (lambda text: boundary_bpe().encode(text).ids, "aa", "bb", [0, 2, 1], [1, 2]),
        (lambda text: boundary_bpe().encode(text).ids, "a", "bb", [2, 1], [1]),
        (lambda text: boundary_bpe().encode(text).ids, "b", "ab", [1, 2], [1]),
        # A tokenizer may take the response away altogether.
        (lambda text: byte_ids(text.strip()), "ab", "  ", [97, 98], []),
        (lambda text: [], "ab", "c", [], []),
    ],
)
def test_response_tokens(
    tokenizer: Tokenizer, prompt: str, response: str, input_ids: list[int], scored: list[int]
) -> None:
    tokens = tokenize(ProbeSample("s", response, prompt, source="f.jsonl:1"), tokenizer)
    assert tokens.input_ids.tolist() == input_ids
    assert scored_positions(tokens) == scored
    assert (tokens.id, tokens.source, tokens.n_bytes) == ("s", "f.jsonl:1", len(response.encode()))


@given(prompt=st.text(max_size=6), response=st.text(min_size=1, max_size=6))
def test_transformers_tokenizer(prompt: str, response: str) -> None:
    tokens = tokenize(ProbeSample("s", response, prompt), BYT5)
    before, after = prompt.encode(), response.encode()
    assert tokens.input_ids.tolist() == [byte + 3 for byte in before + after] + [1]
    assert scored_positions(tokens) == list(range(max(len(before), 1), len(before + after) + 1))


def test_choices_are_tokenised_like_responses() -> None:
    sample = ProbeSample("s", "bb", "a", choices=("bb", "é"), answer=0)
    tokens = tokenize(sample, byte_ids)
    assert tokens.answer == 0
    assert [choice.input_ids.tolist() for choice in tokens.choices] == [[97, 98, 98], [97, 0xC3, 0xA9]]
    assert [scored_positions(choice) for choice in tokens.choices] == [[1, 2], [1, 2]]
    assert [choice.n_bytes for choice in tokens.choices] == [2, 2]


def test_tokenizer_problems_are_named() -> None:
    probe_set = ProbeSet({"t": [ProbeSample("s", "x", source="f.jsonl:3")]})
    bad: dict[str, Any] = {
        "f.jsonl:3 (id 's'): expected a tokenizer for this text sample: pass tokenizer=": None,
        "f.jsonl:3 (id 's'): tokenizer: expected `input_ids` to be integers": lambda text: {"ids": [1]},
        "got list [1.5]": lambda text: [1.5],
        "got str 'x'": lambda text: text,
        "got Encoding": boundary_bpe().encode,
    }
    for expected, tokenizer in bad.items():
        with pytest.raises(ProbeSetError) as caught:
            encode(probe_set, tokenizer)
        assert expected in str(caught.value)


def test_ids_outside_the_vocabulary_are_named() -> None:
    text = ProbeSample("s", "a", "a", ("a", "z"), 0, "f.jsonl:3")
    token = token_sample([5, 9, 7], [False, True, True])
    for sample, largest in ((text, ord("z")), (token, 9)):
        probe_set = ProbeSet({"t": [sample]})
        encode(probe_set, byte_ids, vocab_size=largest + 1)
        with pytest.raises(ProbeSetError) as caught:
            encode(probe_set, byte_ids, vocab_size=largest)
        assert str(caught.value) == (
            f"{sample.where}: expected token ids below the model's vocabulary size {largest}, got {largest}:"
            " tokenizer and model do not match"
        )


# The encoded probe set


def test_encoded_probe_set_is_flat_in_task_order() -> None:
    untouched = token_sample([1, 2], [False, True], n_truncated=4)
    nothing = token_sample([1, 2], [False, False])
    probe_set = ProbeSet({"b": [ProbeSample("x", "ab"), untouched], "a": [nothing, ProbeSample("y", "c"), untouched]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoded = encode(probe_set, byte_ids, 2, vocab_size=256)
    assert encoded.task_names == ("b", "a")
    assert encoded.task_of_sample.tolist() == [0, 0, 1, 1, 1]
    assert encoded.task_of_sample.dtype == np.int64
    assert [sample.id for sample in encoded.samples] == ["x", "t", "t", "y", "t"]
    assert encoded.samples[1] is untouched
    assert (encoded.n_truncated, encoded.n_unscored) == (0, 2)


def test_token_samples_need_no_tokenizer() -> None:
    assert len(encode(ProbeSet({"t": [token_sample([1, 2], [False, True])]})).samples) == 1


# Truncation


def test_too_long_samples_are_cut_from_the_left_and_listed_once() -> None:
    samples = [ProbeSample(f"s{i}", "xy", "p" * (i + 3), source=f"f.jsonl:{i}") for i in range(6)]
    probe_set = ProbeSet({"t": samples})
    with pytest.warns(UserWarning, match="too long") as caught:
        encoded = encode(probe_set, byte_ids, 6)
    assert encoded.n_truncated == 4
    assert [sample.n_truncated for sample in encoded.samples] == [0, 0, 1, 2, 3, 4]
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert str(caught[0].message).splitlines() == [
        "4 of 6 probe samples are too long and were cut from the left:",
        "f.jsonl:2 (id 's2'): 7 tokens > 6",
        "f.jsonl:3 (id 's3'): 8 tokens > 6",
        "f.jsonl:4 (id 's4'): 9 tokens > 6",
        "...",
    ]


@pytest.mark.parametrize("max_length", [2, 3, 4, 5, 6])
def test_truncation_keeps_the_end(max_length: int) -> None:
    sample = ProbeSample("s", "XYZ", "abc")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoded = encode(ProbeSet({"t": [sample]}), byte_ids, max_length)
    tokens = encoded.samples[0]
    assert bytes(tokens.input_ids.tolist()) == b"abcXYZ"[-max_length:]
    # The first token that is kept is not predicted, even where it belongs to the response.
    assert scored_positions(tokens) == list(range(max(max_length - 3, 1), max_length))
    assert tokens.n_bytes == (3 if max_length > 3 else None)
    assert (tokens.n_truncated, encoded.n_truncated) == (6 - max_length, int(max_length < 6))


def test_choices_are_truncated_on_their_own() -> None:
    sample = ProbeSample("s", "x", "abc", ("x", "vwxyz"), 0)
    with pytest.warns(UserWarning, match=r"probe sample 's': 8 tokens > 5"):
        encoded = encode(ProbeSet({"t": [sample]}), byte_ids, 5)
    tokens = encoded.samples[0]
    assert (encoded.n_truncated, tokens.n_truncated, tokens.n_bytes) == (1, 3, 1)
    assert [bytes(choice.input_ids.tolist()) for choice in tokens.choices] == [b"abcx", b"vwxyz"]
    assert [scored_positions(choice) for choice in tokens.choices] == [[3], [1, 2, 3, 4]]
    assert [choice.n_bytes for choice in tokens.choices] == [1, None]


def test_token_samples_are_truncated_too() -> None:
    sample = token_sample([1, 2, 3, 4], [False, True, False, True], n_truncated=2, n_bytes=5)
    with pytest.warns(UserWarning, match=r"4 tokens > 3$"):
        encoded = encode(ProbeSet({"t": [sample]}), max_length=3)
    assert encoded.samples[0].input_ids.tolist() == [2, 3, 4]
    assert encoded.samples[0].scored.tolist() == [False, False, True]
    assert (encoded.samples[0].n_truncated, encoded.samples[0].n_bytes) == (3, None)


def test_max_length_leaves_something_to_predict() -> None:
    with pytest.raises(ProbeSetError, match="max_length: expected None or 2 or more tokens, got int 1"):
        encode(ProbeSet.from_texts(["x"]), byte_ids, 1)


# Batches


@st.composite
def sequences(draw: st.DrawFn) -> TokenSample | TokenChoice:
    length = draw(st.integers(0, 9))
    ids = draw(st.lists(st.integers(0, 99), min_size=length, max_size=length))
    scored = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    scored[:1] = [False] * len(scored[:1])
    arrays = np.array(ids, dtype=np.int64), np.array(scored, dtype=np.bool_)
    return TokenChoice(*arrays) if draw(st.booleans()) else TokenSample("t", *arrays)


@given(st.lists(sequences(), max_size=12), st.integers(1, 40))
def test_batches_hold_every_scored_token_once(many: list[TokenSample | TokenChoice], batch_tokens: int) -> None:
    expected = []
    for index, sequence in enumerate(many):
        order = 0
        for t, (token, scored) in enumerate(zip(sequence.input_ids, sequence.scored, strict=True)):
            if scored:
                expected.append((index, t, order, int(token)))
                order += 1

    found, seen = [], []
    for batch in make_batches(many, batch_tokens):
        n_rows, width = batch.input_ids.shape
        assert n_rows * width <= batch_tokens or n_rows == 1
        for row, index in enumerate(batch.sample.tolist()):
            seen.append(index)
            ids = many[index].input_ids
            np.testing.assert_array_equal(batch.input_ids[row], np.pad(ids, (0, width - len(ids))))
            np.testing.assert_array_equal(batch.attention_mask[row], [1] * len(ids) + [0] * (width - len(ids)))
        assert width == batch.attention_mask.sum(axis=1).max()
        position = batch.flat_position - batch.row * width + 1
        found += list(
            zip(
                *(array.tolist() for array in (batch.sample[batch.row], position, batch.order, batch.target)),
                strict=True,
            )
        )
        keys = list(zip(batch.row.tolist(), position.tolist(), strict=True))
        assert keys == sorted(keys)
        assert ((position >= 1) & (position < width)).all()
        assert batch.n_scored_max == max(int(many[index].scored.sum()) for index in batch.sample) >= 1
        assert {array.dtype for array in vars(batch).values()} == {np.dtype(np.int64)}
    assert sorted(found) == sorted(expected)
    assert seen == sorted((i for i, s in enumerate(many) if s.scored.any()), key=lambda i: len(many[i].input_ids))


def test_batches_are_packed_greedily_by_length() -> None:
    lengths = [5, 2, 3, 2, 30, 3]
    many = [token_sample(range(n), [False] + [True] * (n - 1)) for n in lengths]
    batches = make_batches(many, 12)
    assert [batch.sample.tolist() for batch in batches] == [[1, 3, 2, 5], [0], [4]]
    assert [batch.input_ids.shape for batch in batches] == [(4, 3), (1, 5), (1, 30)]
    assert make_batches([], 12) == []
    with pytest.raises(ProbeSetError, match="batch_tokens: expected 1 or more tokens, got int 0"):
        make_batches(many, 0)


def test_positions_gather_what_a_loss_over_all_tokens_scores() -> None:
    """Cross entropy with labels and an ignored index, as transformers computes it, is the oracle."""
    generator = torch.Generator().manual_seed(0)
    encoded = encode(ProbeSet.builtin(), BYT5)
    batch = make_batches(encoded.samples, 4096)[-1]
    logits = torch.randn(*batch.input_ids.shape, 400, generator=generator)
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1)[torch.from_numpy(batch.flat_position)], torch.from_numpy(batch.target), reduction="none"
    )
    for row, index in enumerate(batch.sample.tolist()):
        sample = encoded.samples[index]
        labels = torch.from_numpy(np.where(sample.scored, sample.input_ids, -100))[None]
        oracle = ForCausalLMLoss(logits[row : row + 1, : labels.shape[1]], labels, 400)
        torch.testing.assert_close(losses[torch.from_numpy(batch.row == row)].mean(), oracle)


def test_builtin_probe_set_has_response_tokens_throughout() -> None:
    encoded = encode(ProbeSet.builtin(), BYT5, 2048, vocab_size=384)
    assert (len(encoded.samples), encoded.n_truncated, encoded.n_unscored) == (60, 0, 0)
    assert all(choice.scored.any() for sample in encoded.samples for choice in sample.choices)
