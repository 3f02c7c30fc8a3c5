"""Tasks of lm-evaluation-harness on the live model: what they measure, and that training does not notice them."""

from __future__ import annotations

import json
import logging
import os
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import ByT5Tokenizer

from backends import BACKENDS, tell_environment
from distributed_training import TOO_MUCH, launch, moe_model
from mui_callback.benchmarks.given import as_benchmarks
from mui_callback.benchmarks.lm_eval import LMEvalBenchmark
from mui_callback.benchmarks.names import benchmark_scalars
from mui_callback.benchmarks.run import run_benchmarks
from mui_callback.benchmarks.sharing import Sharing
from mui_callback.benchmarks.tasks import LMEval
from mui_callback.experts.discover import find_expert_layers
from mui_callback.metrics.phases import Score
from mui_callback.metrics.resampling import Estimate
from mui_callback.parallel.processes import Processes
from mui_callback.parallel.shards import Shards
from mui_callback.probe.unwrap import unwrapped
from plain_moe import ZOO, build_plain
from test_benchmarks import train
from training import assert_same_to_the_bit

pytestmark = pytest.mark.skipif(
    find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: pip install 'mui-callback[lm-eval]'",
)

N_NEW = 5
"""Tokens that are generated."""


def lines() -> list[dict[str, Any]]:
    rng = random.Random(1)
    words = ["four", "seventeen", "ä", "no", "none of these"]
    return [
        {"question": f"{n} and {n + 1} is", "choices": rng.sample(words, 3), "answer": rng.randrange(3)}
        for n in range(9)
    ]


def tasks(directory: Path) -> dict[str, str]:
    """Paths of YAML files of tasks, and of groups of them."""
    rows = directory / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, lines())))
    data = (
        f"dataset_path: json\ndataset_kwargs:\n  cache_dir: {directory / 'cache'}\n"
        f"  data_files:\n    test: {rows}\ntest_split: test\n"
    )
    choices = (
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\n'
        "doc_to_target: answer\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    generated = (
        'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{choices[0]}}"\n'
        f'generation_kwargs:\n  until: ["\\n\\n\\n"]\n  max_gen_toks: {N_NEW}\n'
        "process_results: !function words.process\nmetric_list:\n"
        + "".join(f"  - metric: {metric}\n    aggregation: mean\n" for metric in ("length", "code"))
    )
    (directory / "words.py").write_text(
        "def process(doc, results):\n    return {'length': len(results[0]), 'code': sum(map(ord, results[0]))}\n"
    )
    text = (
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{question}}"\n'
        "metric_list:\n  - metric: byte_perplexity\n"
    )
    one = (
        'output_type: loglikelihood\ndoc_to_text: "{{question}}"\ndoc_to_target: " {{choices[0]}}"\n'
        "metric_list:\n  - metric: perplexity\n    aggregation: perplexity\n  - metric: acc\n"
    )
    made = {
        "choose": f"task: choose\n{data}{choices}",
        "again": f"task: again\ntag: both\n{data}{choices}",
        "write": f"task: write\ntag: both\n{data}{generated}",
        "read": f"task: read\n{data}{text}",
        "guess": f"task: guess\n{data}{one}",
        "sampled": f"task: sampled\n{data}{generated}".replace(
            "  until", "  do_sample: true\n  temperature: 1.0\n  until"
        ),
        "shots": f"task: shots\n{data}{choices}num_fewshot: 2\nfewshot_split: test\n",
        "mean": "group: mean\ntask: [choose, again]\naggregate_metric_list:\n  - metric: acc\n",
        "pair": "group: pair\ntask: [choose, again]\n",
    }
    for name, content in made.items():
        (directory / f"{name}.yaml").write_text(content)
    return {name: str(directory / f"{name}.yaml") for name in made}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tasks(tmp_path_factory.mktemp("tasks"))


def measure(given: Any, model: nn.Module, **options: Any) -> dict[str, Any]:
    results, failures = run_benchmarks(as_benchmarks(given, ByT5Tokenizer()), model, 1, **options)
    assert [str(failure) for failure in failures] == []
    return results


