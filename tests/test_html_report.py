"""The report says what the records have, from whatever study there is, and works in a browser without a network."""

from __future__ import annotations

import csv
import json
import re
from base64 import b64decode
from collections.abc import Callable
from dataclasses import asdict
from io import BytesIO, StringIO
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markupsafe import Markup
from PIL import Image

from html_page import Element, parsed
from made_study import make_study
from made_up_study import in_steps, layout_of, make_up_study
from mui_callback.errors import MUIError
from mui_callback.html_report import published
from mui_callback.html_report.album import Album, as_file_name
from mui_callback.html_report.beside import is_same_model
from mui_callback.html_report.build import ReportFiles, write_report
from mui_callback.html_report.measured import measured
from mui_callback.html_report.numbers import number, percent
from mui_callback.html_report.progress import progress_of
from mui_callback.metrics.phases import PhaseRule
from mui_callback.metrics.trajectory import phase_at
from mui_callback.pictures import style
from mui_callback.pictures.expert_blocks import expert_blocks
from mui_callback.trajectory.checkpoint import CheckpointId, in_tokens
from mui_callback.trajectory.records import Study, open_study, write_plan


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def study(directory: Path) -> Study:
    return open_study(directory)


@pytest.fixture(scope="module")
def files(directory: Path) -> ReportFiles:
    return write_report(directory)


