"""Studies of data as they are run from the command line, on a model that is saved and read back."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy.sparse import csr_array
from transformers import ByT5Tokenizer

from mui_callback.errors import MUIError
from mui_callback.loading import load_tokenizer
from mui_callback.metrics.diversity import chao2, compare
from mui_callback.metrics.max_coverage import greedy_max_coverage
from mui_callback.metrics.rarefaction import coverage_curve
from mui_callback.model_options import ModelOptions
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.probe.run import MUIProbe
from mui_callback.probe.samples import ProbeSample, TokenSample
from mui_callback.studies.data_sets import diversity_of
from mui_callback.studies.diversity import compare_diversity
from mui_callback.studies.picture import save_coverage_curves
from mui_callback.studies.probing import measure, open_probe
from mui_callback.studies.screen import show_diversity, show_selection
from mui_callback.studies.selection import select_samples, write_samples
from tiny import build

RULES = "top_fraction=0.05"


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> ModelOptions:
    path = tmp_path_factory.mktemp("models") / "olmoe"
    build("olmoe", intermediate_size=64).save_pretrained(path)
    ByT5Tokenizer().save_pretrained(path)
    return ModelOptions(str(path), rules=RULES)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Sums, which are almost all the same, and words of all kinds."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    sums = [{"prompt": f"{a}+1=", "response": "2", "choices": ["2", "1"], "answer": 0} for a in (1,) * 7 + (2, 3)]
    words = ["".join(map(chr, rng.integers(33, 126, 12))) for _ in range(12)]
    return [write(folder / "sums.jsonl", sums), write(folder / "words.jsonl", [{"response": word} for word in words])]


def screen(width: int = 80) -> Console:
    return Console(width=width, record=True, file=io.StringIO())


def some_sets(n_sets: int, n_samples: int = 12) -> dict[str, csr_array]:
    rng = np.random.default_rng(0)
    return {
        f"set [{i}]": csr_array((rng.random((n_samples + i, 50 * (1 + n_sets))) < 0.1 + 0.02 * i).astype(np.uint8))
        for i in range(n_sets)
    }


# Diversity


def test_the_study_shows_what_the_report_counts(options: ModelOptions, data: list[Path], tmp_path: Path) -> None:
    console, picture = screen(), tmp_path / "curves.png"
    study = compare_diversity(options, data, picture=picture, console=console)
    model, tokenizer = options.load(), load_tokenizer(options.source)
    report = MUIProbe(model, ProbeSet.from_jsonl(data), tokenizer=tokenizer, rules=RULES).measure()
    assert list(study.data_sets) == ["sums", "words"]
    for name, one in study.data_sets.items():
        assert one.mui == report.tasks[name].mui
        assert one.n_samples == report.tasks[name].n_samples
        assert one.n_tokens == report.tasks[name].predictions.n_tokens
    assert study.comparison.size == 9
    first = MUIProbe(model, ProbeSet.from_jsonl(data[1], max_samples=1), tokenizer=tokenizer, rules=RULES)
    assert first.measure().mui == report.key_neuron_sets()[[9]].nnz / report.layout.n_neurons
    shown = console.export_text()
    for name, one in study.data_sets.items():
        cells = next(re.split(r"\s{2,}", line.strip()) for line in shown.splitlines() if line.startswith(f" {name} "))
        at_nine = study.comparison.mui[name].value
        assert cells[1:5] == [str(one.n_samples), str(one.n_tokens), f"{100 * at_nine:.2f}", f"{100 * one.mui:.2f}"]
        assert one.total is not None
        assert one.seen == pytest.approx(one.mui / one.total.value)
        assert cells[5:] == [f"{100 * one.total.value:.1f}", f"{100 * one.seen:.0f} %"]
    assert "words has a higher MUI than sums, by" in shown
    assert f"Coverage curves: {picture}" in shown
    with Image.open(picture) as image:
        assert image.size == (1200, 744)


def test_the_model_may_be_random(options: ModelOptions, data: list[Path], tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(Path(options.model) / name, tmp_path)
    bare = ModelOptions(str(tmp_path), rules=RULES, random_weights=True)
    study = compare_diversity(bare, data, at=4, level=0.8, console=(console := screen()))
    assert (study.comparison.size, study.comparison.level) == (4, 0.8)
    assert "At 4 samples, with 80 % confidence:" in console.export_text()
    output = tmp_path / "chosen"
    select_samples(bare, data, size=2, output=output, console=screen())
    assert len(ProbeSet.from_jsonl(list(output.iterdir()))) == 2
    with pytest.raises(MUIError, match="expected weights"):
        compare_diversity(replace(bare, random_weights=False), data, console=screen())


def test_samples_without_tokens_are_said(options: ModelOptions) -> None:
    for n, rows in enumerate(([[5, 6, 7]], [[5, 6, 7], [8], [9]])):
        probe_set = ProbeSet.from_token_rows([{"input_ids": row} for row in rows])
        report = measure(open_probe(options, probe_set, (console := screen())), console)
        assert report.unscored == 2 * n
        assert ("2 of 3 samples have no response token; they count" in console.export_text()) is bool(n)


def test_the_study_is_that_of_the_metrics() -> None:
    sets = some_sets(3)
    study = diversity_of(sets, dict.fromkeys(sets, 7), at=5, level=0.9)
    assert study.comparison == compare(sets, size=5, level=0.9)
    for name, one in study.data_sets.items():
        n = sets[name].shape[0]
        whole = coverage_curve(sets[name], np.arange(1, n + 1), level=0.9)
        assert one.curve.sizes.tolist() == whole.sizes.tolist()
        for part, of_whole in ((one.curve.mui, whole.mui), (one.curve.low, whole.low), (one.curve.high, whole.high)):
            assert part is not None
            assert of_whole is not None
            assert part == pytest.approx(of_whole, rel=1e-12)
        assert one.total == chao2(sets[name], level=0.9)


def test_curves_of_many_samples_have_both_ends_and_the_common_size() -> None:
    sets = {"a": csr_array(np.eye(1500, dtype=np.uint8)), "b": csr_array(np.eye(613, 1500, dtype=np.uint8))}
    study = diversity_of(sets, dict.fromkeys(sets, 1))
    sizes = study.data_sets["a"].curve.sizes.tolist()
    assert (sizes[0], sizes[-1], len(sizes) <= 201, 613 in sizes) == (1, 1500, True, True)
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("n_sets", [1, 2, 5, 8])
def test_the_screen_fits_80_columns(n_sets: int) -> None:
    sets = {name.replace("set", "a data set with a long name"): one for name, one in some_sets(n_sets, 1).items()}
    console = screen()
    show_diversity(console, diversity_of(sets, dict.fromkeys(sets, 1_234_567)))
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 80
    assert "[0]" in "".join(shown.split())  # brackets are part of the name, no markup
    assert ("cannot be compared: one sample has no interval" in " ".join(shown.split())) is (n_sets > 1)
    assert ("for all pairs together" in shown) is (n_sets > 2)


def test_a_difference_is_told_from_the_higher_one() -> None:
    sets = {"low": csr_array(np.eye(9, 20, dtype=np.uint8)), "same": csr_array(np.eye(9, 20, dtype=np.uint8))}
    sets["high"] = csr_array(np.kron(np.eye(9), [1, 1]).astype(np.uint8)).copy()
    sets["high"].resize((9, 20))
    show_diversity(console := screen(), diversity_of(sets, dict.fromkeys(sets, 1)))
    lines = [line.strip() for line in console.export_text().splitlines() if line.endswith(("points", "points)"))]
    assert lines[0] == "high has a higher MUI than low, by 45.00 to 45.00 points"
    assert "high has a higher MUI than same, by 45.00 to 45.00 points" in lines
    assert lines[-1] == "low and same cannot be told apart (-0.00 to +0.00 points)"


@pytest.mark.parametrize("n_sets", [1, 2, 8])
def test_the_picture_has_a_line_a_band_and_a_name_for_each_data_set(
    n_sets: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    figures: list[Any] = []
    saved = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), saved(self, *a, **k)))
    sets = {name.replace("set", "$set$"): one for name, one in some_sets(n_sets).items()}
    save_coverage_curves(diversity_of(sets, dict.fromkeys(sets, 1)), tmp_path / "p.png", "a $b$")
    axes = figures[0].axes[0]
    names = [text.get_text() for text in axes.texts]
    assert sorted(name for name in names if "$" in name) == sorted(sets)
    assert not any(text.get_parse_math() for text in axes.texts if "$" in text.get_text())
    assert ("compared at 12" in names) is (n_sets > 1)
    assert len(axes.collections) == n_sets
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    ends = {tuple(line.get_xydata()[-1]) for line in axes.lines if line.get_marker() == "o"}
    assert len(ends) == n_sets


def test_names_of_lines_that_end_together_are_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self))
    dense = np.tile(np.eye(30, 100, dtype=np.uint8), (5, 1, 1))
    for i, one in enumerate(dense):
        one[0, 90 : 90 + i] = 1  # one neuron more than the data set before
    sets = {str(i): csr_array(one) for i, one in enumerate(dense)}
    save_coverage_curves(diversity_of(sets, dict.fromkeys(sets, 1)), tmp_path / "p.png")
    heights = {text.get_text(): text.get_window_extent().y0 for text in figures[0].axes[0].texts}
    assert sorted("01234", key=lambda name: heights[name]) == list("01234")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": 10}, "from 1 to 9, which is all that 'sums' has, got 10"),
        ({"level": 95}, "level: expected a number in (0, 1), got 95"),
        ({"picture": Path("/no/such/folder/p.png")}, "a .png file in a directory that is there"),
        ({"picture": Path("p.gif")}, "a .png file in a directory that is there, got p.gif"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_read(data: list[Path], options: Any, message: str) -> None:
    with pytest.raises((MUIError, ValueError)) as raised:
        compare_diversity(ModelOptions("/no/such/model"), data, console=screen(), **options)
    assert message in str(raised.value)


def test_two_files_of_one_name_are_both_named(data: list[Path], tmp_path: Path) -> None:
    other = write(tmp_path / "sums.jsonl", [{"response": "x"}])
    with pytest.raises(MUIError, match="different stems") as raised:
        compare_diversity(ModelOptions("/no/such/model"), [*data, other], console=screen())
    assert str(data[0]) in str(raised.value)
    assert str(other) in str(raised.value)


# Selection


def plain(sample: ProbeSample | TokenSample) -> ProbeSample:
    """A sample without where it was read."""
    assert isinstance(sample, ProbeSample)
    return replace(sample, source="")


def test_chosen_samples_are_read_back(options: ModelOptions, data: list[Path], tmp_path: Path) -> None:
    console, output = screen(), tmp_path / "new" / "chosen"
    selection = select_samples(options, data, size=5, output=output, console=console)
    probe_set = ProbeSet.from_jsonl(data)
    everything = [(task, plain(sample)) for task, samples in probe_set.tasks.items() for sample in samples]
    chosen = [everything[i] for i in selection.order]
    read = ProbeSet.from_jsonl(sorted(output.iterdir()))
    for task, samples in read.tasks.items():
        assert [plain(sample) for sample in samples] == [sample for of, sample in chosen if of == task]
    assert len(read) == len(chosen) == 5
    ranks = [json.loads(line)["rank"] for path in output.iterdir() for line in path.read_text().splitlines()]
    assert sorted(ranks) == [1, 2, 3, 4, 5]
    model, tokenizer = options.load(), load_tokenizer(options.source)
    reports = [MUIProbe(model, samples, tokenizer=tokenizer, rules=RULES).measure() for samples in (probe_set, read)]
    for task, share in zip(probe_set.task_names, selection.kept.by_task, strict=True):
        assert share is not None
        part = reports[1].tasks[task].mui if task in read.tasks else 0.0
        whole = reports[0].tasks[task].mui
        assert part is not None
        assert whole is not None
        assert share[-1] == pytest.approx(part / whole)
    shown = console.export_text()
    lines = [re.split(r"\s{2,}", line.strip()) for line in shown.splitlines() if "chosen " in line]
    assert [line[0] for line in lines] == ["1", "2", "4", "5"]
    assert lines[-1][2] == f"{100 * selection.kept.overall[-1]:.1f}"
    assert shown.count("random ") == 4
    assert "Written to" in shown


@pytest.mark.parametrize(("n", "sizes"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_sizes_are_powers_of_two_and_all(n: int, sizes: list[int]) -> None:
    selection = greedy_max_coverage(csr_array(np.eye(n, dtype=np.uint8)), np.zeros(n, dtype=np.int64), n)
    show_selection(console := screen(), selection, ["a"], n)
    lines = [line.split() for line in console.export_text().splitlines() if "chosen" in line]
    assert lines == [[str(size), "chosen", f"{100 * size / n:.1f}"] for size in sizes]


def test_fewer_are_chosen_where_fewer_keep_everything(options: ModelOptions, tmp_path: Path) -> None:
    twice = write(tmp_path / "twice.jsonl", [{"response": "the same"}] * 3)
    console, output = screen(), tmp_path / "chosen"
    selection = select_samples(options, [twice], size=3, output=output, console=console)
    assert selection.order.tolist() == [0]
    shown = console.export_text()
    assert "The first 1 keep everything: fewer than the 3 asked for." in shown
    assert "twice.jsonl (1 sample)" in shown
    assert "twice " not in shown.split("chosen")[0]  # one task is all tasks


def test_nothing_is_overwritten(data: list[Path], tmp_path: Path) -> None:
    taken = write(tmp_path / "chosen" / "sums.jsonl", [{"response": "mine"}])
    missing = ModelOptions("/no/such/model")  # all of this is said before the model is read
    for output in (taken, taken.parent):
        with pytest.raises(MUIError, match="expected a new or an empty directory"):
            select_samples(missing, data, size=2, output=output, console=screen())
    for size in (0, 22):
        with pytest.raises(MUIError, match=f"from 1 to the 21 that there are, got {size}"):
            select_samples(missing, data, size=size, output=tmp_path / "new", console=screen())
    with pytest.raises(FileExistsError):
        write_samples(ProbeSet.from_jsonl(data), np.array([0]), taken.parent)
    assert "mine" in taken.read_text()
    (tmp_path / "empty").mkdir()
    with pytest.raises(MUIError, match="no such path"):  # the directory is fine
        select_samples(missing, data, size=2, output=tmp_path / "empty", console=screen())


def test_every_field_is_written(tmp_path: Path) -> None:
    samples = [
        ProbeSample("1", "é\u2028\n\t😀", "prompt\r\n", ("é\u2028\n\t😀", "b"), 0),
        ProbeSample("1", " ", ""),
        ProbeSample("x/y", "c"),
    ]
    probe_set = ProbeSet({"a b": samples, "c": samples, "none": samples})
    written = write_samples(probe_set, np.array([5, 2, 0, 1]), tmp_path)
    assert written == {tmp_path / "a b.jsonl": 3, tmp_path / "c.jsonl": 1}
    read = ProbeSet.from_jsonl(list(written))
    assert [plain(sample) for sample in read.tasks["a b"]] == [samples[2], samples[0], samples[1]]
    assert [plain(sample) for sample in read.tasks["c"]] == [samples[2]]
    tokens = ProbeSet.from_token_rows([{"input_ids": [1, 2]}])
    with pytest.raises(MUIError, match="expected a sample of text"):
        write_samples(tokens, np.array([0]), tmp_path)
