"""Generated answers against a loop that runs the whole sequence for each token, one prompt at a time."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    SwitchTransformersConfig,
)

from made_tokenizer import made_tokenizer
from mui_callback import MUIProbe, ProbeSet
from mui_callback.errors import ProbeSetError, UnsupportedModelError
from mui_callback.probe.encode import encode
from mui_callback.responses.answers import GeneratedAnswer, answer_score, answered_samples, judged
from mui_callback.responses.generation import generate_answers
from mui_callback.responses.prompts import prompt_tokens
from mui_callback.responses.stopping import Ends
from mui_callback.responses.task import Task, read_task
from mui_callback.responses.task_config import TaskConfig
from tiny import VOCAB, build, drawn

PROMPTS = ("What is 1+1?", "a", "One, two, three and so on:", "1+1=", "Name a colour of the sky")
MAX_NEW = 16
TOKENIZER = made_tokenizer()


@pytest.fixture
def task_of(tmp_path: Path) -> Callable[..., Task]:
    def made(prompts: tuple[str, ...] = PROMPTS, **settings: Any) -> Task:
        rows = ({"prompt": prompt, "response": "18"} for prompt in prompts)
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_task(TaskConfig("task", file=tmp_path / "rows.jsonl", **{"max_new_tokens": MAX_NEW, **settings}))

    return made


@pytest.fixture
def model() -> PreTrainedModel:
    return build("qwen2_moe", eos_token_id=2)


def naive(model: PreTrainedModel, prompt: list[int], ends: set[int], max_new: int = MAX_NEW) -> list[int]:
    """Argmax after a forward pass over everything so far, until a token ends it."""
    written: list[int] = []
    with torch.no_grad():
        while len(written) < max_new and not (written and written[-1] in ends):
            written.append(int(model(torch.tensor([prompt + written])).logits[0, -1].argmax()))
    return written


def write_letters_only(model: PreTrainedModel) -> None:
    """So that its answers are text: other tokens have logits of 0."""
    letters = {TOKENIZER.convert_tokens_to_ids(chr(code)) for code in range(ord("!"), ord("~"))}
    with torch.no_grad():
        model.lm_head.weight[[token for token in range(VOCAB) if token not in letters]] = 0


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_greedy_answers_are_those_of_a_naive_loop(family: str, task_of: Callable[..., Task]) -> None:
    model, task, done = build(family, eos_token_id=2), task_of(), []
    whole = [naive(model, TOKENIZER(prompt)["input_ids"], {2}) for prompt in PROMPTS]
    # a token in the middle of an answer ends it from now on, and so do the tokenizer's
    model.generation_config.eos_token_id = [whole[0][5], 300]
    ends = {whole[0][5], 300, 2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers = generate_answers(model, TOKENIZER, task, batch_tokens=100, on_batch=done.append)
    assert done == [2, 3]
    assert {answer.ended for answer in answers} == {"eos", "length"}
    for answer, prompt, sample in zip(answers, PROMPTS, task.samples, strict=True):
        ids = TOKENIZER(prompt)["input_ids"]
        expected = naive(model, ids, ends)
        assert answer.id == sample.id
        assert answer.prompt_ids.tolist() == ids
        assert answer.response_ids.tolist() == (expected if len(expected) > 1 or expected[0] not in ends else [])
        assert answer.ended == ("eos" if expected[-1] in ends else "length")
        assert answer.text == TOKENIZER.decode([token for token in expected if token not in ends])


def test_nothing_of_the_model_is_changed_and_nothing_but_its_argmax_counts(
    model: PreTrainedModel, task_of: Callable[..., Task]
) -> None:
    task = task_of()
    plain = generate_answers(model, TOKENIZER, task)
    own = model.generation_config
    own.update(do_sample=True, temperature=9.0, top_k=3, num_beams=3, repetition_penalty=9.0, no_repeat_ngram_size=1)
    own.update(
        suppress_tokens=[int(plain[0].response_ids[0])], forced_eos_token_id=2, max_new_tokens=3, use_cache=False
    )
    before, state = own.to_dict(), torch.get_rng_state()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = generate_answers(model, TOKENIZER, task)
    assert [answer.response_ids.tolist() for answer in again] == [answer.response_ids.tolist() for answer in plain]
    assert model.generation_config is own
    assert own.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("said_by", ["generation config", "config", "tokenizer"])
def test_all_that_say_what_ends_an_answer(said_by: str, model: PreTrainedModel, task_of: Callable[..., Task]) -> None:
    task, tokenizer = task_of(PROMPTS[:1]), made_tokenizer()
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token = None
    (whole,) = generate_answers(model, tokenizer, task)
    assert (whole.ended, len(whole.response_ids)) == ("length", MAX_NEW)
    token = int(whole.response_ids[6])
    if said_by == "generation config":
        model.generation_config.eos_token_id = token
    elif said_by == "config":
        model.config.eos_token_id = [token]
    else:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token)
    (ended,) = generate_answers(model, tokenizer, task)
    n = whole.response_ids.tolist().index(token) + 1
    assert (ended.ended, ended.response_ids.tolist()) == ("eos", whole.response_ids[:n].tolist())


@pytest.mark.parametrize("use_cache", [None, True, False])
def test_the_use_of_a_cache_is_the_models(
    use_cache: bool | None, model: PreTrainedModel, task_of: Callable[..., Task]
) -> None:
    widths: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _, args, out: widths.append(args[0].shape[1]))
    model.generation_config.use_cache = use_cache
    generate_answers(model, TOKENIZER, task_of(PROMPTS[1:2], max_new_tokens=3))
    assert widths == ([2, 3, 4] if use_cache is False else [2, 1, 1])


def test_an_answer_that_is_only_the_end_is_empty_and_wrong(
    model: PreTrainedModel, task_of: Callable[..., Task]
) -> None:
    task = task_of()
    first = {naive(model, TOKENIZER(prompt)["input_ids"], set(), 1)[0] for prompt in PROMPTS}
    model.generation_config.eos_token_id = [*first]
    answers = generate_answers(model, TOKENIZER, task)
    assert [(len(answer.response_ids), answer.text, answer.ended) for answer in answers] == [(0, "", "eos")] * 5
    assert [answer.is_right for answer in answers] == [False] * 5
    samples = answered_samples(answers, task)
    assert [sample.input_ids.tolist() for sample in samples] == [TOKENIZER(prompt)["input_ids"] for prompt in PROMPTS]
    assert not any(sample.scored.any() for sample in encode(ProbeSet({"task": samples})).samples)


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_stop_texts(family: str, task_of: Callable[..., Task]) -> None:
    model = build(family, eos_token_id=2)
    write_letters_only(model)
    texts = [answer.text for answer in generate_answers(model, TOKENIZER, task_of())]
    stop = [texts[0][4:7], texts[2][3:4]]
    assert all(stop)
    passes: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    answers = generate_answers(model, TOKENIZER, task_of(stop=stop))
    assert answers[0].ended == answers[2].ended == "stop"
    for answer, text in zip(answers, texts, strict=True):
        # the first place where either begins, once a token has completed it
        at = min((text.find(one) for one in stop if one in text), default=None)
        assert answer.text == text[:at]
        assert (answer.ended == "stop") == (at is not None)
        if answer.ended == "stop":
            assert TOKENIZER.decode(answer.response_ids).startswith(answer.text)
            shorter = TOKENIZER.decode(answer.response_ids[:-1])
            assert not answer.text or not shorter.startswith(answer.text)
    passes.clear()
    generate_answers(model, TOKENIZER, task_of((PROMPTS[0],), stop=stop))
    assert len(passes) < MAX_NEW


def ids_of(*tokens: str) -> np.ndarray:
    return np.array(TOKENIZER.convert_tokens_to_ids([*tokens]), dtype=np.int64)


@pytest.mark.parametrize(
    ("tokens", "stop", "kept", "text", "ended"),
    [
        (("18", "Ċ", "x"), "\n", 1, "18", "stop"),
        (("18", ".Ċ", "x"), "\n", 2, "18.", "stop"),  # a token that spans the beginning is kept
        (("18", "ĊĊ", "x"), "\n", 1, "18", "stop"),
        (("18", ".", "Ċ", "Ċ"), ".\n\n", 1, "18", "stop"),
        (("Ċ", "18"), "\n", 0, "", "stop"),
        (("18", "</s>", "Ċ"), "\n", 2, "18", "eos"),
        (("18", "Ċ", "</s>"), "\n", 1, "18", "stop"),
        (("</s>", "<pad>"), "\n", 0, "", "eos"),
        (("18", "<|user|>", "x"), "<|user|>", 1, "18", "stop"),
        (("Ã", "©", "!", "x"), "!", 2, "é", "stop"),  # both bytes of a letter
        (("18", "Ġ", "x"), "\n", 3, "18 x", "length"),
    ],
)
def test_where_an_answer_is_cut(tokens: tuple[str, ...], stop: str, kept: int, text: str, ended: str) -> None:
    ends = Ends(TOKENIZER, frozenset({2}), (stop,))
    ids, before = ids_of(*tokens), ids_of("a")
    response, found, how = ends.cut(ids, before)
    assert (response.tolist(), found, how) == (ids[:kept].tolist(), text, ended)


def test_the_first_of_several_stop_texts_counts() -> None:
    for stop in (("\n", "x"), ("x", "\n"), ("nowhere", "\n", "x")):
        ends = Ends(TOKENIZER, frozenset({2}), stop)
        assert ends.cut(ids_of("18", "Ċ", "a", "x"), ids_of("a"))[1] == "18"


def test_bytes_of_an_answer() -> None:
    ends = Ends(TOKENIZER, frozenset({2}), ("\n",))
    assert ends.n_bytes(ids_of("18", ".Ċ"), ids_of("a")) == 4
    assert ends.n_bytes(ids_of("18", "</s>"), ids_of("a")) == 2
    assert ends.n_bytes(ids_of("Ã", "©"), ids_of("a")) == 2
    assert ends.n_bytes(ids_of("Ã"), ids_of("a")) is None
    assert ends.n_bytes(ids_of()[:0], ids_of("a")) == 0


@given(st.lists(st.integers(5, 264), max_size=12), st.sampled_from(["\n", ".\n", "18", " 1", "a"]))
def test_a_cut_keeps_as_few_tokens_as_have_the_text(tokens: list[int], stop: str) -> None:
    ends, ids, before = Ends(TOKENIZER, frozenset({2}), (stop,)), np.array(tokens, dtype=np.int64), ids_of("a")
    response, text, ended = ends.cut(ids, before)
    whole = TOKENIZER.decode(tokens)
    assert text == whole.partition(stop)[0]
    assert ended == ("stop" if stop in whole else "length")
    if ended == "stop":
        # a naive search from the left
        of_size = (TOKENIZER.decode(tokens[:size]).rstrip("\ufffd") for size in range(len(tokens) + 1))
        assert len(response) == next(size for size, one in enumerate(of_size) if len(one) >= len(text))


def test_out_of_memory_halves_the_batch(model: PreTrainedModel, task_of: Callable[..., Task]) -> None:
    task, sizes, done = task_of(), [], []
    plain = generate_answers(model, TOKENIZER, task)

    def full(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        sizes.append(len(options["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.register_forward_pre_hook(full, with_kwargs=True)
    with pytest.warns(UserWarning, match="out of memory in task 'task'; going on with batches of"):
        again = generate_answers(model, TOKENIZER, task, on_batch=done.append)
    # the rest are shorter: three of them fit where two did, and then do not
    assert [*dict.fromkeys(sizes)] == [5, 2, 3, 1]
    assert done == [2, 1, 1, 1]
    assert [answer.response_ids.tolist() for answer in again] == [answer.response_ids.tolist() for answer in plain]
    handle.remove()
    tries: list[int] = []

    def breaks(*_: Any) -> None:
        tries.append(1)
        raise RuntimeError("no such luck")

    broken = model.register_forward_pre_hook(breaks)
    with pytest.raises(RuntimeError, match="no such luck"):
        generate_answers(model, TOKENIZER, task)
    assert len(tries) == 1  # less memory would not help
    broken.remove()
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="out of memory"):
        generate_answers(model, TOKENIZER, task)


def test_a_prompt_that_is_too_long_is_cut_from_the_left(model: PreTrainedModel, task_of: Callable[..., Task]) -> None:
    task = task_of()
    with pytest.warns(
        UserWarning, match=r"^3 of 5 prompts of task 'task' are too long and were cut from the left:\n.*:1"
    ):
        answers = generate_answers(model, TOKENIZER, task, max_length=MAX_NEW + 8)
    for answer, prompt in zip(answers, PROMPTS, strict=True):
        ids = TOKENIZER(prompt)["input_ids"]
        assert answer.prompt_ids.tolist() == ids[-8:]
        assert answer.n_truncated == max(0, len(ids) - 8)
        assert answer.response_ids.tolist() == naive(model, ids[-8:], {2})
    assert [sample.n_truncated for sample in answered_samples(answers, task)] == [4, 0, 19, 0, 17]
    with pytest.raises(ProbeSetError, match="expected fewer tokens than the context of 16, got int 16"):
        generate_answers(model, TOKENIZER, task, max_length=MAX_NEW)


def test_prompts_are_cut_to_the_positions_that_there_are(task_of: Callable[..., Task]) -> None:
    sizes = {"vocab_size": VOCAB, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": MAX_NEW + 8}
    model = GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=2)).eval()
    with pytest.warns(UserWarning, match="3 of 5 prompts of task 'task' are too long and were cut from the left"):
        answers = generate_answers(model, TOKENIZER, task_of(), max_length=1000)
    assert max(len(answer.prompt_ids) for answer in answers) == 8


def test_a_conversation(model: PreTrainedModel, task_of: Callable[..., Task]) -> None:
    answers = generate_answers(model, TOKENIZER, task_of(), chat=True)
    for answer, prompt in zip(answers, PROMPTS, strict=True):
        ids = [1, 3, *TOKENIZER(prompt, add_special_tokens=False)["input_ids"], 4]
        assert answer.prompt_ids.tolist() == ids
        assert answer.response_ids.tolist() == naive(model, ids, {2})


def test_an_encoder_decoder(task_of: Callable[..., Task]) -> None:
    sizes = {"d_model": 24, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 2}
    config = SwitchTransformersConfig(
        vocab_size=VOCAB, num_experts=4, expert_capacity=64, decoder_start_token_id=0, eos_token_id=1, **sizes
    )
    torch.manual_seed(0)
    model, tokenizer, task = drawn(AutoModelForSeq2SeqLM.from_config(config), 0), ByT5Tokenizer(), task_of()
    answers = generate_answers(model, tokenizer, task)
    for answer, prompt in zip(answers, PROMPTS, strict=True):
        encoder, written = torch.tensor([tokenizer(prompt)["input_ids"]]), [0]
        with torch.no_grad():
            while len(written) <= MAX_NEW and written[-1] != 1:
                logits = model(input_ids=encoder, decoder_input_ids=torch.tensor([written])).logits
                written.append(int(logits[0, -1].argmax()))
        assert answer.prompt_ids.tolist() == encoder[0].tolist()
        assert answer.response_ids.tolist() == written[1:]
    encoded = encode(ProbeSet({"task": answered_samples(answers, task)}), decoder_start=0)
    for sample, answer in zip(encoded.samples, answers, strict=True):
        assert sample.encoder_ids is not None
        assert sample.encoder_ids.tolist() == answer.prompt_ids.tolist()
        assert sample.input_ids.tolist() == [0, *answer.response_ids]


def test_models_that_cannot_answer(model: PreTrainedModel, task_of: Callable[..., Task]) -> None:
    with pytest.raises(UnsupportedModelError, match="Linear: expected a model of transformers with `generate`"):
        generate_answers(nn.Linear(2, 2), TOKENIZER, task_of())
    with pytest.raises(UnsupportedModelError, match="Qwen2MoeModel: expected a model of transformers with `generate`"):
        generate_answers(model.model, TOKENIZER, task_of())
    with pytest.raises(
        ProbeSetError, match=r"below the model's vocabulary size 100, got .*: tokenizer and model do not"
    ):
        generate_answers(build("olmoe", vocab_size=100), TOKENIZER, task_of())


def test_answers_are_scored_as_they_were_written(model: PreTrainedModel, task_of: Callable[..., Task]) -> None:
    task = task_of()
    write_letters_only(model)
    answers = generate_answers(model, TOKENIZER, task)
    probe_set = ProbeSet({"task": answered_samples(answers, task)})
    report = MUIProbe(model, probe_set, rules="top_fraction=0.05").measure()
    assert report.tasks["task"].predictions.n_tokens == sum(len(answer.response_ids) for answer in answers)
    n_bytes = [sample.n_bytes for sample in answered_samples(answers, task)]
    assert n_bytes == [len(answer.text.encode()) for answer in answers]
    assert report.tasks["task"].token_accuracy == 1  # each is the likeliest


def answer(sample_id: str, text: str) -> GeneratedAnswer:
    ids = np.array([1], dtype=np.int64)
    return GeneratedAnswer(sample_id, ids, ids, text, len(text), "length")


def test_the_share_that_is_right(task_of: Callable[..., Task]) -> None:
    task = task_of(PROMPTS[:4], extract="number")
    given = [
        answer(sample.id, text) for sample, text in zip(task.samples, ("#### 18.0", "17", "", "is 18"), strict=True)
    ]
    found = judged(given, task)
    assert [one.extracted for one in found] == ["18", "17", None, "18"]
    assert [one.is_right for one in found] == [True, False, False, True]
    score = answer_score(found)
    assert score is not None
    assert score.value == 0.5
    np.testing.assert_allclose(score.influence, [0.125, -0.125, -0.125, 0.125])
    assert score.standard_error == pytest.approx(np.sqrt(0.25 / 3))
    assert answer_score(judged(given, task_of(PROMPTS[:4], extract="none"))) is None
    with pytest.raises(ValueError, match="task 'task': expected one answer to each of 4 samples, in order"):
        judged(given[::-1], task)
    assert prompt_tokens(task, TOKENIZER, chat=False)[1].tolist() == TOKENIZER("a")["input_ids"]