def log_likelihood(model: nn.Module, context: list[int], continuation: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].double()
    target = torch.tensor(continuation)
    return logits.log_softmax(-1).gather(1, target[:, None]).sum().item()


# What they measure


@pytest.mark.parametrize("batch_size", [1, 8])
def test_choices_are_scored_as_in_a_naive_loop(batch_size: int, paths: dict[str, str]) -> None:
    model = moe_model().train()
    results = measure(LMEval(paths["choose"], batch_size=batch_size), model)
    model.eval()
    right, right_per_character = [], []
    for line in lines():
        # The tokenizer ends each text with a token of its own, and the harness keeps that of the question.
        context = ByT5Tokenizer()(line["question"]).input_ids
        whole = [ByT5Tokenizer()(f"{line['question']} {choice}").input_ids for choice in line["choices"]]
        scores = [log_likelihood(model, context, ids[len(context) :]) for ids in whole]
        right.append(int(np.argmax(scores)) == line["answer"])
        per_character = [score / len(choice) for score, choice in zip(scores, line["choices"], strict=True)]
        right_per_character.append(int(np.argmax(per_character)) == line["answer"])
    n = len(right)
    for name, expected in {"choose/acc": right, "choose/acc_norm": right_per_character}.items():
        p = float(np.mean(expected))
        assert isinstance(results[name], Estimate)
        assert results[name].value == pytest.approx(p)
        assert results[name].standard_error == pytest.approx((p * (1 - p) / (n - 1)) ** 0.5)
    assert set(results) == {"choose/acc", "choose/acc_norm"}


def test_generated_text_is_that_of_the_model(paths: dict[str, str]) -> None:
    model = moe_model()
    results = measure(paths["write"], model)
    codes = []
    for line in lines():
        ids = torch.tensor([ByT5Tokenizer()(line["question"]).input_ids])
        for _ in range(N_NEW):
            with torch.no_grad():
                following = model(ids).logits[0, -1].argmax()
            ids = torch.cat([ids, following.view(1, 1)], dim=1)
            if following == ByT5Tokenizer().eos_token_id:
                break
        text = ByT5Tokenizer().decode(ids[0, -N_NEW:] if len(ids[0]) else ids[0], skip_special_tokens=True)
        codes.append(sum(map(ord, text)))
    assert results["write/code"].value == pytest.approx(np.mean(codes))


def test_what_has_no_closed_formula_has_no_standard_error(paths: dict[str, str]) -> None:
    results = measure([paths["read"], paths["guess"]], moe_model())
    assert results["read/byte_perplexity"] == Score(results["read/byte_perplexity"].value, None)
    assert results["guess/perplexity"].standard_error is None
    assert results["guess/acc"].standard_error is not None
    assert results["guess/perplexity"].value > 1


def test_a_group_with_a_score_stands_for_its_tasks(paths: dict[str, str]) -> None:
    folder = Path(paths["mean"]).parent
    alone = measure(paths["choose"], moe_model())
    results = measure(LMEval(["mean"], include_path=folder), moe_model())
    assert list(results) == ["mean/acc"]
    assert results["mean/acc"].value == pytest.approx(alone["choose/acc"].value)
    assert results["mean/acc"].standard_error == pytest.approx(alone["choose/acc"].standard_error / 2**0.5)


def test_a_group_without_one_and_a_tag_are_their_tasks(paths: dict[str, str]) -> None:
    folder = Path(paths["mean"]).parent
    benchmarks = as_benchmarks(
        [LMEval("pair", include_path=folder), LMEval(["both"], include_path=folder)], ByT5Tokenizer()
    )
    assert [set(one.run(moe_model(), 0, Sharing())) for one in benchmarks] == [
        {"choose/acc", "choose/acc_norm", "again/acc", "again/acc_norm"},
        {"again/acc", "again/acc_norm", "write/length", "write/code"},
    ]


