"""What one pass learned of how the layers are read serves the next ones, which check that contributions add up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from torch import Tensor, nn

import tiny
from mui_callback import MUIProbe, MUIReport, ProbeSet
from mui_callback.errors import ProbeError
from mui_callback.experts.tail import Tail
from mui_callback.scoring.rows import Contributions
from plain_moe import build_plain
from test_repeated import assert_same_to_the_bit
from tiny_samples import make_samples

sums = Contributions.sums


def make_probe(model: nn.Module) -> MUIProbe:
    return MUIProbe(model, ProbeSet({"task": make_samples()}), batch_tokens=40, rules="top_fraction=0.02")


@pytest.fixture
def located(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A layer for each time that its tail was asked for the tokens of its rows."""
    layers: list[str] = []
    locate = Tail.locate

    def note(tail: Tail, *args: Any) -> None:
        layers.append(tail.where)
        locate(tail, *args)

    monkeypatch.setattr(Tail, "locate", note)
    return layers


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_the_tail_is_asked_in_the_first_pass_only(family: str, located: list[str]) -> None:
    probe = make_probe(tiny.build(family))
    first, asked = probe.measure(), len(located)
    second = probe.measure()
    assert asked == len(located) == len(first.layout.layers)
    assert_same_to_the_bit(first, second)


def test_where_the_order_is_not_known_it_is_asked_in_every_batch(located: list[str]) -> None:
    probe = make_probe(build_plain("qwen2"))
    first, asked = probe.measure(), len(located)
    assert asked == len(first.layout.layers) * len(probe._rounds) > len(first.layout.layers)
    probe.measure()
    assert len(located) == 2 * asked


@contextmanager
def in_reverse(modules: list[nn.Module]) -> Iterator[None]:
    """These see the positions in reverse; what they return is in order again, to the bit."""

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].flip(-2), *args[1:])

    def after(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out.flip(-2)

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(module.register_forward_pre_hook(before))
            stack.enter_context(module.register_forward_hook(after))
        yield


def assert_same_key_neurons(one: MUIReport, other: MUIReport) -> None:
    for rule in one.rules:
        assert (one.key_neuron_sets(rule) != other.key_neuron_sets(rule)).nnz == 0
    assert one.counts.sample_mass == pytest.approx(other.counts.sample_mass, rel=1e-5)


def test_a_model_that_is_changed_in_between_is_found_out_and_learned_anew(located: list[str]) -> None:
    model = tiny.build("qwen2_moe")
    probe, shared = make_probe(model), [m for name, m in model.named_modules() if name.endswith(".shared_expert")]
    first, asked = probe.measure(), len(located)
    with in_reverse(shared):
        for _ in range(2):
            located.clear()
            assert_same_key_neurons(first, probe.measure())
            assert len(located) == asked * len(probe._rounds)  # their order is not that of the positions
    located.clear()
    assert_same_key_neurons(first, probe.measure())
    assert len(located) == asked


def test_one_that_stays_wrong_is_told(located: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    probe = make_probe(tiny.build("qwen2_moe"))
    probe.measure()
    monkeypatch.setattr(Contributions, "sums", lambda rows: 2 * sums(rows))
    with pytest.raises(ProbeError, match="do not add up"):
        probe.measure()
    monkeypatch.undo()
    probe.measure()


def test_verify_learns_anew_and_leaves_what_is_known(located: list[str]) -> None:
    probe = make_probe(tiny.build("qwen2_moe"))
    probe.measure()
    asked = len(located)
    probe.verify()
    assert len(located) == 2 * asked
    probe.measure()
    assert len(located) == 2 * asked


def test_nothing_is_kept_of_what_has_no_weight(located: list[str]) -> None:
    model = tiny.build("qwen2_moe")
    gates = [m for name, m in model.named_modules() if name.endswith(".shared_expert_gate")]
    for gate in gates:
        nn.init.constant_(gate.weight, 0.0)
    probe = make_probe(model)
    with ExitStack() as stack:
        for gate in gates:  # a sigmoid of this is zero
            stack.enter_context(gate.register_forward_hook(lambda gate, args, out: out - 1e4))
        probe.measure()
    asked = len(located)
    probe.measure()
    assert len(located) == 2 * asked > 0
