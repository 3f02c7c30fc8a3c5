"""The table of families in the README; as a script (`make families`) it writes the table anew."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from torch import nn

from families import CANNOT_WORK, EXPECTED, Expected, build, family_names
from mui_callback import MUIProbe, ProbeSet
from mui_callback.probe.verification import Verification
from tiny_samples import make_samples

README = Path(__file__).parents[1] / "README.md"
WORKING = [name for name in family_names() if name not in CANNOT_WORK]


@cache
def model_of(family: str) -> nn.Module:
    return build(family)


def probe_of(family: str) -> MUIProbe:
    return MUIProbe(model_of(family), ProbeSet({"a": make_samples()}), rules="top_fraction=0.02")


def row(family: str, probe: MUIProbe, checked: Verification) -> str:
    """The line of a family that was measured."""
    layer = probe.layers[0]
    path = layer.shape.path.replace(f".{layer.shape.layer}", ".N")
    verdict = "NO" if checked.complaints else "yes"
    return f"| {family} | {verdict} | `{path}` | {layer.layout} | {EXPECTED.get(family, Expected()).note} |"


def row_without(family: str) -> str:
    """The line of a family that cannot work."""
    return f"| {family} | no | | | {CANNOT_WORK[family]} |"


def count() -> str:
    """The line above the table."""
    return f"**{len(WORKING)} of {len(family_names())}** work:"


def table() -> str:
    """All of it, measured."""
    rows = {family: row_without(family) for family in CANNOT_WORK}
    for family in WORKING:
        probe = probe_of(family)
        rows[family] = row(family, probe, probe.verify(rounding=1e-5))
    head = "| family | works | MoE block | layout of its experts | what is special, or why it does not work |"
    lines = [head, "|---|---|---|---|---|", *(rows[family] for family in family_names())]
    summary = ["<details>", "<summary>The families, one by one</summary>", ""]
    return "\n".join([count(), "", *summary, *lines, "", "</details>"])


if __name__ == "__main__":
    before, _, rest = README.read_text(encoding="utf-8").partition("<!-- families -->")
    _, _, after = rest.partition("<!-- /families -->")
    README.write_text(f"{before}<!-- families -->\n{table()}\n<!-- /families -->{after}", encoding="utf-8")
