"""Training that stopped and goes on: what was logged is known, what was not is logged, and what changed is said."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback

from distributed_training import launch
from integrations import probe_set
from mui_callback import MemorySink, MUICallback, MUIMonitor, ProbeSet
from mui_callback.metrics.catalogue import OVERHEAD, key
from mui_callback.monitoring.history import History, continued
from mui_callback.monitoring.schedule import Schedule
from mui_callback.spent import Spent
from mui_callback.trainers.hf_resume import warn_if_experts_are_not_restored
from tiny import FAMILIES, build
from tiny_samples import make_samples
from training import STEPS, make_trainer, rows

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*litlogger"),
]


SECONDS = key("seconds")


class Crashed(Exception):
    """What ends a training in these tests."""


def steps(memory: MemorySink) -> list[int]:
    return [point.step for point in memory.points]


def record(output_dir: Path) -> list[Any]:
    """The lines of the record: points as their step, failed ones as words, runs as they are."""
    lines = [json.loads(line) for line in (output_dir / "mui.jsonl").read_text().splitlines()]
    return [line.get("run") or (f"{line['step']} failed" if "error" in line else line["step"]) for line in lines]


def runs(output_dir: Path) -> list[dict[str, Any]]:
    return [line for line in record(output_dir) if isinstance(line, dict)]


def logged(output_dir: Path) -> list[int | str]:
    return [line for line in record(output_dir) if not isinstance(line, dict)]


def last_scalars(memory: MemorySink) -> dict[str, float]:
    """Those of the last point which do not depend on the clock."""
    scalars = {name: value for name, value in memory.points[-1].scalars.items() if name not in (OVERHEAD, SECONDS)}
    assert scalars
    return scalars


@contextmanager
def nothing_said() -> Iterator[None]:
    """No warning of this package."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = [str(w.message) for w in caught]
    assert [words for words in said if "MUI" in words or "mui" in words or "restore" in words] == []


# transformers


