"""Outputs of experts that are part of the output of their layer as they are are read without a recording."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from mui_callback import MUIProbe, ProbeSet
from mui_callback.errors import ProbeError
from mui_callback.experts.cut import Cut
from mui_callback.experts.direct import DirectRows
from mui_callback.experts.down import Product
from mui_callback.experts.straight import leads_straight
from mui_callback.experts.tail import Tail
from mui_callback.scoring.contributions import ScoredTokens
from test_learned import assert_same_key_neurons, in_reverse
from test_repeated import assert_same_to_the_bit
from tiny_samples import make_samples

OTHER = torch.ones(6, 4)
STRAIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "itself in another shape": lambda x: x.view(2, 3, 4)[None],
    "a sum": lambda x: x + OTHER,
    "the second of a sum": lambda x: OTHER + x,
    "added in place": lambda x: OTHER.clone().add_(x).reshape(3, 8),
    "a copy": lambda x: x.clone().contiguous(),
    "another type": lambda x: x.double() + OTHER,
}
NOT_STRAIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "weighted": lambda x: x * 1.0,
    "weighted in a sum": lambda x: torch.add(OTHER, x, alpha=2),
    "twice": lambda x: x + x.view(6, 4),
    "subtracted": lambda x: OTHER - x,
    "in another order": lambda x: x.flip(0),
    "transposed": lambda x: x.T,
    "to several tokens": lambda x: x[:1].expand(6, 4),
    "broadcast": lambda x: torch.ones(2, 6, 4) + x,
    "in part": lambda x: x[:3],
    "not at all": lambda x: OTHER * 1,
    "weighted beside": lambda x: x + 2 * x,
    "by way of what is twice": lambda x: (y := x + OTHER) + y,
}


@pytest.mark.parametrize("tail", STRAIGHT.values(), ids=STRAIGHT)
def test_what_leads_straight_hands_on_what_it_is_sent(tail: Callable[[Tensor], Tensor]) -> None:
    leaf = torch.randn(6, 4, requires_grad=True)
    out = tail(leaf)
    assert leads_straight(leaf, out)
    sent = torch.randn(6, 4)
    (seen,) = torch.autograd.grad(out, leaf, sent.to(out.dtype).view_as(out))
    assert torch.equal(seen, sent)


@pytest.mark.parametrize("tail", NOT_STRAIGHT.values(), ids=NOT_STRAIGHT)
def test_what_does_not_is_told(tail: Callable[[Tensor], Tensor]) -> None:
    leaf = torch.randn(6, 4, requires_grad=True)
    assert not leads_straight(leaf, tail(leaf))


def test_many_ways_are_not_walked_one_by_one() -> None:
    leaf, out = (torch.randn(6, 4, requires_grad=True) for _ in range(2))
    for _ in range(2000):  # as many loops over experts add to the tokens of each
        out = out + out.clone()
    assert not leads_straight(leaf, out)
    assert leads_straight(leaf, out + leaf)


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the output of experts was recorded, by layer."""
    seen: Counter[str] = Counter()
    cut = Tail.cut

    def note(tail: Tail, out: Tensor) -> Cut:
        seen[tail.where] += 1
        return cut(tail, out)

    monkeypatch.setattr(Tail, "cut", note)
    return seen


@pytest.mark.parametrize(
    ("family", "n_first", "n_later"),
    [
        ("olmoe", 1, 0),
        ("gpt_oss", 1, 0),
        ("deepseek_v3", 2, 0),
        ("qwen2_moe", 2, 1),  # a gate weights its shared expert
    ],
)
def test_what_is_direct_is_recorded_in_the_first_batch_alone(
    family: str, n_first: int, n_later: int, cuts: Counter[str]
) -> None:
    probe = MUIProbe(tiny.build(family), ProbeSet({"task": make_samples()}), batch_tokens=40, rules="top_fraction=0.02")
    n_batches = len(probe._rounds)
    assert n_batches > 1
    first = probe.measure()
    assert set(cuts.values()) == {n_first + (n_batches - 1) * n_later}
    cuts.clear()
    assert_same_to_the_bit(first, probe.measure())
    assert set(cuts.values()) == ({n_batches * n_later} if n_later else set())


def test_direct_experts_that_are_changed_in_between_are_found_out() -> None:
    model = tiny.build("deepseek_v3")
    probe = MUIProbe(model, ProbeSet({"task": make_samples()}), batch_tokens=40, rules="top_fraction=0.02")
    first = probe.measure()
    with in_reverse([module for name, module in model.named_modules() if name.endswith(".shared_experts")]):
        assert_same_key_neurons(first, probe.measure())
    assert_same_key_neurons(first, probe.measure())


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe", "olmoe"])
def test_batches_in_which_the_model_does_otherwise_are_noticed(family: str, cuts: Counter[str]) -> None:
    """A user's hook steers large batches alone, so that the first one tells nothing of the others."""
    model = tiny.build(family)

    def steer(module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        return out * 0.5 if out.numel() // out.shape[-1] > 22 else None

    for name, module in model.named_modules():
        if name.endswith((".experts", ".shared_expert", ".shared_experts")):
            module.register_forward_hook(steer)
    samples = ProbeSet({"task": make_samples(lengths=(5, 6, 7, 20, 22, 24))})
    probe = MUIProbe(model, samples, batch_tokens=24, rules="top_fraction=0.02")
    reports = [probe.measure(), probe.measure()]
    cuts.clear()
    third = probe.measure()
    assert set(cuts.values()) == {len(probe._rounds) * len(probe.layers[0].experts)}  # never direct again
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tail, "is_straight", lambda *args, **options: False)
        expected = MUIProbe(model, samples, batch_tokens=24, rules="top_fraction=0.02").measure()
    for report in (*reports, third):
        assert_same_to_the_bit(expected, report)
        assert report.identity_error < 1e-5


def test_direct_experts_see_all_positions_in_a_plain_product() -> None:
    tokens = ScoredTokens(
        row_R=torch.tensor([0, 0]),
        order_R=torch.tensor([0, 1]),
        position_R=torch.tensor([0, 1]),
        target_R=torch.tensor([5, 6]),
        n_rows=1,
        n_orders=2,
        length=3,
    )
    direct, act, down = DirectRows(tokens, torch.randn(2, 4)), torch.randn(3, 5), torch.randn(4, 5)
    for product, own in (
        (Product(act, act @ down.T, None), act),
        (Product(act, act @ down.T, None, weight=down), act[:2]),
    ):
        with pytest.raises(ProbeError, match="expected shared experts to see all 3 positions"):
            direct.add(0, product, own)
    assert not direct.have_come
