"""Counting made-up contributions under every rule, where ties are the rule, against sorting in plain Python."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mui_callback.counts import ProbeCounts
from mui_callback.layout import ExpertLayout, LayerShape
from mui_callback.rules import Rule
from mui_callback.scoring import batch_counts
from mui_callback.scoring.batch_counts import BatchCounts
from mui_callback.scoring.contributions import ExpertScores, LayerScores, Responses
from mui_callback.scoring.device_counts import DeviceCounts
from mui_callback.scoring.key_marks import KeyMarks
from mui_callback.scoring.layer_rows import LayerRows
from mui_callback.scoring.rows import NOTHING, Contributions
from mui_callback.scoring.select import NeuronScores, neurons_above, thresholds
from mui_callback.scoring.topk import Candidates
from naive_rules import naive_entries

CPU = torch.device("cpu")
KINDS = {
    "ties": [-2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 2.0**100],
    "negative": [-4.0, -3.0, -2.0, -1.0],
    "not finite": [-1.0, 1.0, math.nan, math.inf, -math.inf],
    "nothing finite": [math.nan, math.inf, -math.inf],
}
RULES = ("top_fraction=0.05", "topscore=0.5", "top_fraction=0.3", "topscore=1", "global_topk=1", "global_topk=20")

Entry = tuple[int, int, int]  # position in the response, expert, neuron


@dataclass
class Made:
    """Contributions of some samples, and all entries of each of them."""

    layout: ExpertLayout
    length_N: list[int]
    """Response tokens."""
    kind_N: list[str]
    """What the scores of a sample are drawn from."""
    rng: np.random.Generator
    entries: list[list[list[tuple[float, Entry]]]] = field(default_factory=list)
    """By sample and layer; what does not count is left out."""
    n_rows: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Tokens of each sample in each expert of all layers, ``[N, E]``."""

    def __post_init__(self) -> None:
        self.entries = [[[] for _ in self.layout.layers] for _ in self.length_N]
        self.n_rows = np.zeros((len(self.length_N), self.layout.n_experts), dtype=np.int64)

    def responses(self, samples: list[int]) -> Responses:
        """Those of a batch."""
        lengths = [self.length_N[sample] for sample in samples]
        order_R = torch.tensor([n for length in lengths for n in range(length)])
        row_R = torch.arange(len(samples)).repeat_interleave(torch.tensor(lengths))
        return Responses(row_R=row_R, order_R=order_R, n_rows=len(samples), n_orders=max(lengths))

    def layer(self, number: int, samples: list[int]) -> LayerScores:
        """One layer in a batch: a part for the routed experts, and one for the shared ones of each width."""
        shape = self.layout.layers[number]
        experts = list(zip(shape.widths, np.cumsum([0, *shape.widths]).tolist(), strict=False))
        groups = [list(range(shape.n_routed))] + [
            [e for e in range(shape.n_routed, shape.n_experts) if experts[e][0] == width]
            for width in dict.fromkeys(shape.shared_widths)
        ]
        return LayerScores(tuple(self._part(number, samples, group, experts) for group in groups))

    def _part(self, number: int, samples: list[int], group: list[int], experts: list[tuple[int, int]]) -> ExpertScores:
        tokens = [(sample, order) for sample in samples for order in range(self.length_N[sample])]
        share = self.rng.choice([0.0, 0.4, 1.0], p=[0.15, 0.6, 0.25])
        rows = [(t, e) for t in range(len(tokens)) for e in group if self.rng.random() < share]
        self.rng.shuffle(rows)
        width, shape = experts[group[0]][0], self.layout.layers[number]
        is_row = self.rng.random(len(rows)) < 0.8
        act, weight = np.ones((len(rows), width)), self.rng.choice([-1.0, 0.5, 1.0], len(rows))
        for s, (t, e) in enumerate(rows):
            sample, order = tokens[t]
            scores = self.rng.choice(KINDS[self.kind_N[sample]], width)
            act[s] = scores / weight[s]  # exact, and the weights' signs cancel
            if is_row[s]:
                expert = sum(one.n_experts for one in self.layout.layers[:number]) + e
                self.n_rows[sample, expert] += 1
                self.entries[sample][number] += [(float(f), (order, e, j)) for j, f in enumerate(scores)]
        rank = [sum(other == t and f < e for other, f in rows) for t, e in rows]
        assert shape.widths[group[0]] == width
        return ExpertScores(
            Contributions(
                torch.from_numpy(act).float(),
                torch.ones(len(rows), width, dtype=torch.bfloat16),
                torch.from_numpy(weight).float(),
                torch.from_numpy(is_row),
            ),
            token_S=torch.tensor([t for t, _ in rows], dtype=torch.int64),
            expert_S=torch.tensor([e for _, e in rows], dtype=torch.int64),
            rank_S=torch.tensor(rank, dtype=torch.int64),
            rows_per_token=len(group),
            first_expert=group[0],
            first_neuron=experts[group[0]][1],
        )


