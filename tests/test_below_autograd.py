"""Batches that are spared autograd: which these are, that nobody notices, and that what is kept of them can train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mui_callback import MUIProbe, ProbeSet
from mui_callback.errors import ProbeError
from mui_callback.parallel.shards import Shards
from mui_callback.probe.below_autograd import BelowAutograd
from test_repeated import assert_same_to_the_bit
from tiny import build
from tiny_samples import make_samples

LENGTHS = (14, 13, 12, 11, 10)
N_BATCHES = len(LENGTHS)


def probe_of(model: nn.Module) -> MUIProbe:
    """A probe of one sample a batch."""
    return MUIProbe(model, ProbeSet({"a": make_samples(lengths=LENGTHS)}), batch_tokens=14)


def goes_through_autograd() -> bool:
    """Whether versions are counted, as autograd does."""
    tensor = torch.zeros(1)
    tensor.add_(1)
    return tensor._version == 1


@contextmanager
def watched(model: nn.Module) -> Iterator[list[bool]]:
    """Whether each forward of the model goes through autograd."""
    seen: list[bool] = []
    with model.register_forward_pre_hook(lambda *_: seen.append(goes_through_autograd())):
        yield seen


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_batches_are_spared_after_one_in_which_nothing_was_recorded(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)
    probe = probe_of(model)
    with watched(model) as seen:
        spared = [probe.measure(), probe.measure()]
    assert seen == [True, True] + [False] * (N_BATCHES - 2) + [True] + [False] * (N_BATCHES - 1)
    assert goes_through_autograd()

    monkeypatch.setattr(BelowAutograd, "batch", lambda self, *, may_record: nullcontext())
    with watched(model) as seen:
        unspared = probe_of(model).measure()
    assert seen == [True] * N_BATCHES
    for report in spared:
        assert_same_to_the_bit(report, unspared)


def test_no_batch_is_spared_where_a_gate_behind_the_experts_is_asked_in_each() -> None:
    model = build("qwen2_moe")
    with watched(model) as seen:
        probe_of(model).measure()
    assert seen == [True] * N_BATCHES


def test_no_batch_is_spared_of_a_model_that_computes_gradients() -> None:
    model = build("mixtral")
    model.model.layers[0].mlp.gate.register_forward_hook(computes_a_gradient)
    with watched(model) as seen:
        probe_of(model).measure()
    assert seen == [True] * N_BATCHES


def computes_a_gradient(module: nn.Module, args: Any, out: Any) -> None:
    """As models do that are trained while they are tested."""
    with torch.enable_grad():
        x = torch.ones(3, requires_grad=True)
        (grad,) = torch.autograd.grad((x * x).sum(), x)
    assert torch.equal(grad, torch.full((3,), 2.0))


def test_what_a_model_keeps_of_such_a_batch_can_train() -> None:
    model = build("olmoe").train()
    kept: dict[int, Tensor] = {}  # no attribute, which would be restored
    below: set[int] = set()

    def keep(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        if len(out[0]) not in kept:
            if not goes_through_autograd():
                below.add(len(out[0]))
            kept[len(out[0])] = torch.ones_like(out).mul_(0.5)[:, :, :]
        return out * kept[len(out[0])]

    model.model.embed_tokens.register_forward_hook(keep)
    probe = probe_of(model)
    probe.measure()
    ids = torch.arange(3, 3 + LENGTHS[0])[None]
    assert LENGTHS[0] in below
    found, kept_before = gradients(model, ids), dict(kept)
    kept.clear()
    expected = gradients(model, ids)
    assert found
    assert kept_before.keys() > kept.keys()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def gradients(model: nn.Module, ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_weights_that_are_no_plain_ones_or_processes_that_wait_for_each_other_go_through_autograd() -> None:
    class Quantised(nn.Parameter):
        pass

    plain, other = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    other.weight = Quantised(torch.ones(2, 2))
    of_zero3: Any = nn.Linear(2, 2)
    of_zero3.bias.ds_shape, of_zero3.bias.ds_status = torch.Size([2]), None
    for model, shards, is_spared in (
        (plain, Shards(), True),
        (nn.Linear(2, 2, bias=False), Shards(), True),
        (plain, Shards(in_step=True), False),
        (nn.Sequential(plain, other), Shards(), False),
        (nn.Sequential(plain, of_zero3), Shards(), False),
    ):
        below_autograd = BelowAutograd(model, shards)
        for number in range(3):
            with below_autograd.batch(may_record=False):
                assert goes_through_autograd() is not (is_spared and number > 0)


def test_autograd_is_back_after_an_exception() -> None:
    model, calls = build("olmoe"), []

    def fail_in_the_last(*_: Any) -> None:
        calls.append(goes_through_autograd())
        if len(calls) == N_BATCHES:
            raise RuntimeError("injected")

    model.model.layers[1].register_forward_pre_hook(fail_in_the_last)
    with pytest.raises(RuntimeError, match="injected"):
        probe_of(model).measure()
    assert calls[-1] is False
    assert goes_through_autograd()
    x = torch.ones(2, requires_grad=True)
    (x * x).sum().backward()
    assert x.grad is not None


def test_a_write_to_a_parameter_is_reported_though_later_batches_are_spared() -> None:
    model = build("olmoe")

    def write(module: Any, *_: Any) -> None:
        with torch.no_grad():
            module.weight.mul_(1.0)

    model.model.norm.register_forward_pre_hook(write)
    with pytest.raises(ProbeError, match=r"wrote to parameters, which cannot be undone: model\.norm\.weight"):
        probe_of(model).measure()
