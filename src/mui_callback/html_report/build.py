"""The report of a study: one page that works from the disk, and its figures beside it."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mui_callback.errors import MUIError
from mui_callback.html_report import published
from mui_callback.html_report.album import Album
from mui_callback.html_report.beside import comparisons
from mui_callback.html_report.failures import missing
from mui_callback.html_report.heatmaps import slides_of
from mui_callback.html_report.measured import Measured, measured
from mui_callback.html_report.progress import Progress, progress_of
from mui_callback.html_report.routes import POOLED, Route, routes_of
from mui_callback.html_report.sections import (
    KEY_EXPERTS,
    SHARED,
    Found,
    bars_of,
    coverage_figures,
    metric_figures,
    mui_figures,
    trajectory_figures,
)
from mui_callback.html_report.summary import sentences, summary_lines
from mui_callback.html_report.tables import all_rows, as_csv, as_data_url, row_table, top_table
from mui_callback.metrics.phases import PhaseRule
from mui_callback.trajectory.records import RESULTS_NAME, Study, open_study
from mui_callback.version import __version__
from mui_callback.whole_file import replaced_at_once

PAGE_NAME, FIGURES_NAME, ROWS_NAME = "report.html", "figures", "rows.csv"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LEVEL = 0.95
"""Of the intervals in rows, and so of all others."""

_SCORED = {"gold": "the given responses, by teacher forcing", "generate": "the model's own greedy answers"}


@dataclass(frozen=True)
class ReportFiles:
    """What was written."""

    page: Path
    figures: tuple[Path, ...]
    """PNG and SVG of each."""


def write_report(study_directory: Path, output: Path | None = None, rule: PhaseRule | None = None) -> ReportFiles:
    """Write the report of a study, finished or not.

    Args:
        study_directory: with what was measured so far.
        output: a directory for the report; by default ``report`` in that of the study.
        rule: of the phases.

    Raises:
        MUIError: there is no study, or nothing is measured yet.
        OSError: a file cannot be read or written.
    """
    study = open_study(study_directory)
    if not study.records:
        raise MUIError(f"{study_directory}: expected a study with at least one measured checkpoint, got none")
    output = study_directory / "report" if output is None else output
    output.mkdir(parents=True, exist_ok=True)
    progress, rule = progress_of(study), rule or PhaseRule()
    album = Album(output / FIGURES_NAME)
    found = measured(study, progress, _LEVEL)
    routes = [route for model, of in found.items() for route in routes_of(study, model, of, progress, rule)]
    with warnings.catch_warnings():
        # matplotlib's font has no Chinese, but the words of an SVG are drawn by whatever shows it.
        warnings.filterwarnings("ignore", message=r"Glyph \d+")
        content = _content(study, found, routes, progress, rule, album, output)
    page = _environment().get_template("page.html.j2").render(content)
    with replaced_at_once(output / PAGE_NAME) as partial:
        partial.write_text(page, encoding="utf-8")
    return ReportFiles(output / PAGE_NAME, tuple(album.files))


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("mui_callback.html_report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _content(
    study: Study, found: Found, routes: Sequence[Route], progress: Progress, rule: PhaseRule, album: Album, output: Path
) -> dict[str, Any]:
    rows = all_rows(list(found.values()))
    text = as_csv(rows)
    with replaced_at_once(output / ROWS_NAME) as partial:
        partial.write_text(text, encoding="utf-8")
    first = next(iter(found.values()))[0]
    parquet = study.directory / RESULTS_NAME
    return {
        "study": study,
        "version": __version__,
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "models": [_of_model(study, model, of_model, progress) for model, of_model in found.items()],
        "unmeasured": [(model, n) for model, n in _n_planned(study).items() if model not in found],
        "tasks": _tasks(found),
        "settings": first.settings,
        "identity": _identity({model: dict(of[-1].record.identity) for model, of in found.items()}),
        "responses": sorted(
            {_SCORED.get(str(row["response"]), str(row["response"])) for row in rows if row.get("response")}
        ),
        "missing": missing(study),
        "progress": progress,
        "rule": rule,
        "level": _LEVEL,
        "answers": [
            sentences(model, _of(routes, model), progress.phrase(of_model[-1].x)) for model, of_model in found.items()
        ],
        "summary": summary_lines(routes),
        "trajectories": trajectory_figures(album, routes, progress),
        "mui": mui_figures(album, found, study.tasks, progress, _LEVEL),
        "key_experts": metric_figures(
            album, "key-experts", "How many experts a task needs, and how unevenly", KEY_EXPERTS, found, progress
        ),
        "top": [_top(album, model, of_model, progress) for model, of_model in found.items()],
        "slides": [slides_of(album, model, of_model, progress, len(found)) for model, of_model in found.items()],
        "coverage": coverage_figures(album, found, _LEVEL),
        "shared": metric_figures(album, "shared-experts", "What shared experts carry", SHARED, found, progress),
        "table": row_table(rows),
        "csv": as_data_url(text) or ROWS_NAME,
        "parquet": RESULTS_NAME if parquet.exists() else None,
        "published": published,
        "comparisons": comparisons(found, routes),
        "figures_name": FIGURES_NAME,
    }


def _of(routes: Sequence[Route], model: str) -> list[Route]:
    return [route for route in routes if route.model == model]


def _of_model(study: Study, model: str, of_model: Sequence[Measured], progress: Progress) -> dict[str, Any]:
    layout = of_model[-1].pooled.layout
    return {
        "name": model,
        "n_measured": len(of_model),
        "n_planned": _n_planned(study)[model],
        "n_layers": len(layout.layers),
        "n_experts": layout.n_experts,
        "n_shared": int(layout.is_shared.sum()),
        "n_neurons": int(layout.n_neurons),
        "span": " to ".join(dict.fromkeys(progress.phrase(one.x) for one in (of_model[0], of_model[-1]))),
    }


def _n_planned(study: Study) -> Counter[str]:
    return Counter(one.model for one in study.planned)


def _tasks(found: Found) -> list[tuple[str, int]]:
    """Each with the samples that it has at the last checkpoint of any model."""
    n_samples = {task: report.n_samples for of in found.values() for task, report in of[-1].tasks.items()}
    return list(n_samples.items())


def _top(album: Album, model: str, of_model: Sequence[Measured], progress: Progress) -> dict[str, Any]:
    first, last = of_model[0], of_model[-1]
    has_before = len(of_model) > 1 and first.pooled.layout == last.pooled.layout
    before = {POOLED: first.pooled, **first.tasks} if has_before else {}
    now = {POOLED: last.pooled, **last.tasks}
    bars = bars_of(album, model, last, progress.phrase(last.x))
    return {
        "model": model,
        "first": progress.phrase(first.x),
        "tasks": [(drawn, top_table(task, before.get(task), now[task])) for task, drawn in bars],
    }


def _identity(of_models: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """What the numbers depend on, once where it is the same for all models."""
    first, *others = of_models.values()
    return _flat(of_models if any(other != first for other in others) else first)


def _flat(values: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested settings as lines; of digests, as much as tells them apart."""
    if isinstance(values, dict):
        return [line for key, value in values.items() for line in _flat(value, f"{name}.{key}" if name else str(key))]
    words = ", ".join(map(str, values)) if isinstance(values, list) else "none" if values is None else str(values)
    if _DIGEST.fullmatch(words):
        words = words[:12]
    return [(name, (words or "none") if len(words) <= 400 else f"{words[:400]}…")]
