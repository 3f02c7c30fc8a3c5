"""The benchmarks run as they are, tiny and on a CPU. What they measure is not looked at: that is not for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent / "benchmarks"
SHAPES = ["olmoe", "qwen3", "deepseek_v2_lite", "gpt_oss", "dense_1b", "demo"]


def run(tmp_path: Path, script: str, *options: str) -> tuple[dict[str, Any], str]:
    """What a script wrote and said."""
    out = tmp_path / "out.json"
    command = [sys.executable, SCRIPTS / script, "--tiny", "--device", "cpu", "--repeats", "1", "--out", out, *options]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parents[1] / "src")}
    process = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    found = json.loads(out.read_text())
    assert found["machine"]["command"].startswith("python ")
    return found, process.stdout


def test_a_pass_is_that_of_loops_and_counts_everything(tmp_path: Path) -> None:
    found, said = run(tmp_path, "probe_pass.py", "--batches", "2x16", "--batches-per-pass", "2")
    assert [result["shape"] for result in found["results"]] == SHAPES
    for result in found["results"]:
        assert result["against_loops"]["agrees"]
        assert result["against_loops"]["jaccard"] == 1
        assert result["report"]["tokens"] == 2 * 2 * 15
        assert {"plain_ms", "probe_ms", "ratio", "first_batch_ms", "steady_ms", "steady_ratio"} <= result.keys()
        assert {"operators_per_layer", "host_reads_per_batch", "host_bytes_in_a_pass"} <= result["counts"].keys()
        assert result["memory"] == dict.fromkeys(("before", "plain_peak", "probe_peak", "extra"))
        assert 0 < result["floor"]["extra_flops_share"] < 1
    assert said.count("| demo | 2x16 |") == 1


def test_a_pass_with_other_tokens(tmp_path: Path) -> None:
    options = ("--shapes", "demo", "--scored", "response", "--tokens", "zipf", "--layers", "1", "--profile")
    options += ("--batches-per-pass", "2")
    found, said = run(tmp_path, "probe_pass.py", "--times-only", "--no-check", *options, "--trace", str(tmp_path))
    assert [result["layers"] for result in found["results"]] == [1, 1]
    assert "aten::topk" in said
    assert (tmp_path / "demo-2x16-probe.json").exists()


def test_three_tasks(tmp_path: Path) -> None:
    found, _ = run(tmp_path, "probe_pass.py", "--shapes", "olmoe,demo", "--tasks", "--samples", "4")
    for result in found["results"]:
        assert result["report"]["samples"] == 12
        assert 0 <= result["choices"]["padding"] < 1


def test_training_with_the_callback_and_without(tmp_path: Path) -> None:
    found, _ = run(tmp_path, "training.py", "--steps", "12", "--batch", "2x16")
    assert found["summary"]["same_loss"]
    assert found["summary"]["probed"] == [[0, 12]]
    assert [len(runs) for runs in found["runs"].values()] == [1, 1]
    assert {"ratio", "tokens_per_second", "first_probe_of_the_process_seconds"} <= found["summary"].keys()


def test_growth(tmp_path: Path) -> None:
    found, said = run(tmp_path, "growth.py", "--doublings", "1", "--ranks", "2")
    factors = ["samples", "length", "layers", "experts", "width", "tasks", "ranks"]
    assert [(row["factor"], row["times"]) for row in found["rows"]] == [(f, n) for f in factors for n in (1, 2)]
    assert all(row["probe_growth"] == 1 for row in found["rows"] if row["times"] == 1)
    assert [row["sent_bytes"] > 0 for row in found["rows"][-2:]] == [False, True]
    assert said.endswith(" |\n")
