"""What is particular to Lightning: where values go, which module is probed, and with which data."""

from __future__ import annotations

import csv
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, TensorDataset, default_collate
from transformers import ByT5Tokenizer

from integrations import make_model, probe_set
from mui_callback import MemorySink, MUICallback, MUIProbe, ProbeSet
from mui_callback.errors import NoExpertsError, ProbeSetError, UnsupportedModelError
from mui_callback.trainers.eval_rows import EvalData, read_tasks
from plain_moe import PlainLM, build_plain
from tiny import build
from training import rows

HERE = Path(__file__).parent


class Module(pl.LightningModule):
    """Any language model of transformers, as the attribute ``net``."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net if net is not None else make_model()

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = self.net(**batch).loss
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
        if isinstance(batch, dict):
            self.log("val/loss", self.net(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(
    directory: Path, module: pl.LightningModule, callback: MUICallback, *, val: Any = None, **options: Any
) -> pl.Trainer:
    trainer = pl.Trainer(
        **{
            "max_steps": 8,
            "logger": False,
            "accelerator": "cpu",
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": directory,
            "callbacks": [callback],
            "log_every_n_steps": 1,
            **options,
        }
    )
    trainer.fit(module, DataLoader(rows(), batch_size=4), val)
    return trainer


def watch(directory: Path, module: pl.LightningModule, *, trainer: Any = None, **options: Any) -> MemorySink:
    memory = MemorySink()
    fit(
        directory,
        module,
        MUICallback(**{"sinks": [memory], "on_error": "raise", "every": 4, **options}),
        **trainer or {},
    )
    return memory


def steps(memory: MemorySink) -> list[int]:
    return [point.step for point in memory.points]


# When


def test_micro_batches_are_no_steps(tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 3, "max_steps": 5}
    memory = watch(tmp_path, Module(), probe_set=probe_set(), every=2, trainer=options)
    assert steps(memory) == [0, 2, 4, 5]


def test_epochs_that_end_in_the_middle_of_an_accumulation(tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 4, "max_epochs": 2, "max_steps": -1}  # 10 batches: 3 steps an epoch
    memory = watch(tmp_path, Module(), probe_set=probe_set(), every=None, at=[1, 4], trainer=options)
    assert steps(memory) == [0, 1, 4, 6]


def test_the_last_point_is_made_before_weights_are_averaged(tmp_path: Path) -> None:
    module, memory = Module(), MemorySink()
    callback = MUICallback(probe_set(), every=None, sinks=[memory])
    averaging = pl.callbacks.EMAWeightAveraging(decay=0.5)
    fit(tmp_path, module, callback, callbacks=[averaging, callback])
    plain = watch(tmp_path / "plain", Module(), probe_set=probe_set(), every=None)
    assert memory.points[-1].scalars["mui/loss"] == plain.points[-1].scalars["mui/loss"]


def test_training_that_is_stopped_early_has_a_last_point(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 5

    memory = MemorySink()
    callback = MUICallback(probe_set(), every=None, sinks=[memory])
    fit(tmp_path, Module(), callback, callbacks=[callback, Stop()])
    assert steps(memory) == [0, 5]


def test_no_probe_in_a_sanity_check_and_one_at_each_evaluation(tmp_path: Path) -> None:
    val = DataLoader(rows(8, seed=9), batch_size=4)
    options = {"val": val, "val_check_interval": 3, "num_sanity_val_steps": 2}
    memory = watch(tmp_path, Module(), every=None, on_evaluation=True, at_start=False, at_end=False, trainer=options)
    assert steps(memory) == [3, 6]


def test_optimization_by_hand_with_two_optimizers(tmp_path: Path) -> None:
    class ByHand(Module):
        automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.net(**batch).loss)
                optimizer.step()

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            head, rest = self.net.lm_head.parameters(), self.net.model.parameters()
            return [torch.optim.SGD(head, lr=0.1), torch.optim.SGD(rest, lr=0.1)]

    memory = watch(tmp_path, ByHand(), probe_set=probe_set(), every=4, trainer={"max_steps": 10})
    assert steps(memory) == [0, 4, 8, 10]  # each batch makes two steps


def test_a_checkpoint_that_was_only_validated_says_nothing_of_the_training_that_begins_then(tmp_path: Path) -> None:
    val = DataLoader(rows(8), batch_size=4)
    saved = fit(tmp_path, Module(), MUICallback(probe_set(), every=2), val=val, max_steps=6)
    saved.save_checkpoint(tmp_path / "step=6.ckpt")
    memory = MemorySink()
    callback = MUICallback(probe_set(), every=2, sinks=[memory])
    trainer = pl.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[callback],
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.validate(Module(), val, ckpt_path=tmp_path / "step=6.ckpt", verbose=False)
    trainer.fit(Module(), DataLoader(rows(), batch_size=4))
    assert steps(memory) == [0, 2, 4]


def test_a_validation_outside_of_training_is_not_probed(tmp_path: Path) -> None:
    memory = MemorySink()
    callback = MUICallback(probe_set(), on_evaluation=True, sinks=[memory])
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[callback])
    trainer.validate(Module(), DataLoader(rows(8), batch_size=4), verbose=False)
    assert not memory.points


# Where


def test_values_are_on_the_x_axis_of_the_loss_in_every_logger(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path / name) for name in "ab"]
    val = DataLoader(rows(8, seed=9), batch_size=8)
    options = {"logger": loggers, "val": val, "val_check_interval": 4}
    memory = watch(tmp_path, Module(), every=4, trainer=options)
    for logger in loggers:
        with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
            lines = list(csv.DictReader(file))
        at = {column: {int(row["step"]): float(row[column]) for row in lines if row[column]} for column in lines[0]}
        assert list(at["train/loss"]) == list(range(8))  # Lightning counts from 0
        assert at["mui/loss"].keys() == {0, 3, 7}
        # The eval data is probed: its loss is the validation loss, at the same place.
        assert at["val/loss"] == pytest.approx({step: at["mui/loss"][step] for step in (3, 7)}, rel=1e-5)
        assert at["mui/mui"][7] == pytest.approx(memory.points[-1].scalars["mui/mui"])
        assert at["mui/overhead"].keys() == {3, 7}


def test_a_logger_that_fails_is_named_once_and_the_others_get_their_values(tmp_path: Path) -> None:
    class Broken(CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            if "mui/mui" in metrics:
                raise ConnectionError("gone")

    whole = CSVLogger(tmp_path / "whole")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = {"logger": [Broken(tmp_path / "broken"), whole]}
        watch(tmp_path, Module(), probe_set=probe_set(), on_error="warn", trainer=options)
    assert len([w for w in caught if "Broken failed: ConnectionError: gone" in str(w.message)]) == 1
    assert "mui/mui" in (Path(whole.log_dir) / "metrics.csv").read_text()


def test_the_record_is_in_the_root_directory(tmp_path: Path) -> None:
    watch(tmp_path, Module(), probe_set=probe_set())
    assert len((tmp_path / "mui.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_the_probe_computes_in_the_precision_of_the_training(precision: str, tmp_path: Path) -> None:
    module, mixed = Module(), precision == "bf16-mixed"
    first, last = watch(
        tmp_path, module, probe_set=probe_set(), trainer={"precision": precision, "max_steps": 1}
    ).points
    for model, point in ((make_model(), first), (module.net, last)):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            alike = MUIProbe(model if mixed else model.to(torch.bfloat16), probe_set()).measure()
        assert point.report.counts.loss.tolist() == alike.counts.loss.tolist()
    assert first.report.counts.loss.tolist() != MUIProbe(make_model(), probe_set()).measure().counts.loss.tolist()


def test_a_root_that_is_no_directory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="the record goes to the current directory"):
        watch(tmp_path, Module(), probe_set=probe_set(), trainer={"default_root_dir": "memory://run", "max_steps": 1})
    assert (tmp_path / "mui.jsonl").is_file()


# Which model


class Inner(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.student = net


def module_with(**attributes: nn.Module) -> pl.LightningModule:
    module = Module(next(iter(attributes.values())))
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


class IsTheModel(pl.LightningModule):
    """A LightningModule that is the language model itself."""

    forward = PlainLM.forward

    def __init__(self) -> None:
        super().__init__()
        for name, child in build_plain("qwen2").named_children():
            self.add_module(name, child)

    def training_step(self, batch: Any, index: int) -> Tensor:
        logits = self(batch["input_ids"])
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def test_a_module_that_is_the_model(tmp_path: Path) -> None:
    memory = watch(tmp_path, IsTheModel(), probe_set=probe_set(), max_length=100)
    report = MUIProbe(build_plain("qwen2"), probe_set(), max_length=100).measure()
    assert memory.points[0].report.counts.loss.tolist() == report.counts.loss.tolist()


def test_a_model_of_plain_torch_as_an_attribute(tmp_path: Path) -> None:
    class Plain(Module):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.net(batch["input_ids"]).square().mean()

    module = Plain(build_plain("mixtral"))
    memory = watch(tmp_path, module, probe_set=probe_set(), max_length=100)
    assert [layer.path for layer in memory.run.layout.layers] == [f"layers.{n}.block_sparse_moe" for n in range(3)]


def test_a_model_deep_inside(tmp_path: Path) -> None:
    class Deep(Module):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.net.student(**batch).loss

    memory = watch(tmp_path, Deep(Inner(make_model())), probe_set=probe_set())
    assert [layer.path for layer in memory.run.layout.layers] == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_a_model_in_a_container(tmp_path: Path) -> None:
    class Contained(Module):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.net["lm"](batch["input_ids"]).square().mean()

    module = Contained(nn.ModuleDict({"lm": build_plain("mixtral")}))
    assert len(watch(tmp_path, module, probe_set=probe_set(), max_length=100).points) == 3


def test_data_in_a_module_are_not_copied(tmp_path: Path) -> None:
    """Nor is a probe hindered by what cannot be written to."""
    module = Module()
    (tmp_path / "data.bin").write_bytes(bytes(1000))
    module.data = np.memmap(tmp_path / "data.bin", mode="r")
    module.register_buffer("scale", torch.ones(1).expand(10))
    module.net.model.layers[0].limits = np.broadcast_to(np.ones(1), (5,))
    assert len(watch(tmp_path, module, probe_set=probe_set()).points) == 3


def test_dense_models_beside_are_no_matter(tmp_path: Path) -> None:
    module = module_with(net=make_model(), teacher=nn.Linear(3, 3))
    assert len(watch(tmp_path, module, probe_set=probe_set()).points) == 3


def test_two_models_must_be_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"2 language models.*net and other.*moe_model='net'"):
        watch(tmp_path, module_with(net=make_model(), other=make_model()), probe_set=probe_set())


@pytest.mark.parametrize("named", ["path", "module"])
def test_one_of_two_by_its_path_or_itself(named: str, tmp_path: Path) -> None:
    other = build("olmoe")
    moe_model = "other" if named == "path" else other
    memory = watch(tmp_path, module_with(net=make_model(), other=other), probe_set=probe_set(), moe_model=moe_model)
    assert memory.run.layout.layers[0].n_routed == other.config.num_experts
    assert not memory.run.layout.is_shared.any()


def test_a_path_that_leads_nowhere_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"moe_model: expected the path of a module in Module, which has net"
    ):
        watch(tmp_path, Module(), probe_set=probe_set(), moe_model="model")


def test_without_experts_it_is_said_before_the_first_step(tmp_path: Path) -> None:
    module = IsTheModel()
    module.layers = nn.ModuleList()
    with pytest.raises(NoExpertsError, match="IsTheModel has no MoE layer"):
        watch(tmp_path, module, probe_set=probe_set())
    assert module.global_step == 0


# With which data


class Rows(Dataset):  # type: ignore[type-arg]
    """Rows of token ids, as this or that kind of row."""

    def __init__(self, make: Callable[[Tensor], Any], n: int = 6) -> None:
        self.rows = [make(row["input_ids"]) for row in rows(n, seed=5)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def masked(ids: Tensor) -> Tensor:
    labels = ids.clone()
    labels[:10] = -100
    return labels


def collate_masked(batch: list[Tensor]) -> dict[str, Tensor]:
    ids = torch.stack(batch)
    return {"input_ids": ids, "labels": torch.stack([masked(row) for row in ids])}


KINDS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "ids": (lambda ids: ids, 17),
    "a tuple of ids": (lambda ids: (ids,), 17),
    "a mapping": (lambda ids: {"input_ids": ids, "labels": masked(ids)}, 8),
    "ids and the next ones": (lambda ids: (ids[:-1], ids[1:]), 17),
    "ids and labels": (lambda ids: (ids, masked(ids)), 8),
    "ids and the next ones, some ignored": (lambda ids: (ids[:-1], masked(ids)[1:]), 8),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_validation_data_is_the_default(kind: str, tmp_path: Path) -> None:
    make, n_scored = KINDS[kind]
    val = DataLoader(Rows(make), batch_size=2)
    memory = watch(tmp_path, Module(), trainer={"val": val, "max_steps": 1})
    report = memory.points[0].report
    assert report.task_names == ("eval",)
    assert report.tokens == 6 * n_scored
    # Whatever the kind, it is the same text.
    alike = ProbeSet.from_token_rows(
        [{"input_ids": row["input_ids"], "labels": masked(row["input_ids"])} for row in rows(6, seed=5)]
        if n_scored == 8
        else [{"input_ids": row["input_ids"]} for row in rows(6, seed=5)]
    )
    assert report.counts.loss == pytest.approx(MUIProbe(make_model(), alike).measure().counts.loss)


def rows_of_lists() -> list[dict[str, list[int]]]:
    return [{"input_ids": row["input_ids"].tolist(), "labels": row["input_ids"].tolist()} for row in rows(6, seed=5)]


def test_rows_of_plain_lists_which_the_default_collator_turns_around() -> None:
    read = read_tasks({"eval": EvalData(rows_of_lists(), lambda row: default_collate([row]), "eval")}, 4)
    assert [len(sample.input_ids) for sample in read.tasks["eval"]] == [18] * 4


def test_a_batch_sampler_makes_batches_and_so_the_collator_is_used(tmp_path: Path) -> None:
    data = Rows(lambda ids: ids)
    val = DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 2, False), collate_fn=collate_masked)
    memory = watch(tmp_path, Module(), trainer={"val": val, "max_steps": 1})
    assert memory.points[0].report.tokens == 6 * 8


def test_a_collator_that_is_a_method_of_the_module_does_not_copy_it(tmp_path: Path) -> None:
    class Collating(Module):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()  # which cannot be copied
            self.seen: list[int] = []

        def collate(self, batch: list[Tensor]) -> dict[str, Tensor]:
            self.seen.append(id(self.net))
            return collate_masked(batch)

    module = Collating()
    val = DataLoader(Rows(lambda ids: ids), batch_size=2, collate_fn=module.collate)
    memory = watch(tmp_path, module, trainer={"val": val, "max_steps": 1})
    assert memory.points[0].report.tokens == 6 * 8
    assert set(module.seen) == {id(module.net)}


def test_batches_of_three_tensors_are_not_taken_for_three_samples(tmp_path: Path) -> None:
    val = DataLoader(Rows(lambda ids: (ids, torch.ones_like(ids), ids)), batch_size=2)
    with pytest.raises(ProbeSetError, match="pairs of token ids and labels; got list of 3"):
        watch(tmp_path, Module(), trainer={"val": val, "num_sanity_val_steps": 0})


def test_data_without_a_token_to_score_are_refused(tmp_path: Path) -> None:
    val = DataLoader(Rows(lambda ids: {"input_ids": ids, "labels": torch.full_like(ids, -100)}), batch_size=2)
    with pytest.raises(ProbeSetError, match="expected labels of tokens to score, got none in 6 rows"):
        watch(tmp_path, Module(), trainer={"val": val, "num_sanity_val_steps": 0})


def test_data_that_can_be_read_once_are_left_to_the_trainer(tmp_path: Path) -> None:
    batches = iter([{"input_ids": row["input_ids"][None], "labels": row["labels"][None]} for row in rows(4)])
    with pytest.raises(ProbeSetError, match="expected rows that can be read again"):
        watch(tmp_path, Module(), trainer={"val": batches, "num_sanity_val_steps": 0})
    assert len(list(batches)) == 4


def test_so_many_samples_are_taken_however_they_come(tmp_path: Path) -> None:
    batches = torch.stack([row["input_ids"] for row in rows(6, seed=5)]).view(2, 3, 18)
    val = DataLoader(TensorDataset(batches), batch_size=None)
    memory = watch(tmp_path, Module(), eval_samples=2, trainer={"val": val, "max_steps": 1})
    assert memory.points[0].report.n_samples == 2


def test_pairs_that_are_no_labels_are_refused(tmp_path: Path) -> None:
    val = DataLoader(Rows(lambda ids: (ids, ids.flip(0))), batch_size=2)
    with pytest.raises(
        ProbeSetError, match="expected pairs of token ids and labels, which are the same ids or the next"
    ):
        watch(tmp_path, Module(), trainer={"val": val, "num_sanity_val_steps": 0})


def test_each_loader_is_a_task_and_a_collator_is_used(tmp_path: Path) -> None:
    val = [DataLoader(Rows(lambda ids: ids, n), batch_size=2, collate_fn=collate_masked) for n in (4, 6)]
    memory = watch(tmp_path, Module(), eval_samples=5, trainer={"val": val, "max_steps": 1})
    report = memory.points[0].report
    assert report.task_names == ("eval_0", "eval_1")
    assert [task.n_samples for task in report.tasks.values()] == [4, 5]
    assert report.tokens == 9 * 8


def test_a_mapping_of_loaders_gives_the_names(tmp_path: Path) -> None:
    val = {"web": DataLoader(Rows(lambda ids: ids, 3)), "books": DataLoader(Rows(lambda ids: ids, 2))}
    from lightning.pytorch.utilities import CombinedLoader

    memory = watch(tmp_path, Module(), trainer={"val": CombinedLoader(val, "sequential"), "max_steps": 1})
    assert memory.points[0].report.task_names == ("web", "books")


def test_batches_that_the_data_set_makes_itself(tmp_path: Path) -> None:
    val = DataLoader(
        TensorDataset(torch.stack([row["input_ids"] for row in rows(6, seed=5)]).view(2, 3, 18)), batch_size=None
    )
    memory = watch(tmp_path, Module(), trainer={"val": val, "max_steps": 1})
    assert memory.points[0].report.n_samples == 6


def test_without_validation_data_the_tokenizer_of_the_module_reads_the_builtin_set(tmp_path: Path) -> None:
    module = Module()
    module.tokenizer = ByT5Tokenizer()
    memory = watch(tmp_path, module, trainer={"max_steps": 1})
    assert memory.points[0].report.task_names == ProbeSet.builtin().task_names


def test_with_neither_it_says_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(ProbeSetError, match="neither eval data nor a tokenizer"):
        watch(tmp_path, Module())


# The class


@pytest.mark.parametrize("imports", ["before", "after"])
def test_trainers_may_be_imported_before_the_callback_is_made_or_after(imports: str) -> None:
    made = "from mui_callback import MUICallback; callback = MUICallback()"
    trainers = "import pytorch_lightning, lightning.pytorch, transformers"
    lines = [trainers, made] if imports == "before" else [made, trainers]
    lines += [
        "trainer = lightning.pytorch.Trainer(callbacks=[callback], accelerator='cpu', logger=False)",
        "[getattr(callback, name) for name in dir(lightning.pytorch.Callback) if name.startswith('on_')]",
        "kinds = transformers.TrainerCallback, lightning.pytorch.Callback, pytorch_lightning.Callback, MUICallback",
        "assert all(isinstance(callback, kind) for kind in kinds)",
        "import pickle, copy",
        "assert pickle.loads(pickle.dumps(callback)).schedule == copy.deepcopy(callback).schedule == callback.schedule",
        "assert callback.state_key == 'MUICallback'",
        "assert not hasattr(callback, 'nothing')",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, cwd=HERE, timeout=120)


def test_without_any_trainer_it_imports_none() -> None:
    code = "import sys; from mui_callback import MUICallback; MUICallback(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=HERE).stdout
    assert not {"transformers", "lightning", "pytorch_lightning", "wandb"} & set(loaded.split())
