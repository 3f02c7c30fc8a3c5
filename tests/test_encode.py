"""Tokenising a probe set and batching it, against plain loops and hand-made token ids."""

import warnings
from collections.abc import Sequence
from pathlib import Path
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
from mui_callback.probe.batches import make_batches, make_rounds
from mui_callback.probe.device_batch import to_device
from mui_callback.probe.encode import EncodedProbeSet, Tokenizer, encode, tokenize
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.probe.samples import ProbeSample, TokenChoice, TokenSample
from mui_callback.trainers.hf_eval_data import eval_probe_set

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
    assert encoded.n_truncated == 0
    assert [bool(sample.scored.any()) for sample in encoded.samples] == [True, True, False, False, True]


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
def sequences(draw: st.DrawFn, encoder: bool) -> TokenSample | TokenChoice:
    length = draw(st.integers(0, 9))
    ids = draw(st.lists(st.integers(0, 99), min_size=length, max_size=length))
    scored = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    scored[:1] = [False] * len(scored[:1])
    arrays = np.array(ids, dtype=np.int64), np.array(scored, dtype=np.bool_)
    encoder_ids = np.array(draw(st.lists(st.integers(0, 99), min_size=1, max_size=9))) if encoder else None
    if draw(st.booleans()):
        return TokenChoice(*arrays, encoder_ids=encoder_ids)
    return TokenSample("t", *arrays, encoder_ids=encoder_ids)


def assert_padded(padded: Any, mask: Any, rows: list[Any]) -> None:
    for ids, kept, row in zip(padded, mask, rows, strict=True):
        np.testing.assert_array_equal(ids, np.pad(row, (0, len(ids) - len(row))))
        np.testing.assert_array_equal(kept, [1] * len(row) + [0] * (len(ids) - len(row)))
    assert padded.shape == mask.shape == (len(rows), max(map(len, rows)))


def total_length(sequence: TokenSample | TokenChoice) -> int:
    return len(sequence.input_ids) + (0 if sequence.encoder_ids is None else len(sequence.encoder_ids))


@given(st.booleans().flatmap(lambda encoder: st.lists(sequences(encoder), max_size=12)), st.integers(1, 40))
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
        seen += batch.sample.tolist()
        rows = [many[index] for index in batch.sample]
        assert_padded(batch.input_ids, batch.attention_mask, [sequence.input_ids for sequence in rows])
        if batch.encoder_ids is not None:
            assert_padded(batch.encoder_ids, batch.encoder_mask, [sequence.encoder_ids for sequence in rows])
        assert all((sequence.encoder_ids is None) == (batch.encoder_ids is None) for sequence in rows)
        encoder_width = 0 if batch.encoder_ids is None else batch.encoder_ids.shape[1]
        assert n_rows * (width + encoder_width) <= batch_tokens or n_rows == 1
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
        assert {array.dtype for array in vars(batch).values() if array is not None} == {np.dtype(np.int64)}
    assert sorted(found) == sorted(expected)
    assert seen == sorted((i for i, s in enumerate(many) if s.scored.any()), key=lambda i: total_length(many[i]))


@given(
    st.booleans().flatmap(lambda encoder: st.lists(sequences(encoder), max_size=12)),
    st.integers(1, 40),
    st.integers(2, 4),
)
def test_rounds_deal_out_every_sequence_once(
    many: list[TokenSample | TokenChoice], batch_tokens: int, n_shards: int
) -> None:
    """Whatever is scored in one shard's batches is scored nowhere else, and the batches of a round are of one shape."""
    found: list[tuple[int, list[int]]] = []
    for batches in make_rounds(many, batch_tokens, n_shards):
        assert len(batches) == n_shards
        assert len({(batch.n_positions, batch.input_ids.shape) for batch in batches}) == 1
        assert not batches[0].is_stand_in
        n_rows = len(batches[0].sample)
        assert batches[0].n_positions <= batch_tokens or n_rows == 1
        for batch in batches:
            for row, sample in enumerate(batch.sample.tolist()):
                sequence = many[sample]
                n_tokens = len(sequence.input_ids)
                assert batch.input_ids[row, :n_tokens].tolist() == sequence.input_ids.tolist()
                assert batch.attention_mask[row].sum() == n_tokens > 0
                if (batch.row == row).any():
                    found.append((sample, batch.target[batch.row == row].tolist()))
            assert batch.is_stand_in == (len(batch.target) == 0)
    expected = [(i, s.input_ids[s.scored].tolist()) for i, s in enumerate(many) if s.scored.any()]
    assert sorted(found) == expected


def test_batches_are_of_similar_lengths() -> None:
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
    assert (len(encoded.samples), encoded.n_truncated) == (60, 0)
    assert all(sample.scored.any() for sample in encoded.samples)
    assert all(choice.scored.any() for sample in encoded.samples for choice in sample.choices)


