"""Every picture shows the numbers of the report, whatever its shape, and looks the same whatever matplotlib is told."""

from __future__ import annotations

import warnings
from dataclasses import replace
from io import BytesIO
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image

from made import LAYOUT, make_report
from mui_callback.layout import ExpertLayout, LayerShape
from mui_callback.metrics.phases import Phase
from mui_callback.pictures.draw import draw
from mui_callback.pictures.expert_blocks import expert_blocks
from mui_callback.pictures.heatmap import expert_heatmap
from mui_callback.pictures.histogram import expert_mui_histogram
from mui_callback.pictures.paths import Path, PathPoint, Paths
from mui_callback.pictures.scene import PICTURES, Picture, Scene
from mui_callback.pictures.style import as_png, rendered
from mui_callback.pictures.table import expert_rows
from mui_callback.pictures.top_experts import top_experts_bars
from mui_callback.pictures.trajectories import trajectories
from mui_callback.task_report import TaskReport
from words_on_page import assert_apart

WORDS = {"title": "title with a $ in it", "subtitle": "all tasks"}


def a_task(layout: ExpertLayout, seed: int = 0) -> TaskReport:
    """Counts as a real report has them: many experts without key neurons, a few with many."""
    rng = np.random.default_rng(seed)
    width = layout.width
    share = np.exp(rng.normal(-3, 1.2, len(width))) * (1 + 4 * layout.is_shared)
    keys = np.minimum(rng.poisson(share * width), width)
    activated = np.where(keys > 0, rng.binomial(199, np.clip(3 * share, 0, 1)) + 1, 0)
    task = make_report([{0}]).pooled
    return replace(
        task, layout=layout, key_neurons=keys, activated=activated, mass=keys * 1.0, routed=keys, n_samples=200
    )


def layers(n: int, n_routed: int, n_shared: int = 0, n_dense: int = 0) -> ExpertLayout:
    dense = [LayerShape(number, "d", 1, 256) for number in range(n_dense)]
    return ExpertLayout(dense + [LayerShape(i, "m", n_routed, 32, (32,) * n_shared) for i in range(n_dense, n)])


SHAPES = {
    "48 x 128": layers(48, 128),
    "61 x 257": layers(61, 256, 1, n_dense=3),
    "2 x 4": layers(2, 4),
    "one layer": layers(1, 8, 2),
    "dense": layers(12, 0, n_dense=12),
    "two kinds": LAYOUT,
}


def images(figure: Figure) -> dict[str, np.ndarray]:
    """The values of the cells by kind of expert; NaN where there is none."""
    return {axes.get_gid(): np.ma.filled(axes.images[0].get_array(), np.nan) for axes in figure.axes if axes.images}


def opened(picture: Picture) -> Image.Image:
    return Image.open(BytesIO(picture.png))


# Heatmaps


@pytest.mark.parametrize("shape", SHAPES)
def test_every_expert_has_its_cell(shape: str) -> None:
    layout = SHAPES[shape]
    task = a_task(layout)
    cells = images(expert_heatmap(task, task.expert_mui, **WORDS))
    n_cells = 0
    for label, value in zip(layout.expert_labels, 100 * task.expert_mui, strict=True):
        layer, expert = label[1:].split("-")
        row = next(i for i, one in enumerate(layout.layers) if one.layer == int(layer))
        is_dense = layout.layers[row].n_experts == 1
        kind = "dense" if is_dense else "shared" if expert[0] == "S" else "routed"
        assert cells[kind][row, int(expert[1:]) - (kind == "shared")] == value
        n_cells += 1
    assert sum(int((~np.isnan(block)).sum()) for block in cells.values()) == n_cells


