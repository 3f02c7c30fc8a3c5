"""`MUIProbe` and `MUIReport`: what must not matter does not, and what cannot be measured is said."""

from __future__ import annotations

import copy
import gc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import families
from mui_callback import MUIProbe, MUIReport, ProbeSet
from mui_callback.errors import MUIError, NoExpertsError, ProbeError, ProbeSetError, UnsupportedModelError
from mui_callback.metrics.catalogue import CATALOGUE, Scope, key
from mui_callback.probe.model_config import context_length, longest_sequence
from mui_callback.probe.samples import ProbeSample, TokenChoice, TokenSample
from tiny import VOCAB, build, gpt_oss, olmoe, qwen2_moe
from tiny_samples import make_samples

FRACTION = 0.05


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("qwen2_moe")


def probe_set(seed: int = 3) -> ProbeSet:
    rng = np.random.default_rng(seed)
    samples = make_samples(seed, tuple(rng.integers(6, 30, 14)))
    return ProbeSet({"a": samples[:9], "b": samples[9:]})


def same_sets(first: MUIReport, second: MUIReport) -> bool:
    return all(first.key_neurons(task) == second.key_neurons(task) for task in first.task_names)


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe", "gpt_oss"])
@pytest.mark.parametrize("batch_tokens", [1, 64, 10**6])
def test_batch_size_does_not_matter(family: str, batch_tokens: int) -> None:
    model = build(family)
    reference = MUIProbe(model, probe_set(), rules=f"top_fraction={FRACTION}", batch_tokens=150).measure()
    report = MUIProbe(model, probe_set(), rules=f"top_fraction={FRACTION}", batch_tokens=batch_tokens).measure()
    assert same_sets(reference, report)
    assert (reference.key_neuron_sets() != report.key_neuron_sets()).nnz == 0
    assert np.array_equal(reference.counts.routed, report.counts.routed)
    for name, value in reference.scalars().items():
        if name not in ("mui/seconds", "mui/identity_error"):
            assert report.scalars()[name] == pytest.approx(value, rel=1e-5), name


def test_order_of_samples_does_not_matter(model: nn.Module) -> None:
    tasks = probe_set().tasks
    turned = ProbeSet({name: tuple(reversed(samples)) for name, samples in tasks.items()})
    first = MUIProbe(model, probe_set(), rules=f"top_fraction={FRACTION}").measure()
    second = MUIProbe(model, turned, rules=f"top_fraction={FRACTION}").measure()
    assert same_sets(first, second)
    order = list(second.sample_table.id)
    assert order != list(first.sample_table.id)
    rows = [order.index(id_) for id_ in first.sample_table.id]
    assert (first.key_neuron_sets() != second.key_neuron_sets()[rows]).nnz == 0


def test_padding_and_prompt_never_score(model: nn.Module) -> None:
    """A prompt that is all that differs, behind the causal mask, changes nothing; nor does a longer neighbour."""
    ids = np.arange(3, 43)
    scored = np.zeros(40, dtype=bool)
    scored[1:6] = True  # nothing after token 5 is a response token, so nothing after it may count
    other = ids.copy()
    other[6:] = 200
    alone = MUIProbe(
        model, ProbeSet({"a": [TokenSample("x", ids, scored)]}), rules=f"top_fraction={FRACTION}"
    ).measure()
    changed = MUIProbe(
        model, ProbeSet({"a": [TokenSample("x", other, scored)]}), rules=f"top_fraction={FRACTION}"
    ).measure()
    short = MUIProbe(
        model, ProbeSet({"a": [TokenSample("x", ids[:6], scored[:6])]}), rules=f"top_fraction={FRACTION}"
    ).measure()
    beside = ProbeSet({"a": [TokenSample("x", ids[:6], scored[:6])], "b": [TokenSample("y", other, scored)]})
    padded = MUIProbe(model, beside, rules=f"top_fraction={FRACTION}").measure()
    assert alone.key_neurons("a") == changed.key_neurons("a") == short.key_neurons("a") == padded.key_neurons("a")
    assert alone.tokens == short.tokens == 5


def test_pooled_counts_are_union_and_sum_of_the_tasks(model: nn.Module) -> None:
    report = MUIProbe(model, probe_set(), rules=f"top_fraction={FRACTION}").measure()
    a, b = report.tasks["a"], report.tasks["b"]
    assert report.key_neurons() == report.key_neurons("a") | report.key_neurons("b")
    assert report.mui == len(report.key_neurons()) / report.layout.n_neurons
    assert np.array_equal(report.pooled.activated, a.activated + b.activated)
    assert report.pooled.n_samples == a.n_samples + b.n_samples
    total = a.loss * a.predictions.n_tokens + b.loss * b.predictions.n_tokens
    assert report.pooled.loss == pytest.approx(total / report.tokens)


