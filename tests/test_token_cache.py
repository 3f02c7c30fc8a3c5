"""Tokens that are kept on disk: never other ones than the tokenizer's, and never a reason to fail."""

from __future__ import annotations

import resource
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from made_tokenizer import made_tokenizer
from mui_callback import ProbeSet
from mui_callback.errors import ProbeSetError
from mui_callback.probe.encode import EncodedProbeSet, encode
from mui_callback.probe.samples import ProbeSample, TokenSample

N_SAMPLES = 180


def nllb(target: str = "deu_Latn") -> Any:
    """Which tokenises targets otherwise."""
    words = {
        word: i
        for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "a", "b", "▁", "eng_Latn", "deu_Latn", "fra"])
    }
    return transformers.NllbTokenizer(vocab=words, merges=[], src_lang="eng_Latn", tgt_lang=target)


def probe_set(last: str = "abba", n: int = N_SAMPLES) -> ProbeSet:
    """More than 500 texts."""
    texts = [
        ProbeSample(f"s{i}", response, f"question {i}" * (i % 5) or "?", (response, "no"), 0)
        for i, response in enumerate(["ab" * (1 + i % 7) for i in range(n - 1)] + [last])
    ]
    tokens = TokenSample("t", np.arange(4), np.arange(4) > 1)
    return ProbeSet({"texts": texts, "both": [tokens, ProbeSample("same", "a b", "a b")]})


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where tokens are kept."""
    monkeypatch.setenv("MUI_CALLBACK_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


@contextmanager
def nothing_is_tokenised() -> Iterator[None]:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("tokenised")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "_encode_plus", fail)
        yield


def files(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def content(encoded: EncodedProbeSet) -> Any:
    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return str(value.dtype), value.tolist(), value.flags.writeable
        if isinstance(value, tuple):
            return [plain(part) for part in value]
        return {name: plain(part) for name, part in vars(value).items()} if hasattr(value, "__dict__") else value

    return plain(encoded)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (made_tokenizer, {}),
        (made_tokenizer, {"max_length": 20}),
        (made_tokenizer, {"decoder_start": 3}),
        (nllb, {"decoder_start": 2}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*too long")
def test_kept_tokens_are_the_same(make: Callable[[], Any], options: dict[str, Any], kept: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MUI_CALLBACK_CACHE", "off")
        expected = content(encode(probe_set(), make(), vocab_size=300, **options))
    assert not files(kept)
    assert content(encode(probe_set(), make(), vocab_size=300, **options)) == expected
    (file,) = files(kept)
    with nothing_is_tokenised():
        assert content(encode(probe_set(), make(), vocab_size=300, **options)) == expected
    assert files(kept) == [file]


def test_what_is_made_of_the_tokens_is_not_kept(kept: Path) -> None:
    """Lengths, the vocabulary and where samples were read are those of each call, and so is what is wrong with them."""
    encode(probe_set(), made_tokenizer())
    with nothing_is_tokenised():
        with pytest.warns(UserWarning, match="of 182 probe samples are too long and were cut from the left"):
            assert max(len(sample.input_ids) for sample in encode(probe_set(), made_tokenizer(), 9).samples) == 9
        with pytest.raises(ProbeSetError, match="expected token ids below the model's vocabulary size 9"):
            encode(probe_set(), made_tokenizer(), vocab_size=9)
        samples = [ProbeSample("x" + s.id, s.response, s.prompt, s.choices, s.answer, "f") for s in text_samples()]
        renamed = ProbeSet({"texts": samples, "both": probe_set().tasks["both"]})
        encoded = encode(renamed, made_tokenizer())
        assert (encoded.samples[0].id, encoded.samples[0].source) == ("xs0", "f")
    assert len(files(kept)) == 1


def text_samples() -> list[ProbeSample]:
    return [sample for sample in probe_set().tasks["texts"] if isinstance(sample, ProbeSample)]


def test_a_set_with_an_error_is_not_kept(kept: Path) -> None:
    with pytest.raises(ProbeSetError, match="vocabulary"):
        encode(probe_set(), made_tokenizer(), vocab_size=9)
    assert not files(kept)


def with_token() -> Any:
    tokenizer = made_tokenizer()
    tokenizer.add_tokens(["abb"])
    return tokenizer


def without_bos() -> Any:
    tokenizer = made_tokenizer()
    tokenizer.backend_tokenizer.post_processor = nllb().backend_tokenizer.post_processor
    return tokenizer


def splitting() -> Any:
    tokenizer = made_tokenizer()
    tokenizer.split_special_tokens = True
    return tokenizer


def test_other_content_has_another_file(kept: Path) -> None:
    makers = [made_tokenizer, with_token, without_bos, splitting, nllb, lambda: nllb("fra")]
    for number, make in enumerate(makers, 1):
        encode(probe_set(), make(), decoder_start=2)
        assert len(files(kept)) == number
    for make in makers:  # each is there
        with nothing_is_tokenised():
            encode(probe_set(), make(), decoder_start=2)
    encode(probe_set("baab"), made_tokenizer(), decoder_start=2)
    assert len(files(kept)) == len(makers) + 1


def test_where_a_tokenizer_was_read_does_not_matter(kept: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        made_tokenizer().save_pretrained(tmp_path / name)
        encode(probe_set(), PreTrainedTokenizerFast.from_pretrained(tmp_path / name))
    assert len(files(kept)) == 1


class Own(PreTrainedTokenizerFast):
    """Whose methods may do anything."""


def own() -> Any:
    return Own(tokenizer_object=made_tokenizer().backend_tokenizer)


def with_function() -> Any:
    tokenizer = made_tokenizer()
    tokenizer._encode_plus = lambda text, **_: {"input_ids": list(text.encode())}
    return tokenizer


@pytest.mark.parametrize("make", [ByT5Tokenizer, own, with_function, lambda: lambda text: list(text.encode())])
def test_what_cannot_be_known_is_not_kept(make: Callable[[], Any], kept: Path) -> None:
    encode(probe_set(), make())
    assert not files(kept)


def test_few_texts_are_not_kept(kept: Path) -> None:
    encode(probe_set(n=9), made_tokenizer())
    encode(ProbeSet({"t": [TokenSample("t", np.arange(4), np.arange(4) > 1)]}))
    assert not files(kept)


def save(file: Path, **arrays: Any) -> None:
    with file.open("wb") as stream:
        np.savez(stream, **arrays)


def say(flag: int, file: Path) -> None:
    """What no file has in the headers of its first array: 1 for encrypted, 32 for patched."""
    content = bytearray(file.read_bytes())
    for header, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(header) + place] |= flag
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: say(1, file),
        lambda file: say(32, file),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"nothing of the kind"),
        lambda file: file.write_bytes(file.read_bytes()[:-30]),
        lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        lambda file: file.write_bytes(file.read_bytes().replace(file.read_bytes()[400:420], bytes(20))),
        lambda file: save(file, other=np.arange(3)),
        lambda file: save(file, digest=np.zeros((2, 16), "u1"), length=[2, 3], ids=np.arange(4)),
        lambda file: save(file, digest=np.zeros((2, 16), "u1"), length=[2.0, 2.0], ids=np.arange(4)),
        lambda file: save(file, digest=np.array([None]), length=[2], ids=np.arange(2)),
    ],
)
def test_a_damaged_file_is_named_and_written_anew(damage: Callable[[Path], Any], kept: Path) -> None:
    expected = content(encode(probe_set(), made_tokenizer()))
    (file,) = files(kept)
    damage(file)
    with pytest.warns(UserWarning, match=f"MUI: {file} cannot be read, so the probe set is tokenised anew"):
        assert content(encode(probe_set(), made_tokenizer())) == expected
    with nothing_is_tokenised(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert content(encode(probe_set(), made_tokenizer())) == expected
    assert files(kept) == [file]


def test_a_file_that_cannot_be_written_is_no_hindrance(kept: Path) -> None:
    kept.write_text("no directory")
    assert len(encode(probe_set(), made_tokenizer()).samples) == N_SAMPLES + 2


def test_a_full_disk_is_no_hindrance(kept: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        assert len(encode(probe_set(), made_tokenizer()).samples) == N_SAMPLES + 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not files(kept)


def test_many_processes_at_once(kept: Path) -> None:
    program = (
        "from test_token_cache import *; warnings.simplefilter('error');"
        "print([sample.input_ids.tolist() for sample in encode(probe_set(), made_tokenizer()).samples])"
    )
    started = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    shown = [process.communicate()[0] for process in started]
    assert all(process.returncode == 0 for process in started)
    assert set(shown) == {f"{[s.input_ids.tolist() for s in encode(probe_set(), made_tokenizer()).samples]}\n"}
    assert len(files(kept)) == 1


def test_where_tokens_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUI_CALLBACK_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    encode(probe_set(), made_tokenizer())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    encode(probe_set(), made_tokenizer())
    for base in ("home/.cache", "xdg"):
        assert len(files(tmp_path / base / "mui-callback" / "tokens")) == 1
