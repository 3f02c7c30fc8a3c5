"""What module paths say: which module holds another, which layer it is in, whether it is part of the language model."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "base_layer")
"""Names under which wrappers (torch.compile, checkpointing, FSDP, PEFT) keep the module that they wrap."""

_ELSEWHERE = frozenset({"vision", "visual", "image", "audio", "talker", "mtp", "nextn"})
"""Words in paths of modules that a language model does not run on text."""
_ATTENTION = frozenset({"attn", "attention"})
_DECODER = re.compile(r"decoder\..*\d")
"""A decoder with layers. Without one, some call their only stack an encoder."""


def unwrapped(path: str) -> str:
    """The path of the outermost wrapper around a module, which is its place in the model."""
    while path.rpartition(".")[2] in _WRAPPED:
        path = path.rpartition(".")[0]
    return path


def outside(path: str) -> str:
    """The path of the module that holds this one."""
    return unwrapped(path).rpartition(".")[0]


def is_inside(path: str, holder: str) -> bool:
    """Whether a path is that of `holder` or of something in it."""
    return path == holder or path.startswith(f"{holder}.") or not holder


def is_numbered(path: str) -> bool:
    """Whether the path ends in a number, as that of a decoder layer in its list does."""
    return unwrapped(path).rpartition(".")[2].isdecimal()


def language_model_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by path, under every path that they have, but those that are no part of a decoder's MLPs."""
    modules = dict(model.named_modules(remove_duplicate=False))
    has_decoder = any(_DECODER.search(path.lower()) for path in modules)
    elsewhere = _ELSEWHERE | _ATTENTION | ({"encoder"} if has_decoder else set())
    return {path: module for path, module in modules.items() if not _words(path) & elsewhere}


def is_attention(path: str) -> bool:
    """Whether the module is an attention, or in one: some have experts, which are no MLPs."""
    return bool(_words(path) & _ATTENTION)


def _words(path: str) -> set[str]:
    return {word for part in path.lower().split(".") for word in part.split("_")}


def layer_numbers(model: nn.Module, paths: Sequence[str]) -> list[int]:
    """The number of the decoder layer that each module is in: 7 of ``model.layers.7.mlp``.

    Of several numbers in a path (``decoder.block.3.layer.2.mlp``), the first is taken in which the paths differ;
    where all are in one layer, the number in the longest list. 0 where there is none.
    """
    numbers = [[(i, int(part)) for i, part in enumerate(path.split(".")) if part.isdecimal()] for path in paths]
    n_numbers = min(map(len, numbers), default=0)
    if n_numbers == 0:
        return [0] * len(paths)
    columns = [[row[column][1] for row in numbers] for column in range(n_numbers)]
    varying = [column for column in columns if len(set(column)) > 1]
    if varying:
        return varying[0]
    parts = paths[0].split(".")
    lengths = [len(list(model.get_submodule(".".join(parts[:i])).children())) for i, _ in numbers[0][:n_numbers]]
    return columns[lengths.index(max(lengths))]