@st.composite
def made(draw: st.DrawFn, max_samples: int = 4) -> Made:
    experts = st.tuples(st.integers(1, 3), st.sampled_from([1, 3, 65]), st.sampled_from([(), (2,), (2, 2, 70), (130,)]))
    n_layers = draw(st.integers(1, 3))
    alike = draw(st.booleans())
    drawn = [draw(experts)] * n_layers if alike else [draw(experts) for _ in range(n_layers)]
    shapes = [LayerShape(number, "", *one) for number, one in enumerate(drawn)]
    n = draw(st.integers(1, max_samples))
    lengths = draw(st.lists(st.integers(1, 3), min_size=n, max_size=n))
    kinds = draw(st.lists(st.sampled_from(list(KINDS)), min_size=n, max_size=n))
    return Made(ExpertLayout(shapes), lengths, kinds, np.random.default_rng(draw(st.integers(0, 2**32 - 1))))


def expected_neurons(made: Made, rule: str, sample: int) -> list[int]:
    """Numbers on the neurons axis of all layers, ascending, by brute force."""
    layers = made.layout.layers
    n_neurons = [sum(layer.widths) for layer in layers]
    neurons = set()
    for number, (_, e, j) in naive_entries(rule, made.entries[sample], n_neurons):
        neurons.add(sum(n_neurons[:number]) + sum(layers[number].widths[:e]) + j)
    return sorted(neurons)


def counted(made: Made, rules: tuple[str, ...], batches: list[list[int]]) -> ProbeCounts:
    n = len(made.length_N)
    counts = DeviceCounts(
        made.layout,
        np.arange(n) % 2,
        n_tasks=2,
        n_choices=0,
        rules=[Rule.parse(rule) for rule in rules],
        device=CPU,
    )
    for samples in batches:
        batch = BatchCounts(counts, made.responses(samples), torch.tensor(samples), [None] * len(made.layout.layers))
        for number in range(len(made.layout.layers)):
            batch.add_layer(number, made.layer(number, samples))
        batch.finish()
    return counts.to_host()


@given(made(), st.permutations(RULES), st.integers(1, len(RULES)), st.data())
@settings(max_examples=80, deadline=None)
def test_key_neurons_are_those_of_a_sort_of_all_entries(
    made: Made, rules: list[str], n_rules: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(made.length_N))))
    cut = data.draw(st.integers(0, len(order) - 1))
    with pytest.MonkeyPatch.context() as patch:  # looked at and ranked layer by layer, some at a time, all at once
        can_wait = data.draw(st.booleans())
        patch.setattr(batch_counts, "can_wait", lambda parts: can_wait)
        patch.setattr(batch_counts, "alike", lambda parts: [part.rows.width for part in parts])  # for operators
        patch.setattr(batch_counts, "_SCANNED_TOGETHER", data.draw(st.sampled_from([2**30, 20_000, 0])))
        patch.setattr(batch_counts, "_RANKED_TOGETHER", data.draw(st.sampled_from([0, 2000, 2**26])))
        counts = counted(made, tuple(rules[:n_rules]), [part for part in (order[:cut], order[cut:]) if part])
    for rule, found in zip(rules, counts.key_sets, strict=False):
        ends = [0, *found.end.tolist()]
        assert ends[-1] == len(found.neuron)
        for sample, kind in enumerate(made.kind_N):
            neurons = found.neuron[ends[sample] : ends[sample + 1]].tolist()
            assert neurons == expected_neurons(made, rule, sample), (rule, sample, kind)
            assert not (neurons and kind == "nothing finite")


@given(made())
@settings(max_examples=40, deadline=None)
def test_mass_and_rows_are_those_of_a_loop(made: Made) -> None:
    counts = counted(made, RULES[:1], [list(range(len(made.length_N)))])
    shared = made.layout.is_shared
    mass = np.zeros((len(made.length_N), made.layout.n_experts))
    n_bad = 0
    for sample, layers in enumerate(made.entries):
        for number, entries in enumerate(layers):
            first = sum(layer.n_experts for layer in made.layout.layers[:number])
            for score, (_, e, _) in entries:
                n_bad += not math.isfinite(score)
                mass[sample, first + e] += abs(score) if math.isfinite(score) else 0.0
    assert int(counts.not_finite[0]) == n_bad
    for task in (0, 1):
        of_task = np.arange(len(mass)) % 2 == task
        assert counts.mass[task] == pytest.approx(mass[of_task].sum(0), rel=1e-6)
        assert np.array_equal(counts.routed[task], made.n_rows[of_task].sum(0))
    for number, is_kind in enumerate((~shared, shared)):
        assert counts.sample_mass[:, number] == pytest.approx(mass[:, is_kind].sum(1), rel=1e-6)