class Crash(TrainerCallback):
    """Ends training after so many steps, in the midst of the next one."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after:
            raise Crashed


def hf_trainer(
    output_dir: Path, callbacks: Sequence[TrainerCallback], model: PreTrainedModel | None = None, **options: Any
) -> Trainer:
    trainer = make_trainer(output_dir, list(callbacks), **{"save_strategy": "steps", "save_steps": 3, **options})
    if model is not None:
        trainer.model = trainer.model_wrapped = model
    return trainer


def watched(**options: Any) -> tuple[MUICallback, MemorySink]:
    memory = MemorySink()
    return MUICallback(**{"probe_set": probe_set(), "every": 2, "sinks": [memory], **options}), memory


def crash(output_dir: Path, after: int = 7, model: PreTrainedModel | None = None) -> MemorySink:
    """A training that ends too early, with checkpoints after 3 and 6 steps."""
    callback, memory = watched()
    with pytest.raises(Crashed):
        hf_trainer(output_dir, [callback, Crash(after)], model).train()
    return memory


def resume(output_dir: Path, checkpoint: int, **options: Any) -> MemorySink:
    """Training goes on to its end, with the right weights."""
    callback, memory = watched(**options)
    path = output_dir / f"checkpoint-{checkpoint}"
    trainer = hf_trainer(output_dir, [callback], AutoModelForCausalLM.from_pretrained(path))
    trainer.train(resume_from_checkpoint=str(path))
    assert trainer.state.global_step == STEPS
    return memory


@pytest.mark.parametrize("checkpoint", [3, 6])
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_over_both_parts_of_a_training_each_point_is_logged_once(family: str, checkpoint: int, tmp_path: Path) -> None:
    whole_callback, whole = watched()
    hf_trainer(tmp_path / "whole", [whole_callback], build(family)).train()
    first = crash(tmp_path / "parts", model=build(family))
    with nothing_said():
        second = resume(tmp_path / "parts", checkpoint)
    assert steps(first) == [0, 2, 4, 6]
    assert steps(second) == [STEPS]
    assert [line if isinstance(line, int) else "run" for line in record(tmp_path / "parts")] == [
        *["run", 0, 2, 4, 6],
        *["run", STEPS],
    ]
    before, after = runs(tmp_path / "parts")
    assert before["id"] == after["id"]
    assert (before["start_step"], after["start_step"]) == (0, checkpoint)
    assert last_scalars(second) == last_scalars(whole)


def test_the_time_spent_goes_on(tmp_path: Path) -> None:
    first, second = crash(tmp_path), resume(tmp_path, 3)
    before, after = first.points[-1].spent, second.points[-1].spent
    assert after.steps == before.steps + STEPS - 3  # steps that are trained twice take their time twice
    assert after.training > before.training
    assert after.probing > before.probing
    assert second.points[-1].scalars[OVERHEAD] == pytest.approx(after.overhead)
    lines = [json.loads(line) for line in (tmp_path / "mui.jsonl").read_text().splitlines()]
    spent = [Spent(**line["spent"]) for line in lines if "spent" in line]
    assert all(a.probing < b.probing and a.training <= b.training for a, b in pairwise(spent))


def test_the_time_between_the_last_point_and_the_checkpoint_is_not_forgotten(tmp_path: Path) -> None:
    """Else a job that is stopped more often than "auto" can afford a probe would never be probed again."""
    callback, _ = watched(every=4)
    with pytest.raises(Crashed):
        hf_trainer(tmp_path, [callback, Crash(7)]).train()
    second = resume(tmp_path, 6, every=4)
    assert second.points[-1].spent.steps == STEPS


def test_one_callback_and_one_trainer_for_both_parts(tmp_path: Path) -> None:
    callback, memory = watched()
    crashing = Crash(7)
    trainer = hf_trainer(tmp_path, [callback, crashing], build("gpt_oss"))
    with pytest.raises(Crashed):
        trainer.train()
    crashing.after = -1
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert steps(memory) == logged(tmp_path) == [0, 2, 4, 6, STEPS]
    assert [run["start_step"] for run in runs(tmp_path)] == [0, 3]


def test_a_point_that_failed_is_tried_again(tmp_path: Path) -> None:
    callback, first = watched()
    trainer = hf_trainer(tmp_path, [callback, Crash(7)])

    def fail(module: torch.nn.Module, args: Any) -> None:
        if not module.training and trainer.state.global_step in (4, 6):
            raise RuntimeError("injected")

    trainer.model.model.layers[1].mlp.experts.register_forward_pre_hook(fail)
    with pytest.warns(UserWarning, match="MUI probe at step 4 failed"), pytest.raises(Crashed):
        trainer.train()
    assert [point.step for point in first.points if point.error is None] == [0, 2]
    second = resume(tmp_path, 3)
    assert logged(tmp_path) == [0, 2, "4 failed", "6 failed", 4, 6, STEPS]
    assert steps(second) == [4, 6, STEPS]
    assert resume(tmp_path, 3).points == []


def test_a_third_part_knows_the_points_of_both_before(tmp_path: Path) -> None:
    crash(tmp_path, after=4)
    callback, second = watched()
    checkpoint = tmp_path / "checkpoint-3"
    trainer = hf_trainer(tmp_path, [callback, Crash(7)], AutoModelForCausalLM.from_pretrained(checkpoint))
    with pytest.raises(Crashed):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert steps(second) == [6]
    third = resume(tmp_path, 3)
    assert steps(third) == [STEPS]
    assert logged(tmp_path) == [0, 2, 4, 6, STEPS]
    assert len({run["id"] for run in runs(tmp_path)}) == 1
    assert third.points[0].spent.probing > second.points[0].spent.probing


def test_another_probe_set_is_noticed_in_a_trainer(tmp_path: Path) -> None:
    crash(tmp_path)
    with pytest.warns(UserWarning, match=r"training goes on at step 3, but is probed in another way.*\(probe_set was"):
        second = resume(tmp_path, 3, probe_set=ProbeSet({"a": make_samples(7), "b": make_samples(9)}))
    assert steps(second) == [4, 6, STEPS]


def test_a_training_from_the_start_is_a_run_of_its_own(tmp_path: Path) -> None:
    crash(tmp_path)
    with nothing_said():
        fresh = crash(tmp_path)
    assert steps(fresh) == [0, 2, 4, 6]
    assert logged(tmp_path) == [0, 2, 4, 6] * 2
    first, second = runs(tmp_path)
    assert first["id"] != second["id"]
    assert second["start_step"] == 0
    assert fresh.points[-1].spent.steps == 6
    assert steps(resume(tmp_path, 3)) == [STEPS]  # and it is this one that goes on
    assert [run["id"] for run in runs(tmp_path)] == [first["id"], second["id"], second["id"]]


def test_a_run_that_was_recorded_in_between_does_not_confuse_a_trainer(tmp_path: Path) -> None:
    crash(tmp_path)
    callback, _ = watched(every=5)
    hf_trainer(tmp_path, [callback], save_strategy="no").train()
    assert steps(resume(tmp_path, 3)) == [STEPS]
    first, between, last = runs(tmp_path)
    assert first["id"] == last["id"] != between["id"]


def test_what_a_sink_is_told_when_there_is_no_record_of_the_run(tmp_path: Path) -> None:
    """In another output directory nothing is known but the step."""
    crash(tmp_path / "old")
    callback, memory = watched()
    checkpoint = tmp_path / "old" / "checkpoint-6"
    trainer = hf_trainer(tmp_path / "new", [callback], AutoModelForCausalLM.from_pretrained(checkpoint))
    with nothing_said():
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert steps(memory) == logged(tmp_path / "new") == [STEPS]
    assert runs(tmp_path / "new")[0]["start_step"] == 6


NO_STATES = {
    "torn": '{"step": 3, "pro',
    "empty": "",
    "another list": "[]",
    "another number": "5",
    "without a history": '{"step": 3}',
    "of nothing": '{"step": 3, "probed": null, "history": {"run_id": "x", "points": [], "spent": null}}',
}


@pytest.mark.parametrize("content", NO_STATES.values(), ids=NO_STATES)
def test_a_state_that_cannot_be_read_is_made_up_for_by_the_record(content: str, tmp_path: Path) -> None:
    crash(tmp_path)
    (tmp_path / "checkpoint-3" / "mui_state.json").write_text(content)
    assert steps(resume(tmp_path, 3)) == [STEPS]
    assert len({run["id"] for run in runs(tmp_path)}) == 1


def test_the_state_in_a_checkpoint_of_transformers_is_enough(tmp_path: Path) -> None:
    crash(tmp_path / "old")
    shutil.copytree(tmp_path / "old" / "checkpoint-6", tmp_path / "new" / "checkpoint-6")
    second = resume(tmp_path / "new", 6)
    assert steps(second) == [STEPS]
    assert runs(tmp_path / "new")[0]["id"] == runs(tmp_path / "old")[0]["id"]
    assert second.points[0].spent.steps == STEPS


def calls_of(memory: MemorySink) -> dict[int, Any]:
    return {point.step: {task: phase.to_dict() for task, phase in point.phases.items()} for point in memory.points}


CALLED: dict[str, Any] = {"phase_window": 3, "phase_level": 0.01, "rules": "top_fraction=0.05"}


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_a_run_of_transformers_that_goes_on_makes_the_same_calls(is_elsewhere: bool, tmp_path: Path) -> None:
    """Where the record is gone as well as where it holds points that were made after the checkpoint."""
    whole_callback, whole = watched(**CALLED)
    hf_trainer(tmp_path / "whole", [whole_callback]).train()
    callback, _ = watched(**CALLED)
    with pytest.raises(Crashed):
        hf_trainer(tmp_path / "old", [callback, Crash(7)]).train()
    directory = tmp_path / "old"
    if is_elsewhere:
        directory = tmp_path / "new"
        shutil.copytree(tmp_path / "old" / "checkpoint-3", directory / "checkpoint-3")
    second = resume(directory, 3, **CALLED)
    assert steps(second) == ([4, 6, STEPS] if is_elsewhere else [STEPS])
    assert calls_of(second) == {step: calls_of(whole)[step] for step in steps(second)}
    assert {call["phase"] for call in calls_of(whole)[STEPS].values()} != {"undecided"}


# Whether the Trainer restored the experts


class Look(TrainerCallback):
    """Whether training goes on with the weights of the checkpoint."""

    def __init__(self, saved: dict[str, torch.Tensor]) -> None:
        self.saved = saved
        self.lost: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.lost = [name for name, p in model.named_parameters() if not torch.equal(p, self.saved[name])]


def one_step(output_dir: Path, model: PreTrainedModel, **options: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint, and the weights that it should hold."""
    trainer = hf_trainer(output_dir, [], model, max_steps=1, save_steps=1, **options)
    trainer.train()
    return output_dir / "checkpoint-1", {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def go_on(
    checkpoint: Path,
    model: PreTrainedModel,
    saved: dict[str, torch.Tensor],
    *,
    argument: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
    **options: Any,
) -> tuple[list[str], list[str]]:
    """The weights that were not restored, and what was said of it."""
    look = Look(saved)
    callback, _ = watched(every=None, at_start=False, at_end=False)
    trainer = hf_trainer(checkpoint.parent, [look, *callbacks, callback], model, max_steps=2, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=str(checkpoint) if argument is None else argument)
    assert trainer.state.global_step == 2
    return look.lost, [str(w.message) for w in caught if "restore" in str(w.message)]


def split(checkpoint: Path) -> None:
    """The same checkpoint in several files, as those of large models are."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="40KB")
    assert len(list(checkpoint.glob("model-*.safetensors"))) > 1


def way_round(warning: str) -> PreTrainedModel:
    """The model, as the warning tells how to make it."""
    found = re.search(r"Trainer\(model=(\w+)\.from_pretrained\('(.*?)'\), \.\.\.\), and resume then", warning)
    assert found is not None
    return getattr(transformers, found[1]).from_pretrained(found[2])


@pytest.mark.parametrize("family", list(FAMILIES))
def test_experts_that_the_trainer_does_not_restore_are_noticed(family: str, tmp_path: Path) -> None:
    checkpoint, saved = one_step(tmp_path, build(family))
    lost, said = go_on(checkpoint, build(family, seed=5), saved)
    if transformers.__version__ == "5.23.0":
        assert bool(lost) == (family != "gpt_oss")
    assert len(said) == bool(lost)
    if lost:
        assert lost[0] in said[0] or lost[1] in said[0]
        assert go_on(checkpoint, way_round(said[0]), saved) == ([], [])


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tied embeddings": ({"tie_word_embeddings": True}, {}),
    "compiled": ({}, {"torch_compile": True, "torch_compile_backend": "eager"}),
    "bf16 autocast": ({}, {"bf16": True}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_there_is_no_false_alarm_and_no_silence(setting: str, tmp_path: Path) -> None:
    changes, options = SETTINGS[setting]
    checkpoint, saved = one_step(tmp_path, build("olmoe", **changes), **options)
    assert go_on(checkpoint, AutoModelForCausalLM.from_pretrained(checkpoint), saved, **options) == ([], [])
    lost, said = go_on(checkpoint, build("olmoe", seed=5, **changes), saved, **options)
    assert len(said) == bool(lost)


def test_weights_of_half_precision(tmp_path: Path) -> None:
    checkpoint, saved = one_step(tmp_path, build("olmoe", intermediate_size=16).bfloat16())
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.dtype == torch.bfloat16
    assert go_on(checkpoint, model, saved) == ([], [])
    lost, said = go_on(checkpoint, build("olmoe", intermediate_size=16, seed=5).bfloat16(), saved)
    assert len(said) == bool(lost)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        torch.float16,
    ],
)
def test_weights_that_are_rounded_when_they_are_loaded_are_no_alarm(dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint, saved = one_step(tmp_path, build("olmoe", intermediate_size=16))
    rounded = {name: weight.to(dtype) for name, weight in saved.items()}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    assert go_on(checkpoint, model, rounded) == ([], [])


def test_experts_that_were_trained_a_little_only_are_missed_too(tmp_path: Path) -> None:
    """As in fine-tuning, where the model is made from the weights that training began with."""
    checkpoint, saved = one_step(tmp_path, build("olmoe"), learning_rate=1e-6)
    lost, said = go_on(checkpoint, build("olmoe"), saved)
    assert len(said) == bool(lost)


@pytest.mark.parametrize(
    "kind",
    [bool, str, Path],
)
def test_however_the_checkpoint_is_named(kind: type, tmp_path: Path) -> None:
    checkpoint, saved = one_step(tmp_path, build("olmoe"))
    lost, said = go_on(checkpoint, build("olmoe", seed=5), saved, argument=kind(checkpoint))
    assert len(said) == bool(lost)


def test_a_checkpoint_in_several_files(tmp_path: Path) -> None:
    checkpoint, saved = one_step(tmp_path, build("olmoe"))
    split(checkpoint)
    lost, said = go_on(checkpoint, build("olmoe", seed=5), saved)
    assert len(said) == bool(lost)
    assert go_on(checkpoint, AutoModelForCausalLM.from_pretrained(checkpoint), saved) == ([], [])


def test_weights_that_are_elsewhere_are_no_alarm(tmp_path: Path) -> None:
    """As in DeepSpeed's third stage, where what a module holds between two passes is empty."""
    checkpoint, _ = one_step(tmp_path, build("olmoe"))
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    with nothing_said():
        warn_if_experts_are_not_restored(model, checkpoint)


def look_at_a_part(rank: int, directory: Path, kind: str, checkpoint: Path) -> list[str]:
    """What the main process says of a sharded model; the other one does not come to look."""
    model = build("olmoe")
    if kind == "FSDP":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if rank == 0:
            warn_if_experts_are_not_restored(model, checkpoint)
    return [str(w.message) for w in caught if "restore" in str(w.message)]


@pytest.mark.parametrize("kind", ["FSDP", "fully_shard"])
def test_a_model_that_is_sharded_is_not_looked_at(kind: str, tmp_path: Path) -> None:
    build("olmoe").save_pretrained(tmp_path / "checkpoint-1")
    said = launch(tmp_path, look_at_a_part, kind=kind, checkpoint=tmp_path / "checkpoint-1")
    assert said == [[], []]


class Spoil(TrainerCallback):
    """Does something to the checkpoint after the Trainer has read it."""

    def __init__(self, file: Path, content: bytes | None) -> None:
        self.file, self.content = file, content

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.content is None:
            shutil.rmtree(self.file.parent)
        else:
            self.file.unlink(missing_ok=True)  # in place, it would be taken from under a model that is mapped to it
            self.file.write_bytes(self.content)


@pytest.mark.parametrize(
    ("name", "content"),
    [("model.safetensors", b"\x10"), ("model.safetensors", b""), ("model.safetensors.index.json", b'{"weight_m')],
)
def test_a_file_that_cannot_be_read_is_said_and_stops_nothing(name: str, content: bytes, tmp_path: Path) -> None:
    checkpoint, saved = one_step(tmp_path, build("olmoe"))
    if name != "model.safetensors":
        split(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    lost, (said,) = go_on(checkpoint, model, saved, callbacks=[Spoil(checkpoint / name, content)])
    assert not lost
    assert said.startswith(f"It cannot be told whether {checkpoint} was restored as a whole: ")


def test_a_checkpoint_that_is_gone_by_then_is_not_looked_at(tmp_path: Path) -> None:
    checkpoint, saved = one_step(tmp_path, build("gpt_oss"))
    spoil = Spoil(checkpoint / "model.safetensors", None)
    assert go_on(checkpoint, build("gpt_oss", seed=5), saved, callbacks=[spoil]) == ([], [])


# Lightning


class Module(pl.LightningModule):
    """A model whose training is the same in two parts, as long as they meet at the end of an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build("qwen2_moe")

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class LightningCrash(pl.Callback):
    """Ends training after so many steps, in the midst of the next one."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.after:
            raise Crashed


def fit(
    output_dir: Path, callbacks: Sequence[pl.Callback], checkpoint: Path | None = None, max_steps: int = STEPS
) -> pl.Trainer:
    trainer = pl.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, pl.callbacks.ModelCheckpoint) for callback in callbacks),
        default_root_dir=output_dir,
        callbacks=list(callbacks),
    )
    trainer.fit(Module(), DataLoader(rows(12), batch_size=4), ckpt_path=checkpoint)
    return trainer


