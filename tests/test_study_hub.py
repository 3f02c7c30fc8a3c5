"""Checkpoints on the hub: which there are, what is downloaded of them and when, and what is deleted again."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, hf_api, snapshot_download
from huggingface_hub.utils import enable_progress_bars
from rich.console import Console
from torch import nn
from transformers import ByT5Tokenizer
from transformers.utils import logging as transformers_logging

import tiny
from hub_server import HubServer
from mui_callback.errors import MUIError
from mui_callback.forgiving import attempt
from mui_callback.loading import ModelLoadError
from mui_callback.responses.task_config import TaskConfig
from mui_callback.trajectory.config import ModelConfig, StudyConfig
from mui_callback.trajectory.downloads import Downloads
from mui_callback.trajectory.fetching import Fetching
from mui_callback.trajectory.listing import StudiedCheckpoint, list_checkpoints
from mui_callback.trajectory.run import run_study

REPO = "me/olmoe"
STEPS = {"step10-tokens1B": 10, "step20-tokens2B": 20, "step100-tokens10B": 100, "main": 100}
"""Branches and seeds: main is the last step, which one more file makes another commit."""
SMALL = {"config.json", "generation_config.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory for each branch, with more in it than a study reads."""
    root = tmp_path_factory.mktemp("saved")
    for branch, seed in STEPS.items():
        model = tiny.build("olmoe", seed=seed)
        model.save_pretrained(root / branch)
        ByT5Tokenizer().save_pretrained(root / branch)
        torch.save(model.state_dict(), root / branch / "pytorch_model.bin")
        (root / branch / "modeling_own.py").write_text("raise RuntimeError('this is not to be run')\n")
        (root / branch / "onnx").mkdir()
        (root / branch / "onnx" / "model.safetensors").write_bytes(b"of no interest")
        (root / branch / "README.md").write_text(branch)
    (root / "main" / "added_note.txt").write_text("the last step")
    return {branch: root / branch for branch in STEPS}


