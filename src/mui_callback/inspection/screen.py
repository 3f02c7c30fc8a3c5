"""What `mui-callback inspect` shows in the terminal."""

from __future__ import annotations

from itertools import groupby
from math import isnan
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from mui_callback.inspection.cost import ProbeCost
from mui_callback.inspection.describe import LayerDescription
from mui_callback.probe.verification import Verification
from mui_callback.rules import Rule


def show_layers(console: Console, described: list[LayerDescription], rule: Rule) -> None:
    """A table of the layers; layers that follow each other and are alike share a line."""
    table = _table()
    for _, group in groupby(described, key=_kind):
        alike = list(group)
        first, last = alike[0].shape.layer, alike[-1].shape.layer
        layer = f"{first}" if first == last else f"{first} … {last}"
        if last - first + 1 != len(alike):
            layer += f" ({len(alike)})"
        _add_row(table, alike[0], layer, is_new=True)
    console.print(table)
    _show_totals(console, described, rule)


def show_checks(console: Console, described: list[LayerDescription], rule: Rule, checked: Verification) -> None:
    """A table of the layers, one line each, with how well each conserves its output."""
    table = _table()
    table.add_column("used", justify="right", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    previous = None
    for row, check in zip(described, checked.layers, strict=True):
        style = "red" if checked.is_wrong(check) else "yellow" if isnan(check.error) else "green"
        seen = (f"{check.experts_per_token:.3g}", f"[{style}]{check.error:.1e}[/]")
        _add_row(table, row, str(row.shape.layer), *seen, is_new=_kind(row) != previous)
        previous = _kind(row)
    console.print(table)
    _show_totals(console, described, rule)
    console.print(
        f"used: routed experts of a token, on average over {checked.n_tokens} tokens.\n"
        "error: how far the contributions of all neurons are from adding up to the\n"
        f"layer's output, relative; at most {checked.rounding:g} can be rounding.\n"
        f"The head's logits are off by {checked.head_error:.1e}.",
        style="dim",
        highlight=False,
    )


def show_cost(console: Console, cost: ProbeCost, probe: Path | None, *, has_tokenizer: bool) -> None:
    """What a probe would cost."""
    name = "the built-in probe set" if probe is None else probe.name
    unit = "" if has_tokenizer else "There is no tokenizer: counted as one token for each byte, which is too many.\n"
    share = 100 * cost.score_flops / cost.forward_flops
    console.print(
        f"\nA probe with {name}:\n"
        f"{cost.samples} samples, {cost.response_tokens:,} response tokens, {cost.positions:,} positions in "
        f"{cost.passes} forward passes.\n{unit}"
        f"{_operations(cost.forward_flops)} for the forward passes, "
        f"{_operations(cost.score_flops)} more ({share:.2g} %) for the scores.\n"
        f"{_size(cost.score_bytes)} for the scores of a layer, {_size(cost.host_bytes)} to the host once.",
        highlight=False,
    )


def _table() -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("layer", no_wrap=True)
    table.add_column("experts", overflow="fold")
    for name in ("routed", "shared", "top-k", "neurons", "k"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _add_row(table: Table, row: LayerDescription, layer: str, *seen: str, is_new: bool) -> None:
    shape = row.shape
    path = shape.path if "…" not in layer else shape.path.replace(f".{shape.layer}", ".N", 1)
    shared = " + ".join(f"{len(list(same))}x{width}" for width, same in groupby(shape.shared_widths))
    table.add_row(
        layer,
        f"{path}\n[dim]{row.layout}[/]" if is_new else path,
        f"{shape.n_routed}x{shape.routed_width}",
        shared or "-",
        "?" if row.top_k is None else str(row.top_k),
        f"{shape.n_neurons:,}",
        "-" if row.key_entries is None else str(row.key_entries),
        *seen,
    )


def _kind(row: LayerDescription) -> tuple[object, ...]:
    shape = row.shape
    return row.layout, shape.n_routed, shape.routed_width, shape.shared_widths, row.top_k


def _show_totals(console: Console, described: list[LayerDescription], rule: Rule) -> None:
    experts = sum(row.shape.n_experts for row in described)
    neurons = sum(row.shape.n_neurons for row in described)
    key = {
        "top_fraction": "k: a sample's highest contributions in a layer, whose neurons are key.",
        "topscore": f"Key: contributions of at least {rule.value:g} times the highest of sample and layer.",
        "global_topk": f"Key: the {rule.value:,.0f} highest contributions of a sample in all layers together.",
    }[rule.kind]
    console.print(
        f"{len(described)} layers, {experts:,} experts, {neurons:,} neurons.\n{key}",
        highlight=False,
    )


def _operations(flops: float) -> str:
    unit, size = next(((name, size) for name, size in (("P", 1e15), ("T", 1e12)) if flops >= size), ("G", 1e9))
    return f"{flops / size:.3g} {unit}FLOP"


def parameters(count: int) -> str:
    """A number of parameters in words: 671 B, 32.9 k."""
    unit, size = next(((name, size) for name, size in (("B", 1e9), ("M", 1e6)) if count >= size), ("k", 1e3))
    return f"{count / size:.3g} {unit} parameters"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.3g} MiB" if n_bytes >= 2**18 else f"{n_bytes / 2**10:.3g} KiB"