def test_a_group_may_hold_tasks_that_the_harness_has(tmp_path: Path) -> None:
    rows = [
        {
            "question": line["question"],
            "answerKey": "ABC"[line["answer"]],
            "choices": {"text": line["choices"], "label": [*"ABC"]},
        }
        for line in lines()
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"cache_dir": str(tmp_path / "cache"), "data_files": {"test": str(tmp_path / "rows.jsonl")}}
    changes = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": data}
    splits = {"training_split": None, "validation_split": None, "test_split": "test"}
    group = {"group": "mine", "task": [{"task": "arc_easy", **changes, **splits}]}
    (tmp_path / "mine.yaml").write_text(json.dumps(group))  # which is YAML as well
    results = measure(LMEval("mine", include_path=tmp_path), moe_model())
    assert {name.partition("/")[2] for name in results} == {"acc", "acc_norm"}


def test_tasks_have_the_names_that_they_are_given(paths: dict[str, str]) -> None:
    made = as_benchmarks({"mine": paths["choose"], "yours, too": paths["read"]}, ByT5Tokenizer())
    assert [one.name for one in made] == ["lm-eval (mine, yours_too)"]  # one evaluation
    results, _ = run_benchmarks(made, moe_model(), 0)
    assert list(results) == ["mine/acc", "mine/acc_norm", "yours_too/byte_perplexity"]
    named = measure({"x": LMEval(paths["choose"], limit=3), "y": LMEval([paths["read"], paths["write"]])}, moe_model())
    assert set(named) == {"x/acc", "x/acc_norm", "y/read/byte_perplexity", "y/write/length", "y/write/code"}


def test_the_limit_is_that_of_the_harness(paths: dict[str, str]) -> None:
    whole = measure(paths["choose"], moe_model())["choose/acc_norm"]
    for limit, n in ((3, 3), (0.5, 5)):
        part = measure(LMEval(paths["choose"], limit=limit), moe_model())["choose/acc_norm"]
        assert part.n_samples == n
        right = np.round(whole.influence * 9 + whole.value)[:n]
        assert part.value == pytest.approx(right.mean())


def test_examples_in_the_prompt_are_the_same_at_every_point(paths: dict[str, str]) -> None:
    model, seen = moe_model(), []
    made = as_benchmarks(paths["shots"], ByT5Tokenizer())
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    for _ in range(2):
        run_benchmarks(made, model, 0)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0].shape[1] > 60
    fewer = measure(LMEval(paths["shots"], num_fewshot=1), model)
    assert set(fewer) == {"shots/acc", "shots/acc_norm"}
    assert seen[-1].shape[1] < first[-1].shape[1]


def test_what_is_sampled_is_the_same_for_the_same_model(paths: dict[str, str]) -> None:
    made = as_benchmarks(paths["sampled"], ByT5Tokenizer())
    torch.manual_seed(0)
    first, _ = run_benchmarks(made, moe_model(), 0)
    torch.manual_seed(1)
    second, _ = run_benchmarks(made, moe_model(), 0)
    assert first["sampled/code"].value == second["sampled/code"].value


def test_a_score_that_is_not_finite_is_left_out_with_a_warning(paths: dict[str, str]) -> None:
    model = moe_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.warns(UserWarning, match="MUI: guess/perplexity is nan and is left out"):
        results = measure(paths["guess"], model)
    assert list(results) == ["guess/acc"]


# Without a trace


@pytest.mark.parametrize("task", ["choose", "write", "sampled", "read", "shots"])
def test_training_is_the_same_to_the_bit(task: str, paths: dict[str, str], tmp_path: Path) -> None:
    without, _ = train([], tmp_path)
    trained, told = train(paths[task], tmp_path)
    assert told == []
    assert_same_to_the_bit(without, trained)


