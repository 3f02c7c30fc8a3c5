"""`MUICallback` in a real `Trainer`: where points go, and what is probed by default."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    ByT5Tokenizer,
    DataCollatorForLanguageModeling,
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from mui_callback import MUICallback, MUIReport, ProbeSet
from mui_callback.errors import NoExpertsError, ProbeSetError
from mui_callback.metrics.catalogue import OVERHEAD
from mui_callback.sinks.base import ProbePoint, RunDescription
from mui_callback.sinks.memory import MemorySink
from tiny import VOCAB
from tiny_samples import make_samples
from training import STEPS, make_trainer, rows


def probe_set() -> ProbeSet:
    return ProbeSet({"a": make_samples(7), "b": make_samples(8)})


def run(output_dir: Path, *, trainer: Any = None, callbacks: Any = (), **options: Any) -> tuple[Trainer, MemorySink]:
    memory = MemorySink()
    callback = MUICallback(every=3, sinks=[memory], **options)
    made = make_trainer(output_dir, [callback, *callbacks], trainer=trainer)
    made.train()
    return made, memory


def steps(memory: MemorySink) -> list[int]:
    return [point.step for point in memory.points]


def record(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "mui.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rules", "top_fraction=7"),
        ("batch_tokens", 0),
        ("max_length", 1),
        ("every", 0),
        ("budget", 2),
        ("on_error", "ignore"),
    ],
)
def test_settings_are_checked_at_once(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected"):
        MUICallback(**{name: value})


def test_points_and_record(tmp_path: Path) -> None:
    trainer, memory = run(tmp_path, probe_set=probe_set())
    assert steps(memory) == [0, 3, 6, STEPS]
    assert memory.closed
    header, *lines = record(tmp_path)
    assert header["run"]["tasks"] == ["a", "b"]
    assert [layer["path"] for layer in header["run"]["layers"]] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert header["run"]["probe_set"] == probe_set().fingerprint
    assert [line["step"] for line in lines] == steps(memory)
    for line, point in zip(lines, memory.points, strict=True):
        assert isinstance(point.report, MUIReport)
        assert line["scalars"] == point.scalars
        added = {"mui/phase", "mui/a/phase", "mui/b/phase"} | ({OVERHEAD} if point.step else set())
        assert point.scalars.keys() - point.report.scalars().keys() == added
        assert point.report.scalars().items() <= point.scalars.items()
        assert line["tasks"]["a"]["layer_mui"] == pytest.approx(point.report.tasks["a"].layer_mui, abs=1e-6)
        assert len(line["pooled"]["top_experts"]) == 10
    losses = [point.scalars["mui/loss"] for point in memory.points]
    assert len(set(losses)) == len(losses)  # the model that trains is the one that is probed
    assert not [entry for entry in trainer.state.log_history if any(name.startswith("mui/") for name in entry)]


def test_last_step_is_probed_once(tmp_path: Path) -> None:
    memory = MemorySink()
    make_trainer(tmp_path, [MUICallback(probe_set(), every=4, sinks=[memory])]).train()
    assert steps(memory) == [0, 4, STEPS]


def test_training_that_stops_early_is_probed_at_its_end(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 5

    _, memory = run(tmp_path, probe_set=probe_set(), callbacks=[Stop()])
    assert steps(memory) == [0, 3, 5]


def test_the_last_point_is_of_the_last_weights_not_of_the_best_that_are_loaded_then(tmp_path: Path) -> None:
    memory = MemorySink()
    worse = {"eval_loss": iter([1.0, 2.0, 3.0])}

    class Judge(TrainerCallback):  # makes every later evaluation worse
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
            metrics["eval_loss"] = next(worse["eval_loss"])

    callbacks = [Judge(), MUICallback(probe_set(), every=100, sinks=[memory]), EarlyStoppingCallback(1)]
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    data = {"eval_dataset": rows(4, seed=9)}
    trainer = make_trainer(tmp_path / "a", callbacks, trainer=data, load_best_model_at_end=True, **options)
    trainer.train()
    at_the_end = MemorySink()
    make_trainer(
        tmp_path / "b", [MUICallback(probe_set(), every=4, sinks=[at_the_end])], trainer=data, **options
    ).train()
    assert steps(memory)[-1] == trainer.state.global_step == 4
    assert memory.points[-1].scalars["mui/loss"] == at_the_end.points[1].scalars["mui/loss"]


def test_a_warning_that_is_an_error_does_not_stop_training(tmp_path: Path) -> None:
    memory = MemorySink()
    trainer = make_trainer(tmp_path, [MUICallback(probe_set(), every=4, sinks=[memory])])
    trainer.model.model.layers[0].mlp.forward = lambda hidden_states: hidden_states
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.train()
    assert [point.error is not None for point in memory.points] == [True] * 3


def test_training_twice_with_one_callback(tmp_path: Path) -> None:
    trainer, memory = run(tmp_path, probe_set=probe_set())
    first = list(memory.points)
    trainer.train()
    assert steps(memory) == [0, 3, 6, STEPS] * 2
    assert memory.points[4].scalars["mui/loss"] == first[3].scalars["mui/loss"]
    assert [line.get("step", "run") for line in record(tmp_path)] == ["run", 0, 3, 6, STEPS] * 2


def test_a_sink_that_raises_is_warned_about_once_and_loses_nothing(tmp_path: Path) -> None:
    class Broken:
        def open(self, run: RunDescription) -> None:
            pass

        def write(self, point: ProbePoint) -> None:
            raise OSError("server gone")

        def close(self) -> None:
            raise OSError("server gone")

    memory = MemorySink()
    trainer = make_trainer(tmp_path, [MUICallback(probe_set(), every=3, sinks=[Broken(), memory])])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert len([w for w in caught if "Broken failed: OSError: server gone" in str(w.message)]) == 1
    assert steps(memory) == [0, 3, 6, STEPS]
    assert len(record(tmp_path)) == 5


def test_a_record_that_cannot_be_written_does_not_stop_training(tmp_path: Path) -> None:
    (tmp_path / "mui.jsonl").mkdir()
    with pytest.warns(UserWarning, match="JsonlSink failed"):
        trainer, memory = run(tmp_path, probe_set=probe_set())
    assert trainer.state.global_step == STEPS
    assert steps(memory) == [0, 3, 6, STEPS]


def test_a_failed_probe_is_in_the_record(tmp_path: Path) -> None:
    memory = MemorySink()
    callback = MUICallback(probe_set(), every=4, sinks=[memory])
    trainer = make_trainer(tmp_path, [callback])
    block = trainer.model.model.layers[0].mlp
    block.forward = lambda hidden_states: hidden_states
    with pytest.warns(UserWarning, match="probe at step 4 failed; training goes on. ProbeError: layer 0"):
        trainer.train()
    header, *lines = record(tmp_path)
    assert header["run"]["tasks"] == ["a", "b"]
    assert all("ProbeError" in line["error"] for line in lines)
    assert steps(memory) == [0, 4, STEPS]


def test_on_error_raise(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [MUICallback(probe_set(), on_error="raise")])
    trainer.model.model.layers[0].mlp.forward = lambda hidden_states: hidden_states
    with pytest.raises(Exception, match="ran without calling its experts"):
        trainer.train()
    assert "error" in record(tmp_path)[-1]


# What is probed by default


def test_default_is_the_eval_data(tmp_path: Path) -> None:
    _, memory = run(tmp_path, trainer={"eval_dataset": rows(100, seed=5)}, eval_samples=10)
    report = memory.points[0].report
    assert report.task_names == ("eval",)
    assert report.n_samples == 10
    assert report.tokens == 10 * 17


def test_default_takes_a_bounded_number(tmp_path: Path) -> None:
    _, memory = run(tmp_path, trainer={"eval_dataset": rows(200, seed=5)})
    assert memory.points[0].report.n_samples == 64


def test_each_eval_data_set_is_a_task(tmp_path: Path) -> None:
    _, memory = run(tmp_path, trainer={"eval_dataset": {"web": rows(5, seed=5), "books": rows(6, seed=6)}})
    report = memory.points[0].report
    assert report.task_names == ("web", "books")
    assert [task.n_samples for task in report.tasks.values()] == [5, 6]


def test_response_tokens_are_those_that_the_collator_labels(tmp_path: Path) -> None:
    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.stack([torch.as_tensor(row["input_ids"]) for row in batch])
        labels = ids.clone()
        labels[:, :12] = -100
        return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}

    data = [{"input_ids": row["input_ids"]} for row in rows(6, seed=5)]
    _, memory = run(tmp_path, trainer={"eval_dataset": data, "data_collator": collate})
    assert memory.points[0].report.tokens == 6 * 6


def test_eval_data_of_datasets_with_columns_that_the_model_does_not_take(tmp_path: Path) -> None:
    data = Dataset.from_list([{"input_ids": row["input_ids"].tolist(), "url": "x"} for row in rows(6, seed=5)])
    collator = DataCollatorForLanguageModeling(ByT5Tokenizer(), mlm=False)
    _, memory = run(tmp_path, trainer={"eval_dataset": data, "data_collator": collator})
    assert memory.points[0].report.tokens == 6 * 17


def test_eval_data_that_cannot_be_probed_gives_way_to_the_builtin_set(tmp_path: Path) -> None:
    data = Dataset.from_list([{"pixels": [1.0]}])
    trainer = {"eval_dataset": data, "processing_class": ByT5Tokenizer()}
    with pytest.warns(UserWarning, match="eval data cannot be probed.*pixels.*built-in probe set"):
        _, memory = run(tmp_path, trainer=trainer)
    assert memory.points[0].report.task_names == ProbeSet.builtin().task_names


def test_documents_packed_in_a_row_are_samples_of_their_own(tmp_path: Path) -> None:
    ids = rows(2, seed=5)
    packed = torch.cat([ids[0]["input_ids"], ids[1]["input_ids"]])
    positions = torch.arange(18).repeat(2)
    data = [{"input_ids": packed, "labels": packed.clone(), "position_ids": positions}]
    _, memory = run(tmp_path / "packed", trainer={"eval_dataset": data})
    _, apart = run(tmp_path / "apart", trainer={"eval_dataset": ids})
    assert memory.points[0].report.n_samples == 2
    assert memory.points[0].scalars["mui/loss"] == apart.points[0].scalars["mui/loss"]


def test_streaming_eval_data(tmp_path: Path) -> None:
    data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows(9, seed=5)])
    _, memory = run(tmp_path, trainer={"eval_dataset": data.to_iterable_dataset()}, eval_samples=5)
    assert memory.points[0].report.n_samples == 5


def test_without_eval_data_the_builtin_set_is_used(tmp_path: Path) -> None:
    _, memory = run(tmp_path, trainer={"processing_class": ByT5Tokenizer()})
    assert memory.points[0].report.task_names == ProbeSet.builtin().task_names


def test_with_neither_it_says_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(ProbeSetError, match=r"neither eval data nor a tokenizer.*MUICallback\(ProbeSet\.from_jsonl"):
        run(tmp_path)


def test_a_dense_model_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=2, report_to="none", use_cpu=True)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=[MUICallback(probe_set())])
    with pytest.raises(NoExpertsError, match="LlamaForCausalLM has no MoE layer"):
        trainer.train()
    assert trainer.state.global_step == 0
