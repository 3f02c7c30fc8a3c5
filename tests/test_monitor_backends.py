"""What is found besides a probe where weights or experts are spread over processes: the same, in step, no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer

from asked import EVERYTHING, NOT_OF_THE_MODEL
from backend_training import N_STEPS, SETTINGS, Trained, many
from backends import BACKENDS
from distributed_training import launch, noted, output_dir
from mui_callback import MemorySink, MUIMonitor
from test_benchmarks import choices_file, run_it
from tiny import VOCAB

DECIDES = {"rel": 1e-4, "abs": 1e-5}
"""How far the sums of several processes may be from those of one."""


def train_asked(rank: int, directory: Path, *, name: str, path: Path | None, fails: bool = False) -> dict[str, Any]:
    """Some steps with everything that can be asked for, or without a monitor."""
    trainee, seen, sink = BACKENDS[name].build(), Trained(), MemorySink()

    def partly(model: torch.nn.Module, step: int) -> dict[str, float]:
        if fails and rank == 1 and step == 2:
            raise RuntimeError("injected")
        return {"a": step}

    torch.manual_seed(rank)
    monitor = None
    with noted(seen):
        if path is not None:
            monitor = MUIMonitor(
                trainee.model,
                many(),
                tokenizer=ByT5Tokenizer(),
                every=1,
                sinks=[sink],
                output_dir=output_dir(directory, rank),
                benchmarks=[path, run_it, partly],
                **SETTINGS,
                **EVERYTHING,
            )
        for step in range(1, N_STEPS + 1):
            tokens = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(10 * rank + step))
            seen.losses.append(trainee.train_step(tokens))
            if monitor is not None:
                monitor.step(step)
        if monitor is not None:
            monitor.close()
    points = monitor.state_dict()["history"]["points"] if monitor else []
    found = {step: {k: v for k, v in scalars.items() if k not in NOT_OF_THE_MODEL} for step, scalars in points}
    return {"losses": seen.losses, "error": seen.error, "warnings": seen.warnings, "found": found}


@pytest.mark.parametrize("name", ["fsdp2", "zero3", "autoep"])
def test_everything_is_found_together_and_leaves_no_trace(name: str, tmp_path: Path) -> None:
    path = choices_file(tmp_path)
    size = BACKENDS[name].size
    without = launch(tmp_path / "without", train_asked, size=size, name=name, path=None)
    asked = launch(tmp_path / "asked", train_asked, size=size, name=name, path=path, fails=True)
    told = {
        rank: f"MUI at step 2: benchmark '{train_asked.__name__}.<locals>.partly': "
        f"{'' if rank == 1 else 'ProbeError: process 1: '}RuntimeError: injected. Training goes on."
        for rank in range(size)
    }
    for rank, (plain, one) in enumerate(zip(without, asked, strict=True)):
        assert one["error"] is None
        assert one["losses"] == plain["losses"]
        assert one["found"] == asked[0]["found"]
        assert one["warnings"] == [told[rank]]
    found = asked[0]["found"]
    assert list(found) == list(range(N_STEPS + 1))
    assert [step for step in found if "mui/benchmark/a" not in found[step]] == [2]
    assert {"mui/phase", "mui/b/phase", "mui/b/ablation/key", "mui/benchmark/numbers/loss"} <= found[N_STEPS].keys()
    # and at the first point, the same as in one process
    reference = MUIMonitor(
        BACKENDS[name].reference(),
        many(),
        tokenizer=ByT5Tokenizer(),
        output_dir=tmp_path / "reference",
        tracker=None,
        benchmarks=[path, run_it],
        **SETTINGS,
    )
    (_, expected), *_ = reference.state_dict()["history"]["points"]
    for key in expected:
        if "benchmark" in key:
            assert found[0][key] == pytest.approx(expected[key], **DECIDES), key
