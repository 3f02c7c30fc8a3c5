"""Where the tokens of DeepSpeed's expert parallelism go, told by their routers.

The transposed tail tells for any backend which token came to which row (see `experts.tail`), at the price of sending as
much as the tail itself. Where a router is known, its choices can be sent along instead: a number and a weight for each
pair of a token and an expert. What that gives is believed only if it is what the transposed tail gave in the first
batch of a pass.

Shapes: T positions of this process, K experts of a position, L experts of each process, P processes, C places of an
expert for each process, S such places or rows of experts, X pairs that go out, N pairs that came to this process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mui_callback.experts.host_copy import HostCopy
from mui_callback.parallel.peers import Peers


@dataclass(frozen=True)
class Arrivals:
    """Pairs of a token and an expert, those of the first local expert first, each in the order of its rows."""

    first_L: Tensor
    """Where the pairs of each expert begin, right behind those of the one before, int64 ``[L]``."""
    n_L: Tensor
    """How many it has, int64 ``[L]``."""
    token_N: Tensor
    """Number of the scored token, int64 ``[N]``; -1 where there is none."""
    weight_N: Tensor
    """Routing weight, float32 ``[N]``."""

    def at(self, expert_S: Tensor, rank_S: Tensor) -> tuple[Tensor, Tensor]:
        """Token and weight of the n-th row of an expert, ``[S]`` each; -1 and 0 where it has none."""
        if not len(self.token_N):
            return torch.full_like(expert_S, -1), torch.zeros_like(expert_S, dtype=torch.float32)
        place_S = (self.first_L[expert_S] + rank_S).clamp(max=len(self.token_N) - 1)
        is_there_S = rank_S < self.n_L[expert_S]
        return self.token_N[place_S].where(is_there_S, -1), self.weight_N[place_S].where(is_there_S, 0)


class Sent(Protocol):
    """What the processes told each other of one forward pass of a layer."""

    @property
    def n_scored(self) -> HostCopy:
        """Pairs of a scored token that come to each expert of this process, ``[L]``."""

    @property
    def has_met(self) -> bool:
        """Whether `arrivals` can be asked for."""

    def meet(self) -> None:
        """Whatever has to be exchanged for `arrivals`. All processes make this call, once they have left the layer: by
        then nobody waits for what the host wants to know."""

    def arrivals(self) -> Arrivals:
        """All that comes; nothing is exchanged for it."""


class Dispatch(Protocol):
    """Follows the tokens of one layer."""

    def watched(self, then: Callable[[], None]) -> Any:
        """A context in which the choices of the router are noted.

        Args:
            then: called when they are.
        """

    def clear(self) -> None:
        """Forget the last forward pass."""

    @property
    def has_run(self) -> bool:
        """Whether there are choices that can be followed; the same in all processes."""

    def send(self, number_T: Tensor, peers: Peers, n_local: int) -> Sent:
        """Tell the others what goes to their experts. All processes make this call.

        It delays the layer by the fewest operators, and never waits for the device.

        Args:
            number_T: number of the scored token of each position of this process, -1 where there is none.
            peers: the processes that the experts are spread over.
            n_local: L.
        """


class _Watched(ABC):
    def __init__(self, router: nn.Module) -> None:
        self.router = router
        self.choices: Any = None

    @property
    @abstractmethod
    def has_run(self) -> bool:
        """See `Dispatch`."""

    @contextmanager
    def watched(self, then: Callable[[], None]) -> Iterator[None]:
        """See `Dispatch`."""

        def note(router: nn.Module, args: Any, out: Any) -> None:
            self.choices = out
            if self.has_run:
                then()

        with self.router.register_forward_hook(note):
            yield

    def clear(self) -> None:
        """See `Dispatch`."""
        self.choices = None


class SlotDispatch(_Watched):
    """DeepSpeed's MoE: each expert has C places for the tokens of each process, which may be empty."""

    @property
    def has_run(self) -> bool:
        """See `Dispatch`."""
        return isinstance(self.choices, tuple) and len(self.choices) == 7

    def send(self, number_T: Tensor, peers: Peers, n_local: int) -> SentToSlots:
        """See `Dispatch`."""
        expert_KT, place_KT, weight_KT = self.choices[3:6]
        pair_KT2 = torch.stack([number_T.expand_as(weight_KT).double(), weight_KT.detach().double()], dim=-1)
        is_kept_KT = expert_KT >= 0
        n_places = int(self.choices[1])
        n_slots = peers.n * n_local * n_places
        sent_S2 = torch.zeros(n_slots + 1, 2, dtype=torch.float64, device=number_T.device)
        sent_S2[:, 0] = -1
        sent_S2[(expert_KT * n_places + place_KT).where(is_kept_KT, n_slots).flatten()] = pair_KT2.flatten(0, 1)
        n_each = [n_local * n_places] * peers.n
        came_PLC2 = peers.exchange(sent_S2[:n_slots], n_each, n_each).view(peers.n, n_local, n_places, 2)
        return SentToSlots(came_PLC2, HostCopy((came_PLC2[..., 0] >= 0).sum((0, 2))))


