"""What a pass does besides taking time: operators, waits for the device, bytes to the host. Never in a timed run."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from measuring import Action, synchronize
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_DATA_DEPENDENT = {
    *("_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero"),
    *("_unique", "_unique2", "unique_consecutive", "unique_dim", "repeat_interleave.Tensor", "bincount"),
}
"""Operators on a device that the host waits for."""
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


@dataclass
class Dispatched:
    """Operators that PyTorch dispatched. Kernels that are launched in other ways (Triton) are not among them."""

    operators: int = 0
    """Those that write or make a tensor; views are not counted."""
    host_reads: int = 0
    """Those whose result the host waits for if they run on a GPU."""
    host_bytes: int = 0
    """Copied from the device to the host."""
    reads: Counter[str] = field(default_factory=Counter)
    """The names behind `host_reads`."""

    def minus(self, other: Dispatched, n: int) -> dict[str, Any]:
        """What each of the `n` batches does that the other pass did not have."""
        return {
            "operators": (self.operators - other.operators) / n,
            "host_reads": (self.host_reads - other.host_reads) / n,
            "reads": difference(self.reads, other.reads, n),
        }


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = Dispatched()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._can_decompose():
            with self:  # composite operators: if they go through autograd, they come here taken apart
                return func.decompose(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.seen.operators += not _is_view(func)
        copied = _bytes_to_host(name, args, out)
        self.seen.host_bytes += copied
        if copied or _is_read(func, args):
            self.seen.host_reads += 1
            self.seen.reads[name] += 1
        return out


def _is_view(func: Any) -> bool:
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _is_read(func: Any, args: Any) -> bool:
    packet = func.overloadpacket.__name__
    if packet in _DATA_DEPENDENT or f"{packet}.{func._overloadname}" in _DATA_DEPENDENT:
        return True
    indices = args[1] if packet in ("index", "index_put", "index_put_") else ()
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)


def _bytes_to_host(name: str, args: Any, out: Any) -> int:
    if name == "_local_scalar_dense":
        return 0 if args[0].is_cpu else args[0].element_size()
    source = {"_to_copy": 0, "copy_": 1, "_copy_from": 0}.get(name)
    if source is None or not isinstance(out, Tensor) or not out.is_cpu or args[source].is_cpu:
        return 0
    return out.numel() * out.element_size()


def dispatched(action: Action) -> Dispatched:
    """What PyTorch dispatches in an action."""
    with _Counting() as counting:
        action()
    return counting.seen


def synchronizations(action: Action, device: torch.device) -> Counter[str]:
    """Where the host waits for the GPU in an action, with file and line; empty on a CPU."""
    places: Counter[str] = Counter()
    if device.type != "cuda":
        return places
    with _events_counted(places), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            action()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            places[f"{_short(warning.filename)}:{warning.lineno}"] += 1
    return places


@contextmanager
def _events_counted(places: Counter[str]) -> Iterator[None]:
    """Waits for events are not seen by the debug mode."""
    wait = torch.cuda.Event.synchronize

    def counted(event: torch.cuda.Event) -> None:
        places["Event.synchronize"] += 1
        wait(event)

    with patch.object(torch.cuda.Event, "synchronize", counted):
        yield


def difference(more: Mapping[str, int], fewer: Mapping[str, int], n: int) -> dict[str, float]:
    """How often each happens in each of the `n` batches that the one has more than the other."""
    found = {name: (count - fewer.get(name, 0)) / n for name, count in more.items()}
    return {name: count for name, count in sorted(found.items(), key=lambda item: -item[1]) if count}


def _short(filename: str) -> str:
    return "/".join(Path(filename).parts[-2:])


def launches(action: Action, device: torch.device) -> int | None:
    """Kernels that an action launches, Triton's included; None on a CPU."""
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        action()
        synchronize(device)
    return sum(event.count for event in profile.key_averages() if event.key in _LAUNCHES)


def profiled(action: Action, device: torch.device, trace: Path | None, rows: int = 40) -> None:
    """Print what an action spends time in, and leave a trace for Chrome."""
    with torch.profiler.profile() as profile:
        action()
        synchronize(device)
    averages = profile.key_averages()
    keys = ["self_cpu_time_total"] + ["self_device_time_total"] * (device.type == "cuda")
    for key in reversed(keys):
        print(averages.table(sort_by=key, row_limit=rows, max_name_column_width=70), flush=True)
    if trace is not None:
        profile.export_chrome_trace(str(trace))
