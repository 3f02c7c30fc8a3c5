"""`mui-callback inspect` as a user runs it, on models that are saved and read back."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import ByT5Tokenizer, DeepseekV3Config, Qwen3MoeConfig

import families
from mui_callback.cli import main
from mui_callback.experts.discover import find_expert_layers
from mui_callback.inspection.describe import describe
from mui_callback.loading import ModelSource, load_skeleton
from mui_callback.model_options import ModelOptions
from mui_callback.rules import Rule
from tiny import build

RULE = Rule("top_fraction", 0.001)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "qwen2"
    build("qwen2_moe").save_pretrained(path)
    ByT5Tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: object) -> tuple[int, str]:
        status = 0
        try:
            main(["inspect", *map(str, arguments)])
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
            if isinstance(stop.code, str):
                return status, stop.code
        shown = capsys.readouterr()
        return status, shown.out + shown.err

    return run


def rows(shown: str) -> list[list[str]]:
    """The cells of the lines that begin with a layer's number."""
    return [re.split(r"\s{2,}", line.strip()) for line in shown.splitlines() if re.match(r" *\d+ ( |…)", line)]


def test_layers_of_a_checkpoint(qwen2: Path, inspect: Any) -> None:
    status, shown = inspect(qwen2)
    assert status == 0
    assert "Qwen2MoeForCausalLM, 32.9 k parameters" in shown
    assert rows(shown) == [["0 … 1", "model.layers.N.mlp", "6x8", "2x8", "2", "64", "1"]]
    assert "stacked, MLP" in shown
    assert "2 layers, 16 experts, 128 neurons." in shown
    assert "60 samples" in shown
    assert "error" not in shown


def test_verify_says_for_each_layer_how_well_it_holds(qwen2: Path, inspect: Any) -> None:
    status, shown = inspect(qwen2, "--verify")
    assert status == 0
    layers = rows(shown)
    assert [layer[0] for layer in layers] == ["0", "1"]
    assert all(float(layer[-1]) < 1e-6 for layer in layers)
    assert all(layer[-2] == "2" for layer in layers)  # experts of a token, as used


def save_odd(path: Path, forward: str) -> None:
    """A model with code of its own, whose second block does something else than that of transformers."""
    build("qwen2_moe").save_pretrained(path)
    (path / "modeling_odd.py").write_text(
        "from transformers import Qwen2MoeForCausalLM\n"
        "class Odd(Qwen2MoeForCausalLM):\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        block = self.model.layers[1].mlp\n"
        "        forward = block.forward\n"
        f"        block.forward = lambda x: {forward}\n"
    )
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_odd.Odd"}
    (path / "config.json").write_text(json.dumps(config))


def test_a_layer_that_is_read_wrong_is_named(inspect: Any, tmp_path: Path) -> None:
    """Remote code whose block adds something that no neuron made."""
    save_odd(tmp_path, "forward(x) + 0.01 * x")
    status, shown = inspect(tmp_path, "--verify", "--trust-remote-code")
    assert status == 1
    assert "wrong: layer 1 (model.layers.1.mlp): the contributions of its neurons do not add up" in shown
    assert "layer 0" not in shown
    status, shown = inspect(tmp_path, "--verify")  # the class of transformers, which is read right
    assert status == 0


def test_what_cannot_be_read_at_all_is_wrong_too(inspect: Any, tmp_path: Path) -> None:
    save_odd(tmp_path, "forward(x).tanh()")
    status, shown = inspect(tmp_path, "--verify", "--trust-remote-code")
    assert status == 1
    assert "wrong: layer 1 (model.layers.1.mlp): what follows its experts is not linear" in shown


def test_a_config_alone(inspect: Any, tmp_path: Path) -> None:
    config = tmp_path / "tiny.json"
    build("deepseek_v3").config.to_json_file(config)
    status, shown = inspect(config, "--random-weights", "--verify", "--dtype", "bfloat16", "--dense")
    assert status == 0
    assert [layer[0] for layer in rows(shown)] == ["0", "1", "2"]
    assert "There is no tokenizer" in shown
    status, shown = inspect(config, "--verify")
    assert status == 1
    assert "expected weights in model.safetensors" in shown


def test_a_model_of_hundreds_of_billions_is_inspected_without_its_weights(inspect: Any, tmp_path: Path) -> None:
    DeepseekV3Config().save_pretrained(tmp_path)
    status, shown = inspect(tmp_path)
    assert status == 0
    assert "671 B parameters" in shown
    assert rows(shown) == [["3 … 60", "model.layers.N.mlp", "256x2048", "1x2048", "8", "526,336", "526"]]


def test_an_encoder_decoder(inspect: Any, tmp_path: Path) -> None:
    families.build("switch_transformers").save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    status, shown = inspect(tmp_path, "--verify")
    assert status == 0
    assert [(layer[0], float(layer[-1]) < 1e-6) for layer in rows(shown)] == [("1", True), ("3", True)]
    assert "40 samples" in shown  # those with a prompt