# Encoder-decoders

START = 300


def two_sided(encoder: Sequence[int], response: Sequence[int], scored: Sequence[bool], **fields: Any) -> TokenSample:
    return token_sample(response, scored, encoder_ids=np.array(encoder), **fields)


def encoded_ids(tokens: TokenSample | TokenChoice) -> list[int]:
    assert tokens.encoder_ids is not None
    return tokens.encoder_ids.tolist()


@given(
    prompt=st.text(min_size=1, max_size=6), responses=st.lists(st.text(min_size=1, max_size=6), min_size=2, max_size=4)
)
def test_prompt_and_response_are_tokenised_apart(prompt: str, responses: list[str]) -> None:
    sample = ProbeSample("s", responses[0], prompt, tuple(responses), 0)
    tokens = encode(ProbeSet({"t": [sample]}), BYT5, decoder_start=START).samples[0]
    assert (tokens.id, tokens.answer, tokens.n_truncated) == ("s", 0, 0)
    for sequence, response in zip((tokens, *tokens.choices), [responses[0], *responses], strict=True):
        assert encoded_ids(sequence) == [byte + 3 for byte in prompt.encode()] + [1]
        assert sequence.input_ids.tolist() == [START] + [byte + 3 for byte in response.encode()] + [1]
        assert scored_positions(sequence) == list(range(1, len(sequence.input_ids)))
        assert sequence.n_bytes == len(response.encode())


def test_a_response_is_tokenised_as_a_target() -> None:
    words = {word: number for number, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "\u2581", "a", "b"])}
    nllb = transformers.NllbTokenizer(vocab=words, merges=[], src_lang="eng_Latn", tgt_lang="deu_Latn")
    english, german = nllb.convert_tokens_to_ids(["eng_Latn", "deu_Latn"])
    sample = ProbeSample("s", "b", "a", ("b", "a"), 0)
    tokens = encode(ProbeSet({"t": [sample]}), nllb, decoder_start=2).samples[0]
    assert encoded_ids(tokens) == [english, 4, 5, 2]
    for sequence, word in zip((tokens, *tokens.choices), (6, 6, 5), strict=True):
        assert sequence.input_ids.tolist() == [2, german, 4, word, 2]
        assert scored_positions(sequence) == [1, 2, 3, 4]


def test_a_tokenizer_need_not_say_what_it_takes() -> None:
    class Silent:
        __signature__ = "as some compiled functions, it has none that can be read"

        def __call__(self, text: str) -> list[int]:
            return byte_ids(text)

    tokens = tokenize(ProbeSample("s", "cd", "ab"), Silent(), encoder_decoder=True)
    assert (encoded_ids(tokens), tokens.input_ids.tolist()) == ([97, 98], [99, 100])
    assert scored_positions(tokens) == [0, 1]


@pytest.mark.parametrize(("prompt", "tokenizer"), [("", BYT5), (" ", lambda text: byte_ids(text.strip()))])
def test_an_encoder_needs_a_prompt(prompt: str, tokenizer: Tokenizer) -> None:
    probe_set = ProbeSet({"t": [ProbeSample("s", "xy", prompt, ("xy", "yx"), 0, source="f.jsonl:3")]})
    encode(probe_set, tokenizer)
    with pytest.raises(ProbeSetError) as caught:
        encode(probe_set, tokenizer, decoder_start=START)
    assert str(caught.value) == ("f.jsonl:3 (id 's'): expected a prompt: an encoder-decoder needs one for its encoder")


@pytest.mark.parametrize(
    ("sample", "encoder_ids", "input_ids", "scored"),
    [
        # One sequence is parted at its first scored token.
        (token_sample([5, 6, 7, 8], [False, False, True, True]), [5, 6], [START, 7, 8], [1, 2]),
        (token_sample([5, 6, 7, 8], [False, True, False, True]), [5], [START, 6, 7, 8], [1, 3]),
        (token_sample([5, 6], [False, False]), [5, 6], [START], []),
        (token_sample([], []), [], [START], []),
        (two_sided([5, 6], [7, 8], [True, True]), [5, 6], [START, 7, 8], [1, 2]),
        (two_sided([5, 6], [7, 8], [False, True]), [5, 6], [START, 7, 8], [2]),
        (two_sided([5, 6], [], []), [5, 6], [START], []),
    ],
)
def test_token_samples_of_an_encoder_decoder(
    sample: TokenSample, encoder_ids: list[int], input_ids: list[int], scored: list[int]
) -> None:
    encoded = encode(ProbeSet({"t": [sample]}), decoder_start=START)
    tokens = encoded.samples[0]
    assert encoded_ids(tokens) == encoder_ids
    assert tokens.input_ids.tolist() == input_ids
    assert scored_positions(tokens) == scored
    assert len(make_batches([tokens], 9)) == bool(scored)


