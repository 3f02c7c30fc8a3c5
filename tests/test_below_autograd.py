"""Batches that are spared autograd: which these are, that nobody notices, and that what is kept of them can train."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention

from mui_callback import MUIProbe, ProbeSet
from mui_callback.errors import ProbeError
from mui_callback.parallel.shards import Shards
from mui_callback.probe.below_autograd import BelowAutograd
from mui_callback.probe.head import LanguageModelHead
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


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each batch goes through autograd."""
    found: list[bool] = []
    logits = LanguageModelHead.logits

    def watched(*args: Any) -> Tensor:
        found.append(goes_through_autograd())
        return logits(*args)

    monkeypatch.setattr(LanguageModelHead, "logits", watched)
    return found


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_batches_are_spared_after_one_in_which_nothing_was_recorded(
    family: str, seen: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)
    probe = probe_of(model)
    spared = [probe.measure(), probe.measure()]
    assert seen == [True, True] + [False] * (N_BATCHES - 2) + [True] + [False] * (N_BATCHES - 1)
    assert goes_through_autograd()
    monkeypatch.setattr(BelowAutograd, "batch", lambda self, *, may_record: nullcontext())
    seen.clear()
    unspared = probe_of(model).measure()
    assert seen == [True] * N_BATCHES
    for report in spared:
        assert_same_to_the_bit(report, unspared)


def test_no_batch_is_spared_where_a_gate_behind_the_experts_is_asked_in_each(seen: list[bool]) -> None:
    probe_of(build("qwen2_moe")).measure()
    assert seen == [True] * N_BATCHES


class Own(nn.Linear):
    """A module of the user's."""


class Quantised(nn.Parameter):
    """Tensors that are no plain ones."""


class Watching(TorchDispatchMode):
    """Does nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def passes_on(*_: Any) -> None:
    """A hook of the user's."""


def with_a_module(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.lm_head.__class__ = Own


def with_a_hook(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.model.norm.register_forward_pre_hook(passes_on)


def with_a_hook_on_all(model: Any, patch: pytest.MonkeyPatch) -> None:
    register_module_forward_hook(passes_on)


def with_a_forward(model: Any, patch: pytest.MonkeyPatch) -> None:
    attention = model.model.layers[0].self_attn
    forward = attention.forward
    attention.forward = MethodType(lambda self, *args, **options: forward(*args, **options), attention)


def with_a_forward_of_a_class(model: Any, patch: pytest.MonkeyPatch) -> None:
    forward = OlmoeAttention.forward
    patch.setattr(OlmoeAttention, "forward", lambda self, *args, **options: forward(self, *args, **options))


def with_a_script(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.lm_head = torch.jit.trace(model.lm_head, torch.ones(1, 24))


def with_a_hook_of_nowhere(model: Any, patch: pytest.MonkeyPatch) -> None:
    def hook(*_: Any) -> None:
        """Made by code that was generated."""

    hook.__module__ = None  # type: ignore[assignment]
    model.model.norm.register_forward_hook(hook)


def with_another_torch(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.delattr(torch._C, "_AutoDispatchBelowADInplaceOrView")


def with_a_buffer(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.model.norm.register_buffer("scale", Quantised(torch.ones(1)))


def with_a_parameter(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.model.norm.weight = Quantised(torch.ones(24))


def with_zero3(model: Any, patch: pytest.MonkeyPatch) -> None:
    weight: Any = model.model.norm.weight
    weight.ds_shape, weight.ds_status = weight.shape, None


def in_step(model: Any, patch: pytest.MonkeyPatch) -> Shards:
    return Shards(in_step=True)


def unchanged(model: Any, patch: pytest.MonkeyPatch) -> None:
    """What `build` makes."""


@pytest.mark.parametrize(
    "change",
    [
        unchanged,
        with_a_module,
        with_a_hook,
        with_a_hook_on_all,
        with_a_forward,
        with_a_forward_of_a_class,
        with_a_script,
        with_a_hook_of_nowhere,
        with_another_torch,
        with_a_buffer,
        with_a_parameter,
        with_zero3,
        in_step,
    ],
)
def test_a_model_with_anything_that_is_not_known_is_never_spared(
    change: Callable[[Any, pytest.MonkeyPatch], Shards | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("olmoe")
    before = dict(nn.modules.module._global_forward_hooks)
    try:
        below_autograd = BelowAutograd(model, change(model, monkeypatch) or Shards())
    finally:
        nn.modules.module._global_forward_hooks.clear()
        nn.modules.module._global_forward_hooks.update(before)
    for number in range(3):
        with below_autograd.batch(may_record=False):
            assert goes_through_autograd() is not (change is unchanged and number > 0)


def test_a_batch_that_may_be_recorded_or_is_watched_is_not_spared_nor_the_next_one() -> None:
    below_autograd, seen = BelowAutograd(nn.Linear(2, 2), Shards()), []
    for what in ("", "", "watched", "", "", "recorded", "", ""):
        watching = Watching() if what == "watched" else nullcontext()
        with watching, below_autograd.batch(may_record=what == "recorded"):
            seen.append(goes_through_autograd())
    assert seen == [True, False, True, True, False, True, True, False]


def test_what_is_recorded_ends_it() -> None:
    below_autograd = BelowAutograd(nn.Linear(2, 2), Shards())
    for _ in range(3):
        with below_autograd.batch(may_record=False):
            assert goes_through_autograd()
            x = torch.ones(3, requires_grad=True)
            (grad,) = torch.autograd.grad((x * x).sum(), x)
            assert torch.equal(grad, torch.full((3,), 2.0))


def test_what_is_kept_of_such_a_batch_can_train() -> None:
    linear = nn.Linear(3, 3)
    below_autograd = BelowAutograd(linear, Shards())
    for _ in range(2):
        with torch.no_grad(), below_autograd.batch(may_record=False):
            kept = torch.ones(3).mul_(0.5)[:]
    assert not kept.is_inference()
    (linear(kept) * kept).sum().backward()
    assert linear.weight.grad is not None
    assert torch.equal(linear.weight.grad, torch.full((3, 3), 0.25))
    kept.requires_grad_()
    (kept * kept).sum().backward()
    assert torch.equal(kept.grad, torch.ones(3))


def test_autograd_is_back_after_an_exception(seen: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_in_the_last(*_: Any) -> Tensor:
        if len(seen) == N_BATCHES:
            raise RuntimeError("injected")
        return forward(*_)

    forward = torch.nn.functional.embedding
    monkeypatch.setattr(torch.nn.functional, "embedding", fail_in_the_last)
    with pytest.raises(RuntimeError, match="injected"):
        probe_of(build("olmoe")).measure()
    assert seen[-1] is False
    assert goes_through_autograd()
    x = torch.ones(2, requires_grad=True)
    (x * x).sum().backward()
    assert x.grad is not None


def test_a_write_to_a_parameter_in_the_last_batch_is_reported() -> None:
    model = build("olmoe")

    def write(module: Any, args: Any) -> None:
        if args[0].shape[1] == LENGTHS[0]:
            with torch.no_grad():
                module.weight.mul_(1.0)

    model.model.norm.register_forward_pre_hook(write)
    with pytest.raises(ProbeError, match=r"wrote to parameters, which cannot be undone: model\.norm\.weight"):
        probe_of(model).measure()