def test_the_model_is_as_it_was(paths: dict[str, str]) -> None:
    model = moe_model().train()
    model.model.layers[1].eval()
    model.to(torch.bfloat16)

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("the harness must not do that")

    for name in ("eval", "train", "tie_weights", "to", "resize_token_embeddings"):
        object.__setattr__(model, name, refuse)
    tokenizer = ByT5Tokenizer()
    tokenizer.pad_token = None
    tokenizer.padding_side = "right"

    def state() -> dict[str, Any]:
        return {
            "modes": [module.training for module in model.modules()],
            "attributes": {path: sorted(vars(module)) for path, module in model.named_modules()},
            "config": model.config.to_dict(),
            "generation": model.generation_config.to_dict(),
            "generation is": id(model.generation_config),
            "weights": [(p.data_ptr(), p.dtype, p.device, p._version, p.requires_grad) for p in model.parameters()],
            "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
            "tokenizer": (tokenizer.pad_token, tokenizer.padding_side, repr(tokenizer)),
            "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),  # noqa: NPY002
        }

    before = state()
    made = as_benchmarks([paths["choose"], paths["sampled"]], tokenizer)
    assert run_benchmarks(made, model, 0)[1] == []
    assert state() == before


def test_nothing_is_printed_and_nothing_of_the_process_is_changed(
    paths: dict[str, str], capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    import datasets.utils
    import huggingface_hub.utils

    def state() -> dict[str, Any]:
        loggers = [logging.getLogger(), *(logging.getLogger(n) for n in ("lm_eval", "datasets", "transformers"))]
        return {
            "environment": dict(os.environ),
            "loggers": [(logger.level, list(logger.handlers), logger.disabled) for logger in loggers],
            "bars": [m.are_progress_bars_disabled() for m in (datasets.utils, huggingface_hub.utils)],
            "torch": (torch.is_grad_enabled(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()),
        }

    logging.getLogger("lm_eval").setLevel(logging.INFO)
    model = moe_model()
    before = state()
    made = as_benchmarks([paths[name] for name in ("choose", "sampled", "read", "guess", "shots")], ByT5Tokenizer())
    assert run_benchmarks(made, model, 0)[1] == []
    assert state() == before
    assert capfd.readouterr() == ("", "")
    assert [str(warning.message) for warning in recwarn] == []
    logging.getLogger("lm_eval").setLevel(logging.NOTSET)


def test_importing_the_harness_changes_nothing_in_the_environment(paths: dict[str, str], tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import os, sys; before = dict(os.environ)\n"
        "from mui_callback.benchmarks.given import as_benchmarks\n"
        "from transformers import ByT5Tokenizer\n"
        "assert 'lm_eval' not in sys.modules\n"
        "as_benchmarks(sys.argv[1], ByT5Tokenizer())\n"
        "assert 'lm_eval' in sys.modules\n"
        "assert dict(os.environ) == before\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, paths["choose"]], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


# What goes wrong


def test_a_task_that_is_not_known_is_named() -> None:
    with pytest.raises(ValueError, match=r"lm-eval: cannot load the task 'no_such_thing.yaml'"):
        as_benchmarks("no_such_thing.yaml", ByT5Tokenizer())


@pytest.mark.parametrize("tokenizer", [None, str.encode])
def test_a_tokenizer_of_another_kind_is_refused(tokenizer: Any, paths: dict[str, str]) -> None:
    with pytest.raises(TypeError, match="lm-eval: expected a tokenizer of transformers"):
        as_benchmarks(paths["choose"], tokenizer)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"tasks": []}, ValueError, "expected one task or more, got none"),
        ({"tasks": 3}, TypeError, "expected names of tasks or paths of YAML files, got 3"),
        ({"tasks": [3]}, TypeError, r"expected names of tasks or paths of YAML files, got \[3\]"),
        ({"tasks": "a", "limit": 0}, ValueError, "expected limit to be a positive number of samples or None, got 0"),
        ({"tasks": "a", "batch_size": "auto"}, ValueError, "expected batch_size to be a positive number of requests"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        LMEval(**options)


def test_a_model_that_is_not_of_transformers_fails_by_itself(paths: dict[str, str]) -> None:
    made = as_benchmarks([paths["choose"], lambda model, step: {"a": 1}], ByT5Tokenizer())
    results, failures = run_benchmarks(made, build_plain(next(iter(ZOO))), 0)
    assert list(results) == ["a"]
    assert "lm-eval needs a model of transformers, with a config and generate(), got " in str(failures[0])


def test_out_of_memory_halves_the_batches(paths: dict[str, str]) -> None:
    model = moe_model()
    expected = measure(paths["choose"], model)

    def exhaust(module: nn.Module, args: Any) -> None:
        if len(args[0]) > 2:
            torch.empty(TOO_MUCH, dtype=torch.uint8)

    model.register_forward_pre_hook(exhaust)
    with pytest.warns(UserWarning, match="MUI: out of memory in lm-eval; going on with batches of [42] requests"):
        results = measure(paths["choose"], model)
    assert {name: point.value for name, point in results.items()} == {n: p.value for n, p in expected.items()}


# In two processes


def run_together(rank: int, directory: Path, *, names: list[str], backend: str = "", fails: bool = False) -> Any:
    """Scores, failures, how many sequences this process put through the model, and whether weights are as before."""
    tell_environment()
    model = BACKENDS[backend].build().model if backend else DistributedDataParallel(moe_model()).train()
    inner, n_sequences = unwrapped(model), [0]

    def count(module: nn.Module, args: Any, options: dict[str, Any]) -> None:
        n_sequences[0] += len(args[0] if args else options["input_ids"])
        if fails and rank == 1:
            raise RuntimeError("injected")

    inner.register_forward_pre_hook(count, with_kwargs=True)
    made = as_benchmarks([str(directory / f"{name}.yaml") for name in names], ByT5Tokenizer())
    assert isinstance(made[0], LMEvalBenchmark)
    exchanges_tokens = any(not layer.peers.is_alone for layer in find_expert_layers(inner))
    shards = Shards.of(inner, exchanges_tokens=exchanges_tokens)
    results, failures = run_benchmarks(made, model, 1, processes=Processes(), shards=shards)
    return benchmark_scalars(results), [str(failure) for failure in failures], n_sequences[0], model.training


NAMES = ["choose", "write", "read"]


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    tasks(tmp_path)
    return tmp_path


def test_two_share_the_requests(shared: Path) -> None:
    first, second = launch(shared, run_together, names=NAMES)
    model = moe_model()
    counted = [0]
    model.register_forward_pre_hook(
        lambda module, args, options: counted.__setitem__(
            0, counted[0] + len(args[0] if args else options["input_ids"])
        ),
        with_kwargs=True,
    )
    expected = benchmark_scalars(measure([str(shared / f"{name}.yaml") for name in NAMES], model))
    assert first[0] == second[0] == pytest.approx(expected, rel=1e-5)
    assert first[1] == second[1] == []
    assert first[2] + second[2] == counted[0]
    assert min(first[2], second[2]) > 0.3 * counted[0]
    assert first[3]
    assert second[3]


def test_one_that_fails_in_one_fails_in_both(shared: Path) -> None:
    first, second = launch(shared, run_together, names=["choose"], fails=True)
    assert first[0] == second[0] == {}
    assert first[1] == ["benchmark 'lm-eval (choose)': ProbeError: process 1: RuntimeError: injected"]
    assert second[1] == ["benchmark 'lm-eval (choose)': RuntimeError: injected"]


@pytest.mark.parametrize("backend", ["fsdp2", "zero3", "autoep", "hf_ep_all_to_all"])
def test_a_spread_model_runs_all_in_each(backend: str, shared: Path) -> None:
    first, second = launch(shared, run_together, names=[*NAMES, "sampled"], backend=backend)
    paths = [str(shared / f"{name}.yaml") for name in [*NAMES, "sampled"]]
    expected = benchmark_scalars(measure(paths, BACKENDS[backend].reference()))
    assert first[0] == second[0] == pytest.approx(expected, rel=1e-5)
    assert first[1] == second[1] == []
    assert first[2] == second[2] > 0
