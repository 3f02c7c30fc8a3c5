"""Checkpoints on the disk, as trainers write them: the weights that each is of, and what a probe finds in them."""

from __future__ import annotations

import enum
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import ByT5Tokenizer, Trainer, TrainerCallback, TrainingArguments

import state_checkpoints
import tiny
from backend_training import SETTINGS, many
from backends import ODD_QWEN, language_loss, routed_lm
from distributed_training import launch
from mui_callback import MUIProbe, MUIReport
from mui_callback.errors import MUIError
from mui_callback.loading import ModelLoadError
from mui_callback.trajectory.config import ModelConfig
from mui_callback.trajectory.downloads import Downloads
from mui_callback.trajectory.listing import StudiedCheckpoint, list_checkpoints
from plain_moe import build_plain
from state_checkpoints import MIXTURE, TAG, Weights
from test_backends import assert_same_report

PLAIN, MOE = "state_checkpoints:plain_model", "state_checkpoints:moe_model"


def listed(source: Path, *names: str, **options: Any) -> list[StudiedCheckpoint]:
    config = ModelConfig(str(source), checkpoints=[*names], **options)
    return list_checkpoints(config, Downloads(source.parent / "downloads.jsonl"))


def load(source: Path, *names: str, **options: Any) -> nn.Module:
    (checkpoint,) = listed(source, *names, **options)
    checkpoint.place.fetch()
    model = checkpoint.load("cpu")
    checkpoint.place.let_go()
    assert not model.training
    assert checkpoint.place.n_bytes > 0
    assert checkpoint.place.n_bytes_to_fetch == 0
    return model


