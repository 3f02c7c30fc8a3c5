"""The fingerprint of a probe set: equal where the same content is scored, on any machine."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from mui_callback.probe.samples import ProbeSample, TokenChoice, TokenSample


def fingerprint(tasks: Mapping[str, Iterable[ProbeSample | TokenSample]]) -> str:
    """SHA-256 (hex) of task names, texts, token ids, choices and answers, in their order.

    Ids and sources are left out: they can stem from file names.
    """
    digest = hashlib.sha256(b"mui-probe-set-1\n")
    for task, samples in tasks.items():
        digest.update(_canonical(["task", task]))
        for sample in samples:
            digest.update(_canonical(_content(sample)))
    return digest.hexdigest()


def _canonical(content: list[Any]) -> bytes:
    return json.dumps(content, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


def _content(sample: ProbeSample | TokenSample) -> list[Any]:
    if isinstance(sample, ProbeSample):
        return ["text", sample.prompt, sample.response, sample.choices, sample.answer]
    return ["tokens", _tokens(sample), [_tokens(choice) for choice in sample.choices], sample.answer]


def _tokens(tokens: TokenSample | TokenChoice) -> list[Any]:
    encoder = [] if tokens.encoder_ids is None else [tokens.encoder_ids.tolist()]
    return [tokens.input_ids.tolist(), tokens.scored.astype(int).tolist(), tokens.n_bytes, *encoder]
