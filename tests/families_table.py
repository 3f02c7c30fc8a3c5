"""Writes the table of families in the README: `make families`."""

from __future__ import annotations

from families import CANNOT_WORK, family_names
from test_families import README, WORKING, probe_of, row


def main() -> None:
    rows = {family: row(family, probe_of(family), probe_of(family).verify(rounding=1e-5)) for family in WORKING}
    rows |= {family: f"| {family} | no | | | {reason} |" for family, reason in CANNOT_WORK.items()}
    lines = [
        f"**{len(WORKING)} of {len(rows)}** work:",
        "",
        "| family | works | MoE block | layout of its experts | what is special, or why it does not work |",
        "|---|---|---|---|---|",
        *(rows[family] for family in family_names()),
    ]
    before, _, rest = README.read_text(encoding="utf-8").partition("<!-- families -->")
    _, _, after = rest.partition("<!-- /families -->")
    table = "\n".join(lines)
    README.write_text(f"{before}<!-- families -->\n{table}\n<!-- /families -->{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
