"""The results of single samples as a table for other tools: Arrow, and Parquet files.

pyarrow is optional, and imported where it is used.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mui_callback.sample_results import SampleResults
from mui_callback.sample_table import SampleTable
from mui_callback.whole_file import replaced_at_once

if TYPE_CHECKING:
    import pyarrow


def samples_table(
    table: SampleTable, task_names: Sequence[str], results: SampleResults, *, has_shared: bool
) -> pyarrow.Table:
    """One row for each sample, in the order of the probe set.

    Args:
        table: the samples.
        task_names: of the tasks that `table` has by number.
        results: what was found of them.
        has_shared: whether the model has shared experts.

    Raises:
        ImportError: pyarrow is not installed.
    """
    pa = _pyarrow()
    n_tokens, n_keys = results.n_tokens, results.n_key_neurons

    def known(values: Any, is_known_N: Any) -> Any:
        return pa.array(values, mask=~np.asarray(is_known_N))

    with np.errstate(divide="ignore", invalid="ignore"):
        loss, shared_share = results.loss / n_tokens, results.n_shared_key_neurons / n_keys
    return pa.table(
        {
            "id": pa.array(table.id, pa.string()),
            "task": pa.DictionaryArray.from_arrays(table.task.astype(np.int32), pa.array(task_names, pa.string())),
            "loss": known(loss, np.isfinite(loss)),
            "n_tokens": pa.array(n_tokens),
            "n_correct": pa.array(results.n_correct),
            "choice_correct": known(results.is_right, results.has_choices),
            "n_key_neurons": pa.array(n_keys),
            "n_key_experts": pa.array(results.n_key_experts),
            "shared_share": known(shared_share, has_shared & (n_keys > 0)),
        }
    )


def write_parquet(path: str | os.PathLike[str], table: pyarrow.Table) -> None:
    """Write a table as a Parquet file; replaces the file at once, or leaves it as it is.

    Raises:
        ImportError: pyarrow is not installed, or has no Parquet.
        OSError: it cannot be written.
    """
    _pyarrow()
    from pyarrow import parquet

    with replaced_at_once(path) as partial:
        parquet.write_table(table, partial)


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError(
            "a table of samples needs pyarrow, which is not installed: pip install 'mui-callback[study]'"
        ) from error
    return pyarrow