def test_token_accuracy_and_loss_equal_the_plain_forward(model: nn.Module) -> None:
    samples = make_samples(5)
    report = MUIProbe(model, ProbeSet({"a": samples}), rules=f"top_fraction={FRACTION}").measure()
    losses, hits = [], []
    for sample in samples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(sample.input_ids)[None]).logits[0]
        for t in np.flatnonzero(sample.scored):
            losses.append(-logits[t - 1].log_softmax(-1)[sample.input_ids[t]].item())
            hits.append(logits[t - 1].argmax().item() == sample.input_ids[t])
    assert report.pooled.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert report.pooled.token_accuracy == np.mean(hits)


def test_choice_accuracy_equals_the_plain_forward(model: nn.Module) -> None:
    tokenizer = ByT5Tokenizer()
    rows = [
        ProbeSample(f"q{n}", " yes", f"Question {n}:", choices=(" yes", " no", " perhaps so"), answer=n % 3)
        for n in range(12)
    ]
    report = MUIProbe(model, ProbeSet({"quiz": rows}), tokenizer=tokenizer).measure()
    right = 0
    for row in rows:
        scores = []
        for choice in row.choices:
            prompt, ids = tokenizer(row.prompt).input_ids[:-1], tokenizer(row.prompt + choice).input_ids
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            likelihood = sum(logits[t - 1, ids[t]].item() for t in range(len(prompt), len(ids)))
            scores.append(likelihood / len(choice.encode()))
        right += int(np.argmax(scores)) == row.answer
    assert report.tasks["quiz"].choice_accuracy == right / 12


def test_scalars_are_the_catalogue_and_finite(model: nn.Module) -> None:
    rules = (f"top_fraction={FRACTION}", "topscore=0.5")
    scalars = MUIProbe(model, probe_set(), rules=rules).measure().scalars()
    possible = {key(m.name): m for m in CATALOGUE if m.scope in (Scope.TASK, Scope.POOLED, Scope.PROBE)}
    possible |= {key(m.name, task): m for m in CATALOGUE for task in "ab" if m.scope is Scope.TASK}
    possible["mui/by_rule/topscore_0.5"] = next(m for m in CATALOGUE if m.scope is Scope.RULE)
    assert set(possible) - set(scalars) == {"mui/bits_per_byte", "mui/dropped_tokens"} | {
        f"mui/{part}choice_accuracy" for part in ("", "a/", "b/")
    }
    assert set(scalars) <= set(possible)
    for name, value in scalars.items():
        assert isinstance(value, float)
        assert possible[name].low <= value <= (possible[name].high or float("inf")), name


def test_metrics_without_an_answer_are_left_out() -> None:
    scalars = MUIProbe(build("olmoe"), probe_set(), rules=f"top_fraction={FRACTION}").measure().scalars()
    assert not [name for name in scalars if "shared" in name or "choice" in name or "bits_per_byte" in name]


def test_a_sample_without_response_token_marks_nothing_and_is_counted(model: nn.Module) -> None:
    empty = TokenSample("none", np.arange(3, 9), np.zeros(6, dtype=bool))
    with_empty = ProbeSet({"a": [*probe_set().tasks["a"], empty], "b": [empty]})
    report = MUIProbe(model, with_empty, rules=f"top_fraction={FRACTION}").measure()
    plain = MUIProbe(model, probe_set(), rules=f"top_fraction={FRACTION}").measure()
    assert report.key_neurons("a") == plain.key_neurons("a")
    assert report.key_neurons("b") == frozenset()
    assert report.unscored == 2
    assert report.tasks["b"].mui is None
    assert report.tasks["b"].loss is None
    assert "mui/b/loss" not in report.scalars()


