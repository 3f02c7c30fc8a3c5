"""Reading the expert layers while the model runs, one layer at a time.

`instrument` attaches the recorders of all experts. When the last expert of a layer has run, its contributions are
computed and handed on. In between, from the entry of the layer to its output, autograd records what happens outside of
the experts (see `experts.tail`), unless it was learned that nothing has to be asked of it. Nothing else is recorded.

What goes wrong in reading does not interrupt the forward pass of the model, in which other processes may wait for this
one: the first error is kept, to be raised when the pass is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from traceback import clear_frames
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from mui_callback.errors import InterruptedPassError, ProbeError
from mui_callback.forgiving import attempt
from mui_callback.parallel.weights import KeptWhole
from mui_callback.probe.score_layer import LayerReader
from mui_callback.scoring.contributions import LayerScores, ScoredTokens

LayerConsumer = Callable[[int, LayerScores], None]
"""Takes the position of a layer and its contributions to one batch."""
LayerTokens = Callable[[int], ScoredTokens]
"""The scored tokens of a batch, numbered as they meet in the layer at a position."""


class Reading:
    """What is read of the layers, batch by batch.

    Args:
        readers: the readers of all layers of the model.
    """

    def __init__(self, readers: Sequence[LayerReader]) -> None:
        self.readers = readers
        self.error: Exception | None = None
        """The first thing that went wrong."""
        self._batch: _Batch | None = None

    @property
    def is_never_recorded(self) -> bool:
        """Whether it was learned how to read all layers with nothing recorded; see `LayerReader`."""
        return all(reader.is_never_recorded for reader in self.readers)

    @contextmanager
    def batch(
        self,
        tokens: LayerTokens,
        readout_RD: Tensor,
        met_readout: Callable[[int], Tensor],
        consume: LayerConsumer,
        *,
        check: bool = False,
        learn: bool = False,
    ) -> Iterator[None]:
        """Every layer is read once inside, and handed to `consume`; if not, `error` says why.

        Args:
            tokens: the scored tokens of the batch that the model runs inside, by layer.
            readout_RD: unembedding rows of their targets.
            met_readout: unembedding rows of the targets of all tokens that meet in a layer, by layer.
            consume: takes what was read of each layer.
            check: also hand over what the identity needs, ``LayerScores.made_R`` and ``output_R``, of those layers of
                which it is new how they are read.
            learn: hand it over of all layers, and learn how those are read of which it is not known yet; for the first
                batch.
        """
        not_read = set(range(len(self.readers)))
        batch = self._batch = _Batch(tokens, readout_RD, met_readout, consume, check, learn, not_read)
        try:
            yield
        finally:
            self._batch = None
        if batch.not_read:
            paths = ", ".join(self.readers[index].layer.shape.path for index in sorted(batch.not_read))
            self.note(
                ProbeError(
                    f"expected every MoE layer to run in a forward pass of the model; {paths} did not. If something "
                    "has put other modules in their place since (deepspeed.initialize does, with AutoEP), make the "
                    "monitor or the probe after that."
                )
            )

    def note(self, error: Exception | None) -> None:
        """Keep an error, if it is the first one, and none of the tensors that were at hand where it came from."""
        if error is not None:
            clear_frames(error.__traceback__)
        self.error = self.error or error

    def announce(self, index: int, reader: LayerReader) -> None:
        """Tell a layer that is about to run what comes to its experts; see `LayerReader.announce`."""
        if self._batch is not None and reader.can_follow:
            reader.announce(self._batch.tokens(index), self._batch.met_readout(index))

    def take(self, index: int, reader: LayerReader, out: Tensor, *, is_output: bool) -> None:
        """Score what one layer left, if a batch is being read; see `LayerReader.scores`."""
        _, error = attempt(lambda: self._take(index, reader, out, is_output=is_output))
        if isinstance(error, InterruptedPassError):
            raise error
        self.note(error)

    def _take(self, index: int, reader: LayerReader, out: Tensor, *, is_output: bool) -> None:
        batch = self._batch
        if batch is None:
            return
        if index not in batch.not_read:
            path = reader.layer.shape.path
            raise ProbeError(f"expected every MoE layer to run once in a forward pass; {path} ran twice.")
        batch.not_read.remove(index)
        tokens = batch.tokens(index)
        scores = reader.scores(
            *(out, lambda: batch.readout_TD, tokens, batch.met_readout(index)),
            is_output=is_output,
            check=batch.check,
            learn=batch.learn,
        )
        batch.consume(index, scores)


@dataclass
class _Batch:
    tokens: LayerTokens
    readout_RD: Tensor
    met_readout: Callable[[int], Tensor]
    consume: LayerConsumer
    check: bool
    learn: bool
    not_read: set[int]
    """Positions of the layers that have not run yet."""

    @cached_property
    def readout_TD(self) -> Tensor:
        """Unembedding row of the token that each position predicts, zero where none is scored."""
        own = self.tokens(0)
        readout_TD = self.readout_RD.new_zeros(own.n_rows * own.length, self.readout_RD.shape[1])
        readout_TD[own.position_R] = self.readout_RD
        return readout_TD


@contextmanager
def instrument(reading: Reading) -> Iterator[None]:
    """Whatever reads the layers is attached while this lasts; to be entered under `torch.no_grad`."""
    with ExitStack() as stack:
        for index, reader in enumerate(reading.readers):
            stack.enter_context(_LayerCapture(index, reader, reading).attached())
        yield


class _LayerCapture:
    """Follows one layer from its entry to where its experts' outputs have come together."""

    def __init__(self, index: int, reader: LayerReader, reading: Reading) -> None:
        self.index = index
        self.layer = reader.layer
        self.reader = reader
        self.reading = reading
        scope = self.layer.scope
        self.whole = KeptWhole([module for module in scope.modules() if module is not scope])
        self.is_open = False
        self.recording = ExitStack()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """All hooks of this layer."""
        scope = self.layer.scope
        with ExitStack() as stack:
            stack.enter_context(self.whole.possible())
            stack.enter_context(scope.register_forward_pre_hook(self._enter))
            # before the hooks of those who spread the weights of the layer again
            stack.enter_context(scope.register_forward_hook(self._leave, prepend=True))
            if not self.layer.scope_is_moe:
                for child in scope.children():
                    stack.enter_context(child.register_forward_pre_hook(self._join))
            for handle in self.reader.watch_tail():
                stack.enter_context(handle)
            stack.callback(self.recording.close)  # after an exception inside the layer
            for recorder in self.reader.recorders:
                stack.enter_context(recorder.attached())
            yield

    def _enter(self, scope: nn.Module, args: Any) -> None:
        self.reader.clear()
        self.whole.begin()
        self.is_open = True
        self.reading.announce(self.index, self.reader)
        if self.reader.is_followed:
            return
        # Forwards that are meant for no_grad overwrite what autograd saves. What it saves for linear operations are
        # factors; if one of those is overwritten, contributions do not add up. (Detached: an operation that held its
        # own output would never be freed.)
        self.recording.enter_context(torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _as_it_is))
        # Functions inside that are decorated with no_grad give back the mode that they found.
        torch.set_grad_enabled(self.layer.scope_is_moe)

    def _join(self, child: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """In a decoder layer, the MoE layer ends where a module takes the outputs of all its experts as one."""
        x = args[0] if args else None
        if not self.is_open or not isinstance(x, Tensor) or not x.requires_grad or not self.reader.has_joined(x):
            return None
        self._close(x, is_output=len(self.layer.experts) > 1)  # the sum of several; one may come with the residual
        return (x.detach(), *args[1:])

    def _leave(self, scope: nn.Module, args: Any, out: Any) -> Any:
        if not self.is_open:
            return None
        is_recorded = not self.reader.is_followed
        self._close(self._hidden_states(out), is_output=self.layer.scope_is_moe)
        return tree_map_only(Tensor, Tensor.detach, out) if is_recorded else None

    def _hidden_states(self, out: Any) -> Tensor | None:
        """Of all that a module returns, the first tensor that was made of its experts' outputs."""
        if isinstance(out, Tensor):  # most often, and no tree has to be walked
            return out
        tensors = [part for part in tree_leaves(out) if isinstance(part, Tensor)]
        made = [part for part in tensors if part.requires_grad and self.reader.has_joined(part)]
        return next(iter(made or tensors), None)

    def _close(self, out: Tensor | None, *, is_output: bool) -> None:
        torch.set_grad_enabled(False)
        self.recording.close()
        self.is_open = False
        if out is None:
            self.reading.note(ProbeError(f"{self.layer.shape.path}: expected a tensor among its outputs, got none"))
        else:
            self.reading.take(self.index, self.reader, out, is_output=is_output)
        self.reader.clear()
        self.whole.end()


def _as_it_is(saved: Tensor) -> Tensor:
    return saved