def lightning_crash(output_dir: Path, *, asked: Mapping[str, Any] = {}, **options: Any) -> tuple[Path, MemorySink]:
    """A training that ends after 7 steps, with a checkpoint after 3."""
    callback, memory = watched(**asked)
    checkpoints = pl.callbacks.ModelCheckpoint(
        output_dir / "checkpoints", filename="{step}", every_n_train_steps=3, save_top_k=-1, **options
    )
    with pytest.raises(Crashed):
        fit(output_dir, [callback, checkpoints, LightningCrash(7)])
    return output_dir / "checkpoints" / "step=3.ckpt", memory  # at the end of the first epoch


def test_the_state_in_a_checkpoint_of_lightning_is_plain_data(tmp_path: Path) -> None:
    checkpoint, memory = lightning_crash(tmp_path)
    state = torch.load(checkpoint, weights_only=True)["callbacks"]["MUICallback"]
    assert json.loads(json.dumps(state)) == state
    assert state["step"] == 3
    assert [step for step, _ in state["history"]["points"]] == [0, 2]
    assert state["history"]["points"][1][1] == memory.points[1].scalars
    assert state["history"]["run_id"] == runs(tmp_path)[0]["id"]


def test_lightning_goes_on_from_the_state_in_its_checkpoint(tmp_path: Path) -> None:
    whole_callback, whole = watched()
    fit(tmp_path / "whole", [whole_callback])
    checkpoint, first = lightning_crash(tmp_path / "old")
    callback, second = watched()
    with nothing_said():
        fit(tmp_path / "new", [callback], checkpoint)
    assert steps(first) == [0, 2, 4, 6]
    assert steps(second) == logged(tmp_path / "new") == [4, 6, STEPS]  # those after the checkpoint are not in it
    (old,), (new,) = runs(tmp_path / "old"), runs(tmp_path / "new")
    assert new["id"] == old["id"]
    assert new["start_step"] == 3
    assert second.points[0].spent.steps == 4
    assert second.points[0].spent.probing > first.points[1].spent.probing
    assert last_scalars(second) == last_scalars(whole)


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_a_run_of_lightning_that_goes_on_makes_the_same_calls(is_elsewhere: bool, tmp_path: Path) -> None:
    whole_callback, whole = watched(**CALLED)
    fit(tmp_path / "whole", [whole_callback])
    checkpoint, _ = lightning_crash(tmp_path / "old", asked=CALLED)
    callback, second = watched(**CALLED)
    fit(tmp_path / ("new" if is_elsewhere else "old"), [callback], checkpoint)
    assert steps(second) == ([4, 6, STEPS] if is_elsewhere else [STEPS])
    assert calls_of(second) == {step: calls_of(whole)[step] for step in steps(second)}


