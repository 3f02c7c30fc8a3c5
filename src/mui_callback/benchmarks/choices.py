"""Samples with choices as a benchmark: how often the answer is the choice that the model finds most likely.

Shapes: N samples, C choices of all samples, R scored tokens of a batch, V vocabulary.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from mui_callback.benchmarks.base import BenchmarkResult
from mui_callback.benchmarks.sharing import Sharing
from mui_callback.errors import ProbeError, ProbeSetError
from mui_callback.forgiving import warn
from mui_callback.metrics.performance import choice_is_right
from mui_callback.metrics.resampling import ratio_of_sums
from mui_callback.metrics.utilization import FloatArray
from mui_callback.parallel.replicas import check_same
from mui_callback.parallel.shards import Shards
from mui_callback.parallel.weights import common_device
from mui_callback.probe.batches import half_of_largest
from mui_callback.probe.choice_plan import ChoicePlan
from mui_callback.probe.choice_runs import ChoiceRuns, PromptSharing
from mui_callback.probe.encode import EncodedProbeSet, Tokenizer, encode
from mui_callback.probe.head import LanguageModelHead, token_losses
from mui_callback.probe.model_config import decoder_start, longest_sequence
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.settings import ProbeSettings


class ChoiceBenchmark:
    """Scores every choice of every sample by its log-likelihood after the prompt.

    Its scores are ``<name>/accuracy``, the share of samples whose answer has the highest log-likelihood per UTF-8 byte
    (per token where the text is not known; the first wins a tie), which is `choice_accuracy` of a probe, with the
    standard error sqrt(p (1 - p) / (N - 1)); and ``<name>/loss``, the negative log-likelihood of the answers in nats
    per token. They come with what each sample adds to them, so that points of a run can be compared sample by sample.

    The model need not have experts. In a distributed run the samples are dealt out as in a probe.

    Args:
        name: of the benchmark.
        probe_set: the samples; all of them have choices.
        tokenizer: for samples that are text.
        max_length: tokens that longer samples are cut to, from the left; None for the context length of the model.
        batch_tokens: positions in a forward pass; halved if memory runs out.

    Raises:
        ProbeSetError: a sample has no choices, or is text and there is no tokenizer.
    """

    def __init__(
        self,
        name: str,
        probe_set: ProbeSet,
        tokenizer: Tokenizer | None = None,
        *,
        max_length: int | None = ProbeSettings.max_length,
        batch_tokens: int = ProbeSettings.batch_tokens,
    ) -> None:
        for sample in chain.from_iterable(probe_set.tasks.values()):
            if not sample.choices:
                raise ProbeSetError(f"{sample.where}: expected a sample with `choices` and `answer`, got none")
        self.name = name
        self.probe_set = probe_set
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.batch_tokens = batch_tokens
        self._encoded: dict[tuple[int | None, ...], EncodedProbeSet] = {}
        self._prompts = PromptSharing(is_possible=False)

    def run(self, model: nn.Module, step: int, sharing: Sharing) -> BenchmarkResult:
        """One pass over the choices.

        Raises:
            ProbeError: the model puts out no usable logits.
            ProbeSetError: the samples do not fit the tokenizer or the model, or are other ones in another process.
            UnsupportedModelError: the model has no head that can be found, or its weights are on several devices.
        """
        described = {"set of samples of a benchmark": [self.probe_set.fingerprint, self.max_length]}
        check_same(sharing.processes, sharing.processes.rank, described)
        encoded = sharing.together(lambda: self._encode(model))
        prompts = PromptSharing.of(model, sharing.shards)
        if prompts.is_possible != self._prompts.is_possible:
            self._prompts = prompts
        loss = sharing.together(
            lambda: self._losses(model, encoded, sharing),
            with_less_memory=lambda: self._halve_batches(encoded, sharing.shards),
        )
        sharing.shards.world.add(loss)
        return self._scores(encoded, loss.cpu().numpy())

    def _encode(self, model: nn.Module) -> EncodedProbeSet:
        vocab_size = LanguageModelHead(model).shape[0]
        max_length, start = longest_sequence(model, self.max_length), decoder_start(model)
        key = (vocab_size, max_length, start)
        if key not in self._encoded:
            encoded = encode(self.probe_set, self.tokenizer, max_length, vocab_size=vocab_size, decoder_start=start)
            self._encoded = {key: encoded}
        return self._encoded[key]

    def _losses(self, model: nn.Module, encoded: EncodedProbeSet, sharing: Sharing) -> Tensor:
        """Σ negative log-likelihood of each choice, float64 ``[C]``; 0 where another process has it."""
        shards, device = sharing.shards, common_device(model)
        head = LanguageModelHead(model)
        loss_C = torch.zeros(len(encoded.choices), dtype=torch.float64, device=device)
        runs = ChoiceRuns(head, self._prompts, device)
        for inputs, logits_RV in runs.run(self._plan(encoded, shards).parts[shards.own]):
            if shards.counts:
                loss_R, _ = token_losses(logits_RV, inputs.tokens.target_R)
                loss_C.index_add_(0, inputs.sample_B[inputs.tokens.row_R], loss_R.double())
        return loss_C

    def _plan(self, encoded: EncodedProbeSet, shards: Shards) -> ChoicePlan:
        return ChoicePlan.of(encoded, self.batch_tokens, shards, share=self._prompts.is_possible)

    def _halve_batches(self, encoded: EncodedProbeSet, shards: Shards) -> bool:
        half = half_of_largest(self._plan(encoded, shards).in_full())
        if half is not None:
            self.batch_tokens = half
            warn(f"MUI: out of memory in benchmark {self.name!r}; going on with batches of {half} tokens")
        return half is not None

    def _scores(self, encoded: EncodedProbeSet, loss_C: FloatArray) -> BenchmarkResult:
        samples = encoded.samples
        broken = int((~np.isfinite(loss_C)).sum())
        if broken:
            raise ProbeError(
                f"the loss of {broken} of {len(loss_C)} choices is NaN or infinite: the model puts out no usable logits"
            )
        n_choices_N = np.array([len(sample.choices) for sample in samples])
        answer_N = np.array([sample.answer for sample in samples], dtype=np.int64)
        # one unit for all choices of a sample
        is_known_N = [all(choice.n_bytes for choice in sample.choices) for sample in samples]
        tokens_C = np.array([choice.scored.sum() for choice in encoded.choices], dtype=np.int64)
        bytes_C = np.array([choice.n_bytes or 0 for choice in encoded.choices], dtype=np.int64)
        length_C = np.where(np.repeat(is_known_N, n_choices_N), bytes_C, tokens_C)
        _, right_N = choice_is_right(loss_C, length_C, np.repeat(np.arange(len(samples)), n_choices_N), answer_N)
        place_N = np.cumsum(n_choices_N) - n_choices_N + answer_N
        accuracy = ratio_of_sums(right_N.astype(np.float64), np.ones(len(samples)))
        loss = ratio_of_sums(loss_C[place_N], tokens_C[place_N].astype(np.float64))
        assert accuracy is not None
        assert loss is not None
        return {f"{self.name}/accuracy": accuracy, f"{self.name}/loss": loss}
