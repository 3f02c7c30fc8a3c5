"""Reading raw contributions out of a pass, for comparison with an oracle."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from mui_callback.experts.discover import find_expert_layers
from mui_callback.experts.layer import layout_of
from mui_callback.parallel.shards import Shards
from mui_callback.probe.batches import make_batches
from mui_callback.probe.capture import Reading, instrument
from mui_callback.probe.device_batch import to_device
from mui_callback.probe.freeze import frozen
from mui_callback.probe.head import LanguageModelHead
from mui_callback.probe.samples import TokenSample
from mui_callback.probe.score_layer import LayerReader
from mui_callback.scoring.contributions import LayerScores


def layer_scores(
    model: nn.Module, samples: list[TokenSample], *, conservation: bool = False, dense: bool = False
) -> Any:
    """Per layer and sample: (response position, expert, neuron) → contribution; or the identity's two sides."""
    layers = find_expert_layers(model, dense=dense)
    shapes = layout_of(layers).layers
    found: list[list[dict[tuple[int, str, int], float]]] = [[{} for _ in samples] for _ in layers]
    totals: list[list[torch.Tensor]] = [[] for _ in layers]
    outputs: list[list[torch.Tensor]] = [[] for _ in layers]
    head = LanguageModelHead(model)
    device = head.weight_VD.device
    batch: Any = None

    def consume(layer: int, scores: LayerScores) -> None:
        shape = shapes[layer]
        names = [f"E{e:03d}" for e in range(shape.n_routed)]
        names += [f"S{s + 1:03d}" for s in range(len(shape.shared_widths))]
        owner = [(name, j) for name, width in zip(names, shape.widths, strict=True) for j in range(width)]
        for part in scores.parts:
            for s, token in enumerate(part.token_S.tolist()):
                sample = int(batch.sample_B[batch.tokens.row_R[token]])
                for w, value in enumerate(part.rows.all()[s].tolist()):
                    expert, neuron = owner[int(part.first_neuron_S[s]) + w]
                    found[layer][sample][int(batch.tokens.order_R[token]), expert, neuron] = value
        if conservation:
            assert scores.output_R is not None
            assert scores.made_R is not None
            totals[layer].append(scores.made_R)
            outputs[layer].append(scores.output_R)

    reading = Reading([LayerReader(layer) for layer in layers])
    with frozen(model), instrument(reading):
        for host_batch in make_batches(samples, batch_tokens=40):
            batch = to_device(host_batch, device)
            readout_RD = head.rows([host_batch.target], Shards(), device)
            tokens, readout = partial(_same, batch.tokens), partial(_same, readout_RD)
            with reading.batch(tokens, readout_RD, readout, consume, check=conservation, learn=conservation):
                head.logits(batch)
    if reading.error is not None:
        raise reading.error
    if conservation:
        return [torch.cat(parts) for parts in totals], [torch.cat(parts) for parts in outputs]
    return found


def _same(value: Any, layer: int) -> Any:
    return value


def assert_conserved(model: nn.Module, samples: list[TokenSample], *, dense: bool = False) -> None:
    """Σ f is the output of each layer, less what no neuron made."""
    totals, outputs = layer_scores(model, samples, conservation=True, dense=dense)
    assert totals
    for total, output in zip(totals, outputs, strict=True):
        assert torch.linalg.norm(total - output) < 1e-5 * torch.linalg.norm(output)
