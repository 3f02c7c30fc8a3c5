"""Read probe samples from datasets: those of the `datasets` library, hub ids and plain rows."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

from mui_callback.errors import MUIError, ProbeSetError
from mui_callback.forgiving import described
from mui_callback.probe.readers import Columns, text_sample, token_sample
from mui_callback.probe.samples import ProbeSample, TokenSample, fail


def load_hub_dataset(hub_id: str, split: str | None, name: str | None, revision: str | None, *, streaming: bool) -> Any:
    """Call `datasets.load_dataset`, which never runs the code of a dataset's repository here.

    Raises:
        ProbeSetError: If the `datasets` library is not installed, or cannot load the dataset.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ProbeSetError(
            f"loading the dataset {hub_id!r} needs the `datasets` library: pip install 'mui-callback[study]'"
        ) from error
    # Releases before 4 ask, or obey an environment variable, unless told; later ones run none.
    never = "trust_remote_code" in inspect.signature(load_dataset).parameters
    options: dict[str, Any] = {"trust_remote_code": False} if never else {}
    with explained(hub_id, split):
        return load_dataset(hub_id, name, split=split, revision=revision, streaming=streaming, **options)


@contextmanager
def explained(hub_id: str, split: str | None) -> Iterator[None]:
    """For what reads a dataset, which is read from the network or the disk as late as its rows are.

    Raises:
        ProbeSetError: In place of whatever the library, the network or the files raise, with its cause.
    """
    try:
        yield
    except MUIError:
        raise
    except Exception as error:
        part = "" if split is None else f"the split {split!r} of "
        cause = "" if error.__cause__ is None else f" ({described(error.__cause__)})"
        raise ProbeSetError(f"cannot read {part}{hub_id}: {described(error)}{cause}") from error


def select_split(dataset: Any, split: str | None) -> Any:
    """Return the split of a `DatasetDict` (any mapping of splits), or the dataset itself.

    Raises:
        ProbeSetError: If the split is not there, or is not named while there are several.
    """
    if not isinstance(dataset, Mapping):
        if split is not None:
            fail("from_dataset", f"a hub id or a mapping of splits for split={split!r}", type(dataset))
        return dataset
    found = ", ".join(map(repr, dataset)) or "none"
    if split is None and len(dataset) != 1:
        raise ProbeSetError(f"from_dataset: expected split= to name a split, the dataset has: {found}")
    if split is not None and split not in dataset:
        raise ProbeSetError(f"from_dataset: expected a split named {split!r}, the dataset has: {found}")
    return dataset[next(iter(dataset)) if split is None else split]


def read_dataset(
    dataset: Any,
    task: str,
    max_samples: int | None,
    text: str | None,
    columns: Mapping[str, str | None],
) -> tuple[ProbeSample | TokenSample, ...]:
    """Read the rows of a dataset, choosing the columns that hold the samples.

    Args:
        dataset: A sequence or an iterable of mappings.
        task: Names the rows in ids and messages.
        max_samples: Read this many rows only.
        text: The column of plain text that the caller named.
        columns: The columns that the caller named, under the names of `Columns`' fields.

    Raises:
        ProbeSetError: If no known set of columns is there, or a row is no valid sample.
    """
    rows = [*islice(iterate_rows(dataset, task), max_samples)]
    if not rows:
        raise ProbeSetError(f"{task}: expected rows, got an empty dataset")
    found = list(dict.fromkeys(name for row in rows if isinstance(row, Mapping) for name in row))
    chosen = choose_columns(found, text, columns, task)
    sources = [(f"{task}[{index}]", f"{task}-{index}") for index in range(len(rows))]
    if chosen is None:
        return tuple(token_sample(row, *names) for row, names in zip(rows, sources, strict=True))
    return tuple(text_sample(row, chosen, *names) for row, names in zip(rows, sources, strict=True))


def iterate_rows(dataset: Any, task: str) -> Iterator[Any]:
    """Iterate over an iterable, or over a `torch.utils.data.Dataset` that has only length and items."""
    if isinstance(dataset, Iterable) and not isinstance(dataset, Mapping | str):
        return iter(dataset)
    if isinstance(dataset, Mapping | str) or not hasattr(dataset, "__getitem__"):
        fail(task, "a dataset or a sequence of rows", dataset)
    return (dataset[index] for index in range(len(dataset)))


def choose_columns(found: list[str], text: str | None, named: Mapping[str, str | None], task: str) -> Columns | None:
    """Decide which columns to read; None means token ids.

    A column that the caller names wins. Otherwise prompt / response (with choices and answer where both
    are there), then text, then input_ids.

    Raises:
        ProbeSetError: If the columns that are needed are not among those found.
    """
    asked = {field: column for field, column in named.items() if column is not None}
    if text is not None and asked:
        raise ProbeSetError(f"{task}: expected either text_column= or other columns, got both")
    missing = [column for column in (text, *asked.values()) if column is not None and column not in found]
    if missing:
        raise ProbeSetError(f"{task}: expected the column {missing[0]!r}, found only: {_listed(found)}")
    if ("choices" in asked) != ("answer" in asked):
        raise ProbeSetError(f"{task}: expected choices_column= and answer_column= together, got one")

    if text is None and (asked or "response" in found):
        return _response_columns(found, asked, task)
    if text is None and "text" in found:
        text = "text"
    if text is not None:
        return Columns(response=text, prompt=None, choices=None, answer=None)
    if "input_ids" in found:
        return None
    raise ProbeSetError(
        f"{task}: expected the columns 'response' (with 'prompt', 'choices', 'answer'), 'text' or 'input_ids'"
        f" (with 'labels', 'attention_mask'), or their names (response_column= and so on);"
        f" found only: {_listed(found)}"
    )


def _response_columns(found: list[str], asked: Mapping[str, str], task: str) -> Columns:
    response = asked.get("response", "response")
    if response not in found:
        raise ProbeSetError(f"{task}: expected the column 'response' or response_column=, found only: {_listed(found)}")
    # A column has one role: gsm8k's "answer", say, is its response and not an index into choices.
    free = {name for name in found if name not in asked.values() and name != response}
    prompt = asked.get("prompt", "prompt" if "prompt" in free else None)
    if "choices" in asked:
        return Columns(response, prompt, asked["choices"], asked["answer"])
    if {"choices", "answer"} <= free:
        return Columns(response, prompt, "choices", "answer")
    return Columns(response, prompt, None, None)


def _listed(found: list[str]) -> str:
    return ", ".join(map(repr, found)) or "no columns"
