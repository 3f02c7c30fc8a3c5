"""Fused kernels on a GPU against the operators that do the same where there are none."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from mui_callback.probe.head import token_losses
from mui_callback.scoring import kernels
from mui_callback.scoring.rows import CHUNK, Contributions
from mui_callback.scoring.topk import ordered_topk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DEVICE = "cuda"
WIDTHS = [1, 63, 64, 200, 1024, 1100]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@contextmanager
def without_kernels() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "can_run", lambda *tensors: False)
        patch.setattr(kernels, "can_order", lambda *tensors: False)
        patch.setattr(kernels, "can_predict", lambda *tensors: False)
        yield


def rows_of(
    dtype: torch.dtype, width: int, *, is_weighted: bool, is_masked: bool, n_rows: int = 37, seed: int = 0
) -> Contributions:
    """Rows with NaN, infinity and zeros in all that makes them, one all of NaN, in memory with gaps between them."""
    random = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    act, projected = drawn(n_rows, width + 3), drawn(n_rows, width)
    for special in (math.nan, math.inf, -math.inf, 0.0):
        act[torch.rand(act.shape, generator=random) < 0.02] = special
        projected[torch.rand(projected.shape, generator=random) < 0.02] = special
    act[5] = math.nan
    projected[6] = -projected[6].abs()
    act[6] = act[6].abs() + 1  # all below zero, or not finite
    weight = drawn(n_rows)
    weight[7], weight[8] = math.inf, math.nan
    is_row = (torch.rand(n_rows, generator=random) < 0.7).to(DEVICE) if is_masked else None
    of_rows = weight.to(DEVICE) if is_weighted else None
    return Contributions(act.to(DEVICE, dtype)[:, :width], projected.to(DEVICE, dtype), of_rows, is_row)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("is_weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("is_masked", [False, True], ids=["all", "masked"])
def test_summary_and_chunks_are_those_of_the_operators(
    dtype: torch.dtype, width: int, is_weighted: bool, is_masked: bool
) -> None:
    rows = rows_of(dtype, width, is_weighted=is_weighted, is_masked=is_masked)
    assert kernels.can_run(rows.act_SI, rows.projected_SI)
    row_M = torch.arange(rows.n_rows, device=DEVICE).repeat_interleave(rows.n_chunks + 1)
    chunk_M = torch.arange(rows.n_chunks + 1, device=DEVICE).repeat(
        rows.n_rows
    )  # one behind the last, as of wider rows
    fused, chunks, sums = rows.summary(), rows.of_chunks(row_M, chunk_M), rows.sums()
    with without_kernels():
        plain, expected, expected_sums = rows.summary(), rows.of_chunks(row_M, chunk_M), rows.sums()
    assert sums.dtype == expected_sums.dtype == torch.float64
    assert ((sums - expected_sums).abs() <= 1e-5 * plain.mass_S).all()
    assert torch.equal(fused.highest_SC, plain.highest_SC)
    assert int(fused.n_not_finite) == int(plain.n_not_finite) > 0
    assert fused.mass_S.dtype == plain.mass_S.dtype == torch.float32
    torch.testing.assert_close(fused.mass_S, plain.mass_S, rtol=1e-5, atol=0)
    assert chunks.shape == (len(row_M), CHUNK)
    assert torch.equal(chunks, expected)


def test_mixed_precision_is_multiplied_in_float32() -> None:
    act = rows_of(torch.bfloat16, 200, is_weighted=True, is_masked=False)
    projected = rows_of(torch.float32, 200, is_weighted=False, is_masked=False, seed=1)
    rows = Contributions(act.act_SI, projected.projected_SI, act.weight_S)
    fused = rows.summary()
    with without_kernels():
        plain = rows.summary()
    assert torch.equal(fused.highest_SC, plain.highest_SC)
    torch.testing.assert_close(fused.mass_S, plain.mass_S, rtol=1e-5, atol=0)


def test_no_rows_and_no_chunks() -> None:
    rows = rows_of(torch.float32, 64, is_weighted=False, is_masked=False)
    none = Contributions(rows.act_SI[:0], rows.projected_SI[:0])
    assert none.summary().highest_SC.shape == (0, 1)
    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert rows.of_chunks(nothing, nothing).shape == (0, CHUNK)


@pytest.mark.parametrize("n_columns", [1, 5, 1024, 3000])
@pytest.mark.parametrize("k", [1, 7, 2000])
def test_the_highest_in_order_are_those_of_the_operators(n_columns: int, k: int) -> None:
    values = torch.tensor([-math.inf, -2.5, -0.0, 0.0, 1e-40, 1.0, 2.0**127], device=DEVICE)
    random = torch.Generator(device=DEVICE).manual_seed(0)
    score = values[torch.randint(len(values), (6, n_columns), generator=random, device=DEVICE)]
    assert kernels.can_order(score)
    found = ordered_topk(score, k)
    with without_kernels():
        assert torch.equal(found, ordered_topk(score, k))
    for row, indices in zip(score.tolist(), found.tolist(), strict=True):
        assert indices == sorted(range(n_columns), key=lambda i: (-row[i], i))[:k]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_logits", [1, 5, 4096, 10_000])
@pytest.mark.parametrize("layout", ["plain", "rows apart", "columns apart"])
def test_losses_and_first_choices_are_those_of_the_operators(dtype: torch.dtype, n_logits: int, layout: str) -> None:
    random = torch.Generator(device=DEVICE).manual_seed(0)
    logits = (4 * torch.randn(64, n_logits + 3, generator=random, device=DEVICE)).to(dtype)[:, :n_logits]
    logits = logits if layout == "rows apart" else logits.contiguous()
    logits = logits.T.contiguous().T if layout == "columns apart" else logits
    target = torch.randint(n_logits, (64,), generator=random, device=DEVICE)
    logits[0] = 1.0  # all equal
    logits[1] = -math.inf
    logits[2, : n_logits // 2], logits[3, -1], logits[4, 0] = -math.inf, math.inf, math.nan
    target[:20] = logits[:20].argmax(-1)
    target[5], target[6] = 0, n_logits - 1
    assert kernels.can_predict(logits) == (layout != "columns apart" or n_logits == 1)
    loss, is_correct = token_losses(logits, target)
    with without_kernels():
        expected, is_expected = token_losses(logits, target)
    assert loss.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=2e-6, equal_nan=True)
    is_finite = expected.isfinite()
    assert is_finite.sum() > 50
    assert torch.equal(is_correct[is_finite], is_expected[is_finite])
