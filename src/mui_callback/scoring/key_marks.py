"""The key neurons of all samples under one threshold rule, gathered on the device batch by batch.

Shapes: B samples of a batch, L layers, k entries of a sample in a layer, J neurons of all layers, N samples of the
probe, M pairs of a sample and a key neuron, or entries of a sample in all layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mui_callback.counts import KeySets
from mui_callback.layout import ExpertLayout
from mui_callback.parallel.peers import Peers
from mui_callback.rules import Rule
from mui_callback.scoring.rows import NOTHING
from mui_callback.scoring.select import NeuronScores
from mui_callback.scoring.topk import Candidates


class KeyMarks:
    """Pairs of a sample and a key neuron, as the numbers ``sample · J + neuron``; pairs may come more than once.

    Memory is 8 bytes for each entry that the rule takes, until the end of the pass.

    Args:
        rule: which entries are taken.
        layout: the numbering of the neurons.
        device: where the pairs are kept.
    """

    def __init__(self, rule: Rule, layout: ExpertLayout, device: torch.device) -> None:
        self.rule = rule
        self._n_neurons = [layer.n_neurons for layer in layout.layers]
        self._first = np.cumsum([0, *self._n_neurons]).tolist()
        self._pairs = [torch.zeros(0, dtype=torch.int64, device=device)]
        self._columns_of: dict[tuple[tuple[int, int], ...], tuple[Tensor, Tensor]] = {}

    @property
    def n_neurons(self) -> int:
        """J."""
        return int(self._first[-1])

    def add_entries(self, sample_B: Tensor, found: Mapping[int, Candidates]) -> None:
        """Take what the rule takes of the highest entries of each layer.

        Args:
            sample_B: number of each sample, int64 ``[B]``.
            found: by position of the layer, at least as many entries as `Rule.n_entries` says.
        """
        if not found:
            return
        by_layer = {
            layer: candidates.first(self.rule.n_entries(self._n_neurons[layer])) for layer, candidates in found.items()
        }
        score_BM = torch.cat([part.score for part in by_layer.values()], dim=1)
        n_neurons_M, first_M = self._columns({layer: part.score.shape[1] for layer, part in by_layer.items()})
        neuron_BM = torch.cat([part.place for part in by_layer.values()], dim=1) % n_neurons_M + first_M
        if self.rule.kind == "global_topk":  # of equal scores the one in the lower layer
            score_BM, best_BM = score_BM.sort(dim=1, descending=True, stable=True)
            neuron_BM = neuron_BM.gather(1, best_BM)
            score_BM, neuron_BM = (part[:, : int(self.rule.value)] for part in (score_BM, neuron_BM))
        pair_BM = sample_B[:, None] * self.n_neurons + neuron_BM
        self._pairs.append(pair_BM.masked_fill(score_BM == NOTHING, -1).flatten())

    def _columns(self, n_entries: Mapping[int, int]) -> tuple[Tensor, Tensor]:
        """Neurons of the layer of each entry of a sample, and the number of its first one, int64 ``[M]`` each."""
        key = tuple(n_entries.items())
        if key not in self._columns_of:
            layers, sizes = list(n_entries), list(n_entries.values())
            columns = np.repeat([[self._n_neurons[layer], self._first[layer]] for layer in layers], sizes, axis=0)
            n_neurons_M, first_M = torch.from_numpy(columns.T.copy()).to(self._pairs[0].device).unbind(0)
            self._columns_of[key] = n_neurons_M, first_M
        return self._columns_of[key]

    def add_neurons(self, sample_B: Tensor, layer: int, found: NeuronScores) -> None:
        """Take neurons of one layer, whose samples are numbered as in a batch."""
        self._pairs.append(sample_B[found.sample_M] * self.n_neurons + self._first[layer] + found.neuron_M)

    def merge(self, peers: Peers) -> None:
        """Put together what all processes have."""
        self._pairs = [peers.gather(self._unique())]

    def sets(self, n_samples: int) -> KeySets:
        """The pairs of all samples, on the host."""
        pair_M = self._unique()
        ends = self.n_neurons * torch.arange(1, n_samples + 1, device=pair_M.device)
        end_N = torch.searchsorted(pair_M, ends)
        neuron_M = (pair_M % max(self.n_neurons, 1)).to(torch.int32)
        return KeySets(neuron_M.cpu().numpy(), end_N.cpu().numpy())

    def _unique(self) -> Tensor:
        pair_M: Tensor = torch.unique(torch.cat(self._pairs))
        return pair_M[pair_M >= 0]


def entries_needed(rules: Sequence[Rule], n_neurons: int) -> int:
    """How many of a layer's highest entries the rules look at."""
    return max(rule.n_entries(n_neurons) for rule in rules)