def test_the_cost_is_that_of_the_probe_set(qwen2: Path, inspect: Any, tmp_path: Path) -> None:
    samples = tmp_path / "mine.jsonl"
    samples.write_text("".join(json.dumps({"prompt": "ab", "response": "cdefg"}) + "\n" for _ in range(3)))
    _, shown = inspect(qwen2, "--probe", samples, "--batch-tokens", "16")
    # "ab" is context; 5 bytes and the end of sequence are scored, in rows of 8 tokens, two to a pass
    assert "mine.jsonl:\n3 samples, 18 response tokens, 24 positions in 2 forward passes." in shown
    skeleton = load_skeleton(ModelSource(str(qwen2)))
    layer = skeleton.model.layers[0].mlp
    routed = sum(p.numel() for p in layer.experts.parameters())
    every = sum(p.numel() for p in skeleton.parameters()) - skeleton.model.embed_tokens.weight.numel()
    flops = 2 * (every - 2 * routed * (1 - 2 / 6)) * 24
    assert f"{flops / 1e9:.3g} GFLOP for the forward passes" in shown
    # activations and projections: float32, of 2 routed experts and 2 shared ones of 8 neurons, for 12 tokens in a pass
    assert f"{2 * 4 * (2 * 8 + 2 * 8) * 12 / 2**10:.3g} KiB for the scores" in shown
    # 16 bytes for each expert, and for each sample 40 and its two layers' key neuron
    assert f"{(16 * 16 + 3 * (40 + 2 * 4)) / 2**10:.3g} KiB to the host" in shown


def test_the_cost_follows_the_rule_and_the_precision(qwen2: Path, inspect: Any) -> None:
    for rule, key, per_sample in (
        ("topscore=0.9", "Key: contributions of at least 0.9 times the highest of sample and layer.", 40),
        ("global_topk=500", "Key: the 500 highest contributions of a sample in all layers together.", 40 + 4 * 500),
    ):
        _, shown = inspect(qwen2, "--rules", rule, "--dtype", "bfloat16")
        assert rows(shown)[0][-1] == "-"
        assert key in shown
        assert f"{(3 * 16 * 16 + 60 * per_sample) / 2**10:.3g} KiB to the host" in shown
    _, whole = inspect(qwen2)
    sizes = [float(text.split(" MiB for the scores")[0].split()[-1]) for text in (whole, shown)]
    assert sizes[0] == pytest.approx(2 * sizes[1], rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rules", "top_fraction=2"], "rules: expected a number in (0, 1] for top_fraction, got 2"),
        (["--revision", "main"], "expected a hub id with a revision, got a local path"),
        (["--trust"], "unrecognized arguments: --trust"),
        (["--dtype", "float8"], "float8"),
        (["--probe", "/no/such.jsonl"], "no/such.jsonl"),
    ],
)
def test_options_that_are_wrong(options: list[str], message: str, qwen2: Path, inspect: Any) -> None:
    status, shown = inspect(qwen2, *options)
    assert status != 0
    assert message in shown


def test_a_dense_model_is_told_how(inspect: Any, tmp_path: Path) -> None:
    config = tmp_path / "llama.json"
    config.write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64}))
    status, shown = inspect(config)
    assert status == 1
    assert "has no MoE layer" in shown
    status, shown = inspect(config, "--dense")
    assert status == 0
    assert rows(shown)[0][:3] == ["0 … 1", "model.layers.N.mlp", "1x11008"]


@pytest.mark.parametrize("family", [name for name in families.family_names() if name in families.EXPECTED])
def test_top_k_is_that_of_the_source(family: str) -> None:
    with torch.device("meta"):
        model = families.model_class(family)(families.config_of(family))
    found = {row.top_k for row in describe(model, find_expert_layers(model), RULE)}
    expected = {families.EXPECTED[family].top_k}
    assert found == (expected if family not in ("switch_transformers", "nllb_moe") else {None})


def test_a_sampling_setting_is_not_the_number_of_experts() -> None:
    with torch.device("meta"):
        model = families.model_class("switch_transformers")(families.config_of("switch_transformers"))
    model.config.top_k = 5
    assert {row.top_k for row in describe(model, find_expert_layers(model), RULE)} == {None}


def test_the_screen_fits_80_columns(qwen2: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mui_callback.inspection.run import inspect_model

    Qwen3MoeConfig().save_pretrained(tmp_path)
    for path, verify in ((qwen2, True), (tmp_path, False)):
        console = Console(width=80, record=True, file=io.StringIO())
        inspect_model(ModelOptions(str(path)), verify=verify, console=console)
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= 80
        assert "…\n" not in text  # nothing is cut off