def test_lightning_knows_what_was_logged_after_the_checkpoint_from_the_record(tmp_path: Path) -> None:
    checkpoint, first = lightning_crash(tmp_path)
    callback, second = watched()
    with nothing_said():
        fit(tmp_path, [callback], checkpoint)
    assert steps(second) == [STEPS]
    assert logged(tmp_path) == [0, 2, 4, 6, STEPS]
    assert len({run["id"] for run in runs(tmp_path)}) == 1
    assert second.points[0].spent.probing > first.points[-1].spent.probing


def test_a_run_that_was_recorded_in_between_does_not_confuse_lightning(tmp_path: Path) -> None:
    checkpoint, _ = lightning_crash(tmp_path)
    other, _ = watched(every=1, probe_set=ProbeSet({"c": make_samples(3)}))
    fit(tmp_path, [other])
    callback, second = watched()
    with nothing_said():
        fit(tmp_path, [callback], checkpoint)
    assert steps(second) == [STEPS]
    first, between, last = runs(tmp_path)
    assert first["id"] == last["id"] != between["id"]


def test_another_threshold_is_noticed_by_the_state_alone(tmp_path: Path) -> None:
    checkpoint, _ = lightning_crash(tmp_path / "old")
    callback, second = watched(key_expert_frequency=0.5)
    with pytest.warns(UserWarning, match=r"another way than before \(key_expert_frequency was 0\.6, is 0\.5\)"):
        fit(tmp_path / "new", [callback], checkpoint)
    assert steps(second) == [4, 6, STEPS]