def color_of_cell(pixels: np.ndarray, figure: Figure, kind: str, row: int, column: int) -> np.ndarray:
    """The pixel above the number in a cell."""
    axes = next(axes for axes in figure.axes if axes.get_gid() == kind)
    n_rows, n_columns = axes.images[0].get_array().shape
    left, bottom, width, height = axes.get_window_extent().bounds
    x = round(left + (column + 0.5) * width / n_columns)
    y = round(pixels.shape[0] - (bottom + height) + (row + 0.25) * height / n_rows)
    return pixels[y, x]


def test_a_colour_means_the_same_at_every_probe() -> None:
    layout = SHAPES["2 x 4"]
    few, many = (
        replace(a_task(layout), key_neurons=np.array(keys)) for keys in ([0, 1, 2, 3] * 2, [0, 1, 2, 3, 32, 31, 30, 0])
    )
    figures = [expert_heatmap(task, task.expert_mui, **WORDS) for task in (few, many)]
    first, second = (np.asarray(Image.open(BytesIO(as_png(figure))).convert("RGB")) for figure in figures)
    for column in range(4):
        here = [
            color_of_cell(page, figure, "routed", 0, column)
            for page, figure in zip((first, second), figures, strict=True)
        ]
        np.testing.assert_array_equal(*here)
    hues = [color_of_cell(first, figures[0], "routed", 0, column).astype(int) for column in range(4)]
    assert all(np.abs(a - b).max() > 10 for a, b in pairwise(hues))
    key = figures[0].axes[-1]
    assert [label.get_text() for label in key.get_yticklabels()] == ["1 %", "5 %", "20 %", "50 %", "100 %"]


@pytest.mark.parametrize("shape", SHAPES)
def test_zero_has_one_colour_in_the_file(shape: str) -> None:
    task = a_task(SHAPES[shape])
    task = replace(task, key_neurons=np.where(np.arange(len(task.key_neurons)) == 1, 0, task.key_neurons))
    figure = expert_heatmap(task, task.expert_mui, **WORDS)
    page = np.asarray(Image.open(BytesIO(as_png(figure))).convert("RGB"))
    n_zeros = 0
    for kind, values in images(figure).items():
        for row, column in np.argwhere(values == 0):
            assert color_of_cell(page, figure, kind, row, column).tolist() == [0xDF, 0xE2, 0xE7]
            n_zeros += 1
    assert n_zeros == (task.key_neurons == 0).sum() > 0


