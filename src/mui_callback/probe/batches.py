"""From token samples to padded batches."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mui_callback.errors import ProbeSetError
from mui_callback.probe.packing import packed
from mui_callback.probe.samples import BoolArray, IntArray, TokenChoice, TokenSample, fail


@dataclass(frozen=True, eq=False)
class Batch:
    """B sequences, padded on the right with id 0 to T tokens, and the R tokens among them to score.

    (Prompts that others follow are padded on the left, see `shared_prompts`.)

    Those of an encoder-decoder are its decoder's; its encoder's are padded in the same way to S tokens.

    Attributes:
        input_ids: int64 [B, T].
        attention_mask: int64 [B, T], 1 for tokens and 0 for padding.
        encoder_ids: int64 [B, S], or None without an encoder.
        encoder_mask: int64 [B, S], as `attention_mask`, or None without an encoder.
        sample: int64 [B], index of each row's sequence among those that were batched.
        flat_position: int64 [R], row * T + (t - 1): where the prediction of scored token t is made. Scored
            tokens are ordered by row, then by position.
        row: int64 [R], the scored token's row.
        order: int64 [R], 0, 1, 2, ... within each row: the token's rank among the row's scored tokens.
        target: int64 [R], the scored token's id.
    """

    input_ids: IntArray
    attention_mask: IntArray
    encoder_ids: IntArray | None
    encoder_mask: IntArray | None
    sample: IntArray
    flat_position: IntArray
    row: IntArray
    order: IntArray
    target: IntArray

    @property
    def n_positions(self) -> int:
        """Tokens and padding, those of an encoder included."""
        return self.input_ids.size + (0 if self.encoder_ids is None else self.encoder_ids.size)

    @property
    def n_scored_max(self) -> int:
        """The largest number of scored tokens of a row; 0 where there are none."""
        return int(self.order.max(initial=-1)) + 1

    @property
    def is_stand_in(self) -> bool:
        """Whether there is nothing to score."""
        return not len(self.target)


def make_batches(sequences: Sequence[TokenSample | TokenChoice], batch_tokens: int) -> list[Batch]:
    """Batch sequences of similar length.

    Sequences are sorted by length, an encoder's included (ties by index), and cut into few batches of little
    padding, see `packed`. One without a scored token has nothing to score and is in no batch.

    Args:
        sequences: The sequences to batch, as `encode` makes them.
        batch_tokens: The most tokens (B * T, or B * (T + S) with an encoder; with padding) of a batch, 1 or
            more. A longer sequence makes a batch of its own.

    Raises:
        ProbeSetError: If `batch_tokens` is less than 1, or a decoder's sequence has no start token yet.
    """
    return [batch for (batch,) in make_rounds(sequences, batch_tokens, 1)]


def make_rounds(
    sequences: Sequence[TokenSample | TokenChoice], batch_tokens: int, n_shards: int
) -> list[tuple[Batch, ...]]:
    """Batches for several shards that run them at the same time, one each in a round.

    The batches of a round have one shape: no shard waits for another, and routers whose capacity depends on the
    number of tokens have the same one everywhere. Rows that are wanting for it repeat a sequence, with nothing to
    score; so does a whole batch where there are fewer sequences than shards.

    Args:
        sequences: See `make_batches`.
        batch_tokens: See `make_batches`.
        n_shards: Batches of a round.

    Raises:
        ProbeSetError: See `make_batches`.
    """
    if batch_tokens < 1:
        fail("batch_tokens", "1 or more tokens", batch_tokens)
    return [_deal(sequences, pack, n_shards) for pack in _packs(sequences, batch_tokens, n_shards)]


def one_batch(sequences: Sequence[TokenSample | TokenChoice], numbers: Sequence[int]) -> Batch:
    """A batch of some sequences, in this order; each has a scored token.

    Raises:
        ProbeSetError: See `make_batches`.
    """
    return _deal(sequences, list(numbers), 1)[0]


def only(batch: Batch, rows_B: IntArray) -> Batch:
    """Some rows of a batch.

    Args:
        batch: Without an encoder.
        rows_B: int64, the rows, ascending.
    """
    kept_R = np.isin(batch.row, rows_B)
    row_R, length = np.searchsorted(rows_B, batch.row[kept_R]), batch.input_ids.shape[1]
    return replace(
        batch,
        input_ids=batch.input_ids[rows_B],
        attention_mask=batch.attention_mask[rows_B],
        sample=batch.sample[rows_B],
        flat_position=row_R * length + batch.flat_position[kept_R] % length,
        row=row_R,
        order=batch.order[kept_R],
        target=batch.target[kept_R],
    )


def half_of_largest(batches: Iterable[Batch]) -> int | None:
    """Half the positions of the largest batch that can be cut, to go on with less memory; None if none can."""
    largest = max((batch.n_positions for batch in batches if len(batch.sample) > 1), default=None)
    return None if largest is None else largest // 2


def _packs(sequences: Sequence[TokenSample | TokenChoice], batch_tokens: int, n_shards: int) -> list[list[int]]:
    """The sequences of each round."""
    scored = [index for index, sequence in enumerate(sequences) if sequence.scored.any()]
    scored.sort(key=lambda index: sum(_lengths(sequences[index])))
    rounds = packed([_lengths(sequences[index]) for index in scored], batch_tokens, n_shards)
    return [[scored[place] for place in pack] for pack in rounds]


def _deal(sequences: Sequence[TokenSample | TokenChoice], pack: list[int], n_shards: int) -> tuple[Batch, ...]:
    n_rows = -(-len(pack) // n_shards)
    lengths = tuple(max(column) for column in zip(*(_lengths(sequences[index]) for index in pack), strict=True))
    hands = [pack[shard::n_shards] for shard in range(n_shards)]
    return tuple(_pad(sequences, hand + pack[:1] * (n_rows - len(hand)), len(hand), lengths) for hand in hands)


def _lengths(sequence: TokenSample | TokenChoice) -> tuple[int, int]:
    """The number of tokens of the only or the decoder's sequence, and of the encoder's."""
    return len(sequence.input_ids), 0 if sequence.encoder_ids is None else len(sequence.encoder_ids)


def _pad(
    sequences: Sequence[TokenSample | TokenChoice], pack: list[int], n_scored: int, lengths: tuple[int, ...]
) -> Batch:
    """One batch, of whose rows the first `n_scored` are scored."""
    rows_of = [sequences[index] for index in pack]
    input_ids, attention_mask = _padded([sequence.input_ids for sequence in rows_of], lengths[0])
    scored = _padded([sequence.scored for sequence in rows_of], lengths[0])[0].astype(np.bool_)
    scored[n_scored:] = False
    if scored[:, 0].any():
        raise ProbeSetError("expected sequences as `encode` makes them, got one without the decoder's start token")
    encoders = [sequence.encoder_ids for sequence in rows_of if sequence.encoder_ids is not None]
    encoder_ids, encoder_mask = _padded(encoders, lengths[1]) if encoders else (None, None)
    rows, positions = np.nonzero(scored)
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        encoder_ids=encoder_ids,
        encoder_mask=encoder_mask,
        sample=np.array(pack, dtype=np.int64),
        flat_position=rows * input_ids.shape[1] + positions - 1,
        row=rows,
        order=(scored.cumsum(axis=1, dtype=np.int64) - 1)[scored],
        target=input_ids[scored],
    )


def _padded(rows: Sequence[IntArray | BoolArray], length: int) -> tuple[IntArray, IntArray]:
    """The rows, and a mask of where they are, of shape [number of rows, length]."""
    padded = np.zeros((len(rows), length), dtype=np.int64)
    mask = np.zeros_like(padded)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return padded, mask
