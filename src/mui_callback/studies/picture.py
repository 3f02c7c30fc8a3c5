"""The picture of the diversity study."""

from __future__ import annotations

from pathlib import Path

from mui_callback.pictures.coverage import coverage_curves
from mui_callback.studies.data_sets import DiversityStudy


def save_coverage_curves(study: DiversityStudy, path: Path, title: str = "") -> Path:
    """Draw MUI by the number of samples as PNG.

    Args:
        study: the data sets.
        path: the file; its directory must be there.
        title: line above the picture.
    """
    curves = {name: one.curve for name, one in study.data_sets.items()}
    at = study.comparison.size
    is_marked = len(curves) > 1 or any(at != curve.n_samples for curve in curves.values())
    coverage_curves(curves, level=study.comparison.level, title=title, at=at if is_marked else None).savefig(path)
    return path