@pytest.mark.parametrize("shape", ["48 x 128", "61 x 257", "one layer"])
def test_a_cell_is_as_many_pixels_as_every_other_and_has_the_colour_of_its_value(shape: str) -> None:
    task = a_task(SHAPES[shape])
    figure = expert_heatmap(task, task.activated_frequency, **WORDS)
    pixels = np.asarray(Image.open(BytesIO(as_png(figure))).convert("RGB"))
    colors = mpl.colormaps["viridis"]
    for kind, values in images(figure).items():
        axes = next(axes for axes in figure.axes if axes.get_gid() == kind)
        cell = np.array(axes.get_window_extent().size) / values.shape[::-1]
        np.testing.assert_allclose(cell, np.round(cell), atol=1e-6)
        assert min(cell) >= 3
        for row, column in np.argwhere(np.ones_like(values, dtype=bool))[:: max(1, values.size // 500)]:
            value = values[row, column]
            hue = "white" if np.isnan(value) else "#dfe2e7" if value == 0 else colors((value / 100) ** (1 / 3))
            expected = 255 * np.array(mpl.colors.to_rgb(hue))
            np.testing.assert_allclose(color_of_cell(pixels, figure, kind, row, column), expected, atol=6)


@pytest.mark.parametrize("shape", SHAPES)
def test_labels_do_not_overlap_and_nothing_is_outside(shape: str) -> None:
    task = a_task(SHAPES[shape])
    figures = [
        expert_heatmap(task, task.expert_mui, **WORDS),
        top_experts_bars(task, **WORDS),
        expert_mui_histogram(task, **WORDS),
    ]
    for figure in figures:
        rendered(figure)
        page = figure.bbox
        texts = [text for text in figure.findobj(mpl.text.Text) if text.get_text() and text.get_visible()]
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
        for words, box in boxes:
            assert page.x0 <= box.x0, words
            assert box.x1 <= page.x1, words
            assert page.y0 <= box.y0, words
            assert box.y1 <= page.y1, words
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                shown = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
                assert not any(a.overlaps(b) for a, b in pairwise(shown))


def test_pictures_are_small_files() -> None:
    for shape in ("48 x 128", "61 x 257"):
        task = a_task(SHAPES[shape])
        pictures = draw(Scene(3, task, {"a": task}, ()))
        assert max(len(picture.png) for picture in pictures.values()) < 60 * 1024
        assert max(max(opened(picture).size) for picture in pictures.values()) < 1400


def test_blocks_of_layers_with_different_experts() -> None:
    routed, shared = expert_blocks(LAYOUT, np.arange(7.0))
    np.testing.assert_array_equal(routed.values, [[0, 1, 2], [3, 4, np.nan]])
    np.testing.assert_array_equal(shared.values, [[np.nan, np.nan], [5, 6]])
    assert (routed.labels, shared.labels) == (("E0", "E1", "E2"), ("S1", "S2"))


# Bars and histograms


def test_bars_are_the_top_experts() -> None:
    task = a_task(SHAPES["61 x 257"])
    top = task.top_experts()
    figure = top_experts_bars(task, **WORDS)
    (axes,) = figure.axes
    wide, narrow = axes.containers
    assert [bar.get_width() for bar in wide] == pytest.approx([100 * frequency for _, frequency, _ in top])
    assert [bar.get_width() for bar in narrow] == pytest.approx([100 * mui for *_, mui in top])
    assert [label.get_text() for label in axes.get_yticklabels()] == [label for label, *_ in top]
    colors = {bar.get_facecolor()[:3] for bar in narrow}
    assert len(colors) == len({label.split("-")[1][0] for label, *_ in top})


def test_bars_of_experts_without_a_key_neuron_are_left_out() -> None:
    task = edge_cases()["few"]
    (axes,) = top_experts_bars(task, **WORDS).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["L0-E2", "L1-E0"]
    caption = draw(Scene(7, task, {"a": task}, ()))["top_experts"].caption
    assert caption.startswith("The 2 experts with the highest activated frequency")


def test_the_histogram_counts_every_expert_once() -> None:
    task = a_task(SHAPES["61 x 257"])
    (axes,) = expert_mui_histogram(task, **WORDS).axes
    outlines = [patch for patch in axes.patches if isinstance(patch, mpl.patches.StepPatch) and not patch.get_fill()]
    kinds = np.array(task.layout.expert_kinds)
    none = [100 * np.mean(task.key_neurons[kinds == kind] == 0) for kind in ("routed", "shared", "dense")]
    bars = [bar for container in axes.containers for bar in container]
    assert [bar.get_height() for bar in bars] == pytest.approx([share for share in none if share])
    for outline, none_of_kind in zip(outlines, none, strict=True):
        assert np.nansum(outline.get_data().values) + none_of_kind == pytest.approx(100)
        assert not (outline.get_data().values == 0).any()  # no line along the axis
        assert axes.get_xlim()[0] < outline.get_data().edges[-1] < axes.get_xlim()[1]
    spans = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars]
    assert len(bars) > 1
    assert all(end <= start + 1e-9 for (_, end), (start, _) in pairwise(spans))  # side by side
    assert spans[-1][1] < 0


@pytest.mark.parametrize(("shape", "words"), [("2 x 4", "MUI, routed: "), ("one layer", "MUI, routed and shared: ")])
def test_captions_name_the_kinds_that_there_are(shape: str, words: str) -> None:
    task = a_task(SHAPES[shape])
    assert words in draw(Scene(7, task, {"a": task}, ()))["expert_mui_histogram"].caption


# Trajectories


def points_of(n: int, seed: int = 0) -> tuple[PathPoint, ...]:
    rng = np.random.default_rng(seed)
    phases = list(Phase)
    return tuple(
        PathPoint(
            100 * i,
            3 - 2 * i / max(n, 2) + 0.1 * rng.random(),
            0.02 + 0.001 * i,
            phases[i % 5],
            (0.01, 0.05),
            (1.0, 3.0),
        )
        for i in range(n)
    )


@settings(max_examples=12, deadline=None)
@given(n=st.integers(1, 40), n_tasks=st.integers(1, 14), accuracy=st.booleans())
def test_paths_are_drawn_point_by_point(n: int, n_tasks: int, accuracy: bool) -> None:
    axis = "choice_accuracy" if accuracy else "-loss"
    paths = [Path(f"task {seed}", axis, points_of(n, seed)) for seed in range(n_tasks)]
    figure = trajectories(paths, **WORDS)
    assert len(figure.axes) == min(n_tasks, 9)
    for axes, path in zip(figure.axes, paths, strict=False):
        line = next(line for line in axes.lines if line.get_gid() == "path")
        np.testing.assert_allclose(line.get_xdata(), [point.performance for point in path.points])
        np.testing.assert_allclose(line.get_ydata(), [100 * point.mui for point in path.points])
        marks = {one.get_gid(): one.get_offsets() for one in axes.collections}
        for phase in Phase:
            of_phase = [(p.performance, 100 * p.mui) for p in path.points if p.phase is phase]
            np.testing.assert_allclose(np.reshape(marks.get(phase.value, []), (-1, 2)), np.reshape(of_phase, (-1, 2)))
        np.testing.assert_allclose(marks["latest"], [(path.points[-1].performance, 100 * path.points[-1].mui)])
        bands = [line for line in axes.lines if line.get_gid() == "band"]
        assert len(bands) == sum(point.phase is not Phase.UNDECIDED for point in path.points[1:])
        assert bool(axes.xaxis_inverted()) is not accuracy  # better is to the right
        steps = [text.get_text() for text in axes.texts if text.get_gid() == "step"]
        assert set(steps) <= {f"{point.step:,}" for point in path.points}
        latest = axes.transAxes.inverted().transform(axes.transData.transform(marks["latest"][0]))
        assert ((latest > 0) & (latest < 1)).all()


def texts(figure: Figure, gid: str) -> list[mpl.text.Text]:
    return [text for text in figure.findobj(mpl.text.Text) if text.get_gid() == gid]


def test_a_model_that_was_far_off_in_the_beginning_is_out_of_view() -> None:
    far = PathPoint(0, 11.0, 0.9, Phase.UNDECIDED)
    figure = trajectories([Path(None, "-loss", (far, *points_of(6)[1:]))], **WORDS)
    assert max(figure.axes[0].get_xlim()) < 5
    (note,) = texts(figure, "note")
    assert note.get_text() == "steps 100 to 500; step 0 out of view"


def some_paths(n: int, n_tasks: int, name: str = "task {}") -> list[Path]:
    return [Path(name.format(seed), "-loss", points_of(n, seed)) for seed in range(n_tasks)]


@pytest.mark.parametrize("n", [1, 2, 9, 30])
@pytest.mark.parametrize("n_tasks", [1, 2, 4, 10])
def test_no_words_run_over_others_or_out_of_the_page(n: int, n_tasks: int) -> None:
    figure = trajectories(some_paths(n, n_tasks, "hendrycks_math $x$ level {0}: chain_of_thought" * 3), **WORDS)
    assert_apart(figure)
    for axes, name in zip(figure.axes, texts(figure, "name"), strict=True):
        assert name.get_window_extent().x1 <= axes.bbox.x1 + 1
        start, end = name.get_text().split("…")
        assert start.startswith("hendrycks_math")
        assert end.endswith("chain_of_thought")


def test_short_names_are_kept() -> None:
    assert [text.get_text() for text in texts(trajectories(some_paths(3, 2), **WORDS), "name")] == ["task 0", "task 1"]


@pytest.mark.parametrize(
    ("n_tasks", "words"), [(9, ""), (10, "; 1 more task is not shown"), (14, "; 5 more tasks are")]
)
def test_the_picture_says_how_many_tasks_are_left_out(n_tasks: int, words: str) -> None:
    figure = trajectories(some_paths(3, n_tasks), **WORDS)
    (subtitle,) = (text.get_text() for text in figure.texts if text.get_text().startswith(WORDS["subtitle"]))
    assert subtitle.startswith(WORDS["subtitle"] + words)
    assert ("shown" in subtitle) == bool(words)


@pytest.mark.parametrize("n_tasks", [1, 2, 4, 5])
def test_the_legend_has_even_columns(n_tasks: int) -> None:
    figure = trajectories(some_paths(3, n_tasks), **WORDS)
    rendered(figure)
    boxes = [text.get_window_extent() for text in texts(figure, "legend")]
    lefts = np.unique(np.round([box.x0 for box in boxes]))
    assert len(boxes) == len(Phase)
    assert np.ptp(np.diff(lefts)) <= 1
    assert len(lefts) == (5 if n_tasks == 5 else 3)


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 24), seed=st.integers(0, 99), bar=st.floats(0.001, 0.2))
def test_error_bars_are_in_view_and_steps_are_at_their_points(n: int, seed: int, bar: float) -> None:
    rng = np.random.default_rng(seed)
    points = tuple(
        PathPoint(
            1000 * i, 3 * 0.8**i + 0.1 * x, 0.05 + 0.002 * i, Phase.UNDECIDED,
            (0.05 + 0.002 * i - bar / 5, 0.05 + 0.002 * i + bar / 5),
            (3 * 0.8**i + 0.1 * x - bar, 3 * 0.8**i + 0.1 * x + bar),
        )
        for i, x in enumerate(rng.random(n))
    )  # fmt: skip
    figure = trajectories([Path("a", "-loss", points)], **WORDS)
    rendered(figure)
    (axes,) = figure.axes
    left_out = texts(figure, "note")[0].get_text().endswith("out of view")
    places = np.array([(point.performance, 100 * point.mui) for point in points])
    limits = np.sort([axes.get_xlim(), axes.get_ylim()])
    seen = places[(places > limits[:, 0]).all(axis=1) & (places < limits[:, 1]).all(axis=1)]
    spans = np.ptp(seen, axis=0)
    bars = [line.get_xydata() for line in axes.lines if line.get_gid() == "interval"]
    assert all(line.get_marker() in ("_", "|") for line in axes.lines if line.get_gid() == "interval")
    if not left_out:
        assert len(bars) == 2 * n
        outside = np.concatenate([np.maximum(limits[:, 0] - ends, ends - limits[:, 1]) for ends in bars]).max(axis=0)
        is_wide = np.array([2 * bar, 40 * bar]) > 4 * spans
        assert ((outside < 0) | (is_wide & (spans > 0)) | (limits[:, 0] == 0)).all()
    pixels = axes.transData.transform(places)
    for text in axes.texts:
        box = text.get_window_extent()
        ends = np.array([box.min, box.max])
        away = np.linalg.norm(np.maximum(0, np.maximum(ends[0] - pixels, pixels - ends[1])), axis=1)
        own = next(i for i, point in enumerate(points) if f"{point.step:,}" == text.get_text())
        assert away[own] <= away.min() + (9 if own == n - 1 else 3)  # of the last point there is a ring
        if own not in (n - len(seen), n - 1):
            for line in (axes.transData.transform(ends) for ends in bars):
                crossed = (line.max(axis=0) > ends[0] + 3) & (line.min(axis=0) < ends[1] - 3)
                assert not crossed.all(), text.get_text()


