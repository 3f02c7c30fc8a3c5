"""Read a model from a local path or a hub id: no code of its own and no pickle, unless the caller allows it.

Models come in eval mode. All functions raise `ModelLoadError` where what they need cannot be read; those that make a
model raise `UnsupportedModelError` where transformers has no language model with a head for its config.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mui_callback.errors import MUIError, UnsupportedModelError
from mui_callback.forgiving import in_a_line

try:
    import transformers as hf
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.utils import cached_file, has_file
except ImportError as error:
    raise ImportError("loading a model needs transformers: pip install 'mui-callback[hf]'") from error

DType = Literal["auto", "float32", "bfloat16", "float16"]
"""A type of weights; ``"auto"`` is that of the checkpoint or config, float32 where neither names one."""
CHECKPOINTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where transformers looks for weights, in its order."""
VOCABULARIES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""A tokenizer has one of these; without any, transformers can make one that encodes every text to nothing."""


class ModelLoadError(MUIError, RuntimeError):
    """A model, its config or its tokenizer cannot be read from where it was looked for, or not safely."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model is, and what reading it may do."""

    name: str
    """A directory, its config.json, another config as a JSON file, or a hub id. A path that exists comes first."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; without it, the main branch."""
    trust_remote_code: bool = False
    """Run the Python files that come with the model, and prefer them to the classes of transformers."""
    allow_pickle: bool = False
    """Read weights from a pickle where there are no safetensors. Even then nothing but tensors is unpickled."""

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name} (revision {self.revision})"

    @property
    def location(self) -> str:
        """The path or hub id as transformers takes it; a revision of a path raises `ModelLoadError`."""
        path = os.path.expanduser(self.name)
        if not os.path.exists(path):
            return self.name
        if self.revision is not None:
            raise ModelLoadError(f"{self}: expected a hub id with a revision, got a local path")
        return os.path.dirname(path) or os.curdir if os.path.basename(path) == "config.json" else path

    def has(self, file: str) -> bool:
        """Whether the directory or the repository has the file; looks, but does not download."""
        return not os.path.isfile(self.location) and bool(has_file(self.location, file, revision=self.revision))

    def read(self, file: str) -> Any:
        """Return the content of a JSON file."""
        with open(cached_file(self.location, file, revision=self.revision), encoding="utf-8") as text:
            return json.load(text)


def can_be_hub_id(name: str) -> bool:
    """Whether a name can be that of a repository on the hub: it is not written as a path."""
    return not name.startswith(("/", "./", "../", "~")) and not name.endswith("/") and name.count("/") < 2


def load_config(source: ModelSource) -> hf.PreTrainedConfig:
    """Read the config. An adapter, which is no model by itself, is refused."""
    with _explained(source):
        if source.has("adapter_config.json"):
            raise ModelLoadError(f"{source} has an adapter: merge it and save the whole, or name the base model")
        options = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
        config = hf.AutoConfig.from_pretrained(source.location, **options)
        if not source.trust_remote_code:  # both can name a hub repository whose kernels would be run
            config._attn_implementation = config._experts_implementation = None
        return config


def load_skeleton(source: ModelSource, *, dtype: DType = "auto") -> nn.Module:
    """Build the model on the meta device, however large it is: modules and shapes without weights."""
    return load_random(source, dtype=dtype, device="meta")


def load_random(
    source: ModelSource, *, dtype: DType = "auto", device: str | torch.device = "cpu", seed: int = 0
) -> nn.Module:
    """Build the model from its config alone. Its weights depend on the seed and on the kind of device.

    The global random state of the CPU and of the device is left as it was.
    """
    config, device = load_config(source), torch.device(device)
    with _explained(source), torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        auto, code = _auto_class(source, config)
        options = {"dtype": config.dtype if dtype == "auto" else getattr(torch, dtype)}
        torch.manual_seed(seed)
        if code and source.trust_remote_code:  # AutoModel would run the main branch's, whatever the revision
            own = get_class_from_dynamic_module(code, source.location, revision=source.revision)
            model: nn.Module = own._from_config(config, **options)
        else:
            model = auto.from_config(config, trust_remote_code=source.trust_remote_code, **options)
    return model.eval()


def load_pretrained(source: ModelSource, *, dtype: DType = "auto", device: str | torch.device = "cpu") -> nn.Module:
    """Read the model with its weights, which are safetensors where both kinds are there.

    Weights that are missing or do not fit, which transformers would draw at random, raise `ModelLoadError`; tensors
    that the model has no place for are named in a warning.
    """
    config = load_config(source)
    with _explained(source):
        auto, _ = _auto_class(source, config)
        pickles = [file for file in _weight_files(source, config) if not file.endswith(".safetensors")]
        if pickles and not source.allow_pickle:
            raise ModelLoadError(
                f"{source}: the weights are in {pickles[0]}, a pickle, which can run code when it is read."
                " Convert it to safetensors or, if you trust its origin, pass --allow-pickle."
            )
        if pickles:  # transformers would have a bot convert those of the hub there, in public
            os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
        model, info = auto.from_pretrained(
            source.location,
            config=config,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            use_safetensors=not pickles,
            weights_only=True,
            dtype=dtype,
            device_map=device,
            ignore_mismatched_sizes=True,  # to be raised below, by name
            output_loading_info=True,
        )
    check_fit(model, str(source), **_fit(info))
    return cast(nn.Module, model)