def test_a_checkpoint_of_a_training_without_the_callback(tmp_path: Path) -> None:
    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit(tmp_path, [checkpoints], max_steps=3)
    callback, memory = watched()
    with nothing_said():
        fit(tmp_path, [callback], tmp_path / "step=3.ckpt")
    assert steps(memory) == [4, 6, STEPS]
    assert runs(tmp_path)[0]["start_step"] == 3


@pytest.mark.parametrize("saved", ["after the training", "when it crashed"])
def test_a_checkpoint_that_is_saved_when_training_is_over_holds_the_state(saved: str, tmp_path: Path) -> None:
    if saved == "when it crashed":
        lightning_crash(tmp_path, save_on_exception=True)
        checkpoint = tmp_path / "checkpoints" / "step=7.ckpt"
    else:
        callback, _ = watched()
        checkpoint = tmp_path / "after.ckpt"
        fit(tmp_path, [callback], max_steps=7).save_checkpoint(checkpoint)
    state = torch.load(checkpoint, weights_only=True)["callbacks"]["MUICallback"]
    assert [step for step, _ in state["history"]["points"]][:4] == [0, 2, 4, 6]
    callback, second = watched()
    fit(tmp_path / "new", [callback], checkpoint)
    assert steps(second) == [STEPS]
    assert runs(tmp_path / "new")[0]["id"] == runs(tmp_path)[0]["id"]