def test_choices_of_token_samples_start_too() -> None:
    causal = TokenChoice(np.array([1, 2, 3]), np.array([False, False, True]))
    apart = TokenChoice(np.array([3]), np.array([True]), encoder_ids=np.array([1, 2]))
    for choice in (causal, apart):
        sample = two_sided([1, 2], [3], [True], choices=(choice, choice), answer=1)
        for sequence in encode(ProbeSet({"t": [sample]}), decoder_start=START).samples[0].choices:
            assert (encoded_ids(sequence), sequence.input_ids.tolist()) == ([1, 2], [START, 3])
            assert scored_positions(sequence) == [1]


def test_a_causal_model_has_no_encoder() -> None:
    choice = TokenChoice(np.array([3]), np.array([True]), encoder_ids=np.array([1, 2]))
    for sample in (
        two_sided([5], [6], [True], source="f[3]"),
        token_sample([5, 6], [False, True], choices=(choice, choice), answer=0, source="f[3]"),
    ):
        with pytest.raises(ProbeSetError) as caught:
            encode(ProbeSet({"t": [sample]}))
        assert str(caught.value).startswith("f[3] (id 't'): expected prompt and response in one sequence")
        assert "the model is not an encoder-decoder" in str(caught.value)


def test_prompts_lose_their_beginning_and_responses_their_end() -> None:
    sample = ProbeSample("s", "vwxyz", "abcd", ("vwxyz", "v"), 0)
    for max_length, cut, prompt, response in (
        (6, 0, b"abcd", b"vwxyz"),
        (5, 1, b"abcd", b"vwxy"),
        (3, 3, b"bcd", b"vw"),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            encoded = encode(ProbeSet({"t": [sample]}), byte_ids, max_length, decoder_start=START)
        tokens = encoded.samples[0]
        assert (encoded.n_truncated, tokens.n_truncated) == (int(cut > 0), cut)
        lost = None if cut else 5
        for sequence, kept, n_bytes in zip(
            (tokens, *tokens.choices), (response, response, b"v"), (lost, lost, 1), strict=True
        ):
            assert bytes(encoded_ids(sequence)) == prompt
            assert sequence.input_ids.tolist() == [START, *kept]
            assert scored_positions(sequence) == list(range(1, len(kept) + 1))
            assert sequence.n_bytes == n_bytes
        assert [str(warning.message) for warning in caught] == [
            "1 of 1 probe samples are too long and were cut (prompts from the left, responses from the right):\n"
            f"probe sample 's': 6 tokens > {max_length}"
        ] * (cut > 0)


def test_a_long_prompt_alone_leaves_the_response_whole() -> None:
    with pytest.warns(UserWarning, match="9 tokens > 4"):
        encoded = encode(ProbeSet({"t": [ProbeSample("s", "xyz", "p" * 9)]}), byte_ids, 4, decoder_start=START)
    tokens = encoded.samples[0]
    assert (encoded_ids(tokens), tokens.n_bytes, tokens.n_truncated) == ([ord("p")] * 4, 3, 5)
    assert tokens.input_ids.tolist() == [START, *b"xyz"]


@pytest.mark.parametrize(("encoder", "start", "largest"), [(9, 2, 9), (2, 2, 5), (2, 9, 9)])
def test_the_vocabulary_covers_the_encoder_and_the_start(encoder: int, start: int, largest: int) -> None:
    probe_set = ProbeSet({"t": [two_sided([encoder], [5], [True])]})
    encode(probe_set, vocab_size=largest + 1, decoder_start=start)
    with pytest.raises(ProbeSetError, match=f"below the model's vocabulary size {largest}, got {largest}"):
        encode(probe_set, vocab_size=largest, decoder_start=start)


def test_batches_count_the_encoder() -> None:
    lengths = [(2, 9), (5, 1), (3, 3), (9, 2), (2, 4)]
    many = [two_sided(range(s), range(t), [False] + [True] * (t - 1)) for t, s in lengths]
    for batch_tokens, expected in (
        (21, [[1], [2, 4], [0], [3]]),
        (22, [[1, 2], [4, 0], [3]]),
        (36, [[1, 2, 4], [0, 3]]),
        (90, [[1, 2, 4, 0, 3]]),
    ):
        assert [batch.sample.tolist() for batch in make_batches(many, batch_tokens)] == expected


def test_a_decoder_without_its_start_is_not_batched() -> None:
    with pytest.raises(ProbeSetError, match="got one without the decoder's start token"):
        make_batches([two_sided([5], [6], [True])], 9)


def test_what_the_model_is_called_with() -> None:
    causal, apart = token_sample([5, 6, 7], [False, True, True]), two_sided([8, 9], [START, 4, 3], [False, True, True])
    for sample, expected in (
        (causal, {"input_ids": [[5, 6, 7]], "attention_mask": [[1, 1, 1]]}),
        (
            apart,
            {
                "input_ids": [[8, 9]],
                "attention_mask": [[1, 1]],
                "decoder_input_ids": [[START, 4, 3]],
                "decoder_attention_mask": [[1, 1, 1]],
            },
        ),
    ):
        batch = to_device(make_batches([sample], 9)[0], torch.device("cpu"))
        assert {name: tensor.tolist() for name, tensor in batch.model_inputs.items()} == expected
        assert batch.input_ids.tolist() == [sample.input_ids.tolist()]
        assert batch.tokens.length == 3


def tiny_switch() -> Any:
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=384,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_heads=4,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=4,
        expert_capacity=3,  # counted in each sequence from its start, so that padding on the right takes none
        decoder_start_token_id=0,
        initializer_factor=5.0,
    )
    return transformers.SwitchTransformersForConditionalGeneration(config).eval()


