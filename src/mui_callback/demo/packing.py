"""Samples of different length side by side in rows of one length, so that no compute is spent on padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from random import Random

import torch

from mui_callback.probe.encode import Tokenizer, tokenize
from mui_callback.probe.samples import ProbeSample, TokenSample

IGNORED = -100
"""Label of a token that the loss leaves out, as in transformers."""

Row = dict[str, torch.Tensor]


def pack(
    samples: Mapping[str, Sequence[ProbeSample]],
    shares: Mapping[str, float],
    tokenizer: Tokenizer,
    *,
    n_rows: int,
    row_length: int,
    seed: int = 0,
) -> list[Row]:
    """Rows to train on, each with samples of all tasks.

    Positions start at 0 in each sample: transformers then lets no sample attend to another one of its row. The loss
    is that of the probe: of the responses, the end of the text included.

    Args:
        samples: Samples by task, each seen once before one is seen again.
        shares: Share of the tokens that each task gets.
        tokenizer: Appends the token that ends a text.
        n_rows: Number of rows.
        row_length: Tokens of a row; the rest that the next sample does not fit into is padding.
        seed: Order of the samples.

    Returns:
        Rows of int64 ``[row_length]``: ``input_ids``, ``labels`` and ``position_ids``.
    """
    random = Random(seed)
    tokens = cache(partial(tokenize, tokenizer=tokenizer))
    streams = {task: map(tokens, _forever(samples[task], random)) for task in shares}
    seen = dict.fromkeys(shares, 0)
    rows: list[Row] = []
    row: list[TokenSample] = []
    room = row_length
    while len(rows) < n_rows:
        task = min(shares, key=lambda task: seen[task] / shares[task])
        sample = next(streams[task])
        n_tokens = len(sample.input_ids)
        if n_tokens > room:
            rows.append(_join(row, row_length))
            row, room = [], row_length
        row.append(sample)
        room -= n_tokens
        seen[task] += n_tokens
    return rows


def _forever(samples: Sequence[ProbeSample], random: Random) -> Iterator[ProbeSample]:
    while True:
        yield from random.sample(samples, len(samples))


def _join(samples: list[TokenSample], length: int) -> Row:
    # A padding token is a text of its own, at position 0.
    row = {
        "input_ids": torch.zeros(length, dtype=torch.int64),
        "labels": torch.full((length,), IGNORED),
        "position_ids": torch.zeros(length, dtype=torch.int64),
    }
    start = 0
    for sample in samples:
        ids, scored = torch.tensor(sample.input_ids), torch.tensor(sample.scored)
        here = slice(start, start + len(ids))
        row["input_ids"][here] = ids
        row["labels"][here] = ids.where(scored, torch.tensor(IGNORED))
        row["position_ids"][here] = torch.arange(len(ids))
        start = here.stop
    return row
