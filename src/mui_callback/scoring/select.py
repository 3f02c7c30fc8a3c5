"""Which neurons of a layer are a sample's key neurons."""

from __future__ import annotations

from mui_callback.scoring.contributions import LayerScores, Responses
from mui_callback.scoring.topk import Candidates, merge_candidates, top_entries


def key_entries_per_sample(n_neurons: int, top_fraction: float) -> int:
    """k = max(1, ⌊fraction · neurons of the layer⌋): the entries of a layer that make a sample's key neurons."""
    # a product like 0.001 · 3000 may fall short of the whole number by a rounding error
    return max(1, int(top_fraction * n_neurons + 1e-9))


def select_key_entries(scores: LayerScores, tokens: Responses, n_neurons: int, k: int) -> Candidates:
    """The k highest contributions of each sample over all (position, expert, neuron) of one layer.

    One neuron may fill several entries, so a sample has at most k key neurons in a layer. This is the ``topk`` rule of
    MUI-Eval and the 0.1 % of arXiv 2509.23933.

    Returns:
        Entries whose ``place`` is ``position · n_neurons + neuron``.
    """
    found = []
    for part in scores.parts:
        order_S = tokens.order_R[part.token_S]
        found.append(
            top_entries(
                part.score_SW,
                tokens.row_R[part.token_S],
                order_S * part.rows_per_token + part.rank_S,
                order_S * n_neurons + part.first_neuron_S,
                n_samples=tokens.n_rows,
                n_slots=tokens.n_orders * part.rows_per_token,
                k=k,
            )
        )
    return merge_candidates(found, k)