def test_a_checkpoint_that_is_saved_before_the_callback_hears_of_the_step(tmp_path: Path) -> None:
    """By a callback that comes first, say; its state is that of the step before."""

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    first, _ = watched()
    fit(tmp_path / "old", [Save(), first])
    second, _ = watched()
    fit(tmp_path / "new", [second], tmp_path / "early.ckpt")
    assert runs(tmp_path / "new")[0]["id"] == runs(tmp_path / "old")[0]["id"]


def test_a_state_that_was_not_used_is_forgotten(tmp_path: Path) -> None:
    class Refuse(pl.Callback):
        def on_fit_start(self, *args: Any) -> None:
            raise Crashed

    checkpoint, _ = lightning_crash(tmp_path / "old")
    callback, memory = watched()
    with pytest.raises(Crashed):
        fit(tmp_path / "new", [callback, Refuse()], checkpoint)
    fit(tmp_path / "new", [callback], max_steps=2)
    assert steps(memory) == [0, 2]
    assert runs(tmp_path / "new")[0]["id"] != runs(tmp_path / "old")[0]["id"]


# Loops of the user's own


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("qwen2_moe")


def loop(
    model: PreTrainedModel, output_dir: Path, told: Sequence[int], *, closed: bool = True, **options: Any
) -> tuple[MUIMonitor, MemorySink]:
    """A loop that tells of these steps; where it is not closed, it was killed."""
    memory = MemorySink()
    arguments = {"probe_set": probe_set(), "every": 2, "output_dir": output_dir, "tracker": None, "sinks": [memory]}
    monitor = MUIMonitor(model, **{**arguments, **options})
    for step in told:
        monitor.step(step)
    if closed:
        monitor.close()
    return monitor, memory


def test_a_loop_goes_on_from_the_state_in_its_checkpoint(model: PreTrainedModel, tmp_path: Path) -> None:
    monitor, first = loop(model, tmp_path / "old", range(1, 6), closed=False)
    torch.save({"mui": monitor.state_dict()}, tmp_path / "checkpoint.pt")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["mui"]
    with nothing_said():
        _, second = loop(model, tmp_path / "new", range(6, 10), state=state)
    assert steps(first) == [0, 2, 4]
    assert steps(second) == [6, 8, 9]
    (old,), (new,) = runs(tmp_path / "old"), runs(tmp_path / "new")
    assert new["id"] == old["id"]
    assert new["start_step"] == 5
    assert second.points[-1].spent.steps == 9
    assert second.points[0].spent.probing > first.points[-1].spent.probing


