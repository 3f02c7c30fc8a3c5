"""Experts that are read where they call their down projection.

Lists of modules, weights that are stacked outside of transformers' experts interface, shared experts and the MLP of a
dense layer: whatever calls them, and in which order, the activations are the input of the down projection, and what
becomes of its output is the tail.

Shapes: E experts, I neurons of an expert, W = neurons of one down projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from mui_callback.errors import UnsupportedModelError
from mui_callback.experts.base import First
from mui_callback.experts.called_recorder import CalledRecorder
from mui_callback.experts.down import DownProjection, StackedDown
from mui_callback.experts.expert_parallelism import NOT_SPREAD, Spread
from mui_callback.experts.tail import Tail
from mui_callback.settings import Activation


class CalledExperts:
    """Experts by their down projections.

    Args:
        path: module path, for messages.
        downs: the down projections, in the order of the experts.
        modules: the modules in which experts run up to their down projection.
        is_routed: whether tokens are sent to them; if not, every position passes through each of them, in order.
        width: neurons that make an expert, where a down projection holds several side by side.
        identities: modules beside the experts that pass tokens on as they are ("zero experts").
        spread: which experts of the layer these are, where each process has some.
        activations_in: the modules that hold their activation functions, if not `modules`.

    Raises:
        UnsupportedModelError: the experts have different widths.
    """

    def __init__(
        self,
        path: str,
        downs: Sequence[DownProjection],
        modules: Sequence[nn.Module],
        *,
        is_routed: bool,
        width: int | None = None,
        identities: Sequence[nn.Module] = (),
        spread: Spread = NOT_SPREAD,
        activations_in: Sequence[nn.Module] | None = None,
    ) -> None:
        self.path = path
        self.activations_in = tuple(modules if activations_in is None else activations_in)
        self.downs = tuple(downs)
        self.modules = tuple(modules)
        self.is_routed = is_routed
        self.identities = tuple(identities)
        self.spread = spread
        down_widths = {down.width for down in downs}
        if len(down_widths) != 1:
            raise UnsupportedModelError(
                f"{path}: expected experts of one width, got {', '.join(map(str, sorted(down_widths)))}"
            )
        self.down_width = down_widths.pop()
        self.width = width if width and self.down_width % width == 0 else self.down_width
        n_local = sum(down.n_experts for down in self.downs)
        self.n_downs = spread.total(n_local)
        self.first_down = spread.first(n_local)

    @property
    def layout(self) -> str:
        """See `Experts`."""
        if any(isinstance(down, StackedDown) for down in self.downs):
            return "one parameter"
        return "list of modules" if len(self.downs) > 1 else "MLP"

    @property
    def n_experts(self) -> int:
        """See `Experts`."""
        return self.n_downs * (self.down_width // self.width)

    def recorder(self, tail: Tail, first: First, activation: Activation) -> CalledRecorder:
        """See `Experts`."""
        return CalledRecorder(self, tail, first, activation)

    @contextmanager
    def masked(self, is_masked_EI: Tensor, note_use: Callable[[], None]) -> Iterator[None]:
        """See `Experts`."""
        is_masked_EW = is_masked_EI.view(self.n_downs, self.down_width)
        with ExitStack() as stack:
            first = self.first_down
            for down in self.downs:
                stack.enter_context(down.masked(is_masked_EW[first : first + down.n_experts], note_use))
                first += down.n_experts
            yield