def test_contributions_that_are_not_finite_never_count() -> None:
    model = build("olmoe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2] = float("nan")
    report = MUIProbe(model, probe_set(), rules=f"top_fraction={FRACTION}").measure()
    assert report.not_finite > 0
    assert all(np.isfinite(value) for value in report.scalars().values())
    assert not [neuron for neuron in report.key_neurons() if neuron[:2] == (1, "E2")]


def test_report_survives_a_file_without_pickle(model: nn.Module, tmp_path: Path) -> None:
    report = MUIProbe(model, probe_set(), rules=f"top_fraction={FRACTION}").measure()
    path = tmp_path / "report.mui"
    report.save(path)
    np.load(path, allow_pickle=False)
    loaded = MUIReport.load(path)
    assert loaded.scalars() == report.scalars()
    assert loaded.layout == report.layout
    assert loaded.settings == report.settings
    assert same_sets(loaded, report)
    assert [p.name for p in tmp_path.iterdir()] == ["report.mui"]


def test_a_loss_that_is_not_finite_is_counted(model: nn.Module) -> None:
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    report = MUIProbe(model, probe_set()).measure()
    assert report.not_finite >= report.tokens
    assert "mui/loss" not in report.scalars()


@pytest.mark.parametrize("content", [b"", b"not a report", b"PK\x03\x04broken"])
def test_loading_something_else_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.mui"
    path.write_bytes(content)
    with pytest.raises(MUIError, match=r"x\.mui: expected a report"):
        MUIReport.load(path)


def test_loading_a_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.mui"
    np.savez(path, header=np.array([object()], dtype=object))
    with pytest.raises(MUIError, match="expected a report"):
        MUIReport.load(path.with_suffix(".mui.npz"))


def test_an_unknown_task_is_named(model: nn.Module) -> None:
    report = MUIProbe(model, probe_set(), rules=f"top_fraction={FRACTION}").measure()
    with pytest.raises(KeyError, match="no task 'c' in this report; it has a, b"):
        report.key_neurons("c")


def test_a_dense_model_is_refused_by_name() -> None:
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(NoExpertsError, match=r"LlamaForCausalLM has no MoE layer.*gate_up_proj.*dense=True"):
        MUIProbe(dense, probe_set())


def test_a_model_without_head_is_refused(model: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match="Qwen2MoeModel: expected a language-model head"):
        MUIProbe(model.model, probe_set())


def test_weights_that_are_not_there_are_refused(model: nn.Module) -> None:
    model = copy.deepcopy(model)
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(torch.empty(0))  # what ZeRO-3 leaves in each process
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.experts\.down_proj: expected a weight of this"):
        MUIProbe(model, probe_set())


def test_experts_that_did_not_run_are_noticed() -> None:
    """A block whose forward was replaced must not be reported as a layer without key neurons."""
    model = build("olmoe")
    block = model.model.layers[0].mlp
    block.forward = lambda hidden_states: hidden_states
    with pytest.raises(ProbeError, match=r"layer 0 \(model\.layers\.0\.mlp\) ran without calling its experts"):
        MUIProbe(model, probe_set()).measure()


def test_a_layer_that_did_not_run_is_noticed() -> None:
    model = build("olmoe")
    model.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(ProbeError, match=r"every MoE layer to run.*model\.layers\.1\.mlp did not"):
        MUIProbe(model, probe_set()).measure()


def test_a_layer_that_runs_twice_is_noticed() -> None:
    model = build("olmoe")
    layer = model.model.layers[1]
    once = layer.forward
    layer.forward = lambda x, **kwargs: once(once(x, **kwargs), **kwargs)
    with pytest.raises(ProbeError, match=r"every MoE layer to run once.*model\.layers\.1\.mlp ran twice"):
        MUIProbe(model, probe_set()).measure()


def test_layers_with_one_number_are_refused() -> None:
    model = build("olmoe")
    model.second = nn.ModuleDict({"layers": model.model.layers})
    model.model.layers = nn.ModuleList(list(build("olmoe", seed=1).model.layers))
    with pytest.raises(UnsupportedModelError, match=r"different numbers.*model\.layers\.0\.mlp and second\.layers\.0"):
        MUIProbe(model, probe_set())


def test_a_choice_that_nothing_predicts_is_refused(model: nn.Module) -> None:
    rows = [ProbeSample("q", "yes", choices=("y", "no"), answer=0)]
    with pytest.raises(ProbeSetError, match=r"'q'.*choice 0 has none"):
        MUIProbe(model, ProbeSet({"quiz": rows}), tokenizer=lambda text: list(text.encode()))


def test_weights_on_several_devices_are_refused() -> None:
    model = build("olmoe")
    model.model.layers[1].to("meta")
    with pytest.raises(UnsupportedModelError, match="all weights on one CPU or CUDA device, got them on cpu, meta"):
        MUIProbe(model, probe_set())


def test_a_block_that_is_not_read_right_is_refused() -> None:
    """A norm as a function, which no hook sees: its contributions would be wrong."""
    model = build("olmoe")
    block = model.model.layers[1].mlp
    forward = block.forward
    block.forward = lambda x: torch.nn.functional.rms_norm(forward(x), (24,))
    with pytest.raises(ProbeError, match=r"layer 1 \(model\.layers\.1\.mlp\): what follows its experts is not linear"):
        MUIProbe(model, probe_set()).measure()


def test_a_part_that_no_neuron_made_is_refused() -> None:
    model = build("olmoe")
    block = model.model.layers[1].mlp
    forward = block.forward
    block.forward = lambda x: forward(x) + x
    with pytest.raises(ProbeError, match=r"layer 1 \(model\.layers\.1\.mlp\).*do not add up to its output"):
        MUIProbe(model, probe_set()).measure()


def test_a_head_that_is_not_read_right_is_refused() -> None:
    model = build("olmoe")

    class Adapted(nn.Linear):  # an adapter adds to what the weight makes
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + super().forward(x.flip(-1))

    head = Adapted(24, VOCAB, bias=False)
    head.load_state_dict(model.lm_head.state_dict())
    model.lm_head = head
    with pytest.raises(ProbeError, match="logits of the language-model head are not its weight times"):
        MUIProbe(model, probe_set()).measure()


def test_a_probe_set_without_response_tokens_measures_nothing(model: nn.Module) -> None:
    empty = TokenSample("none", np.arange(3, 9), np.zeros(6, dtype=bool))
    report = MUIProbe(model, ProbeSet({"a": [empty]})).measure()
    assert report.unscored == 1
    assert "mui/mui" not in report.scalars()


def test_a_head_that_does_not_run_is_refused() -> None:
    """Its weight may not be what the logits are made with."""
    model = build("olmoe")
    rows = model.lm_head.weight
    model.lm_head.forward = None  # never called
    forward = model.model.forward

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.lm_head = model.model, model.lm_head

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return forward(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state @ rows.T

    with pytest.raises(ProbeError, match="the language-model head was not called as a module"):
        MUIProbe(Logits(), probe_set()).measure()


def test_a_head_with_a_bias_is_read_right() -> None:
    model = build("olmoe")
    model.lm_head = nn.Linear(24, VOCAB)
    assert MUIProbe(model, probe_set()).measure().mui > 0


def test_a_resized_vocabulary_is_noticed() -> None:
    model = build("olmoe")
    probe = MUIProbe(model, probe_set(), rules=f"top_fraction={FRACTION}")
    model.resize_token_embeddings(VOCAB + 64)
    fresh = MUIProbe(model, probe_set(), rules=f"top_fraction={FRACTION}")
    with torch.no_grad():
        model.lm_head.weight.mul_(torch.rand_like(model.lm_head.weight))
    assert same_sets(probe.measure(), fresh.measure())


def test_measuring_under_inference_mode(model: nn.Module) -> None:
    probe = MUIProbe(model, probe_set(), rules=f"top_fraction={FRACTION}")
    with torch.inference_mode():
        report = probe.measure()
    assert same_sets(report, probe.measure())


def test_text_needs_a_tokenizer(model: nn.Module) -> None:
    with pytest.raises(ProbeSetError, match="tokenizer"):
        MUIProbe(model, ProbeSet.builtin())


def test_a_tokenizer_of_another_model_is_noticed() -> None:
    small = build(olmoe(vocab_size=64, pad_token_id=0))
    with pytest.raises(ProbeSetError, match="vocabulary size 64"):
        MUIProbe(small, ProbeSet.builtin(), tokenizer=ByT5Tokenizer())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rules", "top_fraction=0"),
        ("rules", "topscore=1.5"),
        ("rules", ()),
        ("activation", "up"),
        ("alignment", "last"),
        ("key_expert_frequency", -1),
        ("batch_tokens", 0),
    ],
)
def test_options_out_of_range(model: nn.Module, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option}: expected"):
        MUIProbe(model, probe_set(), **{option: value})


