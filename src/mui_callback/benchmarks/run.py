"""Running benchmarks on the live model: each by itself, in all processes together, without a trace in the training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from mui_callback.benchmarks.base import Benchmark, BenchmarkResult
from mui_callback.benchmarks.sharing import Sharing, TogetherError
from mui_callback.errors import ProbeError
from mui_callback.experts.capacity import let_all_pass
from mui_callback.forgiving import attempt, described
from mui_callback.metrics.phases import Point
from mui_callback.parallel.processes import Processes, in_words
from mui_callback.parallel.shards import Shards
from mui_callback.parallel.weights import engines_at_rest
from mui_callback.probe.freeze import frozen
from mui_callback.probe.unwrap import unwrapped


@dataclass(frozen=True)
class BenchmarkFailure:
    """One that failed, in this process or in another one."""

    number: int
    """Its place among the benchmarks that were to be run."""
    name: str
    error: Exception
    """What went wrong in this process, or a `ProbeError` that says what did elsewhere."""

    def __str__(self) -> str:
        return f"benchmark {self.name!r}: {described(self.error)}"


def run_benchmarks(
    benchmarks: Sequence[Benchmark],
    model: nn.Module,
    step: int,
    *,
    processes: Processes | None = None,
    shards: Shards | None = None,
) -> tuple[dict[str, Point], list[BenchmarkFailure]]:
    """Measure all of them.

    In each the model is held still as in a probe: eval mode, no gradients, routers that let every token pass; random
    states and everything that a forward pass could leave behind are put back. One that raises harms no other. In a
    distributed run all processes make this call with the same benchmarks, and get the same results.

    Args:
        benchmarks: as `as_benchmarks` makes them.
        model: the model as it is trained; what is wrapped around it is taken off.
        step: optimizer steps done.
        processes: how the processes of `torch.distributed` talk to each other; by default as they always do.
        shards: who does which part of the work, as the probe of the same model has it; by default each does all of it.

    Returns:
        The scores by name, and what failed, if anything did.

    Raises:
        InterruptedPassError: a benchmark failed in one process, and others wait for it in a forward pass.
        DesynchronizedError: not all processes made this call.
    """
    held = unwrapped(model)
    sharing = Sharing(processes or Processes(), shards or Shards())
    results: dict[str, Point] = {}
    failures: list[BenchmarkFailure] = []
    for number, benchmark in enumerate(benchmarks):
        own, error = attempt(partial(_measure, benchmark, held, step, sharing))
        failed = sharing.gather(error)
        if not failed:
            found = sharing.processes.from_main(partial(dict[str, Point], own or {}))
            _, error = attempt(partial(_check_new, found, results))
        if failed or error is not None:
            own_error = _own_error(error) or ProbeError(in_words(failed))
            failures.append(BenchmarkFailure(number, benchmark.name, own_error))
        else:
            results |= found
    return results, failures


def _measure(benchmark: Benchmark, model: nn.Module, step: int, sharing: Sharing) -> BenchmarkResult:
    with frozen(model), engines_at_rest(model):
        let_all_pass(model)
        return benchmark.run(model, step, sharing)


def _check_new(found: BenchmarkResult, results: BenchmarkResult) -> None:
    for name in found:
        if name in results:
            raise ValueError(f"expected names that differ, but another benchmark has {name!r} too")


def _own_error(error: BaseException | None) -> Exception | None:
    """What this process failed with by itself."""
    own = error.__cause__ if isinstance(error, TogetherError) else error
    return own if isinstance(own, Exception) else None