def refusal(source: Path, *names: str, **options: Any) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load(source, *names, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_same_weights(model: nn.Module, expected: Weights) -> None:
    weights = model.state_dict()
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []
    assert {weight.dtype for weight in weights.values()} == {weight.dtype for weight in expected.values()}


def probed(model: nn.Module) -> MUIReport:
    return MUIProbe(model, many(), **SETTINGS).measure()


def with_weights(model: nn.Module, weights: Weights) -> nn.Module:
    model.load_state_dict(weights)
    return model.eval()


@pytest.fixture(autouse=True)
def in_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions that make models are looked for where the command is called."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(Path(__file__).parent)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with the config and the tokenizer of `ODD_QWEN`."""
    directory = tmp_path_factory.mktemp("config")
    ODD_QWEN().config.save_pretrained(directory)
    ByT5Tokenizer().save_pretrained(directory)
    return str(directory)


# transformers' Trainer


class _KeepWeights(TrainerCallback):
    def __init__(self) -> None:
        self.weights: dict[int, Weights] = {}

    def on_save(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        self.weights[state.global_step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_run_of_the_trainer(tmp_path: Path) -> None:
    kept = _KeepWeights()
    args = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=10, save_steps=5, report_to=[], disable_tqdm=True)
    data = [{"input_ids": row, "labels": row} for row in state_checkpoints.tokens()]
    trainer = Trainer(tiny.build("olmoe"), args, train_dataset=data, processing_class=ByT5Tokenizer(), callbacks=[kept])
    trainer.train()
    trainer.save_model()

    found = listed(tmp_path)
    assert [(one.id.label, one.id.step) for one in found] == [("checkpoint-5", 5), ("checkpoint-10", 10)]
    for one in found:
        assert one.id.step is not None
        model = one.load("cpu")
        assert_same_weights(model, kept.weights[one.id.step])
        assert one.load_tokenizer()("ab").input_ids == ByT5Tokenizer()("ab").input_ids
        weights = tmp_path / one.id.label / "model.safetensors"
        assert one.place.n_bytes == weights.stat().st_size
        reference = with_weights(tiny.build("olmoe"), kept.weights[one.id.step])
        assert_same_report(probed(reference), probed(model))
    (last,) = listed(tmp_path, ".")
    assert_same_weights(last.load("cpu"), kept.weights[10])
    assert_same_weights(load(tmp_path / "checkpoint-5"), kept.weights[5])
    assert [one.id.label for one in listed(tmp_path, "checkpoint-1*", "checkpoint-5")] == [
        "checkpoint-10",
        "checkpoint-5",
    ]
    with pytest.raises(MUIError, match=r"no checkpoint matches 'step\*'; there is checkpoint-5, checkpoint-10"):
        listed(tmp_path, "step*")
    (missing,) = listed(tmp_path, "checkpoint-7")
    with pytest.raises(ModelLoadError, match="checkpoint-7: there is no such directory"):
        missing.place.n_bytes  # noqa: B018
    with pytest.raises(ModelLoadError, match="checkpoint-7: there is no such directory"):
        missing.load("cpu")


# Lightning


class _Kind(enum.Enum):
    BIG = 1


@dataclass
class _Options:
    kind: _Kind
    path: Path


def _touch(path: Path) -> None:
    path.touch()


class _Trap:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return _touch, (self.mark,)


class _Call:
    """Is unpickled by a function that another one gives."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int.from_bytes, (b"", "big")


def train_in_lightning(file: Path, model: nn.Module, **hyperparameters: Any) -> Weights:
    """A checkpoint of a module that has a model at an attribute."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.lm = model
            self.head = nn.Linear(2, 2)  # not the model's

        def training_step(self, batch: Tensor) -> Tensor:
            return language_loss(self.lm(batch), batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=1,
        default_root_dir=file.parent,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(**hyperparameters), DataLoader([*state_checkpoints.tokens()], batch_size=2))
    trainer.save_checkpoint(file)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_lightning_with_a_config(tmp_path: Path, config: str) -> None:
    first = train_in_lightning(tmp_path / "epoch=0-step=5.ckpt", ODD_QWEN(), lr=1e-3, layers=[1, 2])
    second = train_in_lightning(tmp_path / "epoch=1-step=20.ckpt", tiny.build("qwen2_moe", seed=1, vocab_size=385))
    found = listed(tmp_path, architecture=config)
    assert [one.id.step for one in found] == [5, 20]
    for one, expected in zip(found, (first, second), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what is not the model's is none that it leaves out
            assert_same_weights(one.load("cpu"), expected)
        assert one.load_tokenizer() is not None
        assert {weight.device.type for weight in one.load_skeleton().parameters()} == {"meta"}
    assert_same_report(probed(with_weights(ODD_QWEN(), first)), probed(found[0].load("cpu")))
    assert_same_weights(load(tmp_path / "epoch=0-step=5.ckpt", architecture=config), first)
    message = "has weights only; expected `architecture`, the model's config or a function that makes it"
    assert message in refusal(tmp_path, "*step=5.ckpt")


def test_lightning_with_a_function(tmp_path: Path) -> None:
    expected = train_in_lightning(tmp_path / "last.ckpt", build_plain("qwen2"))
    model = load(tmp_path, architecture=PLAIN)
    assert_same_weights(model, expected)
    assert_same_report(probed(with_weights(build_plain("qwen2"), expected)), probed(model))
    assert listed(tmp_path, architecture=PLAIN)[0].load_tokenizer() is None


def test_what_else_is_in_a_file_is_not_run(tmp_path: Path, config: str) -> None:
    options = _Options(_Kind.BIG, tmp_path)
    expected = train_in_lightning(
        tmp_path / "last.ckpt", ODD_QWEN(), options=options, trap=_Trap(tmp_path / "mark"), make=os.path.join
    )
    (tmp_path / "mark").unlink(missing_ok=True)
    assert_same_weights(load(tmp_path, architecture=config), expected)
    assert not (tmp_path / "mark").exists()
    torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert (tmp_path / "mark").exists()

    torch.save({"state_dict": expected, "call": _Call()}, tmp_path / "last.ckpt")
    message = "last.ckpt: holds more than weights, which is not run (Trying to call reduce for "
    assert message in refusal(tmp_path, architecture=config)


# DeepSpeed, and shards of torch


@dataclass(frozen=True)
class Written:
    """Checkpoints of two processes, and their weights in each."""

    directory: Path
    weights: list[dict[str, Weights]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    directory = tmp_path_factory.mktemp("written")
    return Written(directory, launch(directory, state_checkpoints.write_all))


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero3_tied", "zero3_groups", "zero3_frozen"])
def test_deepspeed_with_a_config(written: Written, config: str, name: str) -> None:
    (checkpoint,) = listed(written.directory / name, architecture=config)
    assert (checkpoint.id.label, checkpoint.id.step) == (TAG, 1)
    model = checkpoint.load("cpu")
    expected = written.weights[0][name]
    assert_same_weights(model, expected)
    if name in ("zero2", "zero3"):
        assert_same_report(probed(with_weights(ODD_QWEN(), expected)), probed(model))


@pytest.mark.parametrize("name", ["plain_zero2_bf16", "plain_zero3"])
def test_deepspeed_with_a_function(written: Written, name: str) -> None:
    """With bfloat16 these are the 16-bit weights that the model ran with."""
    model = load(written.directory / name, architecture=PLAIN)
    assert_same_weights(model, written.weights[0][name])
    assert (next(model.parameters()).dtype == torch.bfloat16) == ("bf16" in name)
    as_float = load(written.directory / name, architecture=PLAIN, dtype="float32")
    assert {weight.dtype for weight in as_float.parameters()} == {torch.float32}


def measure_moe(rank: int, directory: Path, *, source: Path) -> tuple[Weights, MUIReport]:
    model = load(source, architecture=MOE)
    return model.state_dict(), probed(model)


def test_deepspeed_s_moe(written: Written, tmp_path: Path) -> None:
    """Each expert is in a file of its own; the function makes the whole model in a process of its own."""
    ((weights, report),) = launch(tmp_path, measure_moe, size=1, source=written.directory / "moe")
    expected: Weights = {}
    for rank, of_rank in enumerate(written.weights):
        for name, tensor in of_rank["moe"].items():
            head, found, rest = name.partition(".deepspeed_experts.")
            expected[f"{head}{found}{int(rest[0]) + 2 * rank}{rest[1:]}" if found else name] = tensor
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []
    named = {
        name.replace("deepspeed_moe.gate.wg", "router").replace(
            "deepspeed_moe.experts.deepspeed_experts", "experts"
        ): one
        for name, one in expected.items()
    }
    assert_same_report(probed(with_weights(routed_lm(MIXTURE), named)), report)


@pytest.mark.parametrize("name", ["trainer_zero3", "trainer_zero3_gathered"])
def test_deepspeed_in_the_trainer(written: Written, name: str) -> None:
    (checkpoint,) = listed(written.directory / name)
    assert (checkpoint.id.label, checkpoint.id.step) == ("checkpoint-1", 1)
    assert_same_weights(checkpoint.load("cpu"), written.weights[0][name])
    assert type(checkpoint.place).__name__ == ("ModelDirectory" if "gathered" in name else "StateFiles")


def test_deepspeed_needs_no_deepspeed(written: Written, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    for name in [module for module in sys.modules if module.startswith("deepspeed.")]:
        monkeypatch.delitem(sys.modules, name)
    assert_same_weights(load(written.directory / "zero3", architecture=config), written.weights[0]["zero3"])


def test_the_steps_of_a_run_are_not_one_checkpoint(written: Written, config: str, tmp_path: Path) -> None:
    for step in (9, 10):
        shutil.copytree(written.directory / "zero1" / TAG, tmp_path / "runs" / "a" / f"global_step{step}")
    assert [one.id.step for one in listed(tmp_path / "runs" / "a", architecture=config)] == [9, 10]
    with pytest.raises(
        MUIError, match=r"runs: expected a model .* or checkpoints: checkpoint-\*, \*\.ckpt, global_step"
    ):
        listed(tmp_path / "runs", architecture=config)


def test_deepspeed_in_lightning(written: Written, config: str, tmp_path: Path) -> None:
    """Lightning has the directory of DeepSpeed in one of its own, and the attribute of its module in names."""
    inside = tmp_path / "epoch=0-step=1.ckpt" / "checkpoint"
    shutil.copytree(written.directory / "zero2" / TAG, inside)
    file = inside / "mp_rank_00_model_states.pt"
    states = torch.load(file, weights_only=True)
    torch.save({**states, "module": {f"lm.{name}": one for name, one in states["module"].items()}}, file)
    (checkpoint,) = listed(tmp_path, architecture=config)
    assert checkpoint.id.step == 1
    assert_same_weights(checkpoint.load("cpu"), written.weights[0]["zero2"])


def test_shards_of_torch(written: Written, config: str, tmp_path: Path) -> None:
    directory = written.directory / "lightning_shards"
    assert "python -m torch.distributed.checkpoint.format_utils dcp_to_torch" in refusal(directory, architecture=config)

    in_trainer = tmp_path / "run" / "checkpoint-1"  # as FSDP in transformers' Trainer has them
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        shutil.copytree(directory / "step=1.ckpt", in_trainer / name)
    assert "pytorch_model_fsdp_0: the weights are in shards" in refusal(in_trainer.parent, architecture=config)

    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(directory / "step=1.ckpt", tmp_path / "step=1.ckpt")
    assert_same_weights(load(tmp_path, architecture=config), written.weights[0]["lightning_shards"])


@pytest.mark.parametrize(
    "name",
    [
        "mp_rank_01_model_states.pt",  # tensor parallelism
        "layer_00-model_00-model_states.pt",  # pipeline parallelism
    ],
)
def test_what_parallelism_within_the_model_has_split(written: Written, config: str, tmp_path: Path, name: str) -> None:
    shutil.copytree(written.directory / "zero1" / TAG, tmp_path / "run" / TAG)
    file = tmp_path / "run" / TAG / "mp_rank_00_model_states.pt"
    shutil.copy(file, file.parent / name)
    message = refusal(tmp_path / "run", architecture=config)
    assert "expected the weights of one model-parallel process, got " in message
    assert name in message


def test_experts_that_auto_ep_has_split(written: Written, config: str, tmp_path: Path) -> None:
    message = "experts that DeepSpeed's AutoEP has split are not put together here"
    assert message in refusal(written.directory / "autoep_zero3", architecture=config)
    tiny.olmoe().save_pretrained(tmp_path)
    missing = "do not fit OlmoeForCausalLM: model.layers.0.mlp.experts.down_proj is missing"
    assert missing in refusal(written.directory / "autoep", architecture=str(tmp_path))


def test_zero_3_in_parts(written: Written, config: str, tmp_path: Path) -> None:
    step = tmp_path / "run" / TAG
    shutil.copytree(written.directory / "zero3" / TAG, step)
    shutil.copy(step / "zero_pp_rank_0_mp_rank_00_model_states.pt", step / "zero_pp_rank_0_mp_rank_01_model_states.pt")
    assert "expected the weights of one model-parallel process" in refusal(tmp_path / "run", architecture=config)
    (step / "zero_pp_rank_0_mp_rank_01_model_states.pt").unlink()

    (step / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    message = "expected the files of 2 processes, found none of process 1"
    assert message in refusal(tmp_path / "run", architecture=config)
    (step / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()  # as if there never had been another process
    assert re.search(r"expected \d+ weights of each of 1 processes, got \[", refusal(step.parent, architecture=config))


# What does not fit, and what fits nevertheless


@pytest.fixture(params=["config", "function"])
def case(request: pytest.FixtureRequest, config: str) -> tuple[str, Callable[[], nn.Module]]:
    """An architecture and a model of it."""
    return (config, ODD_QWEN) if request.param == "config" else (PLAIN, lambda: build_plain("qwen2"))


Case = tuple[str, Callable[[], nn.Module]]


def save(file: Path, state: dict[str, Any]) -> None:
    torch.save({"state_dict": state}, file)


def test_missing_weights_and_wrong_shapes(tmp_path: Path, case: Case) -> None:
    architecture, make = case
    state = make().state_dict()
    first, last = min(state), max(state)
    del state[first]
    save(tmp_path / "a.ckpt", state)
    assert f"1 weights do not fit {type(make()).__name__}: {first} is missing" in refusal(
        tmp_path, architecture=architecture
    )
    state[last] = state[last][:-1]
    save(tmp_path / "a.ckpt", state)
    message = refusal(tmp_path, architecture=architecture)
    assert f"2 weights do not fit {type(make()).__name__}: {first} is missing, {last} is [" in message


def test_files_that_are_no_checkpoint(tmp_path: Path, case: Case) -> None:
    architecture, make = case
    file = tmp_path / "a.ckpt"
    save(file, {"other.thing": torch.zeros(2)})
    assert "expected weights such as " in refusal(tmp_path, architecture=architecture)
    save(file, {})
    assert "a.ckpt: expected weights, found none" in refusal(tmp_path, architecture=architecture)
    torch.save([1, 2], file)
    assert "a.ckpt: expected a checkpoint with a state_dict, got list" in refusal(tmp_path, architecture=architecture)
    save(file, make().state_dict())
    file.write_bytes(file.read_bytes()[:-5000])
    assert "a.ckpt: " in refusal(tmp_path, architecture=architecture)
    file.write_bytes(b"")
    assert "a.ckpt: " in refusal(tmp_path, architecture=architecture)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MUIError, match=r"expected a model .* or checkpoints"):
        listed(tmp_path / "empty")


def test_a_function_that_makes_no_model(tmp_path: Path) -> None:
    save(tmp_path / "a.ckpt", ODD_QWEN().state_dict())
    assert "state_checkpoints:nothing: AttributeError" in refusal(tmp_path, architecture="state_checkpoints:nothing")
    assert "no_module:f: ModuleNotFoundError" in refusal(tmp_path, architecture="no_module:f")
    message = "state_checkpoints:tokens: expected a torch module, got Tensor"
    assert message in refusal(tmp_path, architecture="state_checkpoints:tokens")


def test_tensors_that_the_model_has_no_place_for(tmp_path: Path, case: Case) -> None:
    architecture, make = case
    state = make().state_dict()
    save(tmp_path / "a.ckpt", {**state, "a.b": torch.zeros(2), "a.c": torch.zeros(2)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_same_weights(load(tmp_path, architecture=architecture), state)
    said = [str(warning.message) for warning in caught if "a.ckpt" in str(warning.message)]
    assert said == [f"{tmp_path}/a.ckpt: {type(make()).__name__} leaves out 2 tensors: a.b, a.c"]


def test_names_of_a_compiled_and_of_a_wrapped_model(tmp_path: Path, case: Case) -> None:
    architecture, make = case
    model = make()
    expected = model.state_dict()
    compiled = nn.ModuleDict({"net": torch.compile(model)}).state_dict()
    assert all(name.startswith("net._orig_mod.") for name in compiled)
    save(tmp_path / "a.ckpt", compiled)
    assert_same_weights(load(tmp_path, architecture=architecture), expected)
    save(tmp_path / "a.ckpt", {name.replace("layers.1.", "layers.1._orig_mod."): one for name, one in expected.items()})
    assert_same_weights(load(tmp_path, architecture=architecture), expected)


def test_two_models_of_one_kind(tmp_path: Path, case: Case) -> None:
    architecture, make = case
    expected = make().state_dict()
    pair = {f"{at}.{name}": one + number for number, at in enumerate(("lm", "zz")) for name, one in expected.items()}
    save(tmp_path / "a.ckpt", pair)
    with pytest.warns(UserWarning, match="has the model at 'lm.' and at 'zz.'; the first is taken"):
        assert_same_weights(load(tmp_path, architecture=architecture), expected)


def tied_model() -> nn.Module:
    model = build_plain("qwen2")
    embedding, head = model.get_submodule("embed_tokens"), model.get_submodule("lm_head")
    head.weight = embedding.weight
    return model


def test_tied_weights(tmp_path: Path) -> None:
    model = tiny.build("qwen2_moe", tie_word_embeddings=True)
    model.config.save_pretrained(tmp_path / "config")
    for architecture, made in ((str(tmp_path / "config"), model), (f"{__name__}:tied_model", tied_model())):
        state = {name: 2 * one for name, one in made.state_dict().items()}
        (left_out,) = [name for name in state if name.endswith("lm_head.weight")]
        save(tmp_path / "a.ckpt", {name: one for name, one in state.items() if name != left_out})
        assert_same_weights(load(tmp_path / "a.ckpt", architecture=architecture), state)


def test_checkpoints_of_earlier_versions_of_transformers(tmp_path: Path) -> None:
    """Their models had a module for each expert, where those of today have a tensor for all."""
    from safetensors.torch import load_file

    model = tiny.build("olmoe")
    model.save_pretrained(tmp_path / "model")  # has the old names still
    names = load_file(tmp_path / "model" / "model.safetensors")
    assert "model.layers.0.mlp.experts.0.up_proj.weight" in names
    save(tmp_path / "a.ckpt", {f"lm.{name}": one for name, one in names.items()})
    assert_same_weights(load(tmp_path / "a.ckpt", architecture=str(tmp_path / "model")), model.state_dict())


def test_dtypes(tmp_path: Path, case: Case) -> None:
    architecture, make = case
    save(tmp_path / "a.ckpt", make().to(torch.bfloat16).state_dict())
    for dtype, expected in (("auto", torch.bfloat16), ("float32", torch.float32)):
        model = load(tmp_path, architecture=architecture, dtype=dtype)
        assert {weight.dtype for weight in model.parameters()} == {expected}


def test_models_side_by_side(tmp_path: Path, config: str, written: Written) -> None:
    """A directory, a file and a directory of DeepSpeed, in the order in which they are named."""
    tiny.build("olmoe").save_pretrained(tmp_path / "olmoe")
    save(tmp_path / "a.ckpt", ODD_QWEN().state_dict())
    found = [
        *listed(tmp_path / "olmoe"),
        *listed(tmp_path / "a.ckpt", architecture=config, name="qwen"),
        *listed(written.directory / "zero1", architecture=config),
    ]
    assert [str(one.id) for one in found] == ["olmoe olmoe", "qwen a.ckpt", f"zero1 {TAG}"]
    kinds = [type(one.load("cpu")).__name__ for one in found]
    assert kinds == ["OlmoeForCausalLM", "Qwen2MoeForCausalLM", "Qwen2MoeForCausalLM"]
