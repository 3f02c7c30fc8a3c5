"""Which processes probe a model together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mui_callback.errors import UnsupportedModelError
from mui_callback.experts.layer import ExpertLayer
from mui_callback.forgiving import warn
from mui_callback.parallel.processes import Processes
from mui_callback.parallel.replicas import check_same, have_one_model
from mui_callback.parallel.shards import Shards
from mui_callback.parallel.weights import is_spread


class Agreement:
    """All processes of a run, if they have one model and one probe set; each by itself, if they train their own.

    Args:
        model: the model of this process.
        layers: its expert layers.
        described: what all have to have in common, see `check_same`.

    Raises:
        UnsupportedModelError: see `Shards.of`.
    """

    def __init__(self, model: nn.Module, layers: Sequence[ExpertLayer], described: Mapping[str, Any]) -> None:
        self._model = model
        self._layers = layers
        self._described = described
        self._processes: Processes | None = None
        self._look()

    def reach(self, processes: Processes | None = None) -> None:
        """Find out who probes what; to be called by all processes.

        Args:
            processes: how they talk to each other; None for ways of their own.

        Raises:
            UnsupportedModelError: they have different layers, or models that differ where they must not.
            ProbeSetError: they have different probe sets.
            DesynchronizedError: not all of them made this call.
        """
        self._processes = processes or Processes()
        self._look()
        if not self.shards.world.is_alone:
            check_same(self._processes, self.shards.rank, self._described)
            self._part_if_models_differ(self._processes)

    def renewed(self) -> Processes:
        """How the processes talk to each other, once it holds for the next pass, too; raises what `reach` does."""
        if self._processes is None or is_spread(self._model) != self._is_spread:
            self.reach(self._processes)
        else:
            self._part_if_models_differ(self._processes)
        assert self._processes is not None
        return self._processes

    def _look(self) -> None:
        self._is_spread = is_spread(self._model)
        exchanges_tokens = any(not layer.peers.is_alone for layer in self._layers)
        self.shards = Shards.of(self._model, exchanges_tokens=exchanges_tokens)
        """Who probes what, of those who agree."""

    def _part_if_models_differ(self, processes: Processes) -> None:
        if self.shards.world.is_alone or have_one_model(processes, self._model, self._apart):
            return
        if self.shards.in_step:
            raise UnsupportedModelError(
                "expected weights that are not spread over processes to be the same in all of them, but they differ"
            )
        if processes.is_main:
            warn("MUI: the processes train models of their own; each probes its own, and that of process 0 is logged.")
        self.shards = Shards()

    @property
    def _apart(self) -> list[nn.Module]:
        """Modules whose weights differ from process to process."""
        spread = [layer.experts[0] for layer in self._layers if not layer.peers.is_alone]
        return [module for experts in spread for module in experts.modules]