def test_paths_come_from_what_was_logged() -> None:
    logged = {
        0: {"mui/a/mui": 0.1, "mui/a/loss": 2.0, "mui/a/phase": 0.0},
        10: {"mui/a/mui": 0.2, "mui/a/loss": 1.0, "mui/a/phase": 1.0, "mui/a/mui_low": 0.1, "mui/a/mui_high": 0.3},
        20: {"mui/a/mui": 0.2},
        30: {"mui/a/mui": 0.3, "mui/benchmark/arc": 0.5, "mui/benchmark/arc_stderr": 0.1},
    }
    loss = Paths().of("a", "-loss", logged)
    assert loss.points == (
        PathPoint(0, 2.0, 0.1, Phase.UNDECIDED),
        PathPoint(10, 1.0, 0.2, Phase.ACCUMULATING, (0.1, 0.3)),
    )
    (point,) = Paths().of("a", "benchmark/arc", logged).points
    assert (point.performance, point.performance_interval) == (0.5, pytest.approx((0.304, 0.696)))
    assert Paths().of(None, "-loss", logged).points == ()


# All of them


def edge_cases() -> dict[str, TaskReport]:
    one = a_task(SHAPES["one layer"])
    nothing = np.zeros_like(one.key_neurons)
    return {
        "all zero": replace(one, key_neurons=nothing, activated=nothing),
        "not measured": replace(one, key_neurons=nothing, activated=nothing, mass=nothing * 0.0, n_samples=0),
        "all key": replace(one, key_neurons=one.layout.width, activated=np.full_like(nothing, 200)),
        "no shared experts": a_task(SHAPES["2 x 4"]),
        "dense": a_task(SHAPES["dense"]),
        "few": replace(
            a_task(SHAPES["2 x 4"]),
            key_neurons=np.array([0, 0, 2, 0, 1, 0, 0, 0]),
            activated=np.array([0, 0, 9, 0, 3, 0, 0, 0]),
        ),
    }


