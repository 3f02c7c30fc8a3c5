"""Reading models from paths and hub ids: what is read, what is refused, and what is never run."""

import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    ByT5Tokenizer,
    DeepseekV3Config,
    PreTrainedConfig,
    Qwen3_5MoeConfig,
    Qwen3VLMoeConfig,
    SwitchTransformersConfig,
    ViTConfig,
)

import tiny
from mui_callback import loading
from mui_callback.errors import MUIError, UnsupportedModelError
from mui_callback.loading import (
    ModelLoadError,
    ModelSource,
    load_config,
    load_pretrained,
    load_random,
    load_skeleton,
    load_tokenizer,
)

READERS = [load_config, load_skeleton, load_random, load_pretrained]
TEXT = {
    "vocab_size": 384,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 32,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 24,
    "patch_size": 14,
}


@pytest.fixture
def modules() -> Path:
    """Where transformers copies code that it runs: one place in a process, for it becomes a package's path."""
    return Path(os.environ["HF_MODULES_CACHE"])


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network, an empty hub cache, and nobody at the terminal."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", "")  # set first, to be unset at the end whatever happens
    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION")

    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "no")
    yield
    assert not asked


def save(path: Path, family: str = "olmoe", **changes: Any) -> nn.Module:
    model = tiny.build(family, **changes)
    model.save_pretrained(path)
    return model


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def to_pickle(path: Path, name: str = "pytorch_model.bin") -> None:
    torch.save(load_file(path / "model.safetensors"), path / name)
    (path / "model.safetensors").unlink()