def likelihoods(model: Any, encoded: EncodedProbeSet) -> list[float]:
    """The log-likelihood of each sample's response, from one batch of all."""
    (batch,) = make_batches(encoded.samples, 10_000)
    inputs = to_device(batch, torch.device("cpu"))
    assert all((mask[:, -1] == 0).any() for mask in (inputs.attention_mask, inputs.encoder_mask) if mask is not None)
    with torch.no_grad():
        logits = model(**inputs.model_inputs).logits
    tokens = inputs.tokens
    chosen = logits.flatten(0, 1)[tokens.position_R].log_softmax(-1).gather(1, tokens.target_R[:, None])[:, 0]
    by_row = torch.zeros(len(batch.sample)).index_add(0, tokens.row_R, chosen)
    return by_row[inputs.sample_B.argsort()].tolist()


def losses(model: Any, rows: Sequence[dict[str, Any]]) -> list[float]:
    """What transformers makes of each row: the negative log-likelihood of its labels."""
    with torch.no_grad():
        tensors = [{name: torch.as_tensor(values).reshape(1, -1) for name, values in row.items()} for row in rows]
        return [float(model(**row).loss) * int((row["labels"] != -100).sum()) for row in tensors]


TEXTS = [("What is it?", "a cat"), ("And this one, over there?", "a dog, I think"), ("Why?", "it barks at cats")]


def seq2seq_rows() -> list[dict[str, Any]]:
    return [{"input_ids": BYT5(prompt).input_ids, "labels": BYT5(response).input_ids} for prompt, response in TEXTS]


def test_responses_are_as_likely_as_the_model_says_of_its_labels() -> None:
    model, rows = tiny_switch(), seq2seq_rows()
    text = ProbeSet({"t": [ProbeSample(prompt, response, prompt) for prompt, response in TEXTS]})
    expected = losses(model, rows)
    for probe_set, tokenizer in ((text, BYT5), (ProbeSet.from_token_rows(rows), None)):
        encoded = encode(probe_set, tokenizer, vocab_size=384, decoder_start=model.config.decoder_start_token_id)
        torch.testing.assert_close(likelihoods(model, encoded), [-loss for loss in expected], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("with_model", [False, True])
def test_eval_data_of_a_trainer_is_scored_as_it_scores_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_model: bool
) -> None:
    model, rows = tiny_switch(), seq2seq_rows()
    rows[0]["labels"] = rows[0]["labels"] + [1] * (len(rows[0]["input_ids"]) - len(rows[0]["labels"]))
    assert len(rows[0]["labels"]) == len(rows[0]["input_ids"])  # nothing but the model says what this row is
    if with_model:  # then the collator says what the decoder reads, so that labels may be missing anywhere
        rows[1]["labels"][2:5] = [-100] * 3
    trainer = transformers.Seq2SeqTrainer(
        model=model,
        args=transformers.Seq2SeqTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
        eval_dataset=rows,
        data_collator=transformers.DataCollatorForSeq2Seq(
            BYT5, model=model if with_model else None, pad_to_multiple_of=8
        ),
    )
    # The collator is copied, but the model in it is not.
    monkeypatch.setattr(type(model), "__deepcopy__", lambda *_: pytest.fail("the model was copied"), raising=False)
    probe_set = eval_probe_set(trainer, 8)
    assert probe_set is not None
    encoded = encode(probe_set, vocab_size=384, decoder_start=model.config.decoder_start_token_id)
    assert [encoded_ids(sample) for sample in encoded.samples] == [row["input_ids"] for row in rows]
    expected = [-loss for loss in losses(model, rows)]
    torch.testing.assert_close(likelihoods(model, encoded), expected, rtol=1e-5, atol=1e-4)