@pytest.fixture
def hub(saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with the model, and an empty cache; the branches are in no order."""
    with HubServer() as server:
        for branch in ("main", "step100-tokens10B", "step10-tokens1B", "step20-tokens2B"):
            server.add(REPO, branch, saved[branch])
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


@pytest.fixture
def downloads(tmp_path: Path) -> Downloads:
    return Downloads(tmp_path / "study" / "downloads.jsonl")


def listed(downloads: Downloads, *names: str, **options: object) -> list[StudiedCheckpoint]:
    return list_checkpoints(ModelConfig(REPO, checkpoints=[*names], **options), downloads)


def labels(checkpoints: list[StudiedCheckpoint]) -> list[str]:
    return [one.id.label for one in checkpoints]


def snapshots() -> dict[str, set[str]]:
    """The files of the snapshots that are in the cache, whose content is there too, by commit."""
    found: dict[str, set[str]] = {}
    for directory in Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*"):
        with suppress(FileNotFoundError):  # it is deleted meanwhile
            found[directory.name] = {file.name for file in directory.rglob("*") if file.exists()}
    return found


def n_blobs() -> int:
    return sum(not blob.name.endswith(".incomplete") for blob in Path(constants.HF_HUB_CACHE).glob("models--*/blobs/*"))


def same(left: nn.Module, right: nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def load(checkpoint: StudiedCheckpoint) -> nn.Module:
    checkpoint.place.fetch()
    return checkpoint.load("cpu")


# Which there are


def test_patterns_are_in_the_order_of_their_steps(hub: HubServer, downloads: Downloads) -> None:
    found = listed(downloads, "*")
    assert [(one.id.model, one.id.label, one.id.step, one.id.tokens) for one in found] == [
        ("olmoe", "step10-tokens1B", 10, 1e9),
        ("olmoe", "step20-tokens2B", 20, 2e9),
        ("olmoe", "step100-tokens10B", 100, 1e10),
        ("olmoe", "main", None, None),
    ]
    assert labels(listed(downloads, "main", "step?0-*", "main")) == ["main", "step10-tokens1B", "step20-tokens2B"]
    assert labels(listed(downloads, "step*", at_most=2)) == ["step10-tokens1B", "step100-tokens10B"]
    assert labels(listed(downloads)) == ["main"]
    assert hub.requests == ["GET /api/models/me/olmoe/refs"] * 3


def test_names_are_not_looked_up(hub: HubServer, downloads: Downloads) -> None:
    assert labels(listed(downloads, "step20-tokens2B", "step7-tokens7B")) == ["step20-tokens2B", "step7-tokens7B"]
    assert hub.requests == []


def test_a_pattern_that_matches_nothing_says_what_there_is(hub: HubServer, downloads: Downloads) -> None:
    with pytest.raises(MUIError, match=r"me/olmoe: no checkpoint matches 'epoch\*'; there is step10-tokens1B, step20"):
        listed(downloads, "epoch*")
    with pytest.raises(ModelLoadError, match="me/other: there is no such path, and as a hub id: 404"):
        list_checkpoints(ModelConfig("me/other", checkpoints=["*"]), downloads)


def test_what_is_not_there_is_said_when_it_is_fetched(hub: HubServer, downloads: Downloads) -> None:
    (checkpoint,) = listed(downloads, "step7-tokens7B")
    for ask in (checkpoint.place.fetch, lambda: checkpoint.place.n_bytes):
        with pytest.raises(ModelLoadError, match=r"me/olmoe \(revision step7-tokens7B\): 404"):
            ask()
    checkpoint.place.let_go()  # is nothing to complain of
    assert snapshots() == {}
    assert not downloads.file.exists()


# What is downloaded


def test_sizes_before_and_after(hub: HubServer, downloads: Downloads, saved: dict[str, Path]) -> None:
    one, other = listed(downloads, "step10-tokens1B", "step20-tokens2B")
    names = SMALL | {"model.safetensors"}
    names |= {file.name for file in saved["step10-tokens1B"].iterdir() if file.suffix in (".json", ".txt", ".jinja")}
    size = sum((saved["step10-tokens1B"] / name).stat().st_size for name in names)
    assert (one.place.n_bytes, one.place.n_bytes_to_fetch) == (size, size)
    assert len(hub.requests) == 1
    assert snapshots() == {}

    one.place.fetch()
    assert (one.place.n_bytes, one.place.n_bytes_to_fetch) == (size, 0)
    assert [*snapshots().values()] == [names]
    assert other.place.n_bytes_to_fetch == other.place.n_bytes
    (again,) = listed(downloads, "step10-tokens1B")
    assert again.place.n_bytes_to_fetch == 0


def test_code_comes_only_if_it_may_be_run(hub: HubServer, downloads: Downloads) -> None:
    listed(downloads, "main", trust_remote_code=True)[0].place.fetch()
    (files,) = snapshots().values()
    assert "modeling_own.py" in files
    assert not files & {"pytorch_model.bin", "README.md"}


def test_a_pickle_comes_only_if_it_may_be_read_and_nothing_else_is_there(
    hub: HubServer, downloads: Downloads, saved: dict[str, Path], tmp_path: Path
) -> None:
    listed(downloads, "main", allow_pickle=True)[0].place.fetch()
    (files,) = snapshots().values()
    assert "pytorch_model.bin" not in files

    for name in ("config.json", "pytorch_model.bin"):
        (tmp_path / "pickled").mkdir(exist_ok=True)
        (tmp_path / "pickled" / name).write_bytes((saved["main"] / name).read_bytes())
    hub.add("me/pickled", "main", tmp_path / "pickled")
    (allowed,) = list_checkpoints(ModelConfig("me/pickled", allow_pickle=True), downloads)
    assert same(load(allowed), tiny.build("olmoe", seed=100))
    allowed.place.let_go()
    (refused,) = list_checkpoints(ModelConfig("me/pickled"), downloads)
    with pytest.raises(ModelLoadError, match="expected weights in"):
        load(refused)


@pytest.mark.parametrize("branch", ["step20-tokens2B", "main"])
def test_the_weights_are_those_that_were_saved(hub: HubServer, downloads: Downloads, branch: str) -> None:
    (checkpoint,) = listed(downloads, branch)
    assert same(load(checkpoint), tiny.build("olmoe", seed=STEPS[branch]))
    assert checkpoint.load_tokenizer()("ab").input_ids == ByT5Tokenizer()("ab").input_ids


def test_skeleton_and_tokenizer_come_without_weights(hub: HubServer, downloads: Downloads) -> None:
    (checkpoint,) = listed(downloads, "step10-tokens1B")
    assert {one.device.type for one in checkpoint.load_skeleton().parameters()} == {"meta"}
    assert checkpoint.load_tokenizer() is not None
    assert not any("lfs" in request for request in hub.requests)
    with pytest.raises(ModelLoadError, match="has to be fetched"):
        checkpoint.load("cpu")

    # The study has downloaded the weights nevertheless, and deletes them.
    checkpoint.place.fetch()
    checkpoint.place.let_go()
    assert snapshots() == {}


@pytest.mark.parametrize("trouble", ["refuses", "vanishes", "is not to be asked"])
def test_what_is_in_the_cache_needs_no_hub(
    hub: HubServer, downloads: Downloads, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed(downloads, "step10-tokens1B")[0].place.fetch()
    if trouble == "vanishes":
        hub.vanish()
    elif trouble == "refuses":
        hub.refused.add("models")
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    there, missing = listed(downloads, "step10-tokens1B", "step20-tokens2B")
    assert there.place.n_bytes > 0
    assert there.place.n_bytes_to_fetch == 0
    assert same(load(there), tiny.build("olmoe", seed=10))
    with pytest.raises(
        ModelLoadError, match=r"me/olmoe \(revision step20-tokens2B\): .*(Connection refused|500|offline mode)"
    ):
        missing.place.fetch()


def test_what_was_downloaded_in_part_is_gone_on_with(hub: HubServer, downloads: Downloads) -> None:
    (checkpoint,) = listed(downloads, "step10-tokens1B")
    hub.gone.add("model.safetensors")
    with pytest.raises(ModelLoadError, match=r"EntryNotFound|404"):
        checkpoint.place.fetch()
    hub.gone.clear()
    assert same(load(checkpoint), tiny.build("olmoe", seed=10))
    checkpoint.place.let_go()
    assert snapshots() == {}


# What is deleted


def test_only_what_the_study_has_downloaded_is_deleted(hub: HubServer, downloads: Downloads) -> None:
    before = snapshot_download(REPO, revision="step10-tokens1B")
    n_before = n_blobs()
    checkpoints = listed(downloads, "step*")
    for checkpoint in checkpoints:
        checkpoint.place.fetch()
    assert len(snapshots()) == 3
    assert n_blobs() == n_before + 2  # weights; all else is the same in all of them
    for checkpoint in checkpoints:
        checkpoint.place.let_go()
    assert [*snapshots()] == [Path(before).name]
    assert n_blobs() == n_before
    assert same(load(checkpoints[0]), tiny.build("olmoe", seed=10))
    assert checkpoints[0].load_tokenizer() is not None


def test_what_a_killed_study_has_downloaded_is_deleted_by_the_next_one(hub: HubServer, downloads: Downloads) -> None:
    listed(downloads, "step20-tokens2B")[0].place.fetch()
    with downloads.file.open("a") as lines:
        lines.write('{"model": "me/ol')  # killed while it wrote
    (again,) = listed(Downloads(downloads.file), "step20-tokens2B")
    again.place.let_go()
    assert snapshots() == {}


def test_what_was_deleted_and_comes_back_otherwise_is_no_longer_the_study_s(
    hub: HubServer, downloads: Downloads
) -> None:
    (checkpoint,) = listed(downloads, "step20-tokens2B")
    checkpoint.place.fetch()
    checkpoint.place.let_go()
    snapshot_download(REPO, revision="step20-tokens2B")
    checkpoint.place.fetch()
    checkpoint.place.let_go()
    assert len(snapshots()) == 1


def test_a_branch_that_moves_on(hub: HubServer, downloads: Downloads, saved: dict[str, Path]) -> None:
    (checkpoint,) = listed(downloads, "main")
    assert same(load(checkpoint), tiny.build("olmoe", seed=100))
    hub.add(REPO, "main", saved["step20-tokens2B"])
    assert same(load(checkpoint), tiny.build("olmoe", seed=20))
    assert len(snapshots()) == 2
    checkpoint.place.let_go()
    assert snapshots() == {}


def test_two_names_of_one_commit(hub: HubServer, downloads: Downloads, saved: dict[str, Path]) -> None:
    hub.add(REPO, "step50-tokens5B", saved["step20-tokens2B"])
    with Fetching(keep=0) as fetching:
        one, other = listed(downloads, "step20-tokens2B", "step50-tokens5B")
        fetching.fetch(one.place, other.place)
        fetching.let_go(one.place)
        fetching.fetch(other.place, None)
        assert same(other.load("cpu"), tiny.build("olmoe", seed=20))
        fetching.let_go(other.place)
    assert snapshots() == {}


# When


class Watched:
    """Most snapshots with weights that there ever are in the cache."""

    def __init__(self) -> None:
        self.most = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._over.is_set():
            self.most = max(self.most, sum("model.safetensors" in files for files in snapshots().values()))
            time.sleep(0.001)

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def measure(checkpoints: list[StudiedCheckpoint], keep: int | None, meanwhile: Callable[[], None]) -> list[str]:
    """What a study does; returns the errors."""
    errors = []
    with Fetching(keep) as fetching:
        for one, following in zip(checkpoints, [*checkpoints[1:], None], strict=True):
            _, error = attempt(partial(fetching.fetch, one.place, following and following.place))
            if error is None:
                meanwhile()
                one.load("cpu")
            else:
                errors.append(str(error))
            fetching.let_go(one.place)
    return errors


@pytest.mark.parametrize(("keep", "n_kept", "most"), [(0, 0, 2), (1, 1, 3), (None, 4, 4)])
def test_disk_use_is_bounded(hub: HubServer, downloads: Downloads, keep: int | None, n_kept: int, most: int) -> None:
    with Watched() as watched:
        assert measure(listed(downloads, "*"), keep, lambda: time.sleep(0.05)) == []
    assert len(snapshots()) == n_kept
    assert 1 < watched.most <= most


def test_the_next_one_is_downloaded_while_one_is_measured(hub: HubServer, downloads: Downloads) -> None:
    threads = set()

    def wait_for_next() -> None:
        threads.update(thread.name for thread in threading.enumerate() if "mui-fetch" in thread.name)
        end = time.monotonic() + 10
        while len(snapshots()) < 2 and time.monotonic() < end:
            time.sleep(0.005)
        assert len(snapshots()) == 2

    checkpoints = listed(downloads, "step*")
    with Fetching(keep=0) as fetching:
        for one, following in pairwise(checkpoints):
            fetching.fetch(one.place, following.place)
            wait_for_next()
            fetching.let_go(one.place)
    assert len(threads) == 1


@pytest.fixture
def as_loud_as_before() -> Iterator[None]:
    """The command makes transformers quiet."""
    verbosity = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()
    enable_progress_bars()


@pytest.mark.usefixtures("as_loud_as_before")
def test_a_study_that_goes_on_deletes_what_the_last_one_left(
    hub: HubServer, downloads: Downloads, tmp_path: Path
) -> None:
    """As if it had been killed between measuring and deleting: nothing is downloaded again, and all of it goes."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "response": "2"}\n{"prompt": "2+3=", "response": "5"}\n')
    study = StudyConfig(
        downloads.file.parent,
        [ModelConfig(REPO, checkpoints=["step*"])],
        [TaskConfig("sums", file=tmp_path / "rows.jsonl")],
        device="cpu",
        keep_checkpoints=None,
    )
    assert run_study(study, Console(quiet=True)).n_measured == 3
    assert len(snapshots()) == 3
    before = len(hub.requests)
    assert run_study(replace(study, keep_checkpoints=1), Console(quiet=True)).n_measured == 3
    assert len(snapshots()) == 1
    assert run_study(replace(study, keep_checkpoints=0), Console(quiet=True)).n_measured == 3
    assert snapshots() == {}
    assert hub.requests[before:] == ["GET /api/models/me/olmoe/refs"] * 2


def test_measuring_does_not_wait_for_the_next_one(hub: HubServer, downloads: Downloads) -> None:
    one, other = listed(downloads, "step10-tokens1B", "step20-tokens2B")
    one.place.fetch()
    hub.held.clear()
    with Fetching(keep=None) as fetching:
        fetching.fetch(one.place, other.place)
        assert same(one.load("cpu"), tiny.build("olmoe", seed=10))
        assert other.place.n_bytes_to_fetch > 0
        hub.held.set()


def test_a_download_that_fails_is_told_when_it_is_its_turn(hub: HubServer, downloads: Downloads) -> None:
    hub.gone.add("step20-tokens2B")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        errors = measure(listed(downloads, "step*"), 0, lambda: None)
    assert len(errors) == 1
    assert errors[0].startswith("me/olmoe (revision step20-tokens2B): 404")
    assert snapshots() == {}


def test_what_is_downloaded_ahead_and_fails_for_a_while_is_tried_again(hub: HubServer, downloads: Downloads) -> None:
    hub.gone.add("step20-tokens2B")
    one, other = listed(downloads, "step10-tokens1B", "step20-tokens2B")
    with Fetching(keep=None) as fetching:
        fetching.fetch(one.place, other.place)
        fetching.fetch(one.place, None)  # waits for it
        hub.gone.clear()
        fetching.fetch(other.place, None)
    assert same(other.load("cpu"), tiny.build("olmoe", seed=20))