@pytest.mark.parametrize("case", edge_cases())
@pytest.mark.parametrize("paths", [(), (Path("a", "-loss", ()),), (Path("a", "-loss", points_of(1)),)])
def test_whatever_was_found_there_is_a_picture_and_a_caption(case: str, paths: tuple[Path, ...]) -> None:
    task = edge_cases()[case]
    paths = tuple(path for path in paths if path.points)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures = draw(Scene(7, task, {"a": task}, paths))
    assert pictures.keys() == set(PICTURES)
    for picture in pictures.values():
        assert opened(picture).format == "PNG"
        assert "step 7" in picture.caption.lower()
        assert "task a" in picture.caption.lower()
        assert "nan" not in picture.caption.lower()


def test_nothing_is_cut_at_the_edge_of_a_picture() -> None:
    name = "hendrycks_math_intermediate_algebra" * 4
    for shape in ("2 x 4", "two kinds"):
        task = a_task(SHAPES[shape])
        for key, picture in draw(Scene(7, task, {name: task}, (Path(name, "-loss", points_of(4)),))).items():
            page = np.asarray(opened(picture).convert("RGB"))
            for edge in (page[:4], page[-4:], page[:, :4], page[:, -4:]):
                assert (edge == 255).all(), (shape, key)
            assert name in picture.caption


