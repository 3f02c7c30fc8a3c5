"""The readers of a model's layers, and what they keep from pass to pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mui_callback.probe.score_layer import LayerReader


class Learned:
    """What was learned of how layers are read, which holds as long as passes go well.

    Args:
        make: makes readers that know nothing, careful ones or not; may raise for a model that cannot be read.
        device: where the model is.
    """

    def __init__(self, make: Callable[[bool], tuple[LayerReader, ...]], device: torch.device) -> None:
        self._make_careful_or_not = make
        self._is_careful = False
        self._readers = self._make()
        self._precision = _autocast(device)
        self.is_used = False
        """Whether the readers of the next pass have learned in one that went well; the same in all processes."""

    def take(self, device: torch.device) -> Sequence[LayerReader]:
        """The readers for one pass. What they know is forgotten, unless they are kept after it."""
        precision = _autocast(device)  # products that autocast makes cannot be followed
        readers = self._readers if precision == self._precision else self._make()
        self._readers, self._precision, self.is_used = self._make(), precision, False
        return readers

    def keep(self, readers: Sequence[LayerReader]) -> None:
        """After a pass that went well in all processes."""
        self._readers = tuple(
            reader if reader.is_learned else new for reader, new in zip(readers, self._readers, strict=True)
        )
        for reader in self._readers:
            reader.is_proven = reader.is_learned
        self.is_used = True

    def be_careful(self) -> bool:
        """From now on let readers ask in every batch, as batches turned out to differ; False if they do so already."""
        was_careful, self._is_careful = self._is_careful, True
        self._readers, self.is_used = self._make(), False
        return not was_careful

    def _make(self) -> tuple[LayerReader, ...]:
        return self._make_careful_or_not(self._is_careful)

    def anew(self) -> Sequence[LayerReader]:
        """Readers that know nothing; what is known stays as it is."""
        return self._make()


def _autocast(device: torch.device) -> torch.dtype | None:
    """In which precision autocast lets products run; None without it."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