def same(left: nn.Module, right: nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def refusal(read: Callable[[ModelSource], Any], source: ModelSource | Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        read(source if isinstance(source, ModelSource) else ModelSource(str(source)))
    message = str(caught.value)
    assert "\n" not in message
    return message


def read(path: Path, **allowed: bool) -> nn.Module:
    return load_pretrained(ModelSource(str(path), **allowed))


# What is read


@pytest.mark.parametrize("name", ["", "config.json"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_checkpoint_is_read_as_it_was_saved(tmp_path: Path, family: str, name: str) -> None:
    saved = save(tmp_path, family)
    loaded = read(tmp_path / name)
    assert type(loaded) is type(saved)
    assert same(loaded, saved)
    assert not loaded.training
    assert {weight.device.type for weight in loaded.parameters()} == {"cpu"}


def test_a_config_in_the_working_directory_and_in_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = save(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert same(load_pretrained(ModelSource("config.json")), saved)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert same(load_pretrained(ModelSource(f"~/{tmp_path.name}")), saved)


def test_dtypes(tmp_path: Path) -> None:
    save(tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    source = ModelSource(str(tmp_path))
    for load in (load_pretrained, load_random):
        assert {weight.dtype for weight in load(source).parameters()} == {torch.bfloat16}
        assert {weight.dtype for weight in load(source, dtype="float16").parameters()} == {torch.float16}


def test_devices(tmp_path: Path) -> None:
    save(tmp_path)
    source = ModelSource(str(tmp_path))
    for load in (load_pretrained, load_random):
        for device in ("meta", "cpu", torch.device("cpu")):
            kind = torch.device(device).type
            assert {weight.device.type for weight in load(source, device=device).parameters()} == {kind}


@pytest.mark.parametrize("name", ["config.json", "qwen.json"])
def test_a_config_is_enough_for_a_skeleton_and_for_random_weights(tmp_path: Path, name: str) -> None:
    config = tiny.qwen3_moe(dtype="bfloat16")
    config.to_json_file(tmp_path / name)
    source = ModelSource(str(tmp_path / name))
    assert load_config(source).to_diff_dict() == config.to_diff_dict()

    skeleton, model = load_skeleton(source), load_random(source)
    shapes = {key: (weight.shape, weight.dtype) for key, weight in model.named_parameters()}
    assert {key: (weight.shape, weight.dtype) for key, weight in skeleton.named_parameters()} == shapes
    assert {weight.device.type for weight in skeleton.parameters()} == {"meta"}
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}
    assert next(model.parameters()).dtype == torch.bfloat16
    assert not skeleton.training
    assert not model.training
    assert "expected weights in model.safetensors or" in refusal(load_pretrained, source)


def test_a_skeleton_of_any_size(tmp_path: Path) -> None:
    DeepseekV3Config().save_pretrained(tmp_path)
    skeleton = load_skeleton(ModelSource(str(tmp_path)))
    assert sum(weight.numel() for weight in skeleton.parameters()) > 600e9
    assert {weight.device.type for weight in skeleton.parameters()} == {"meta"}


def test_random_weights_depend_on_the_seed_and_leave_the_global_state(tmp_path: Path) -> None:
    tiny.olmoe().save_pretrained(tmp_path)
    source = ModelSource(str(tmp_path))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = load_random(source, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert same(load_random(source, seed=1), first)
    assert not same(load_random(source, seed=2), first)


def switch(**changes: Any) -> PreTrainedConfig:
    sizes = {"vocab_size": 384, "d_model": 24, "d_kv": 12, "d_ff": 12, "num_layers": 2, "num_heads": 2}
    experts = {"num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    return SwitchTransformersConfig(**sizes, **experts, num_experts=4, **changes)


def images(config_class: Any, **changes: Any) -> PreTrainedConfig:
    return config_class(text_config=dict(TEXT), vision_config={**VISION, "deepstack_visual_indexes": [0]}, **changes)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (switch(), "SwitchTransformersForConditionalGeneration"),
        (images(Qwen3VLMoeConfig), "Qwen3VLMoeForConditionalGeneration"),  # has no causal model
        (images(Qwen3_5MoeConfig), "Qwen3_5MoeForCausalLM"),  # has one for its text
    ],
)
def test_the_class_with_a_language_model_head(tmp_path: Path, config: PreTrainedConfig, expected: str) -> None:
    config.save_pretrained(tmp_path)
    source = ModelSource(str(tmp_path))
    model = load_random(source)
    assert type(model).__name__ == type(load_skeleton(source)).__name__ == expected
    assert model.get_output_embeddings().weight.shape == (384, 24)
    model.save_pretrained(tmp_path)
    assert type(loaded := load_pretrained(source)).__name__ == expected
    assert same(loaded, model)


def test_a_model_without_language_is_not_supported(tmp_path: Path) -> None:
    ViTConfig().save_pretrained(tmp_path)
    for load in READERS[1:]:
        with pytest.raises(UnsupportedModelError, match=r"AutoModelForCausalLM or .*ImageTextToText .*'vit'"):
            load(ModelSource(str(tmp_path)))


# Code that comes with a model


def save_with_code(path: Path, marks: Path, *, model_type: str, mark: str = "") -> nn.Module:
    """A model and a tokenizer whose three Python files leave a mark when they are imported."""
    model = save(path, "gpt_oss")
    ByT5Tokenizer().save_pretrained(path)
    for name, code in {
        "config": f"from transformers import GptOssConfig as Base\nclass Own(Base): model_type = {model_type!r}\n",
        "model": (
            "from transformers import GptOssForCausalLM as Base\nfrom .own_config import Own as Config\n"
            "class Own(Base):\n    config_class = Config\n"
        ),
        "tokenizer": "from transformers import ByT5Tokenizer as Base\nclass Own(Base):\n    pass\n",
    }.items():
        (path / f"own_{name}.py").write_text(f"open({str(marks / (name + mark))!r}, 'w').close()\n{code}")
    auto_map = {"AutoConfig": "own_config.Own", "AutoModelForCausalLM": "own_model.Own"}
    edit_json(path / "config.json", model_type=model_type, auto_map=auto_map)
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own_tokenizer.Own", None]}}
    edit_json(path / "tokenizer_config.json", **own)
    marks.mkdir()
    return model


def found(marks: Path) -> set[str]:
    return {mark.name for mark in marks.iterdir()}


def test_code_is_not_run_unless_it_is_trusted(tmp_path: Path) -> None:
    path, marks = tmp_path / "model", tmp_path / "marks"
    saved = save_with_code(path, marks, model_type="own_moe")
    for load in (*READERS, load_tokenizer):
        message = refusal(load, path)
        assert "own_config.py, own_model.py, own_tokenizer.py" in message
        assert "--trust-remote-code" in message
    assert found(marks) == set()

    source = ModelSource(str(path), trust_remote_code=True)
    assert type(load_config(source)).__module__.startswith("transformers_modules.")
    assert found(marks) == {"config"}
    assert same(load_pretrained(source), saved)
    assert found(marks) == {"config", "model"}
    assert type(load_skeleton(source)).__name__ == "Own"
    assert type(load_tokenizer(source)).__name__ == "Own"
    assert found(marks) == {"config", "model", "tokenizer"}


def test_a_known_type_needs_no_code(tmp_path: Path) -> None:
    path, marks = tmp_path / "model", tmp_path / "marks"
    saved = save_with_code(path, marks, model_type="gpt_oss")
    edit_json(path / "tokenizer_config.json", tokenizer_class="ByT5Tokenizer")
    source = ModelSource(str(path))
    assert type(load_config(source)).__name__ == "GptOssConfig"
    assert same(load_pretrained(source), saved)
    assert type(load_skeleton(source)).__module__.startswith("transformers.")
    assert isinstance(load_tokenizer(source), ByT5Tokenizer)
    assert found(marks) == set()
    load_skeleton(ModelSource(str(path), trust_remote_code=True))
    assert found(marks) == {"config", "model"}


def test_a_known_model_with_images_comes_before_code_for_one_without(tmp_path: Path) -> None:
    path, marks = tmp_path / "model", tmp_path / "marks"
    save_with_code(path, marks, model_type="own_moe")
    images(Qwen3VLMoeConfig, auto_map={"AutoModelForCausalLM": "own_model.Own"}).save_pretrained(path)
    assert type(load_skeleton(ModelSource(str(path)))).__name__ == "Qwen3VLMoeForConditionalGeneration"
    assert found(marks) == set()
    refusal(load_skeleton, ModelSource(str(path), trust_remote_code=True))  # it is not for this config, but it is run
    assert "model" in found(marks)


def test_a_known_config_whose_model_is_not(tmp_path: Path) -> None:
    path, marks = tmp_path / "model", tmp_path / "marks"
    save_with_code(path, marks, model_type="own_moe")
    for code, file in {"own_model.Own": "own_model.py", "org/code--own_model.Own": "org/code/own_model.py"}.items():
        ViTConfig(auto_map={"AutoModelForCausalLM": code}).save_pretrained(path)
        for load in READERS[1:]:
            assert f": {file}, own_tokenizer.py." in refusal(load, path)
    assert found(marks) == set()


@pytest.mark.parametrize("names", [["attn_implementation"], ["experts_implementation"]])
def test_a_config_cannot_name_kernels(tmp_path: Path, names: list[str]) -> None:
    config = images(Qwen3VLMoeConfig)
    config.save_pretrained(tmp_path)
    named = dict.fromkeys(names, "someone/kernels")
    edit_json(tmp_path / "config.json", **named, text_config={**config.text_config.to_dict(), **named})
    config = load_config(ModelSource(str(tmp_path)))
    for part in (config, config.text_config):
        assert part._attn_implementation is part._experts_implementation is None
    load_skeleton(ModelSource(str(tmp_path)))


# Pickles


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("kind", ["one", "sharded", "named", "in an index of safetensors"])
def test_a_pickle_is_refused_unless_it_is_allowed(tmp_path: Path, kind: str) -> None:
    saved = save(tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    name = {"one": "pytorch_model.bin", "named": "adapter_model.bin"}.get(kind, "shard.bin")
    to_pickle(tmp_path, name)
    if kind == "named":
        edit_json(tmp_path / "config.json", transformers_weights=name)
    elif kind != "one":
        index = {"sharded": "pytorch_model.bin", "in an index of safetensors": "model.safetensors"}[kind]
        content = {"metadata": {}, "weight_map": dict.fromkeys(keys, name)}
        (tmp_path / f"{index}.index.json").write_text(json.dumps(content))
    message = refusal(load_pretrained, tmp_path)
    assert f" {name}, a pickle, which can run code" in message
    assert "--allow-pickle" in message
    if kind != "in an index of safetensors":
        assert "DISABLE_SAFETENSORS_CONVERSION" not in os.environ
        assert same(read(tmp_path, allow_pickle=True), saved)
        assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "1"


@pytest.mark.parametrize("dtype", ["float32", None])  # None is that of the weights, which transformers reads first
def test_a_malicious_pickle_is_not_run_even_if_it_is_allowed(tmp_path: Path, dtype: str | None) -> None:
    path, mark = tmp_path / "model", tmp_path / "mark"
    save(path)
    edit_json(path / "config.json", dtype=dtype)
    weights = {**load_file(path / "model.safetensors"), "evil": Malicious(mark)}
    (path / "model.safetensors").unlink()
    torch.save(weights, path / "pytorch_model.bin")
    for source in (ModelSource(str(path)), ModelSource(str(path), allow_pickle=True)):
        refusal(load_pretrained, source)
        assert not mark.exists()
    pickle.loads(pickle.dumps(Malicious(mark)))
    assert mark.exists()  # it would have


def test_safetensors_come_before_a_pickle(tmp_path: Path) -> None:
    saved = save(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a pickle")
    assert same(read(tmp_path), saved)
    assert same(read(tmp_path, allow_pickle=True), saved)


@pytest.mark.parametrize("name", ["consolidated.00.pt", "consolidated.00.pth", "model.gguf", "other.safetensors"])
def test_weights_by_another_name_are_named(tmp_path: Path, name: str) -> None:
    tiny.olmoe().save_pretrained(tmp_path)
    (tmp_path / name).touch()
    for allow in (False, True):
        assert f"found {name}" in refusal(load_pretrained, ModelSource(str(tmp_path), allow_pickle=allow))


# Weights that do not fit


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("lm_head.weight", "1 weights .*: lm_head.weight is missing"),
        ("model.layers.0.mlp.gate.weight", "1 weights .*: model.layers.0.mlp.gate.weight is missing"),
        (  # one of six that are put together
            "model.layers.1.mlp.experts.2.down_proj.weight",
            r"experts.down_proj is \[5, 24, 12\], not \[6, 24, 12\]",
        ),
    ],
)
def test_a_missing_weight_is_refused(tmp_path: Path, key: str, said: str) -> None:
    save(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.pop(key))
    with pytest.raises(ModelLoadError, match=said):
        read(tmp_path)


def test_many_missing_weights_are_counted(tmp_path: Path) -> None:
    save(tmp_path)
    edit_json(tmp_path / "config.json", num_hidden_layers=3)
    message = refusal(load_pretrained, tmp_path)
    assert "11 weights" in message
    assert message.count("is missing") == 3
    assert message.endswith("…")


def test_weights_of_other_shapes_are_refused(tmp_path: Path) -> None:
    save(tmp_path)
    edit_json(tmp_path / "config.json", vocab_size=385)
    message = refusal(load_pretrained, tmp_path)
    assert "lm_head.weight is [384, 24], not [385, 24], model.embed_tokens.weight is [384, 24]" in message


def test_tied_weights_are_not_missing_unless_both_are(tmp_path: Path) -> None:
    saved = save(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert same(read(tmp_path), saved)
    edit_weights(tmp_path, lambda weights: weights.pop("model.embed_tokens.weight"))
    assert "model.embed_tokens.weight is missing" in refusal(load_pretrained, tmp_path)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    saved = tiny.build("olmoe")
    saved.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert same(read(tmp_path), saved)
    shards[1].unlink()
    assert shards[1].name in refusal(load_pretrained, tmp_path)


def test_tensors_that_are_left_out_are_named_in_a_warning(tmp_path: Path) -> None:
    saved = save(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.update({"model.layers.2.mtp.weight": torch.zeros(2)}))
    with pytest.warns(UserWarning, match=r"leaves out 1 tensors: model\.layers\.2\.mtp\.weight") as caught:
        loaded = read(tmp_path)
    assert same(loaded, saved)
    assert [Path(warning.filename) for warning in caught if "leaves out" in str(warning.message)] == [Path(__file__)]


# Tokenizers


def test_a_tokenizer_or_none(tmp_path: Path) -> None:
    save(tmp_path)
    assert load_tokenizer(ModelSource(str(tmp_path))) is None
    assert load_tokenizer(ModelSource(str(tmp_path / "config.json"))) is None
    ByT5Tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(ModelSource(str(tmp_path)))
    assert tokenizer is not None
    assert tokenizer("ab")["input_ids"] == [100, 101, 1]


def test_a_tokenizer_without_its_vocabulary_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "qwen3_moe")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert "no vocabulary" in refusal(load_tokenizer, tmp_path)


# What is not there, or no model


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    for load in READERS:
        message = refusal(load, tmp_path)
        assert "has an adapter" in message
        assert "base model" in message
    save(tmp_path)
    assert "has an adapter" in refusal(load_pretrained, tmp_path)


@pytest.mark.parametrize("name", ["/no/such/model", "./no", "../no", "~nobody/x", "a/b/c", "no/"])
def test_a_path_that_is_not_there(name: str) -> None:
    for load in (*READERS, load_tokenizer):
        assert refusal(load, ModelSource(name)) == f"{name}: there is no such path"


@pytest.mark.parametrize("name", ["a b/c", ""])
def test_a_name_that_is_neither_a_path_nor_a_hub_id(name: str) -> None:
    for load in (*READERS, load_tokenizer):
        assert "there is no such path, and as a hub id: Repo id must" in refusal(load, ModelSource(name))


@pytest.mark.parametrize("load", [*READERS, load_tokenizer])
def test_a_hub_that_cannot_be_reached(load: Callable[[ModelSource], Any]) -> None:
    message = refusal(load, ModelSource("org/model", revision="v1.5"))
    assert message.startswith("org/model (revision v1.5): there is no such path, and as a hub id: We couldn't connect")


def test_a_hub_id_is_read_at_its_revision(tmp_path: Path) -> None:
    """From the cache of an earlier download."""
    repository = tmp_path / "hub" / "models--org--model"
    commits = {"main": "a" * 40, "v1": "b" * 40}
    (repository / "refs").mkdir(parents=True)
    for revision, commit in commits.items():
        snapshot = repository / "snapshots" / commit
        save_with_code(snapshot, tmp_path / revision, model_type="own_moe")
        edit_json(snapshot / "config.json", sliding_window=len(revision))
        (repository / "refs" / revision).write_text(commit)
    edit_weights(snapshot, lambda weights: weights["lm_head.weight"].zero_())

    assert "own_model.py" in refusal(load_skeleton, ModelSource("org/model"))
    for revision in ("v1", None):
        source = ModelSource("org/model", revision=revision, trust_remote_code=True)
        marks = tmp_path / (revision or "main")
        load_skeleton(source)
        assert found(marks) == {"config", "model"}
        model = load_pretrained(source)
        assert model.config.sliding_window == len(marks.name)
        assert bool(model.lm_head.weight.any()) is (revision is None)
        assert load_tokenizer(source)("a")["input_ids"] == [100, 1]
        assert found(marks) == {"config", "model", "tokenizer"}
    assert load_config(ModelSource("org/model", commits["v1"], trust_remote_code=True)).sliding_window == 2
    assert "v2" in refusal(load_config, ModelSource("org/model", revision="v2"))


def test_a_path_has_no_revisions(tmp_path: Path) -> None:
    save(tmp_path)
    for load in (*READERS, load_tokenizer):
        assert "got a local path" in refusal(load, ModelSource(str(tmp_path), revision="main"))


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"model_type": "own"}', '{"model_type": "olmoe", "hidden_size": "x"}', "\x00", None]
)
def test_a_config_that_is_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    for load in READERS:
        message = refusal(load, tmp_path)
        assert message.startswith(f"{tmp_path}: ")
        assert "hub id" not in message


@pytest.mark.parametrize("auto_map", ["own.Own", ["own.Own"], {"AutoModelForCausalLM": 3}])
def test_a_config_that_cannot_be_built(tmp_path: Path, auto_map: Any) -> None:
    tiny.olmoe(num_attention_heads=3).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", num_attention_heads=0, auto_map=auto_map)
    for load in READERS[1:]:
        assert refusal(load, tmp_path).startswith(f"{tmp_path}: ")


def test_errors_are_of_the_package() -> None:
    assert issubclass(ModelLoadError, MUIError)


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    source = Path(loading.__file__).read_text()
    with pytest.raises(ImportError, match=r"pip install 'mui-callback\[hf\]'"):
        exec(compile(source, loading.__file__, "exec"), {"__name__": "mui_callback.loading_again"})
