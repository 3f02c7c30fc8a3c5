"""Fused kernels on a GPU against the operators that do the same where there are none."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from mui_callback.experts.pairs import Pairs, SortedRows
from mui_callback.fused import available, scores
from mui_callback.fused import experts as fused
from mui_callback.fused.experts import Gate
from mui_callback.fused.logits import can_predict
from mui_callback.probe.head import token_losses
from mui_callback.scoring.contributions import ExpertScores, Responses
from mui_callback.scoring.layer_rows import LayerRows, alike, can_wait
from mui_callback.scoring.rows import Contributions
from mui_callback.scoring.topk import ordered_topk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DEVICE = "cuda"
WIDTHS = [1, 63, 64, 200, 1024, 1100]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@contextmanager
def without_kernels() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(available, "runs_on", lambda device: False)
        yield


@pytest.mark.skipif(torch.version.hip is not None, reason="kernels are compiled for the sizes of tensors")
def test_compiled_kernels_are_launched_again_without_triton_looking_for_them() -> None:
    pytest.importorskip("triton")
    assert available.runs_on(torch.device(DEVICE, 0))
    from mui_callback.fused.launching import Kernel

    assert Kernel.keeps_compiled


Sizes = tuple[int, int, int]
"""Width of an expert, experts, and how many of them a token has."""


def responses_of(lengths: list[int]) -> Responses:
    return Responses(
        row_R=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(DEVICE),
        order_R=torch.tensor([order for length in lengths for order in range(length)], device=DEVICE),
        n_rows=len(lengths),
        n_orders=max(lengths),
    )


def part_of(
    sizes: Sizes, n_tokens: int, first: tuple[int, int], random: torch.Generator, dtype: torch.dtype, *, is_plain: bool
) -> ExpertScores:
    """Rows with NaN, infinity and zeros in all that makes them, in memory with gaps between them; plain ones are in
    order and without weights."""
    width, n_experts, top_k = sizes

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    chosen = torch.stack([torch.randperm(n_experts, generator=random)[:top_k] for _ in range(n_tokens)])
    rank, expert, token = chosen.argsort(1).argsort(1), chosen, torch.arange(n_tokens)[:, None].expand_as(chosen)
    n_rows = chosen.numel()
    order = torch.randperm(n_rows, generator=random)
    act, projected, weight = drawn(n_rows + 7, width + 3), drawn(n_rows, width), drawn(n_rows)
    for special in (math.nan, math.inf, -math.inf, 0.0):
        act[torch.rand(act.shape, generator=random) < 0.02] = special
        projected[torch.rand(projected.shape, generator=random) < 0.02] = special
    act[5] = math.nan
    weight[0], weight[1] = math.inf, math.nan
    act_row = torch.randperm(n_rows + 7, generator=random)[:n_rows].to(DEVICE)
    is_row = (torch.rand(n_rows, generator=random) < 0.7).to(DEVICE)
    act = act.to(DEVICE, dtype)[:, :width]
    rows = (
        Contributions(act[:n_rows], projected.to(DEVICE, dtype))
        if is_plain
        else Contributions(act, projected.to(DEVICE), weight.to(DEVICE), is_row, act_row)
    )
    token, expert, rank = (numbers.flatten()[order].to(DEVICE) for numbers in (token, expert, rank))
    return ExpertScores(rows, token, expert + first[0], rank, top_k, *first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("k", [1, 9, 200])
def test_layers_are_as_the_operators_find_them(dtype: torch.dtype, width: int, k: int) -> None:
    responses, random = responses_of([3, 5, 1, 4]), torch.Generator().manual_seed(width)
    parts_L = [
        [
            part_of((width, 6, 3), 13, (0, 0), random, dtype, is_plain=False),
            part_of((100, 2, 2), 13, (6, 6 * width), random, dtype, is_plain=True),
        ]
        for _ in range(3)
    ]
    assert len({alike(parts) for parts in parts_L}) == 1
    assert all(map(can_wait, parts_L))
    lent = [replace(part, rows=replace(part.rows, is_lent=True)) for part in parts_L[0]]
    assert not can_wait(lent)
    parts_L[1][0] = first_rows(parts_L[1][0], 20)
    n_neurons = 6 * width + 200
    found = LayerRows.of(parts_L, responses, 8)
    assert found.kinds
    entries = found.finalists(k, n_neurons).entries(k)
    with without_kernels():
        plain = LayerRows.of([[anew(part) for part in parts] for parts in parts_L], responses, 8)
        assert not plain.kinds
        expected = plain.finalists(k, n_neurons).entries(k)
    assert torch.equal(found.found.highest_LBPC, plain.found.highest_LBPC)
    torch.testing.assert_close(found.found.use_RLE2, plain.found.use_RLE2, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.use(responses), plain.use(responses), rtol=1e-5, atol=0)
    assert int(found.found.n_not_finite) == int(plain.found.n_not_finite) > 0
    assert len(entries.score) == 3 * responses.n_rows
    assert torch.equal(entries.score, expected.score)
    is_entry = expected.score > -math.inf
    assert is_entry.any()
    assert torch.equal(entries.place[is_entry], expected.place[is_entry])
    for part in (part for parts in parts_L for part in parts):
        own = part.rows.sums()
        with without_kernels():
            rows = anew(part).rows
            other = rows.sums()
            assert own.dtype == other.dtype == torch.float64
            assert ((own - other).abs() <= 1e-5 * rows.summary().mass_S).all()


def anew(part: ExpertScores) -> ExpertScores:
    """The same; rows keep whether there are kernels for them."""
    return replace(part, rows=replace(part.rows))


def first_rows(part: ExpertScores, n: int) -> ExpertScores:
    rows = {name: getattr(part.rows, name)[:n] for name in ("projected_SI", "weight_S", "is_row_S", "act_row_S")}
    numbers = {name: getattr(part, name)[:n] for name in ("token_S", "expert_S", "rank_S")}
    return replace(part, rows=replace(part.rows, **rows), **numbers)


@pytest.mark.parametrize("n_slots", [1, 5, 700, 9000])
@pytest.mark.parametrize("k", [1, 7, 300])
def test_chunks_are_chosen_as_a_sort_does(n_slots: int, k: int) -> None:
    values = torch.tensor([-math.inf, -2.5, -0.0, 0.0, 1e-40, 1.0, 2.0**127], device=DEVICE)
    random = torch.Generator(device=DEVICE).manual_seed(0)
    score = values[torch.randint(len(values), (4, n_slots, 2), generator=random, device=DEVICE)]
    score[0] = torch.randn(n_slots, 2, generator=random, device=DEVICE)
    highest = torch.cat([score.amax(-1, keepdim=True), score], dim=-1).unflatten(0, (2, 2))
    nothing = torch.zeros(2, 2, n_slots, dtype=torch.int64, device=DEVICE)
    found = scores.highest_chunks(scores.Found(highest, nothing, nothing, nothing, 1), k).flatten(0, 1)
    for row, chosen in zip(score.flatten(1).tolist(), found.tolist(), strict=True):
        best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
        assert chosen == sorted(chosen)
        assert [i for i in chosen if row[i] > -math.inf] == sorted(i for i in best if row[i] > -math.inf)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [Gate(), Gate(is_interleaved=True, alpha=1.702, limit=1.5)], ids=["silu", "gpt-oss"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_activations_are_those_of_the_model(dtype: torch.dtype, gate: Gate, has_bias: bool) -> None:
    random = torch.Generator(device=DEVICE).manual_seed(0)
    up = (2 * torch.randn(37, 2 * 1100, generator=random, device=DEVICE)).to(dtype)
    bias = torch.randn(256, 2 * 1100, generator=random, device=DEVICE).to(dtype) if has_bias else None
    expert = torch.randint(256, (37,), generator=random, device=DEVICE)
    up[3, 8], up[4, 9] = math.nan, math.inf
    found = fused.gated(gate, up, bias, expert.to(torch.uint8))
    x = up.double() if bias is None else (up + bias[expert]).double()
    if gate.is_interleaved:
        g, u = x[:, ::2].clamp(max=gate.limit), x[:, 1::2].clamp(-gate.limit, gate.limit)
        expected = (u + 1) * g * torch.sigmoid(gate.alpha * g)
    else:
        expected = torch.nn.functional.silu(x[:, :1100]) * x[:, 1100:]
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), expected, rtol=1e-6 if dtype == torch.float32 else 0.02, atol=1e-6, equal_nan=True
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_outputs_are_those_of_the_operators(dtype: torch.dtype, has_bias: bool) -> None:
    """Ids of as many as there are experts and more stand for none."""
    n_tokens, top_k, n_local, width = 50, 4, 6, 1100
    random = torch.Generator().manual_seed(0)
    expert_TK = torch.stack([torch.randperm(n_local + 3, generator=random)[:top_k] for _ in range(n_tokens)]).to(DEVICE)
    weight_TK = torch.rand(n_tokens, top_k, generator=random).to(DEVICE, dtype)
    expert_S, order_S = expert_TK.flatten().clamp(max=n_local - 1).sort(stable=True)
    row_TK = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(200, device=DEVICE)).view_as(expert_TK)
    raw_SD = torch.randn(200, width, generator=random).to(DEVICE, dtype)
    bias = torch.randn(n_local, width, generator=random).to(DEVICE, dtype) if has_bias else None
    found = fused.combined(raw_SD, bias, row_TK, expert_TK, weight_TK, n_local)
    out_SD = raw_SD.double() if bias is None else raw_SD.double() + bias[expert_S].double()
    weight_SK = weight_TK.double().masked_fill(expert_TK >= n_local, 0)
    expected = (out_SD[row_TK] * weight_SK[..., None]).sum(1)
    torch.testing.assert_close(
        found.double(), expected, rtol=1e-5 if dtype == torch.float32 else 0.01, atol=1e-5, equal_nan=True
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_tokens", [1, 50, 3000, 20_000])
@pytest.mark.parametrize(("n_local", "top_k"), [(1, 1), (6, 4), (128, 8), (300, 3)])
def test_sorted_pairs_are_those_of_the_operators(dtype: torch.dtype, n_tokens: int, n_local: int, top_k: int) -> None:
    """Ids of as many as there are experts and more stand for none."""
    random = torch.Generator().manual_seed(0)
    expert_TK = torch.rand(n_tokens, n_local + 3, generator=random).topk(top_k).indices.to(DEVICE)
    weight_TK = torch.rand(n_tokens, top_k, generator=random).to(DEVICE, dtype)
    n_scored = -(-n_tokens // 3)
    position_R = torch.randperm(n_tokens, generator=random)[:n_scored].sort().values.to(DEVICE)
    number_T = torch.full((n_tokens,), -1, device=DEVICE)
    number_T[position_R] = 5 + torch.arange(n_scored, device=DEVICE)
    assert fused.can_sort(expert_TK, weight_TK, n_local)
    assert not fused.can_sort(expert_TK, weight_TK, 513)
    expected = SortedRows.of(expert_TK, n_local)
    alone, none = fused.sort_pairs(expert_TK, weight_TK, n_local, torch.full_like(number_T, -1), 0, 0)
    rows, found = fused.sort_pairs(expert_TK, weight_TK, n_local, number_T, 5, n_scored)
    assert [len(field) for field in none] == [0] * 6 + [n_local]
    assert not none[-1].any()
    for own, other, plain in zip(rows, alone, vars(expected).values(), strict=True):
        assert torch.equal(own, other)
        assert torch.equal(own.long(), plain.long())  # operators sort ids of 8 bits
    pairs = Pairs(*found)
    by_pair = Pairs.of(position_R, expert_TK, weight_TK, expected.row_TK, n_local)
    assert torch.equal(pairs.end_E, by_pair.end_E)
    assert torch.equal(pairs.expert_P, by_pair.expert_P)

    def listed(one: Pairs) -> list[tuple[float, ...]]:
        is_row_P = torch.ones_like(one.from_P) if one.is_row_P is None else one.is_row_P
        fields = (one.expert_P, one.from_P, one.rank_P, one.weight_P, one.row_P, is_row_P)
        return list(zip(*(field.tolist() for field in fields), strict=True))

    assert sorted(listed(pairs)) == sorted(listed(by_pair))
    of_experts = [pair for pair in listed(pairs) if pair[-1]]  # what belongs to no expert comes in any order
    assert of_experts == [pair for pair in listed(by_pair) if pair[-1]]


@pytest.mark.parametrize("n_columns", [1, 5, 1024, 3000])
@pytest.mark.parametrize("k", [1, 7, 2000])
def test_the_highest_in_order_are_those_of_the_operators(n_columns: int, k: int) -> None:
    values = torch.tensor([-math.inf, -2.5, -0.0, 0.0, 1e-40, 1.0, 2.0**127], device=DEVICE)
    random = torch.Generator(device=DEVICE).manual_seed(0)
    score = values[torch.randint(len(values), (6, n_columns), generator=random, device=DEVICE)]
    assert scores.can_order(score)
    found = ordered_topk(score, k)
    with without_kernels():
        assert torch.equal(found, ordered_topk(score, k))
    for row, indices in zip(score.tolist(), found.tolist(), strict=True):
        assert indices == sorted(range(n_columns), key=lambda i: (-row[i], i))[:k]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_logits", [1, 5, 4096, 10_000])
@pytest.mark.parametrize("layout", ["plain", "rows apart", "columns apart"])
def test_losses_and_first_choices_are_those_of_the_operators(dtype: torch.dtype, n_logits: int, layout: str) -> None:
    random = torch.Generator(device=DEVICE).manual_seed(0)
    logits = (4 * torch.randn(64, n_logits + 3, generator=random, device=DEVICE)).to(dtype)[:, :n_logits]
    logits = logits if layout == "rows apart" else logits.contiguous()
    logits = logits.T.contiguous().T if layout == "columns apart" else logits
    target = torch.randint(n_logits, (64,), generator=random, device=DEVICE)
    logits[0] = 1.0  # all equal
    logits[1] = -math.inf
    logits[2, : n_logits // 2], logits[3, -1], logits[4, 0] = -math.inf, math.inf, math.nan
    target[:20] = logits[:20].argmax(-1)
    target[5], target[6] = 0, n_logits - 1
    assert can_predict(logits) == (layout != "columns apart" or n_logits == 1)
    loss, is_correct = token_losses(logits, target)
    with without_kernels():
        expected, is_expected = token_losses(logits, target)
    assert loss.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=2e-6, equal_nan=True)
    is_finite = expected.isfinite()
    assert is_finite.sum() > 50
    assert torch.equal(is_correct[is_finite], is_expected[is_finite])