def test_zero_small_and_absent_are_told_apart() -> None:
    layout = ExpertLayout([LayerShape(0, "a", 3, 1000), LayerShape(1, "b", 2, 1000)])
    task = replace(a_task(layout), key_neurons=np.array([0, 1, 1000, 1, 1]))
    figure = expert_heatmap(task, task.expert_mui, **WORDS)
    (image,) = figure.axes[0].images
    zero, small, _, *_, absent = (image.to_rgba(image.get_array())[..., :3]).reshape(-1, 3)
    for one, other in ((zero, small), (zero, absent), (small, absent)):
        assert np.abs(one - other).max() > 0.1


def test_pictures_depend_on_no_setting_of_matplotlib_and_change_none() -> None:
    task = a_task(SHAPES["one layer"])
    scene = Scene(7, task, {"a": task}, (Path("a", "-loss", points_of(8)),))
    plain = {name: picture.png for name, picture in draw(scene).items()}
    before, random_state = dict(mpl.rcParams), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert {name: picture.png for name, picture in draw(scene).items()} == plain
    assert dict(mpl.rcParams) == before
    assert np.random.get_state()[1].tolist() == random_state  # noqa: NPY002
    assert not pyplot.get_fignums()
    with pyplot.style.context(["dark_background", "ggplot"]):
        mpl.rcParams.update(
            {
                "text.usetex": True, "font.size": 22, "font.family": "serif", "figure.dpi": 200, "axes.grid": True,
                "figure.autolayout": True, "lines.linewidth": 5, "xtick.minor.visible": True, "axes.linewidth": 4,
                "axes.spines.left": False, "image.origin": "lower", "axes.xmargin": 0.3, "axes.ymargin": 0.3,
                "xtick.major.size": 9, "xtick.major.pad": 20, "grid.color": "red", "patch.linewidth": 5,
                "xtick.direction": "in", "xtick.top": True, "ytick.right": True, "legend.facecolor": "red",
            }
        )  # fmt: skip
        told = {name: picture.png for name, picture in draw(scene).items()}
    assert told == plain