@given(made(max_samples=3), st.integers(1, 30), st.sampled_from([-2.0, -1.0, -0.0, 0.5, 1.0]))
@settings(max_examples=60, deadline=None)
def test_entries_and_neurons_of_a_layer_are_those_of_a_sort(made: Made, k: int, lowest: float) -> None:
    samples, shape = list(range(len(made.length_N))), made.layout.layers[0]
    rows = LayerRows.of([made.layer(0, samples).parts], made.responses(samples), shape.n_experts)
    first = np.cumsum([0, *shape.widths])
    found = rows.finalists(k, shape.n_neurons).entries(k)
    threshold_B = torch.full((len(samples),), lowest)
    threshold_B[0] = math.inf  # of a sample that has no highest score
    above = neurons_above(rows, 0, shape.n_neurons, threshold_B)
    pairs = list(zip(above.sample_M.tolist(), above.neuron_M.tolist(), above.score_M.tolist(), strict=True))
    assert pairs == sorted(pairs)
    for sample in samples:
        finite = [(f, entry) for f, entry in made.entries[sample][0] if math.isfinite(f)]
        best = sorted(finite, key=lambda pair: (-pair[0], pair[1]))[:k]
        assert found.score[sample].tolist() == [f for f, _ in best] + [NOTHING] * (k - len(best))
        places = [order * shape.n_neurons + int(first[e]) + j for _, (order, e, j) in best]
        assert found.place[sample, : len(best)].tolist() == places
        highest: dict[int, float] = {}
        for f, (_, e, j) in finite:
            highest[int(first[e]) + j] = max(f, highest.get(int(first[e]) + j, NOTHING))
        in_sample = {neuron: f for s, neuron, f in pairs if s == sample}
        assert in_sample == {neuron: f for neuron, f in highest.items() if f >= threshold_B[sample]}
        stricter = above.at_least(threshold_B + 0.5)
        of_stricter = stricter.neuron_M[stricter.sample_M == sample].tolist()
        assert of_stricter == [neuron for neuron, f in in_sample.items() if f >= threshold_B[sample] + 0.5]


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=5),
    st.floats(min_value=0, max_value=1, exclude_min=True),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
@settings(deadline=None)
def test_a_threshold_divides_float32_as_the_exact_product_does(
    highest: list[float], ratio: float, score: float
) -> None:
    found = thresholds(ratio, torch.tensor([*highest, NOTHING]))
    assert found.dtype == torch.float32
    assert found[-1] == math.inf
    for value, threshold in zip(highest, found.tolist(), strict=False):
        near = np.float32(ratio * value)
        for one in (score, value, *(np.nextafter(near, np.float32(end)) for end in (-np.inf, np.inf)), near):
            assert (float(one) >= threshold) == (float(one) >= ratio * value)


LAYOUT = ExpertLayout([LayerShape(0, "", 2, 2), LayerShape(1, "", 1, 3)])


@given(st.data(), st.sampled_from(["global_topk=1", "global_topk=3", "top_fraction=0.5", "top_fraction=1"]))
@settings(max_examples=60, deadline=None)
def test_marks_are_the_sets_of_what_was_added(data: st.DataObject, rule: str) -> None:
    marks, n_samples = KeyMarks(Rule.parse(rule), LAYOUT, CPU), 4
    expected: list[set[int]] = [set() for _ in range(n_samples)]
    values = st.sampled_from([-1.0, -0.0, 0.0, 1.0, NOTHING])
    for sample_B in data.draw(st.sampled_from([[[2, 0]], [[3], [1, 0]], [[0], [0]], []])):
        found = {}
        scores = {
            layer: [sorted(data.draw(st.lists(values, min_size=5, max_size=5)), reverse=True) for _ in sample_B]
            for layer in data.draw(st.sampled_from([[0, 1], [1], [0], []]))
        }
        places = {layer: [[7, 20, 41, 68, 69]] * len(sample_B) for layer in scores}
        found = {layer: Candidates(torch.tensor(scores[layer]), torch.tensor(places[layer])) for layer in scores}
        marks.add_entries(torch.tensor(sample_B), found)
        for b, sample in enumerate(sample_B):
            layers = [
                list(zip(scores[layer][b], [(p,) for p in places[layer][b]], strict=True)) if layer in scores else []
                for layer in (0, 1)
            ]
            for layer, (place,) in naive_entries(rule, layers, (4, 3)):
                expected[sample].add(place % (4, 3)[layer] + (0, 4)[layer])
    one_M = torch.tensor
    marks.add_neurons(one_M([1, 3]), 1, NeuronScores(one_M([0, 1, 1]), one_M([2, 0, 0]), one_M([1.0, 2.0, 3.0])))
    expected[1].add(4 + 2)
    expected[3].add(4 + 0)
    found_sets = marks.sets(n_samples)
    assert [set(part.tolist()) for part in np.split(found_sets.neuron, found_sets.end[:-1])] == expected
    assert len(found_sets.neuron) == sum(map(len, expected))