def test_samples_longer_than_the_context_are_cut_and_counted() -> None:
    model = build(qwen2_moe(max_position_embeddings=24))
    rng = np.random.default_rng(0)
    long = TokenSample("long", rng.integers(3, VOCAB, 40), np.arange(40) >= 20)
    with pytest.warns(UserWarning, match="40 tokens > 24"):
        probe = MUIProbe(model, ProbeSet({"a": [long]}))
    report = probe.measure()
    assert report.truncated == 1
    assert report.tokens == 20
    assert report.settings.max_length == 24


def test_choices_may_be_tokens(model: nn.Module) -> None:
    choice = [TokenChoice(np.array([5, 6, n]), np.array([False, False, True])) for n in (7, 8)]
    sample = TokenSample("x", np.array([5, 6, 7]), np.array([False, False, True]), choices=tuple(choice), answer=0)
    report = MUIProbe(model, ProbeSet({"a": [sample]})).measure()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6]])).logits[0, -1]
    assert report.pooled.choice_accuracy == float(logits[7] > logits[8])


def test_measuring_twice_gives_the_same(model: nn.Module) -> None:
    probe = MUIProbe(model, probe_set(), rules=f"top_fraction={FRACTION}")
    first, second = probe.measure(), probe.measure()
    assert (first.key_neuron_sets() != second.key_neuron_sets()).nnz == 0
    assert np.array_equal(first.counts.loss, second.counts.loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_run(dtype: torch.dtype) -> None:
    reference = MUIProbe(build(gpt_oss()), probe_set(), rules=f"top_fraction={FRACTION}").measure()
    report = MUIProbe(build(gpt_oss()).to(dtype), probe_set(), rules=f"top_fraction={FRACTION}").measure()
    ours, theirs = report.key_neurons(), reference.key_neurons()
    assert len(ours & theirs) / len(ours | theirs) > (0.999 if dtype == torch.float64 else 0.5)
    assert report.pooled.loss == pytest.approx(reference.pooled.loss, rel=0.05)


def test_a_compiled_model_is_probed_as_the_original(model: nn.Module) -> None:
    compiled = torch.compile(model, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = MUIProbe(compiled, probe_set(), rules=f"top_fraction={FRACTION}").measure()
    assert same_sets(report, MUIProbe(model, probe_set(), rules=f"top_fraction={FRACTION}").measure())


@pytest.mark.parametrize("name", ["wpe", "position", "embed_positions", "pos_emb", "position_embeddings"])
def test_without_a_config_the_embedding_of_positions_says_how_long_the_context_is(name: str) -> None:
    model = nn.Module()
    model.add_module("inner", nn.ModuleDict({name: nn.Embedding(77, 4), "tokens": nn.Embedding(50, 4)}))
    assert context_length(model) == 77
    assert context_length(nn.ModuleDict({"composition": nn.Embedding(5, 4), "wte": nn.Embedding(9, 4)})) is None


def test_the_config_says_it_first() -> None:
    model = build("olmoe")
    model.position = nn.Embedding(7, 4)
    assert context_length(model) == model.config.max_position_embeddings


def test_samples_are_cut_to_the_positions_that_there_are() -> None:
    """A sample that is longer than these would end the process on a GPU, whatever was asked for."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=2, n_positions=20)).eval()
    samples = ProbeSet({"a": [TokenSample("0", np.arange(30), np.arange(30) > 15)]})
    assert [longest_sequence(model, asked) for asked in (None, 5, 20, 21)] == [20, 5, 20, 20]
    words = "max_length: 28 tokens are more than the 20 that GPT2LMHeadModel was made for; samples are cut to 20"
    with pytest.warns(UserWarning, match=words):
        probe = MUIProbe(model, samples, max_length=28, dense=True)
    assert probe.settings.max_length == 20
    assert probe.measure().truncated == 1


@pytest.mark.parametrize("family", ["olmoe", "qwen3_vl_moe"])
def test_more_tokens_than_a_config_says_are_as_many_as_asked_for(family: str) -> None:
    """Patches of an image may have positions that are learned."""
    model = families.build(family)
    n = context_length(model)
    assert n is not None
    with pytest.warns(UserWarning, match=rf"max_length: {n + 1} tokens are more than the {n} that \w+ was made for$"):
        probe = MUIProbe(model, probe_set(), max_length=n + 1)
    assert probe.settings.max_length == longest_sequence(model, n + 1) == n + 1
    assert longest_sequence(nn.Linear(2, 2), 9) == 9


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_nothing_of_a_pass_is_kept(family: str) -> None:
    """Tensors that hold each other in a circle through autograd would never be freed."""

    def tensors() -> int:
        gc.collect()
        return sum(type(held) is torch.Tensor for held in gc.get_objects())

    probe = MUIProbe(build(family), probe_set())
    probe.measure()
    before = tensors()
    probe.measure()
    assert tensors() == before