def test_the_state_of_a_loop_that_goes_on_holds_the_points_before_it(model: PreTrainedModel, tmp_path: Path) -> None:
    first, _ = loop(model, tmp_path / "a", range(1, 6), closed=False)
    second, _ = loop(model, tmp_path / "b", range(6, 8), closed=False, state=first.state_dict())
    state = second.state_dict()
    assert state["step"] == 7
    assert [step for step, _ in state["history"]["points"]] == [0, 2, 4, 6]
    _, third = loop(model, tmp_path / "c", range(1, 10), state={**state, "step": 1})
    assert steps(third) == [8, 9]


def test_a_loop_that_says_where_it_starts_goes_on_from_the_record(model: PreTrainedModel, tmp_path: Path) -> None:
    loop(model, tmp_path, range(1, 8), closed=False)
    with nothing_said():
        _, second = loop(model, tmp_path, range(4, 10), start_step=3)
    assert steps(second) == [8, 9]
    assert logged(tmp_path) == [0, 2, 4, 6, 8, 9]
    assert [run["start_step"] for run in runs(tmp_path)] == [0, 3]


def test_a_loop_without_a_state_goes_on_with_the_run_that_was_probed_alike(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    loop(model, tmp_path, range(1, 6), closed=False)
    loop(model, tmp_path, range(1, 6), closed=False, rules="top_fraction=0.05")
    with nothing_said():
        _, third = loop(model, tmp_path, range(4, 7), start_step=3)
    assert steps(third) == [6]
    first, other, last = runs(tmp_path)
    assert first["id"] == last["id"] != other["id"]


def test_a_record_that_cannot_be_read_does_not_keep_training_from_going_on(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    (tmp_path / "mui.jsonl").mkdir()
    with pytest.warns(UserWarning, match="logged before are not known: IsADirectoryError"):
        _, memory = loop(model, tmp_path, range(4, 7), start_step=3)
    assert steps(memory) == [4, 6]


def test_a_loop_that_says_nothing_of_where_it_goes_on_is_told(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"first step that it is told of is 6.*pass start_step=5 or state=") as caught:
        loop(model, tmp_path, range(6, 9))
    assert len([w for w in caught if "start_step" in str(w.message)]) == 1
    with nothing_said():
        loop(model, tmp_path, range(1, 4))
        loop(model, tmp_path, range(6, 9), start_step=5)


# What changed in between


def changed_sizes(**sizes: Any) -> dict[str, Any]:
    return {"model": build("qwen2_moe", **sizes)}


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "samples": (
        {"probe_set": ProbeSet({"a": make_samples(7), "b": make_samples(9)})},
        f"(probe_set was {probe_set().fingerprint[:12]}…, is "
        f"{ProbeSet({'a': make_samples(7), 'b': make_samples(9)}).fingerprint[:12]}…)",
    ),
    "tasks": ({"probe_set": ProbeSet({"a": make_samples(7)})}, "tasks was ['a', 'b'], is ['a']; probe_set was "),
    "threshold": ({"rules": "top_fraction=0.05"}, "(rules was ['top_fraction=0.001'], is ['top_fraction=0.05'])"),
    "two settings": (
        {"max_length": 64, "key_expert_frequency": 0.5},
        "(key_expert_frequency was 0.6, is 0.5; max_length was 512, is 64)",
    ),
    "number of experts": (changed_sizes(num_experts=8), "(layers was "),
    "number of layers": (changed_sizes(num_hidden_layers=3), "(layers was "),
    "width of experts": (changed_sizes(moe_intermediate_size=16), "(layers was "),
}


@pytest.mark.parametrize("source", ["record", "state"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_said_and_earlier_points_do_not_count(
    change: str, source: str, model: PreTrainedModel, tmp_path: Path
) -> None:
    options, words = CHANGES[change]
    first, _ = loop(model, tmp_path, range(1, 6), closed=False)
    started = {"start_step": 3} if source == "record" else {"state": {**first.state_dict(), "step": 3}}
    directory = tmp_path if source == "record" else tmp_path / "new"
    with pytest.warns(UserWarning, match="goes on at step 3, but is probed in another way than before") as caught:
        _, second = loop(**{"model": model, **options}, output_dir=directory, told=range(4, 8), **started)
    (warning,) = [str(w.message) for w in caught if "another way" in str(w.message)]
    assert words in warning
    assert warning.endswith("Points before and after cannot be compared.")
    assert steps(second) == [4, 6, 7]
    assert runs(directory)[-1]["id"] == runs(tmp_path)[0]["id"]
    with nothing_said():  # the next part is as the one before it
        _, third = loop(**{"model": model, **options}, output_dir=directory, told=range(4, 9), start_step=3)
    assert steps(third) == [8]


def test_what_changed_in_the_experts_can_be_seen(model: PreTrainedModel, tmp_path: Path) -> None:
    loop(model, tmp_path, range(1, 6), closed=False)
    with pytest.warns(UserWarning, match="layers was") as caught:
        loop(build("qwen2_moe", moe_intermediate_size=16), tmp_path, [4], start_step=3)
    before, after = re.search(r"\(layers was (.*), is (.*)\)", str(caught[0].message)).groups()
    assert before != after


def test_the_first_way_of_probing_again(model: PreTrainedModel, tmp_path: Path) -> None:
    loop(model, tmp_path, range(1, 6), closed=False)
    with pytest.warns(UserWarning, match=r"rules was \['top_fraction=0.001'\], is \['top_fraction=0.05'\]"):
        loop(model, tmp_path, range(4, 8), closed=False, start_step=3, rules="top_fraction=0.05")
    with pytest.warns(UserWarning, match=r"rules was \['top_fraction=0.05'\], is \['top_fraction=0.001'\]"):
        _, third = loop(model, tmp_path, range(3, 8), start_step=2)
    assert steps(third) == [6, 7]  # that at step 4 was made in this way


@pytest.mark.parametrize("source", ["record", "state"])
def test_smaller_batches_change_nothing(source: str, model: PreTrainedModel, tmp_path: Path) -> None:
    first, _ = loop(model, tmp_path, range(1, 6), closed=False)
    started = {"start_step": 3} if source == "record" else {"state": {**first.state_dict(), "step": 3}}
    with nothing_said():
        _, second = loop(model, tmp_path, range(4, 7), batch_tokens=32, **started)
    assert steps(second) == [6]


@pytest.mark.parametrize("cause", ["another threshold", "a torn line"])
def test_a_warning_that_is_an_error_does_not_keep_training_from_going_on(
    cause: str, model: PreTrainedModel, tmp_path: Path
) -> None:
    loop(model, tmp_path, range(1, 6), closed=False)
    options = {"rules": "top_fraction=0.05"} if cause == "another threshold" else {}
    if not options:
        path = tmp_path / "mui.jsonl"
        path.write_bytes(path.read_bytes()[:-9])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, second = loop(model, tmp_path, range(4, 7), start_step=3, **options)
    assert steps(second) == [4, 6]


# The pace of "auto"

STEP_SECONDS, PROBE_SECONDS = 0.5, 0.5


def train_without_a_clock(schedule: Schedule, start: int, end: int, spent: Spent) -> tuple[list[int], Spent]:
    """The steps after `start` that are probed, and what was spent at the end."""
    probed, look = [], schedule.next_look(start, spent)
    for step in range(start + 1, end + 1):
        spent = replace(spent, steps=spent.steps + 1, training=spent.training + STEP_SECONDS)
        if step >= look:
            if schedule.affords(spent):
                probed.append(step)
                spent = replace(spent, probing=spent.probing + PROBE_SECONDS, last_probe=PROBE_SECONDS)
            look = schedule.next_look(step, spent)
    return probed, spent


@settings(max_examples=30)
@given(pause=st.integers(10, 1999), at_end=st.booleans())
def test_the_pace_after_a_pause_is_that_of_a_run_without_one(pause: int, at_end: bool) -> None:
    schedule = Schedule(budget=1 / 128, at_end=at_end)  # with numbers that add up without rounding
    start = Spent(0, 0.0, PROBE_SECONDS, PROBE_SECONDS)
    whole, whole_spent = train_without_a_clock(schedule, 0, 2000, start)
    first, spent = train_without_a_clock(schedule, 0, pause, start)
    kept = json.loads(json.dumps({"probed": {}, "history": History("run", spent=spent).to_dict()}))
    history, _ = continued({}, pause, [], kept)
    assert history.spent == spent
    second, second_spent = train_without_a_clock(schedule, pause, 2000, history.spent)
    assert first + second == whole
    assert second_spent == whole_spent
    assert len(whole) > 5


def at_a_pace_of_ten(steps_with_points: Sequence[int], probed: dict[str, Any]) -> dict[str, Any]:
    """A state after 1005 steps of a second each, when a probe of 0.1 s can be paid; 1 % allows one in 10 steps."""
    spent = Spent(steps=1005, training=1005.0, probing=9.5, last_probe=0.1)
    history = History("run", {step: {"mui/mui": 0.5} for step in steps_with_points}, spent)
    return {"step": 1005, "probed": probed, "history": history.to_dict()}


def test_a_run_that_goes_on_keeps_its_pace(model: PreTrainedModel, tmp_path: Path) -> None:
    probed = loop(model, tmp_path / "any", [])[0].state_dict()["probed"]
    state = at_a_pace_of_ten([1000], probed)
    _, memory = loop(model, tmp_path, range(1006, 1011), closed=False, every="auto", state=state)
    assert steps(memory) == [1010]


def test_a_point_that_was_logged_before_does_not_upset_the_pace(model: PreTrainedModel, tmp_path: Path) -> None:
    probed = loop(model, tmp_path / "any", [])[0].state_dict()["probed"]
    state = at_a_pace_of_ten([1000, 1010], probed)
    _, memory = loop(model, tmp_path, range(1006, 1021), closed=False, every="auto", state=state)
    assert steps(memory) == [1020]
