"""Panels of values over training, dots and planes show the numbers that they are given, and words have room."""

from __future__ import annotations

from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from mui_callback.metrics.phases import Phase
from mui_callback.metrics.rarefaction import CoverageCurve
from mui_callback.pictures.coverage import coverage_curves
from mui_callback.pictures.curves import Line, Panel, curves, dots
from mui_callback.pictures.panels import strokes
from mui_callback.pictures.paths import Path, PathPoint
from mui_callback.pictures.planes import Plane, planes
from mui_callback.pictures.style import as_svg
from mui_callback.pictures.trajectories import trajectories
from words_on_page import assert_apart

WORDS = {"title": "title with a $ in it", "subtitle": "all tasks"}


def line(name: str, n: int = 6, seed: int = 0, gap: int | None = None) -> Line:
    rng = np.random.default_rng(seed)
    y = 10 + rng.random(n).cumsum()
    if gap is not None:
        y[gap] = np.nan
    return Line(name, 1e12 * np.arange(1.0, n + 1), y, y - 1, y + 1)


def some_panels(n_panels: int, n_lines: int, n: int = 6, name: str = "model {}") -> list[Panel]:
    return [
        Panel(f"task {p}: hendrycks_math level $5$" * 2, "MUI, %", [line(name.format(i), n, i) for i in range(n_lines)])
        for p in range(n_panels)
    ]


def drawn(figure: Figure, gid: str) -> list[mpl.artist.Artist]:
    return [artist for axes in figure.axes for artist in axes.get_children() if artist.get_gid() == gid]


def over_training(panels: list[Panel]) -> Figure:
    return curves(panels, **WORDS, x_label="tokens", x_words=lambda value: f"{value / 1e12:g}T")


def test_lines_and_bands_are_the_values() -> None:
    panel = Panel("a", "%", [line("one", gap=2), line("two", seed=1)])
    figure = over_training([panel])
    for artist, given in zip(drawn(figure, "line"), panel.lines, strict=True):
        np.testing.assert_array_equal(artist.get_xdata(), given.x)
        np.testing.assert_array_equal(artist.get_ydata(), given.y)
    bands = drawn(figure, "interval")
    assert len(bands) == 2
    np.testing.assert_allclose(bands[1].get_datalim(figure.axes[0].transData).intervaly, [
        panel.lines[1].low.min(), panel.lines[1].high.max(),
    ])  # fmt: skip
    low, high = figure.axes[0].get_ylim()
    assert low < np.nanmin(panel.lines[0].low)
    assert high > panel.lines[1].high.max()


def test_dots_are_the_last_values() -> None:
    panels = some_panels(2, 3)
    figure = dots(panels, **WORDS)
    given = [one for panel in panels for one in panel.lines]
    for artist, one in zip(drawn(figure, "line"), given, strict=True):
        assert artist.get_xdata()[0] == one.y[-1]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["model 0", "model 1", "model 2"]


@pytest.mark.parametrize(
    ("n_panels", "n_lines"),  # one, two and three columns, with the shortest legends and the longest
    [(1, 1), (1, 8), (1, 25), (2, 8), (2, 25), (4, 2), (9, 1), (9, 8), (9, 25)],
)
def test_words_have_room(n_panels: int, n_lines: int) -> None:
    name = "organisation/a-model-with-a-name-that-is-long-{}" if n_lines < 9 else "{}"
    panels = some_panels(n_panels, n_lines, name=name)
    assert_apart(over_training(panels))
    assert_apart(dots(panels, **WORDS))


def test_nothing_to_draw_is_said() -> None:
    nothing = Line("x", np.array([1e12]), np.array([np.nan]))
    for figure in (over_training([Panel("a", "%", [nothing])]), over_training([Panel("a", "%", [])])):
        assert [text.get_text() for text in figure.axes[0].texts] == ["no value"]
        assert_apart(figure)


def test_names_keep_their_stroke_and_no_two_have_the_same() -> None:
    names = [f"n{i % 24}" for i in range(48)]
    found = strokes(names)
    assert len(found) == 24 == len({(one.color, str(one.dashes)) for one in found.values()})
    assert {found[name] for name in names[:6]} == {strokes(names[:6])[name] for name in names[:6]}


def a_path(seed: int, n: int, axis: str = "-loss") -> Path:
    rng = np.random.default_rng(seed)
    points = (PathPoint(i, 3 - i + rng.random(), 0.1 + 0.01 * i, Phase.UNDECIDED, (0.05, 0.3)) for i in range(n))
    return Path("t", axis, tuple(points))


@pytest.mark.parametrize("axis", ["-loss", "choice_accuracy"])
@pytest.mark.parametrize("n", [1, 5])
def test_planes_have_the_path_of_each_model(axis: str, n: int) -> None:
    paths = {f"model {seed}": a_path(seed, n, axis) for seed in range(8)}
    figure = planes([Plane("t", axis, paths), Plane("u", axis, {})], **WORDS)
    for artist, path in zip(drawn(figure, "path"), paths.values(), strict=True):
        np.testing.assert_allclose(artist.get_xdata(), [point.performance for point in path.points])
        np.testing.assert_allclose(artist.get_ydata(), [100 * point.mui for point in path.points])
    for artist, path in zip(drawn(figure, "latest"), paths.values(), strict=True):
        assert artist.get_xdata()[0] == path.points[-1].performance
    assert bool(figure.axes[0].xaxis_inverted()) is (axis == "-loss")
    assert_apart(figure)


def test_points_may_have_names_of_their_own() -> None:
    points = tuple(PathPoint(i, 2.0 - 0.1 * i, 0.1 + 0.01 * i, Phase.UNDECIDED, name=f"{i}T") for i in range(1, 4))
    figure = trajectories([Path("a", "-loss", points, ("tokens", "tokens"))], **WORDS)
    assert {"1T", "3T"} <= {text.get_text() for text in figure.axes[0].texts if text.get_gid() == "step"}
    (note,) = (text for text in figure.findobj(mpl.text.Text) if text.get_gid() == "note")
    assert note.get_text() == "tokens 1T to 3T"


def test_names_of_curves_are_in_the_picture() -> None:
    sizes = np.arange(1, 9)
    curve = CoverageCurve(8, sizes, sizes / 80, None, sizes / 90, sizes / 70)
    names = ["x", "a_name_that_is_rather_long_for_a_task"]
    figure = coverage_curves(dict.fromkeys(names, curve), level=0.95)
    (axes,) = figure.axes
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert sorted(boxes) == sorted(names)
    assert all(box.x1 <= figure.bbox.x1 for box in boxes.values())


def test_svg_is_made_of_words_and_leaves_settings_alone() -> None:
    before = dict(mpl.rcParams)
    with mpl.rc_context({"text.usetex": True, "svg.fonttype": "path", "axes.grid": True}):
        svg = as_svg(over_training(some_panels(2, 2)))
    assert dict(mpl.rcParams) == before
    assert svg == as_svg(over_training(some_panels(2, 2)))
    assert ">title with a $ in it</text>" in svg
    assert not any(a == b == "" for a, b in pairwise(svg.split("\n")))