# The table


def test_the_table_has_a_row_for_each_expert() -> None:
    report = make_report([{0, 1, 13}, {13}, {20}], [0, 0, 1])
    columns, rows = expert_rows(report.pooled, report.tasks)
    assert [row[0] for row in rows] == list(LAYOUT.expert_labels)
    found = [dict(zip(columns, row, strict=True)) for row in rows]
    assert [row["expert_mui"] for row in found] == list(report.pooled.expert_mui)
    assert [row["b/activated_frequency"] for row in found] == list(report.tasks["b"].activated_frequency)
    assert [row["kind"] for row in found] == ["routed"] * 5 + ["shared"] * 2
    assert [row["layer"] for row in found] == [1, 1, 1, 4, 4, 4, 4]


def test_of_more_experts_than_rows_those_that_are_activated_most_are_kept() -> None:
    task = a_task(SHAPES["61 x 257"])
    _, rows = expert_rows(task, {"a": task})
    assert len(rows) == 10_000 < task.layout.n_experts
    kept = {row[0] for row in rows}
    assert {label for label, *_ in task.top_experts(10_000)} == kept
    assert [row[0] for row in rows] == [label for label in task.layout.expert_labels if label in kept]


def test_paths_of_a_run_that_goes_on_are_those_of_all_that_was_logged() -> None:
    logged: dict[int, dict[str, float]] = {}
    paths = Paths()
    for step in (0, 5, 10):
        logged[step] = {"mui/loss": 3.0 - step, "mui/mui": 0.1}
        paths.forget(step)
        assert paths.of(None, "-loss", logged) == Paths().of(None, "-loss", logged)
    logged[10]["mui/mui"] = 0.2  # as where a benchmark comes later
    paths.forget(10)
    assert [point.mui for point in paths.of(None, "-loss", logged).points] == [0.1, 0.1, 0.2]


def test_most_of_a_path_that_settles_is_in_view() -> None:
    """Each point of it is much closer to the end than the one before."""
    for n in (4, 7, 13):
        n_cut = n // 4 if n > 5 else 0
        points = [PathPoint(i, 1 + 4.0 * 0.4**i, 0.1 + 0.4**i, Phase.UNDECIDED) for i in range(n)]
        axes = trajectories([Path("a", "-loss", tuple(points))], title="", subtitle="").axes[0]
        (left, right), (bottom, top) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
        shown = [left <= p.performance <= right and bottom <= 100 * p.mui <= top for p in points]
        assert shown == [i >= n_cut for i in range(n)]
