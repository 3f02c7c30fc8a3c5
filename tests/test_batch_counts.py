"""What waits in a batch, and what is left of it when something goes wrong."""

from __future__ import annotations

import gc
import weakref
from unittest.mock import patch

import numpy as np
import torch

from mui_callback.forgiving import attempt
from mui_callback.layout import ExpertLayout, LayerShape
from mui_callback.probe.capture import Reading
from mui_callback.rules import Rule
from mui_callback.scoring import batch_counts
from mui_callback.scoring.batch_counts import BatchCounts
from mui_callback.scoring.contributions import ExpertScores, LayerScores, Responses
from mui_callback.scoring.device_counts import DeviceCounts
from mui_callback.scoring.layer_rows import LayerRows
from mui_callback.scoring.rows import Contributions, Summary

N_LAYERS = 4


def counts() -> DeviceCounts:
    layout = ExpertLayout([LayerShape(number, "", 1, 3) for number in range(N_LAYERS)])
    rules = [Rule.parse("top_fraction=0.5")]
    return DeviceCounts(
        layout, np.zeros(1, dtype=np.int64), n_tasks=1, n_choices=0, rules=rules, device=torch.device("cpu")
    )


def batch(of: DeviceCounts) -> BatchCounts:
    none = torch.zeros(1, dtype=torch.int64)
    responses = Responses(row_R=none, order_R=none, n_rows=1, n_orders=1)
    return BatchCounts(of, responses, none, [None] * N_LAYERS)


def layer() -> LayerScores:
    none = torch.zeros(1, dtype=torch.int64)
    return LayerScores((ExpertScores(Contributions(torch.ones(1, 3), torch.ones(1, 3)), none, none, none, 1),))


def test_more_that_are_not_finite_than_32_bits_hold() -> None:
    summary = Summary(torch.zeros(1), torch.full((1, 1), float("-inf")), torch.tensor(2**30))
    of = counts()
    one = batch(of)
    with patch.object(Contributions, "summary", lambda self: summary):
        for number in range(N_LAYERS):
            one.add_layer(number, layer())
    one.finish()
    assert int(of.not_finite) == N_LAYERS * 2**30


def test_what_waits_is_let_go_when_looking_at_it_fails() -> None:
    reading, one = Reading([]), batch(counts())
    layers = [layer() for _ in range(N_LAYERS)]
    held = [weakref.ref(scores.parts[0].rows.act) for scores in layers]
    with patch.object(batch_counts, "can_wait", lambda parts: True), patch.object(LayerRows, "use", _out_of_memory):
        for number in range(N_LAYERS):
            _, error = attempt(lambda number=number: one.add_layer(number, layers.pop(0)))
            assert (error is None) == (number < N_LAYERS - 1)  # nothing is left to be looked at behind the last layer
            reading.note(error)
    del error
    gc.collect()
    assert isinstance(reading.error, torch.OutOfMemoryError)
    assert [one() for one in held] == [None] * N_LAYERS


def _out_of_memory(rows: LayerRows, tokens: Responses) -> None:
    raise torch.OutOfMemoryError("out of memory")
