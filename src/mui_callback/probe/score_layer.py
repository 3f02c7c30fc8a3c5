"""From what a layer's experts did to the contributions of its neurons.

What lies between the output of an expert and the output of its MoE layer (a gate on the shared expert, a scaling
factor, a projection out of a latent space) is linear in the former. Its transpose, applied to the unembedding row of
the target, gives the *readout* in front of it, so that for any architecture

    G · ⟨W_d[:, j], W_head[y]⟩ = ⟨W_d[:, j], readout⟩.

Shapes: T positions of the batch (flattened), K experts of a token, R scored tokens, S = R·K rows, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mui_callback.errors import ProbeError
from mui_callback.experts.discover import ExpertLayer
from mui_callback.experts.shared import SharedExperts
from mui_callback.experts.stacked import RoutedRows, StackedExperts
from mui_callback.scoring.contributions import ExpertScores, LayerScores, ScoredTokens, contributions, only_finite


@dataclass
class LayerTrace:
    """What the experts of one layer left in one forward pass; shared experts by their path."""

    rows: RoutedRows | None = None
    routed_out: Tensor | None = None
    """Output of the routed experts, ``[T, D]``."""
    shared_act: dict[str, Tensor] = field(default_factory=dict)
    """Activations in front of the down projection, ``[T, W]``."""
    shared_out: dict[str, Tensor] = field(default_factory=dict)
    """Outputs of the shared experts."""


def score_layer(
    layer: ExpertLayer,
    trace: LayerTrace,
    out: Tensor,
    readout_TD: Tensor,
    tokens: ScoredTokens,
    *,
    with_output: bool = False,
) -> LayerScores:
    """The contributions of all neurons of a layer to the scored tokens.

    Args:
        layer: the layer.
        trace: what its experts left; with a recorded tail where ``layer.scope_is_moe``.
        out: output of its scope.
        readout_TD: unembedding row of the token that each position predicts, zero where none is scored.
        tokens: the scored tokens.
        with_output: also compute what the conservation identity compares them with.

    Raises:
        ProbeError: an expert did not run, or not on the positions of the batch.
    """
    rows, routed_out = _check_complete(layer, trace, tokens)
    leaves = [routed_out, *(trace.shared_out[shared.path] for shared in layer.shared)]
    readouts = _readouts(leaves, out if layer.scope_is_moe else None, readout_TD, tokens)
    with torch.no_grad(), torch.autocast(out.device.type, enabled=False):
        parts = [_score_routed(layer.routed, rows, readouts[0], tokens)]
        first_neuron = layer.shape.n_routed * layer.shape.routed_width
        for shared, readout_RD in zip(layer.shared, readouts[1:], strict=True):
            act_RW = trace.shared_act[shared.path][tokens.position_R]
            parts.append(_score_shared(shared, act_RW, readout_RD, first_neuron))
            first_neuron += shared.width
        if not with_output:
            return LayerScores(tuple(parts))
        outputs = [out] if layer.scope_is_moe else leaves
        output_R = torch.stack([_inner(output, readout_TD, tokens) for output in outputs]).sum(0)
        return LayerScores(
            tuple(parts),
            output_R=output_R,
            bias_R=_output_biases(layer, rows, readouts, tokens),
        )


def _check_complete(layer: ExpertLayer, trace: LayerTrace, tokens: ScoredTokens) -> tuple[RoutedRows, Tensor]:
    where = f"layer {layer.shape.layer} ({layer.shape.path})"
    if trace.rows is None or trace.routed_out is None:
        raise ProbeError(
            f"{where} ran without calling its experts through transformers' experts interface. "
            "Was its forward replaced, by a kernel from the hub for example?"
        )
    expected, seen = tokens.n_rows * tokens.length, trace.rows.expert_TK.shape[0]
    if seen != expected:
        raise ProbeError(
            f"{where}: expected its experts to see the {expected} positions of the batch, one row each, got {seen}."
        )
    for shared in layer.shared:
        if shared.path not in trace.shared_out or shared.path not in trace.shared_act:
            raise ProbeError(f"{where} ran without calling its shared experts {shared.path}.")
    return trace.rows, trace.routed_out


def _readouts(leaves: list[Tensor], out: Tensor | None, readout_TD: Tensor, tokens: ScoredTokens) -> list[Tensor]:
    """The unembedding rows as seen from the output of each kind of experts, ``[R, D]`` each."""
    if out is None:  # the outputs are added up as they are
        return [readout_TD[tokens.position_R]] * len(leaves)
    seen = torch.autograd.grad(out, leaves, readout_TD.to(out.dtype).view_as(out))
    return [leaf.reshape(-1, leaf.shape[-1])[tokens.position_R] for leaf in seen]


def _score_routed(routed: StackedExperts, rows: RoutedRows, readout_RD: Tensor, tokens: ScoredTokens) -> ExpertScores:
    expert_RK, by_expert_RK = rows.expert_TK[tokens.position_R].sort(dim=1)
    weight_RK = rows.weight_TK[tokens.position_R].gather(1, by_expert_RK)
    row_RK = rows.row_TK[tokens.position_R].gather(1, by_expert_RK)
    top_k = expert_RK.shape[1]

    expert_S, order_S = expert_RK.flatten().sort(stable=True)
    token_S, rank_S = order_S // top_k, order_S % top_k
    row_S = row_RK.flatten()[order_S]
    is_row_S = expert_S < routed.n_experts
    expert_S = expert_S.clamp(max=routed.n_experts - 1)
    readout_SD = readout_RD[token_S]
    if rows.raw_SD is not None:
        readout_SD = routed.through_norm(readout_SD, rows.raw_SD[row_S])
    score_SI, n_not_finite = only_finite(
        contributions(rows.act_SI[row_S], routed.project(rows, readout_SD, expert_S), weight_RK.flatten()[order_S])
    )
    return ExpertScores(
        score_SI.masked_fill_(~is_row_S.unsqueeze(-1), float("-inf")),
        token_S,
        first_neuron_S=expert_S * routed.width,
        rank_S=rank_S,
        rows_per_token=top_k,
        expert_width=routed.width,
        n_not_finite=n_not_finite,
        is_row_S=is_row_S,
    )


def _score_shared(shared: SharedExperts, act_RW: Tensor, readout_RD: Tensor, first_neuron: int) -> ExpertScores:
    score_RW, n_not_finite = only_finite(contributions(act_RW, shared.project(readout_RD)))
    token_R = torch.arange(score_RW.shape[0], device=score_RW.device)
    return ExpertScores(
        score_RW,
        token_R,
        first_neuron_S=torch.full_like(token_R, first_neuron),
        rank_S=torch.zeros_like(token_R),
        rows_per_token=1,
        expert_width=shared.expert_width,
        n_not_finite=n_not_finite,
    )


def _inner(out: Tensor, readout_TD: Tensor, tokens: ScoredTokens) -> Tensor:
    """⟨output, readout⟩ of each scored token, float32 ``[R]``."""
    out_RD = out.detach().reshape(-1, out.shape[-1])[tokens.position_R]
    return (out_RD.float() * readout_TD[tokens.position_R].float()).sum(-1)


def _output_biases(layer: ExpertLayer, rows: RoutedRows, readouts: list[Tensor], tokens: ScoredTokens) -> Tensor:
    """What the output biases of all experts add to ⟨output, readout⟩, float32 ``[R]``."""
    bias_R = torch.zeros(readouts[0].shape[0], device=readouts[0].device)
    expert_RK = rows.expert_TK[tokens.position_R].clamp(max=layer.routed.n_experts - 1)
    weight_RK = rows.weight_TK[tokens.position_R].float()
    for expert_R, weight_R in zip(expert_RK.unbind(1), weight_RK.unbind(1), strict=True):
        routed_R = layer.routed.output_bias(readouts[0], expert_R)
        if routed_R is not None:
            bias_R += routed_R * weight_R
    for shared, readout_RD in zip(layer.shared, readouts[1:], strict=True):
        shared_R = shared.output_bias(readout_RD)
        if shared_R is not None:
            bias_R += shared_R
    return bias_R