@pytest.fixture(scope="module")
def page(files: ReportFiles) -> Element:
    return parsed(files.page.read_text(encoding="utf-8"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pixels, which take most of the time and are those of the study that was trained."""
    monkeypatch.setattr("mui_callback.html_report.album.as_png", lambda _: b"")


def page_of(directory: Path, rule: PhaseRule | None = None) -> Element:
    return parsed(write_report(directory, rule=rule).page.read_text(encoding="utf-8"))


def table_of(table: Element) -> list[dict[str, Element]]:
    """Its rows by the heads of their columns."""
    heads = [head.text for head in table.all("thead")[0].all("th")]
    return [dict(zip(heads, row.children, strict=True)) for row in table.all("tbody")[0].all("tr")]


# The page


def test_the_page_loads_nothing_and_its_parts_are_sound(files: ReportFiles, page: Element) -> None:
    for one in page.every():
        for name, value in one.attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "poster", "data", "action"):
                is_kept = value.startswith(("#", "data:")) or one.tag == "a"
                assert is_kept, (one.tag, name, value[:80])
            assert one.tag == "a" or "url(" not in value or "url(#" in value
        if one.tag == "script":
            assert "src" not in one.attributes
    source = files.page.read_text(encoding="utf-8")
    assert not re.search(r"@import|@font-face|url\((?!#)", source)
    ids = [one.attributes["id"] for one in page.every() if "id" in one.attributes]
    assert len(ids) == len(set(ids))
    for link in page.all("a"):
        target = link.attributes["href"]
        if target.startswith("#"):
            assert target[1:] in ids
        elif not target.startswith(("data:", "https://arxiv.org/")):
            assert (files.page.parent / target).exists(), target
    used = re.findall(r'(?:href="#|url\(#)([^)"]+)', source)
    assert set(used) <= set(ids)


def test_every_picture_has_words_and_every_table_heads(page: Element) -> None:
    drawings = page.all("svg")
    assert len(drawings) > 10
    for drawing in drawings:
        assert drawing.attributes["role"] == "img"
        assert len(drawing.attributes["aria-label"]) > 20
    assert all(image.attributes.get("alt") for image in page.all("img"))
    for table in page.all("table"):
        assert table.all("th")
        assert all(head.attributes["scope"] in ("col", "row") for head in table.all("th"))
    assert page.all("html")[0].attributes["lang"] == "en"


def test_sections_are_there_in_their_order(page: Element) -> None:
    names = [section.attributes["id"] for section in page.all("section")]
    assert names == [
        "answer", "measured", "trajectory", "mui", "key-experts", "top-experts", "experts", "coverage", "shared",
        "rows", "paper",
    ]  # fmt: skip
    links = [link.attributes["href"][1:] for link in page.all("nav")[0].all("a")]
    assert links == names


def test_the_table_has_the_values_of_the_records(page: Element, study: Study) -> None:
    (table,) = page.by_id("rows").all("table")
    rows = [row for record in study.records for row in record.rows]
    shown = table_of(table)
    assert len(shown) == len(rows) == 36
    n_numbers = 0
    for cells, row in zip(shown, rows, strict=True):
        for name, cell in cells.items():
            value, raw = row[name], cell.attributes["data-raw"]
            if value is None:
                assert (raw, cell.text) == ("", "\N{EN DASH}")
            elif isinstance(value, str):
                assert raw == cell.text == value
            else:
                assert float(raw) == value
                assert cell.attributes["class"] == "number"
                if name == "tokens":
                    assert cell.text == in_tokens(value)
                else:
                    scale = 100 if cell.text.endswith("%") else 1
                    words = float(cell.text.replace("%", "").replace(",", ""))
                    assert words == pytest.approx(scale * value, rel=6e-3, abs=1e-9)
                n_numbers += 1
    assert n_numbers > 500


def test_the_link_has_all_columns(page: Element, files: ReportFiles, study: Study) -> None:
    (link,) = (link for link in page.by_id("rows").all("a") if "download" in link.attributes)
    text = unquote(link.attributes["href"].partition(",")[2])
    assert text == (files.page.parent / "rows.csv").read_text(encoding="utf-8")
    rows = [row for record in study.records for row in record.rows]
    for found, row in zip(csv.DictReader(StringIO(text)), rows, strict=True):
        assert found == {name: "" if value is None else str(value) for name, value in row.items()}


def test_the_summary_answers_with_first_and_last_values_and_phases(page: Element, study: Study) -> None:
    rule, (table,) = PhaseRule(), page.by_id("answer").all("table")
    heads = [head.text for head in table.all("thead")[0].all("th")]
    assert heads == [
        "model",
        "task",
        "phase, over the last 5",
        "performance, first",
        "last",
        "MUI, first",
        "last",
        "turns",
    ]
    lines = {(row.children[0].text, row.children[1].text): row for row in table.all("tbody")[0].all("tr")}
    for model in study.models:
        for task in (*study.tasks, None):
            of_task = [(one.checkpoint.step, one.points[task]) for one in study.of(model) if task in one.points]
            points = {step: point for step, point in of_task if step is not None}
            line = [cell.text for cell in lines[model, task or "all tasks pooled"].children]
            first, last = points[min(points)], points[max(points)]
            phase = phase_at(points, max(points), rule)
            assert phase is not None
            assert line[2].startswith(phase.call.phase.value)
            is_loss = first.axis == "-loss"
            words = [
                f"{number(-one.performance.value)} nats" if is_loss else percent(one.performance.value)
                for one in (first, last)
            ]
            assert line[3:7] == [*words, percent(first.mui.value), percent(last.mui.value)]
    answers = [one.text for one in page.by_id("answer").all("div") if one.attributes.get("class") == "answer"]
    assert len(answers) == 2
    assert answers[0].startswith("At 2B tokens, olmoe-tiny is ")


def test_what_is_scored_is_said(page: Element) -> None:
    words = page.by_id("measured").text
    assert (
        "english (8), code (8), arithmetic (8). What is scored: the given responses, by teacher forcing. Key" in words
    )
    assert "rulestop_fraction=0.05" in words


# Figures


def test_every_figure_is_there_as_png_and_svg(files: ReportFiles, page: Element) -> None:
    names = {path.stem if path.suffix == ".svg" else path.name.removesuffix(".png") for path in files.figures}
    assert len(files.figures) == 2 * len(names) == len(set(files.figures))
    assert set(files.figures) == set((files.page.parent / "figures").iterdir())
    for path in files.figures:
        if path.suffix == ".png":
            with Image.open(path) as image:
                width, height = image.size
                colors = image.convert("RGB").getcolors(1 << 24)
            assert min(width, height) > 100
            assert len(colors) > 5
            drawing = ElementTree.parse(path.with_suffix(".svg")).getroot()
            _, _, svg_width, svg_height = map(float, drawing.attrib["viewBox"].split())
            assert svg_width / svg_height == pytest.approx(width / height, rel=0.01)
            assert drawing.findall(".//{*}text")  # words are words
    linked = {link.attributes["href"] for link in page.all("a") if link.text in ("PNG", "SVG")}
    assert len(linked) == 2 * len(page.all("svg"))


def test_colours_of_the_page_are_left_to_its_theme(page: Element) -> None:
    for drawing in page.all("svg"):
        styles = " ".join(one.attributes.get("style", "") for one in drawing.every())
        assert "var(--page)" in styles
        assert "var(--ink)" in styles
        for color in (style.INK, style.FAINT, style.RULE, "#ffffff", "#000000"):
            assert color not in styles.lower()


def test_the_slides_have_every_expert_at_every_checkpoint(page: Element, study: Study) -> None:
    slides = [one for one in page.by_id("experts").all("div") if one.attributes.get("class") == "slides"]
    assert len(slides) == 2
    for model, one in zip(study.models, slides, strict=True):
        data = json.loads("".join(one.all("script")[0].parts))
        tasks = [option.text for option in one.all("select")[0].all("option")]
        assert tasks == ["all tasks pooled", *study.tasks]
        records = study.of(model)
        assert [words.split(" (")[1] for words in data["checkpoints"]] == [f"{r.checkpoint.label})" for r in records]
        for value, of_tasks in data["cells"].items():
            for task, of_checkpoints in zip(tasks, of_tasks, strict=True):
                for record, images in zip(records, of_checkpoints, strict=True):
                    report = record.report.pooled if task == "all tasks pooled" else record.report.tasks[task]
                    blocks = expert_blocks(report.layout, 100 * getattr(report, value))
                    for block, image in zip(blocks, images, strict=True):
                        assert_shows(image, block.values)
        shown = [image.attributes["href"] for image in one.all("image") if image.attributes.get("class") == "cells"]
        assert shown == data["cells"]["expert_mui"][0][-1]


def assert_shows(image: str, values: np.ndarray) -> None:
    with Image.open(BytesIO(b64decode(image.partition(",")[2]))) as opened:
        pixels = np.asarray(opened)
        colors = np.asarray(opened.convert("RGBA"))
    np.testing.assert_array_equal(pixels, np.where(values > 0, 2 + np.round(253 * (values / 100) ** (1 / 3)), 1))
    assert (colors[values == 0] == (128, 139, 159, 64)).all()
    assert (colors[values > 0, 3] == 255).all()


def test_an_svg_in_the_page_says_what_its_words_are(tmp_path: Path) -> None:
    figure = style.blank(300, 200, "a < b & $c$", "")
    drawn = Album(tmp_path).add("x", figure, 'alt "x" <b>')
    svg = parsed(drawn.svg).all("svg")[0]
    assert svg.attributes["aria-label"] == 'alt "x" <b>'
    assert svg.text == "a < b & $c$"
    assert isinstance(drawn.svg, Markup)


# Other studies


def test_a_study_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MUIError, match=r"expected the directory of a study, with study\.json in it"):
        write_report(tmp_path)
    write_plan(tmp_path, name="x", identities={"m": {}}, checkpoints=in_steps(2), config={})
    with pytest.raises(MUIError, match="at least one measured checkpoint, got none"):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()


@pytest.mark.usefixtures("quick")
def test_a_single_checkpoint_of_one_task(tmp_path: Path) -> None:
    page = page_of(make_up_study(tmp_path, in_steps(1), ["only"]))
    answer = page.by_id("answer").text
    assert "At 500B tokens, the only checkpoint, m has a performance (loss, lower is better) of" in answer
    assert "on only." in answer
    (table,) = page.by_id("answer").all("table")
    assert [row["task"].text for row in table_of(table)] == ["only"]
    assert "pooled" not in page.all("main")[0].text
    assert page.by_id("experts").all("input")[0].attributes["disabled"] == ""
    assert "shared" not in [one.attributes["id"] for one in page.all("section")]


@pytest.mark.usefixtures("quick")
def test_what_is_missing_is_listed_with_the_reason(tmp_path: Path) -> None:
    planned = in_steps(7)
    make_up_study(tmp_path, planned, ["a"], left_out=(2, 5, 6))
    said = [(2, "an older error"), (2, "no <space> left"), (5, "gone"), (0, "was measured later")]
    lines = [{"time": 1.0, "checkpoint": asdict(planned[number]), "error": why} for number, why in said]
    text = "\n".join([*map(json.dumps, lines), '{"model": "m", "la'])
    (tmp_path / "failures.jsonl").write_text(text, encoding="utf-8")
    measured = page_of(tmp_path, PhaseRule(3)).by_id("measured")
    assert "4 of 7" in measured.text
    assert "3 planned checkpoints are not measured" in measured.text
    words = [one.text for one in measured.all("li")]
    assert words == [
        f"m {planned[2].label}: no <space> left",
        f"m {planned[5].label}: gone",
        f"m {planned[6].label} (not yet)",
    ]


@pytest.mark.usefixtures("quick")
def test_a_model_of_which_nothing_is_measured_is_named(tmp_path: Path) -> None:
    planned = [*in_steps(2), CheckpointId("<other>", "main"), CheckpointId("<other>", "more")]
    make_up_study(tmp_path, planned, ["a"], left_out=(2, 3))
    words = [one.text for one in page_of(tmp_path, PhaseRule(3)).by_id("measured").all("p")]
    assert "None of the 2 checkpoints of <other> is measured." in words


@pytest.mark.usefixtures("quick")
def test_models_with_one_checkpoint_each_are_side_by_side(tmp_path: Path) -> None:
    names = ["org/DeepSeek-V2-Lite-Chat", "gpt-oss-20b", "mine"]
    planned = [CheckpointId(name, "main") for name in names]
    files = write_report(make_up_study(tmp_path, planned, ["math", "b"], layout=layout_of(2, 4, 1)))
    page = parsed(files.page.read_text(encoding="utf-8"))
    assert len(page.by_id("trajectory").all("svg")) == 1
    svg = page.by_id("mui").all("svg")[0]
    assert set(names) <= {text.text for text in svg.all("text")}
    section = page.by_id("paper")
    paper = {title.text: table for title, table in zip(section.all("h3"), section.all("table"), strict=False)}
    of_models = table_of(paper["Models, mean over the paper's benchmarks"])
    here = {row["model"].text: row["here"].text for row in of_models if row["here"].text != "\N{EN DASH}"}
    assert here == {
        "DeepSeek-V2-Lite": "org/DeepSeek-V2-Lite-Chat, mean over the tasks",
        "GPT-OSS-20B": "gpt-oss-20b, mean over the tasks",
    }
    on_math = {row["model"].text: row["here"].text for row in table_of(paper["Key expert proportion on MATH"])}
    records = {record.checkpoint.model: record.report.tasks["math"] for record in open_study(tmp_path).records}
    for name, model in (("DeepSeek-V2-Lite", names[0]), ("mine (not in the paper)", "mine")):
        assert on_math[name] == percent(records[model].key_expert_proportion, 4)
    assert on_math["Qwen1.5-MoE"] == "\N{EN DASH}"


@pytest.mark.usefixtures("quick")
def test_olmoe_is_beside_the_paper_where_it_has_as_many_tokens(tmp_path: Path) -> None:
    make_up_study(tmp_path, in_steps(4, "allenai/OLMoE-1B-7B-0924"), ["a", "MBPP"])
    paper = page_of(tmp_path).by_id("paper")
    means, mbpp = (table_of(table) for table in paper.all("table")[:2])
    assert [row["here: tokens"].text for row in means] == ["500B", "1T", "2T", *["\N{EN DASH}"] * 3]
    assert [row["MUI, paper"].text for row in means] == [f"{at.mui} %" for at in published.OLMOE_MEAN]
    study = open_study(tmp_path)
    for table, tasks in ((means, study.tasks), (mbpp, ("MBPP",))):
        for row, record in zip(table[:3], (study.records[i] for i in (0, 1, 3)), strict=True):
            mui = np.mean([record.points[task].mui.value for task in tasks])
            assert row["MUI, here"].text == percent(float(mui))


@pytest.mark.parametrize(
    ("planned", "words"),
    [
        ([CheckpointId("m", f"v{i}", step=10 * i) for i in range(3)], "From step 0 to step 20"),
        ([CheckpointId("m", f"v{i}") for i in range(3)], "From checkpoint 1 to checkpoint 3"),
        ([CheckpointId("m", f"v{i}", step=7, tokens=1e12 * (i + 1)) for i in range(3)], "From 1T tokens to 3T tokens"),
    ],
)
@pytest.mark.usefixtures("quick")
def test_checkpoints_are_counted_in_what_they_have(planned: list[CheckpointId], words: str, tmp_path: Path) -> None:
    page = page_of(make_up_study(tmp_path, planned, ["a"]), PhaseRule(3))
    assert words in page.by_id("answer").text


@pytest.mark.usefixtures("quick")
def test_names_are_words_whatever_is_in_them(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    tasks = ["<script>alert(1)</script>", "\"quotes' & {{ braces }}", "$x_{$ \\frac", "数学推理", "very long " * 30]
    model = "</script><img src=x onerror=alert(1)> ../../up"
    planned = [CheckpointId(model, f"</style>{i}", step=i) for i in range(2)]
    files = write_report(make_up_study(tmp_path, planned, tasks, name="</title><b>bold</b>"))
    assert not [one for one in recwarn if "Glyph" in str(one.message)]
    page = parsed(files.page.read_text(encoding="utf-8"))
    assert page.all("h1")[0].text == page.all("title")[0].text.removesuffix(": MUI report") == "</title><b>bold</b>"
    assert not page.all("img")
    assert not page.all("b")
    assert len(page.all("script")) == 2
    (table,) = page.by_id("answer").all("table")
    shown = [row["task"].text for row in table_of(table)]
    assert shown[2:] == [" ".join(task.split()) for task in tasks]
    assert "数学推理" in {text.text for text in page.by_id("mui").all("text")}  # a browser has a font for it
    assert all(path.parent == files.page.parent / "figures" for path in files.figures)


@settings(max_examples=50)
@example(["a b", "a?b"])
@example(["..", "/"])
@given(names=st.lists(st.text(min_size=1), min_size=2, max_size=2, unique=True))
def test_names_of_files_are_plain_and_apart(names: list[str]) -> None:
    first, second = map(as_file_name, names)
    assert first != second
    assert re.fullmatch(r"[A-Za-z0-9.=_-]{1,90}", first)
    assert not first.startswith(".")


# Numbers and names


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.0, "0"), (5.033e12, "5.03T"), (9.999e8, "1000M"), (5e11, "500B"), (12.0, "12"), (1500.0, "1.5K")],
)
def test_tokens_are_written_as_in_names_of_models(value: float, words: str) -> None:
    assert in_tokens(value) == words


@pytest.mark.parametrize(
    ("function", "value", "words"),
    [
        (percent, 0.3854, "38.5 %"),
        (percent, 0.3, "30.0 %"),
        (percent, 1.0, "100 %"),
        (percent, 0.0, "0 %"),
        (percent, 1.2e-7, "1.2e-05 %"),
        (percent, None, "\N{EN DASH}"),
        (number, 123456.0, "123,456"),
        (number, 3.14159, "3.142"),
    ],
)
def test_numbers(function: Callable[[float | None], str], value: float | None, words: str) -> None:
    assert function(value) == words


@pytest.mark.parametrize(
    ("name", "of_paper", "is_same"),
    [
        ("deepseek-ai/DeepSeek-V2", "DeepSeek-V2", True),
        ("deepseek-ai/DeepSeek-V2-Chat", "DeepSeek-V2", True),
        ("deepseek-ai/DeepSeek-V2-Lite", "DeepSeek-V2", False),
        ("DeepSeek-V2.5", "DeepSeek-V2", False),
        ("/models/qwen3-30b-a3b-instruct-2507/", "Qwen3-30B-A3B", True),
        ("OLMoE-1B-7B-0924", "OLMoE-1B-7B-0924", True),
        ("my-gpt-oss-20b", "GPT-OSS-20B", False),
    ],
)
def test_models_of_the_paper_are_known_by_name(name: str, of_paper: str, is_same: bool) -> None:
    assert is_same_model(name, of_paper) is is_same


@pytest.mark.usefixtures("quick")
def test_the_command_writes_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mui_callback.cli import main

    make_up_study(tmp_path / "study", in_steps(3), ["a"])
    main(["report", str(tmp_path / "study"), "--output", str(tmp_path / "out"), "--phase-window", "3"])
    page = tmp_path / "out" / "report.html"
    assert str(page) in capsys.readouterr().out
    assert "lines through the last 3 checkpoints" in parsed(page.read_text(encoding="utf-8")).by_id("answer").text
    with pytest.raises(SystemExit, match="window: expected a number of points of at least 3, got 2"):
        main(["report", str(tmp_path / "study"), "--phase-window", "2"])


def test_stages_that_each_begin_anew_are_in_their_order(tmp_path: Path) -> None:
    labels = [f"stage{stage}-step{step}-tokens{step}B" for stage in (1, 2) for step in (10, 20)]
    planned = [CheckpointId.named("m", label) for label in labels]
    study = open_study(make_up_study(tmp_path, planned, ["a"]))
    progress = progress_of(study)
    assert progress.kind == "checkpoints"
    assert [one.checkpoint for one in measured(study, progress, 0.95)["m"]] == planned
    assert progress_of(open_study(make_up_study(tmp_path / "one", planned[:2], ["a"]))).kind == "tokens"
