"""Choices after prompts that are run once: each scored token once, from the same tokens before it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mui_callback.parallel.shards import Shards
from mui_callback.probe.batches import Batch
from mui_callback.probe.choice_plan import ChoicePlan
from mui_callback.probe.encode import EncodedProbeSet
from mui_callback.probe.samples import TokenChoice, TokenSample
from mui_callback.probe.shared_prompts import PromptGroup, share_prompts

Scored = tuple[int, tuple[int, ...], int]
"""A scored token: of which choice, after which tokens, and which it is."""


def choice(prompt: list[int], own: list[int], n_scored: int | None = None) -> TokenChoice:
    ids = np.array(prompt + own, dtype=np.int64)
    return TokenChoice(ids, np.arange(len(ids)) >= len(ids) - (len(own) if n_scored is None else n_scored))


def encoded(samples: list[list[TokenChoice]]) -> EncodedProbeSet:
    made = [
        TokenSample(str(i), choices[0].input_ids, choices[0].scored, choices=tuple(choices), answer=0)
        if choices
        else TokenSample(str(i), np.arange(5), np.arange(5) > 2)
        for i, choices in enumerate(samples)
    ]
    return EncodedProbeSet(("t",), tuple(made), np.zeros(len(made), dtype=np.int64), 0)


def wanted(all_choices: list[TokenChoice]) -> list[Scored]:
    return [
        (number, tuple(one.input_ids[:t].tolist()), int(one.input_ids[t]))
        for number, one in enumerate(all_choices)
        for t in np.flatnonzero(one.scored)
    ]


def predicted(batch: Batch, before: list[list[int]]) -> list[Scored]:
    """What a batch predicts, after what comes before each of its rows."""
    found = []
    for position, row, target in zip(batch.flat_position, batch.row, batch.target, strict=True):
        place = position - row * batch.input_ids.shape[1]
        assert batch.attention_mask[row, : place + 1].all()
        tokens = before[row] + batch.input_ids[row, : place + 1].tolist()
        found.append((int(batch.sample[row]), tuple(tokens), int(target)))
    return found


def read(part: Batch | PromptGroup, batch_tokens: int) -> list[Scored]:
    if isinstance(part, Batch):
        return predicted(part, [[] for _ in part.sample])
    mask = part.prompts.attention_mask
    assert (np.diff(mask, axis=1) >= 0).all()
    assert mask[:, -1].all()
    prompts = [ids[kept == 1].tolist() for ids, kept in zip(part.prompts.input_ids, mask, strict=True)]
    assert not len(part.prompts.target)
    found = []
    for one in part.followers:
        rows, length = one.rest.input_ids.shape
        assert rows == 1 or rows * (length + mask.shape[1]) <= batch_tokens
        after = predicted(one.rest, [prompts[prompt] for prompt in one.prompt])
        assert sorted(after) == sorted(predicted(one.batch, [[] for _ in one.batch.sample]))
        assert one.batch.sample.tolist() == one.rest.sample.tolist()
        found += after
    return found


@st.composite
def sample(draw: st.DrawFn) -> list[TokenChoice]:
    """Choices whose tokens may merge with the end of the prompt, and that may begin with the same tokens."""
    length = draw(st.integers(1, 120))
    prompt = draw(st.lists(st.integers(0, 3), min_size=length, max_size=length))
    made = []
    for _ in range(draw(st.sampled_from([0, 2, 3, 5]))):
        own = draw(st.lists(st.integers(0, 3), min_size=1, max_size=9))
        kept = draw(st.integers(max(1, length - 2), length))
        cut = draw(st.sampled_from([0, 0, 0, length // 2]))  # as choices that are too long for the model
        made.append(choice(prompt[min(cut, kept - 1) : kept], own, draw(st.integers(1, len(own)))))
    return made


@given(st.lists(sample(), min_size=1, max_size=14), st.integers(1, 6000), st.integers(1, 3))
def test_every_scored_token_is_predicted_once_from_all_before_it(
    samples: list[list[TokenChoice]], batch_tokens: int, n_shards: int
) -> None:
    probe_set = encoded(samples)
    plan = ChoicePlan.of(probe_set, batch_tokens, Shards(tuple(range(n_shards))), share=True)
    assert len(plan.parts) == n_shards
    found = [token for parts in plan.parts for part in parts for token in read(part, batch_tokens)]
    assert sorted(found) == wanted(probe_set.choices)
    in_full = [token for batch in plan.in_full() for token in predicted(batch, [[] for _ in batch.sample])]
    assert sorted(in_full) == sorted(found)


def many(prompt_length: int, n: int = 40, n_choices: int = 4) -> list[list[TokenChoice]]:
    rng = np.random.default_rng(prompt_length)
    made = []
    for i in range(n):
        prompt = rng.integers(3, 99, prompt_length + i % 5).tolist()
        made.append([choice(prompt, rng.integers(3, 99, 2 + (i + j) % 4).tolist()) for j in range(n_choices)])
    return made


@pytest.mark.parametrize("n_shards", [1, 2])
def test_each_prompt_is_run_once(n_shards: int) -> None:
    plan = ChoicePlan.of(encoded(many(60)), 8192, Shards(tuple(range(n_shards))), share=True)
    groups = [part for parts in plan.parts for part in parts]
    assert all(isinstance(part, PromptGroup) for part in groups)
    assert sum(len(group.prompts.sample) for group in groups if isinstance(group, PromptGroup)) == 40
    planned = sum(batch.n_positions for batch in plan.passes())
    assert planned < 0.45 * sum(batch.n_positions for batch in plan.in_full())


def test_half_of_arc_is_saved() -> None:
    """Tokens of the prompts and the longest choices of the first 200 test samples of ARC: quantiles, each by itself."""
    places = np.linspace(0, 4, 200)
    prompts = np.interp(places, range(5), [11, 20, 30, 45, 107]).astype(int)
    longest = np.interp(places, range(5), [1, 6, 9, 12, 28]).astype(int)
    np.random.default_rng(0).shuffle(longest)
    samples = [
        [choice([1] * p, [2 + j] * max(1, round(c * share))) for j, share in enumerate((1, 0.8, 0.6, 0.5))]
        for p, c in zip(prompts, longest, strict=True)
    ]
    plans = [ChoicePlan.of(encoded(samples), 8192, Shards(), share=share) for share in (False, True)]
    alone, shared = (sum(batch.n_positions for batch in plan.passes()) for plan in plans)
    assert shared < 0.6 * alone
    assert len([*plans[1].passes()]) <= 1.5 * len([*plans[0].passes()])


def cases() -> dict[str, Any]:
    prompt = list(range(10, 60))
    return {
        "whole": ([choice(prompt, [1, 2]), choice(prompt, [3])], 49),
        "merged": ([choice(prompt, [1, 2]), choice(prompt[:-1], [3])], 48),
        "begun alike": ([choice(prompt, [1, 2]), choice(prompt, [1, 3])], 49),
        "scored late": ([choice(prompt, [1, 2], 1), choice(prompt, [1, 3], 1)], 50),
        "one in the other": ([choice(prompt, [1]), choice(prompt, [1, 2])], 49),
        "cut": ([choice(prompt, [1, 2]), choice(prompt[5:], [3])], 0),
        "of one token": ([choice([1], [2]), choice([1], [3])], 0),
        "of two tokens": ([choice([1, 1], [2]), choice([1, 1], [3])], 1),
    }


@pytest.mark.parametrize("name", cases())
def test_how_long_a_prompt_is(name: str) -> None:
    same, length = cases()[name]
    choices = same * 400
    groups = share_prompts(choices, [range(i, i + 2) for i in range(0, len(choices), 2)], 10**6)
    lengths = {int(n) for group in groups for n in group.prompts.attention_mask.sum(axis=1)}
    assert lengths == ({length} if length > 1 else set())  # with one token, nothing is saved


def test_few_positions_are_not_worth_a_pass() -> None:
    few = encoded(many(9, n=5))
    assert all(isinstance(part, Batch) for part in ChoicePlan.of(few, 8192, Shards(), share=True).parts[0])


def test_a_batch_that_holds_no_sample_shares_nothing_and_ends() -> None:
    """As it is where memory runs out again and again."""
    plan = ChoicePlan.of(encoded(many(60, n=4)), 1, Shards(), share=True)
    assert all(len(batch.sample) == 1 for batch in plan.in_full())


def test_nothing_is_shared_where_processes_are_in_step() -> None:
    samples = encoded(many(60, n=3, n_choices=2))
    shards = Shards((0, 1, 2, 3), in_step=True)
    plan = ChoicePlan.of(samples, 100, shards, share=False)
    assert len({tuple(batch.input_ids.shape for batch in parts) for parts in plan.parts}) == 1  # type: ignore[union-attr]
    apart = ChoicePlan.of(samples, 100, Shards((0, 1, 2, 3)), share=False)
    assert not any(batch.is_stand_in for batch in apart.in_full())
