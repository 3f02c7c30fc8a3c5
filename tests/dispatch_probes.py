"""What each process does in the tests of routers that tell where their tokens go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch

from backend_training import SETTINGS as OF_BACKENDS
from backends import BACKENDS
from mui_callback import MUIProbe, MUIReport, ProbeSet
from mui_callback.errors import ProbeError
from mui_callback.experts.called_recorder import CalledRecorder
from mui_callback.experts.dispatch import Arrivals, SentSorted, SentToSlots
from mui_callback.experts.followed import FollowedRows
from mui_callback.experts.tail import Tail
from mui_callback.scoring.device_counts import DeviceCounts
from tiny_samples import make_samples


def _another_token(came: Arrivals) -> Arrivals:
    token_N = came.token_N.clone()
    place = torch.nonzero((token_N >= 0) & (came.weight_N != 0))[:1, 0]  # of one pair only
    token_N[place] = (token_N[place] + 1) % (token_N.max() + 1)
    return replace(came, token_N=token_N)


def _no_tokens(came: Arrivals) -> Arrivals:
    return replace(came, token_N=torch.full_like(came.token_N, -1))


def _another_weight(came: Arrivals) -> Arrivals:
    return replace(came, weight_N=came.weight_N * 1.1)


def _fewer_pairs(came: Arrivals) -> Arrivals:
    return replace(came, n_L=came.n_L // 2)


Lie = Callable[[Arrivals], Arrivals]
LIES: dict[str, Lie] = {
    "another token": _another_token,
    "no tokens": _no_tokens,
    "another weight": _another_weight,
    "fewer pairs": _fewer_pairs,
}


SETTINGS = {**OF_BACKENDS, "batch_tokens": 60}


def reaching() -> ProbeSet:
    """Samples of which the first batch reaches every expert; of one that is not reached, nothing is learned."""
    return ProbeSet({"a": make_samples(7, (12,) * 9 + (11, 13, 20, 21))})


@dataclass
class Told:
    """What came out of a probe."""

    report: MUIReport
    believes: list[bool]
    """Of the routed experts of each layer that was asked, whether what their dispatch says was found to be so."""
    n_batches: int
    n_followed: int
    """How often the dispatch of a layer was followed."""
    n_asked: int
    """How often a tail was asked for the tokens of its rows."""


def measure(
    rank: int,
    directory: Path,
    *,
    name: str,
    liar: int | None = None,
    lies: tuple[str | None, ...] = (None,),
    times: int = 1,
) -> list[Told]:
    """Probe a model for each lie.

    Args:
        rank: this process.
        directory: of the launch.
        name: of the backend.
        liar: the process in which it is told.
        lies: what is wrong with what is said to come to its experts.
        times: how often one probe measures for each.
    """
    model, found = BACKENDS[name].build().model, []
    for lie in lies:
        with _lying(LIES[lie] if lie is not None and rank == liar else None):
            probe = MUIProbe(model, reaching(), **SETTINGS)
            found += [_told_by(probe) for _ in range(times)]
    return found


def measure_with_a_lie_between(rank: int, directory: Path, *, name: str) -> list[Told]:
    """Measure three times; what came to one of two processes is said wrong the second time, when it is believed."""
    probe = MUIProbe(BACKENDS[name].build().model, reaching(), **SETTINGS)
    first = _told_by(probe)
    with _lying(_another_weight if rank == 0 else None):
        second = _told_by(probe)
    return [first, second, _told_by(probe)]


def measure_with_a_failure_between(rank: int, directory: Path, *, name: str) -> list[Told]:
    """Measure three times; the second time one of two processes has no memory left when all is counted."""
    probe = MUIProbe(BACKENDS[name].build().model, reaching(), **SETTINGS)
    first = _told_by(probe)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(DeviceCounts, "to_host", _no_memory)
        with pytest.raises((ProbeError, MemoryError)):
            probe.measure()
    return [first, _told_by(probe), _told_by(probe)]


def _no_memory(counts: DeviceCounts) -> None:
    raise MemoryError("injected")


def measure_in_another_precision(rank: int, directory: Path, *, name: str) -> list[Told]:
    """Without autocast, twice with it, and without it again."""
    probe = MUIProbe(BACKENDS[name].build().model, reaching(), **SETTINGS)
    before = _told_by(probe)
    with torch.autocast("cpu", torch.bfloat16):
        inside = [_told_by(probe), _told_by(probe)]
    return [before, *inside, _told_by(probe)]


def _told_by(probe: MUIProbe) -> Told:
    with _noted() as believes, _counted(FollowedRows, "rows") as followed, _counted(Tail, "locate") as asked:
        report = probe.measure()
    return Told(report, believes, len(probe._rounds), len(followed), len(asked))


@contextmanager
def _counted(kind: type, name: str) -> Iterator[list[int]]:
    """One entry for each call of a method."""
    calls: list[int] = []
    method = getattr(kind, name)

    def count(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return method(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, name, count)
        yield calls


@contextmanager
def _noted() -> Iterator[list[bool]]:
    """What the routed experts of each layer made of what their dispatch says, in the order of the layers."""
    believes: list[bool] = []
    learn = CalledRecorder.learn

    def note(recorder: CalledRecorder, *args: Any) -> None:
        learn(recorder, *args)
        if recorder.experts.is_routed:
            believes.append(recorder.trusts_dispatch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CalledRecorder, "learn", note)
        yield believes


@contextmanager
def _lying(lie: Lie | None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for kind in (SentToSlots, SentSorted) if lie is not None else ():
            patch.setattr(kind, "arrivals", partialmethod(_told, lie, kind.arrivals))
        yield


def _told(sent: Any, lie: Lie, arrivals: Callable[..., Arrivals]) -> Arrivals:
    return lie(arrivals(sent))