@dataclass(frozen=True)
class SentToSlots:
    """See `Sent`."""

    came_PLC2: Tensor
    """Number and weight of what is in each place, float64; -1 and 0 where nothing is."""
    n_scored: HostCopy
    has_met = True

    def meet(self) -> None:
        """See `Sent`: the places are known, so all is sent at once."""

    def arrivals(self) -> Arrivals:
        """See `Sent`."""
        n_peers, n_local, n_places, _ = self.came_PLC2.shape
        token_N, weight_N = self.came_PLC2.transpose(0, 1).reshape(-1, 2).unbind(1)
        n_L = torch.full((n_local,), n_peers * n_places, device=token_N.device)
        return Arrivals(_starts(n_L), n_L, token_N.long(), weight_N.float())


class SortedDispatch(_Watched):
    """DeepSpeed's AutoEP: pairs are sorted by expert, sent, and sorted again by expert and sender."""

    @property
    def has_run(self) -> bool:
        """See `Dispatch`."""
        return isinstance(self.choices, tuple) and len(self.choices) >= 3

    def send(self, number_T: Tensor, peers: Peers, n_local: int) -> SentSorted:
        """See `Dispatch`. How many pairs go where is sent at once, the pairs when that is known."""
        weight_TK, expert_TK = self.choices[0], self.choices[1]
        expert_X, order_X = expert_TK.flatten().long().sort(stable=True)
        number_X, weight_X = number_T[order_X // expert_TK.shape[1]], weight_TK.detach().flatten()[order_X]
        pair_X2 = torch.stack([number_X.double(), weight_X.double()], dim=1)
        bounds = torch.searchsorted(expert_X, torch.arange(peers.n * n_local + 1, device=number_T.device))
        n_before = torch.nn.functional.pad((number_X >= 0).cumsum(0), (1, 0))
        n_of_expert = torch.stack([bounds.diff(), n_before[bounds].diff()], dim=1)  # all, and scored ones
        came_PL2 = peers.exchange(n_of_expert, [n_local] * peers.n, [n_local] * peers.n).view(peers.n, n_local, 2)
        n_out, n_in = n_of_expert[:, 0].view(peers.n, n_local).sum(1), came_PL2[..., 0].sum(1)
        sizes, n_scored = HostCopy(torch.cat([n_out, n_in])), HostCopy(came_PL2[..., 1].sum(0))
        return SentSorted(pair_X2, came_PL2[..., 0], sizes, n_scored, peers)


@dataclass
class SentSorted:
    """See `Sent`."""

    pair_X2: Tensor
    """Number and weight of each pair that goes out, by receiver and expert, float64."""
    came_PL: Tensor
    """How many come of each."""
    sizes: HostCopy
    """How many go to each process, and how many come from it."""
    n_scored: HostCopy
    peers: Peers
    came_N2: Tensor | None = None
    """Number and weight of each pair that came, by sender and expert, float64."""

    @property
    def has_met(self) -> bool:
        """See `Sent`."""
        return self.came_N2 is not None

    def meet(self) -> None:
        """See `Sent`."""
        if self.came_N2 is None:
            sizes = self.sizes.get()
            self.came_N2 = self.peers.exchange(self.pair_X2, sizes[: self.peers.n], sizes[self.peers.n :])

    def arrivals(self) -> Arrivals:
        """See `Sent`."""
        assert self.came_N2 is not None
        # from blocks by sender and expert to blocks by expert and sender
        n_LP = self.came_PL.T.flatten()
        from_LP = _starts(self.came_PL.flatten()).view_as(self.came_PL).T.flatten()
        shift_N = (from_LP - _starts(n_LP)).repeat_interleave(n_LP, output_size=len(self.came_N2))
        place_N = torch.arange(len(shift_N), device=shift_N.device) + shift_N
        token_N, weight_N = self.came_N2[place_N].unbind(1)
        n_L = self.came_PL.sum(0)
        return Arrivals(_starts(n_L), n_L, token_N.long(), weight_N.float())


def _starts(n: Tensor) -> Tensor:
    """Where each of some parts behind one another begins."""
    return n.cumsum(0) - n


def find_dispatch(block: nn.Module) -> Dispatch | None:
    """That of a block that spreads its experts, if its router is one that is known."""
    gate, router = getattr(block, "gate", None), getattr(block, "router", None)
    if isinstance(gate, nn.Module) and hasattr(gate, "drop_tokens") and hasattr(gate, "wg"):
        return SlotDispatch(gate)
    if isinstance(router, nn.Module) and hasattr(block, "score_apply"):
        return SortedDispatch(router)
    return None
