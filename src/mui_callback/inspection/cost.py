"""What a probe would cost, counted in operations and bytes before it is run."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import nn

from mui_callback.experts.layer import ExpertLayer
from mui_callback.inspection.describe import LayerDescription
from mui_callback.parallel.shards import Shards
from mui_callback.probe.batches import Batch, make_batches
from mui_callback.probe.choice_plan import ChoicePlan
from mui_callback.probe.choice_runs import PromptSharing
from mui_callback.probe.encode import EncodedProbeSet, Tokenizer, encode
from mui_callback.probe.head import LanguageModelHead
from mui_callback.probe.model_config import decoder_start, longest_sequence
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.rules import Rule
from mui_callback.settings import ProbeSettings


@dataclass(frozen=True)
class ProbeCost:
    """The cost of one probe."""

    samples: int
    response_tokens: int
    """Tokens that are scored."""
    positions: int
    """Positions in all forward passes, padding and the choices of samples included."""
    passes: int
    """Forward passes."""
    forward_flops: float
    """Operations of the matrix products of the forward passes, 2 for each weight that a position uses; attention
    between positions is left out."""
    score_flops: float
    """Operations of the one product more that the scores take in each layer."""
    score_bytes: int
    """The two factors of the scores of the largest batch in the widest layer, in the type of the weights. On a GPU,
    those of layers before it may wait beside it, up to 384 MiB."""
    host_bytes: int
    """What goes from the device to the host, once; with the rule ``topscore``, which takes as many neurons as there are
    above its threshold, without the key neurons."""


def cost_of(
    model: nn.Module,
    layers: tuple[ExpertLayer, ...],
    described: list[LayerDescription],
    tokenizer: Tokenizer | None,
    settings: ProbeSettings,
    probe_set: ProbeSet | None = None,
) -> ProbeCost:
    """What a probe set takes; without a tokenizer, a token is taken for a byte.

    Args:
        model: see `probe_cost`, as the following.
        layers: …
        described: …
        tokenizer: of the model.
        settings: of the probe.
        probe_set: the samples; the built-in ones where it is None.
    """
    start = decoder_start(model)
    probe_set = probe_set or ProbeSet.builtin(only_with_prompt=start is not None)
    max_length = longest_sequence(model, settings.max_length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which samples are cut is said when they are probed
        encoded = encode(probe_set, tokenizer or _bytes, max_length, decoder_start=start)
    batches = make_batches(encoded.samples, settings.batch_tokens)
    share = PromptSharing.of(model, Shards()).is_possible
    choices = ChoicePlan.of(encoded, settings.batch_tokens, Shards(), share=share)
    return probe_cost(model, layers, described, encoded, batches, [*choices.passes()], settings.parsed_rules[0])


def probe_cost(
    model: nn.Module,
    layers: tuple[ExpertLayer, ...],
    described: list[LayerDescription],
    encoded: EncodedProbeSet,
    batches: list[Batch],
    choice_batches: list[Batch],
    rule: Rule,
) -> ProbeCost:
    """Count what a probe of these batches takes.

    Args:
        model: the model, with its embedding; may be on the meta device.
        layers: what `find_expert_layers` found.
        described: their description.
        encoded: the probe set.
        batches: its samples in batches.
        choice_batches: the choices of its samples, and prompts of theirs, in batches; they run forward only.
        rule: which contributions make key neurons.
    """
    everything = [*batches, *choice_batches]
    positions = sum(batch.n_positions for batch in everything)
    scored = sum(len(batch.target) for batch in batches)
    widths = [(row.top_k or 1) * row.shape.routed_width + sum(row.shape.shared_widths) for row in described]
    entries = {
        "top_fraction": sum(row.key_entries or 0 for row in described),
        "global_topk": int(rule.value),
        "topscore": 0,
    }[rule.kind]
    experts = sum(row.shape.n_experts for row in described)
    return ProbeCost(
        samples=len(encoded.samples),
        response_tokens=sum(int(sample.scored.sum()) for sample in encoded.samples),
        positions=positions,
        passes=len(everything),
        forward_flops=2.0 * _active_weights(model, layers, described) * positions,
        score_flops=2.0 * LanguageModelHead(model).shape[1] * sum(widths) * scored,
        score_bytes=2
        * LanguageModelHead(model).weight_VD.element_size()
        * max(widths)
        * max((len(batch.target) for batch in batches), default=0),
        host_bytes=16 * len(encoded.task_names) * experts + (40 + 4 * entries) * len(encoded.samples),
    )


def _active_weights(model: nn.Module, layers: tuple[ExpertLayer, ...], described: list[LayerDescription]) -> float:
    """Weights that one position is multiplied with: all but the embeddings, and of routed experts its own.

    Of experts that `register_adapter` names, only the down projections are known to be theirs.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    embeddings.discard(id(LanguageModelHead(model).weight_VD))  # where it is tied
    active = float(sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in embeddings))
    for layer, row in zip(layers, described, strict=True):
        if row.shape.n_routed > 1:
            inside = [p for module in layer.experts[0].modules for p in module.parameters()]
            inside += [p for p in layer.scope.parameters() if p.dim() == 3 and p.shape[0] >= row.shape.n_routed]
            routed = {id(p): p.numel() for p in inside}
            active -= sum(routed.values()) * (1 - (row.top_k or 1) / row.shape.n_routed)
    return active


def _bytes(text: str) -> list[int]:
    return list(text.encode())
