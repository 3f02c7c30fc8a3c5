"""The report in Chromium: its script runs, its controls work, it fits, and it is legible on light and dark ground."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from made_up_study import in_steps, layout_of, make_up_study
from mui_callback.errors import MUIError
from mui_callback.html_report.build import write_report
from mui_callback.trajectory.failures import Failures

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")

_ACTIONS = """
<script>
const found = {};
const root = document.documentElement;
found.ready = root.dataset.ready;
const page = () => getComputedStyle(document.body).backgroundColor;
found.before = page();
document.getElementById("theme").click();
found.after = page();
const slides = document.querySelector(".slides");
const range = slides.querySelector("input");
const cells = () => slides.querySelector("image.cells").getAttribute("href");
const move = (control, value) => { control.value = value; control.dispatchEvent(new Event("input")); return cells(); };
found.controls = getComputedStyle(slides.querySelector("form")).display;
found.last = cells();
found.first = move(range, 0);
found.said = slides.querySelector("output").textContent;
found.task = (slides.querySelector("select").selectedIndex = 1, move(range, 0));
found.value = move(slides.querySelectorAll("select")[1], "activated_frequency");
found.data = JSON.parse(slides.querySelector("script").textContent).cells;
const table = document.querySelector("table.sortable");
const column = [...table.tHead.rows[0].cells].findIndex((head) => head.textContent === "mui");
const values = () => [...table.tBodies[0].rows].map((row) => Number(row.cells[column].dataset.raw));
table.tHead.rows[0].cells[column].querySelector("button").click();
found.up = values();
table.tHead.rows[0].cells[column].querySelector("button").click();
found.down = values();
found.sort = table.tHead.rows[0].cells[column].getAttribute("aria-sort");
root.setAttribute("data-found", JSON.stringify(found));
</script>
"""
_WIDTH = """
<script>parent.postMessage([innerWidth, document.documentElement.scrollWidth], "*");</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two models, with shared experts, names that are long, and a checkpoint that failed."""
    directory = tmp_path_factory.mktemp("study")
    planned = [one for model in ("a", "b-" * 60) for one in in_steps(4, model)]
    tasks = ["math", "a_task_whose_name_has_no_blank_" * 4]
    make_up_study(directory, planned, tasks, layout=layout_of(3, 6, 1), left_out=(2,))
    Failures(directory).add(planned[2], MUIError("/a/path/without/blanks" * 12))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mui_callback.html_report.album.as_png", lambda _: b"")
        return write_report(directory).page


def browse(profile: Path, *options: str) -> str:
    """What Chromium prints."""
    assert BROWSER is not None
    profile.mkdir(exist_ok=True)
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
    # whatever it would load has to be in the file
    fixed.append("--host-resolver-rules=MAP * ~NOTFOUND")
    shown = subprocess.run([BROWSER, *fixed, *options], capture_output=True, text=True, timeout=120, check=True)
    return shown.stdout


def with_script(page: Path, script: str, name: str) -> Path:
    """A copy of a page with a script at its end."""
    changed = page.with_name(name)
    text = page.read_text(encoding="utf-8")
    assert text.count("</body>") == 1
    changed.write_text(text.replace("</body>", f"{script}</body>"), encoding="utf-8")
    return changed


def attribute(page: str, name: str) -> Any:
    found = re.search(rf'{name}="([^"]*)"', page)
    assert found, page[:300]
    return json.loads(found[1].replace("&quot;", '"').replace("&lt;", "<").replace("&amp;", "&"))


def test_the_controls_work(page: Path, tmp_path: Path) -> None:
    acted = with_script(page, _ACTIONS, "acted.html")
    found = attribute(browse(tmp_path, "--dump-dom", acted.as_uri()), "data-found")
    assert found["ready"] == "1"
    assert {found["before"], found["after"]} == {"rgb(255, 255, 255)", "rgb(20, 23, 28)"}
    assert found["controls"] == "flex"
    cells = found["data"]
    assert found["last"] == cells["expert_mui"][0][-1][0]
    assert found["first"] == cells["expert_mui"][0][0][0]
    assert found["task"] == cells["expert_mui"][1][0][0]
    assert found["value"] == cells["activated_frequency"][1][0][0]
    assert len({found[name] for name in ("last", "first", "task", "value")}) == 4
    assert found["said"] == "500B tokens (step1000-tokens500B)"
    assert found["up"] == sorted(found["up"])
    assert found["down"] == sorted(found["up"], reverse=True)
    assert len(set(found["up"])) > 5
    assert found["sort"] == "descending"


@pytest.mark.parametrize("width", [400, 1600])
def test_the_page_is_as_wide_as_the_window(width: int, page: Path, tmp_path: Path) -> None:
    inner = with_script(page, _WIDTH, f"inner{width}.html")
    outer = page.with_name(f"outer{width}.html")
    listen = 'onmessage = (e) => document.documentElement.setAttribute("data-found", JSON.stringify(e.data));'
    frame = f'<iframe src="{inner.name}" style="width:{width}px;height:900px;border:0"></iframe>'
    outer.write_text(f"<!DOCTYPE html><html><body><script>{listen}</script>{frame}</body></html>", encoding="utf-8")
    shown = browse(tmp_path, "--virtual-time-budget=3000", "--window-size=1700,1000", "--dump-dom", outer.as_uri())
    assert attribute(shown, "data-found") == [width, width]


@pytest.mark.parametrize(("scheme", "ground"), [(1, (255, 255, 255)), (0, (20, 23, 28))])
def test_it_is_drawn_on_light_and_on_dark_ground(
    scheme: int, ground: tuple[int, int, int], page: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "page.png"
    browse(
        tmp_path / "profile", f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1300,6000",
        f"--screenshot={picture}", page.as_uri(),
    )  # fmt: skip
    with Image.open(picture) as opened:
        pixels = np.asarray(opened.convert("RGB")).astype(int)
    is_ground = (pixels == ground).all(axis=-1)
    assert 0.6 < is_ground.mean() < 0.98
    # Figures are on the same ground: no block of another one.
    other = (pixels == (20, 23, 28) if scheme else pixels == (255, 255, 255)).all(axis=-1)
    assert other.mean() < 0.002
    strong = np.abs(pixels - ground).max(axis=-1) > 150
    rows = strong.any(axis=1).reshape(-1, 500).mean(axis=1)
    assert (rows > 0.1).all()  # something to read everywhere