def load_state(
    source: ModelSource,
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    where: str,
) -> nn.Module:
    """Build the model from its config, with weights that are here already; see `load_pretrained` for those that do not
    fit. On the CPU it may share their memory.

    Args:
        source: of the config.
        state: weights by name, as the model has them or as its checkpoints do.
        dtype: that they get.
        device: of the model.
        where: names the state in messages.
    """
    config, model_class = load_config(source), type(load_skeleton(source))
    with _explained(source):
        model, info = cast(Any, model_class).from_pretrained(
            None,
            config=config,
            state_dict={**state},
            dtype=dtype,
            device_map=device,
            ignore_mismatched_sizes=True,  # to be raised below, by name
            output_loading_info=True,
        )
    check_fit(model, where, **_fit(info))
    return cast(nn.Module, model)


def _fit(info: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers says of how weights fit, for `check_fit`."""
    return {kind: info[f"{kind}_keys"] for kind in ("missing", "mismatched", "unexpected")}


def check_fit(
    model: nn.Module,
    where: str,
    *,
    missing: Iterable[str],
    mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]],
    unexpected: Iterable[str],
) -> None:
    """Refuse weights that leave some of the model's as they are, and warn of those that it has no place for.

    Args:
        model: that they are for.
        where: names them in messages.
        missing: names.
        mismatched: names, with the shape that is there and the model's.
        unexpected: names.
    """
    wrong = [f"{key} is missing" for key in sorted(missing)]
    wrong += [f"{key} is {[*there]}, not {[*here]}" for key, there, here in sorted(mismatched)]
    if wrong:
        raise ModelLoadError(f"{where}: {len(wrong)} weights do not fit {type(model).__name__}: {_first(wrong)}")
    if extra := sorted(unexpected):
        warnings.warn(f"{where}: {type(model).__name__} leaves out {len(extra)} tensors: {_first(extra)}", stacklevel=3)


def load_tokenizer(source: ModelSource) -> Any | None:
    """Read the tokenizer; None where there is none. One that encodes a letter to nothing is refused."""
    with _explained(source):
        if not any(map(source.has, VOCABULARIES)):
            # A hub that is not reached has no file either; this raises where there is no such model.
            hf.PreTrainedConfig.get_config_dict(source.location, revision=source.revision)
            return None
        options = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
        tokenizer = hf.AutoTokenizer.from_pretrained(source.location, **options)
        if not tokenizer("a", add_special_tokens=False)["input_ids"]:
            raise ModelLoadError(f"{source}: the tokenizer has no vocabulary")
        return tokenizer


def _auto_class(source: ModelSource, config: Any) -> tuple[Any, str]:
    """Choose a language model with a head, with images if there is no other; and name the code that brings it, if any.

    Classes of transformers come first, unless the code that comes with the model is trusted.
    """
    text = (hf.AutoModelForCausalLM, hf.MODEL_FOR_CAUSAL_LM_MAPPING)
    if config.is_encoder_decoder:
        text = (hf.AutoModelForSeq2SeqLM, hf.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
    choices = (text, (hf.AutoModelForImageTextToText, hf.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING))
    known = [auto for auto, classes in choices if type(config) in classes]
    auto_map = getattr(config, "auto_map", None) or {}
    brought = [auto for auto, _ in choices if auto.__name__ in auto_map]
    for auto in brought + known if source.trust_remote_code else known + brought:
        return auto, auto_map.get(auto.__name__, "")
    wanted = " or ".join(auto.__name__ for auto, _ in choices)
    raise UnsupportedModelError(f"{source}: found no {wanted} for the model type {config.model_type!r}")


def _weight_files(source: ModelSource, config: Any) -> list[str]:
    """Name the files that transformers would read weights from, those of an index included."""
    named = getattr(config, "transformers_weights", None)
    names = (named,) if named else CHECKPOINTS
    for name in filter(source.has, names):
        return sorted({*source.read(name)["weight_map"].values()}) if name.endswith(".json") else [name]
    there = os.listdir(source.location) if os.path.isdir(source.location) else []
    others = sorted(name for name in there if name.endswith((".bin", ".gguf", ".pt", ".pth", ".safetensors")))
    raise ModelLoadError(f"{source}: expected weights in {' or '.join(names)}, found {_first(others) or 'none'}")


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


@contextmanager
def _explained(source: ModelSource) -> Iterator[None]:
    """Turn whatever reading foreign files raises into one line that says what was tried."""
    try:
        yield
    except MUIError:
        raise
    except Exception as error:
        said = in_a_line(error)
        if "trust_remote_code=True" in said:
            named = filter(source.has, ("config.json", "tokenizer_config.json"))
            maps = [source.read(file).get("auto_map") for file in named]
            modules = re.findall(r'"([^"]+)\.\w+"', json.dumps(maps))  # of "module.Class", wherever they are
            files = ", ".join(sorted({f"{module.replace('--', '/')}.py" for module in modules}))
            raise ModelLoadError(
                f"{source} needs code of its own: {files or 'see its auto_map'}."
                " Read it and, if you trust it, pass --trust-remote-code to run it."
            ) from error
        if not os.path.exists(source.location):
            tried = f", and as a hub id: {said}" if can_be_hub_id(source.name) else ""
            raise ModelLoadError(f"{source}: there is no such path{tried}") from error
        raise ModelLoadError(f"{source}: {said}") from error
