"""The unembedding of a language model: rows of single tokens, and logits of single positions.

Shapes: B samples, T positions, R scored tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mui_callback.errors import ProbeError, UnsupportedModelError
from mui_callback.fused.logits import can_predict, predictions
from mui_callback.parallel.rows import check_rows, rows_of
from mui_callback.parallel.shards import Shards
from mui_callback.parallel.weights import check_readable, whole_shape
from mui_callback.probe.call import ModelCall
from mui_callback.probe.device_batch import DeviceBatch
from mui_callback.probe.samples import IntArray
from mui_callback.scoring.contributions import ScoredTokens, relative_error
from mui_callback.scoring.rows import inner

_ROWS_AT_ONCE = 1024
_NAMES = ("lm_head", "embed_out", "output_layer", "unembed", "head", "output")
"""Names of heads, for models without get_output_embeddings; the first that there is one module of."""


class LanguageModelHead:
    """Finds the output embedding of a model and runs the model for the logits of scored tokens only.

    Raises:
        UnsupportedModelError: the model has no output embedding with a weight ``[V, D]``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        head = _find_head(model)
        weight = getattr(head, "weight", None)
        is_plain = isinstance(weight, Tensor) and weight.dtype.is_floating_point and weight.dtype.itemsize > 1
        is_matrix = isinstance(weight, Tensor) and len(whole_shape(weight)) == 2
        if not isinstance(head, nn.Module) or not isinstance(weight, Tensor) or not is_plain or not is_matrix:
            raise UnsupportedModelError(
                f"{type(model).__name__}: expected a language-model head, from get_output_embeddings() or as one "
                f"module named {', '.join(_NAMES)}, with a plain floating-point weight [vocabulary, width]; "
                f"got {type(head).__name__}."
            )
        self.module = head
        check_readable("language-model head", weight)
        check_rows(weight)
        self.error = torch.full((), -1.0, dtype=torch.float32)
        """Relative difference, in the last forward that was checked, between the targets' logits as the head computed
        them and ⟨hidden state, W_head[y]⟩ plus its bias; -1 if the head did not run as a module."""
        self.is_coarse = False
        """Whether the forward that was checked ran in 16 bits, whatever the weights are."""
        self._call = ModelCall(model)

    @property
    def shape(self) -> torch.Size:
        """V and D."""
        return whole_shape(self.weight_VD)

    @property
    def weight_VD(self) -> Tensor:
        """W_head, ``[V, D]``, or what of it is in this process at present."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    def rows(self, targets: Sequence[IntArray], shards: Shards, device: torch.device) -> Tensor:
        """W_head[y] of each target of this process, ``[R, D]``: a gather, never a product with the vocabulary.

        Where the head is spread over processes, all of them make this call, and get no more than their rows.

        Args:
            targets: by shard, the targets of all processes.
            shards: which of them are whose.
            device: where the rows are wanted.
        """
        by_rank = [targets[shard] for shard in shards.shard_of]
        return rows_of(self.weight_VD, by_rank, shards.rank, device, shards.traffic)

    def logits(self, inputs: DeviceBatch, readout_RD: Tensor | None = None) -> Tensor:
        """Run the model and return the logits that predict the scored tokens, ``[R, V]``.

        The head is given those positions only, so the logits of prompt and padding are never computed; what the
        model does to its logits afterwards (scaling, capping) applies as always. With the rows of the targets, `error`
        is set.
        """
        tokens, input_ids = inputs.tokens, inputs.input_ids
        with self._keep_only(tokens, readout_RD):
            output = self._call(inputs.model_inputs)
        logits = _logits_of(output)
        if logits.shape[:2] == (1, tokens.position_R.shape[0]):
            return logits[0]
        if logits.shape[:-1] in (input_ids.shape, (input_ids.numel(),)):  # the head is not called with [B, T, D]
            return logits.reshape(input_ids.numel(), -1)[tokens.position_R]
        raise ProbeError(
            f"{type(self.model).__name__}: expected logits of shape [{input_ids.shape[0]}, {input_ids.shape[1]}, "
            f"vocabulary], got {tuple(logits.shape)}."
        )

    def cache(self, inputs: DeviceBatch) -> Any:
        """Run the model for what later positions need of these, its ``past_key_values``; None if it returns none."""
        with self._keep_only(inputs.tokens, None):
            return getattr(self._call(inputs.model_inputs), "past_key_values", None)

    @contextmanager
    def _keep_only(self, tokens: ScoredTokens, readout_RD: Tensor | None) -> Iterator[None]:
        bias: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
            hidden = args[0] if args else next(iter(options.values()))
            own = getattr(module, "bias", None)
            if own is not None and readout_RD is not None:  # here, where whoever spreads it has made it whole
                bias.append(own.detach()[tokens.target_R])
            if hidden.shape[:-1] == (tokens.n_rows, tokens.length):
                hidden = hidden.flatten(0, 1)[tokens.position_R].unsqueeze(0)
            return (hidden, *args[1:]), options if args else {}

        def compare(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            assert readout_RD is not None
            self.is_coarse = torch.is_autocast_enabled(out.device.type) or args[0].dtype.itemsize < 4
            hidden_RD, out_RV = args[0].flatten(0, -2), out.flatten(0, -2)
            if len(hidden_RD) == tokens.n_rows * tokens.length:
                hidden_RD, out_RV = hidden_RD[tokens.position_R], out_RV[tokens.position_R]
            if len(hidden_RD) != len(tokens.position_R):
                return
            expected_R = inner(hidden_RD, readout_RD)
            for part_R in bias:
                expected_R += part_R.float()
            self.error = relative_error(out_RV.gather(1, tokens.target_R[:, None])[:, 0].float(), expected_R)

        handles = [self.module.register_forward_pre_hook(keep, with_kwargs=True)]
        if readout_RD is not None:
            handles.append(self.module.register_forward_hook(compare))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _find_head(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if isinstance(head, nn.Module):
        return head
    modules = list(model.named_modules())
    for name in _NAMES:
        found: list[nn.Module] = [module for path, module in modules if path.rpartition(".")[2] == name]
        if len(found) == 1:
            return found[0]
    return None


def token_losses(logits_RV: Tensor, target_R: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood (nats, float32) and whether the target is the highest logit (of equal ones the first),
    ``[R]`` each."""
    if can_predict(logits_RV):
        return predictions(logits_RV, target_R)
    losses, correct = [logits_RV.new_zeros(0, dtype=torch.float32)], [logits_RV.new_zeros(0, dtype=torch.bool)]
    for logits, target in zip(torch.split(logits_RV, _ROWS_AT_ONCE), torch.split(target_R, _ROWS_AT_ONCE), strict=True):
        losses.append(torch.nn.functional.cross_entropy(logits.float(), target, reduction="none"))
        correct.append(_are_first_choice(logits, target))
    return torch.cat(losses), torch.cat(correct)


def _are_first_choice(logits_RV: Tensor, target_R: Tensor) -> Tensor:
    """Whether each target is the highest logit, of equal ones the first, bool ``[R]``; anything where one is NaN."""
    if logits_RV.device.type != "cpu":
        return logits_RV.argmax(-1) == target_R
    # On a CPU argmax takes ten times as long as amax, so it is asked only where the target may be it.
    may_be_R = logits_RV.amax(-1) == logits_RV.gather(1, target_R[:, None])[:, 0]
    (row_M,) = torch.nonzero(may_be_R, as_tuple=True)
    may_be_R[row_M] = logits_RV[row_M].argmax(-1) == target_R[row_M]
    return may_be_R


def _logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: an output of transformers, a mapping, a tuple or the tensor itself."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise ProbeError(f"expected logits from the model, as a tensor or under the name logits, got {type(output)}")
    return output
