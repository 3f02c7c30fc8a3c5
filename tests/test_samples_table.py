"""The results of single samples as an Arrow table and a Parquet file."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pytest
from pyarrow import parquet

from made import LAYOUT, make_report
from mui_callback import MUIReport
from mui_callback.layout import ExpertLayout, LayerShape


@pytest.fixture
def report() -> MUIReport:
    return make_report(
        [{0, 1, 4, 20}, {24, 25}, set(), {3}],
        [0, 1, 1, 0],
        table={
            "n_tokens": np.array([4, 2, 0, 5]),
            "answer": np.array([1, -1, -1, 0]),
            "choice_sample": np.array([0, 0, 3, 3]),
            "choice_length": np.array([2, 2, 2, 2]),
        },
        loss=np.array([6.0, 1.0, 0.0, np.nan]),
        correct=np.array([1, 2, 0, 0]),
        choice_loss=np.array([3.0, 1.0, 9.0, 4.0]),
    )


def test_the_columns_by_hand(report: MUIReport) -> None:
    assert LAYOUT.is_shared.tolist() == [False] * 5 + [True] * 2  # neurons 20 to 23 and 24 to 25
    assert report.samples.to_pydict() == {
        "id": ["s0", "s1", "s2", "s3"],
        "task": ["a", "b", "b", "a"],
        "loss": [1.5, 0.5, None, None],
        "n_tokens": [4, 2, 0, 5],
        "n_correct": [1, 2, 0, 0],
        "choice_correct": [True, None, None, False],
        "n_key_neurons": [4, 2, 0, 1],
        "n_key_experts": [3, 1, 0, 1],
        "shared_share": [0.25, 1.0, None, 0.0],
    }


def test_the_columns_add_up_to_the_metrics(report: MUIReport) -> None:
    table = report.samples
    assert pa.compute.sum(table["n_key_experts"]).as_py() == report.pooled.activated.sum()
    assert pa.compute.sum(table["n_key_neurons"]).as_py() == report.key_neuron_sets().nnz
    right = table.filter(pa.compute.is_valid(table["choice_correct"]))["choice_correct"]
    assert pa.compute.mean(right).as_py() == report.pooled.choice_accuracy
    assert table.num_rows == report.n_samples == len(table["id"].unique())


def test_without_shared_experts_there_is_no_share() -> None:
    layout = ExpertLayout([LayerShape(0, "a", 3, 6)])
    assert make_report([{0}], layout=layout).samples["shared_share"].to_pylist() == [None]


def test_a_report_without_samples_has_a_table_of_the_same_columns(report: MUIReport) -> None:
    empty = make_report([]).samples
    assert empty.num_rows == 0
    assert empty.schema == report.samples.schema


def test_a_parquet_file_is_read_back(report: MUIReport, tmp_path: Path) -> None:
    path = tmp_path / "samples.parquet"
    path.write_bytes(b"something before")
    report.save_samples(path)
    assert parquet.read_table(path).to_pydict() == report.samples.to_pydict()
    assert [entry.name for entry in tmp_path.iterdir()] == ["samples.parquet"]


def test_without_pyarrow_it_is_said_how_to_get_it(
    report: MUIReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"needs pyarrow.*pip install 'mui-callback\[study\]'"):
        _ = report.samples
    with pytest.raises(ImportError, match="needs pyarrow"):
        report.save_samples(tmp_path / "samples.parquet")
    assert report.scalars()  # nothing else needs it
