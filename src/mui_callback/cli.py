"""The command line: it parses and calls, nothing else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from mui_callback.errors import MUIError
from mui_callback.settings import ProbeSettings


def demo(output_dir: Path = Path("mui-demo"), steps: int | None = None, seed: int = 0) -> None:
    """Train a small MoE on real text on the CPU, in about three minutes, and watch its experts.

    Args:
        output_dir: where the record, the W&B run and the picture go.
        steps: optimizer steps, if not the demo's own number; fewer take less time and show less.
        seed: seed of the weights and of the data.
    """
    if steps is not None and steps < 1:
        raise MUIError(f"steps: expected a positive number, got {steps}")
    from mui_callback.demo.run import DEFAULT_STEPS, run_demo

    run_demo(output_dir, steps=DEFAULT_STEPS if steps is None else steps, seed=seed)


def inspect(
    model: str,
    revision: str | None = None,
    random_weights: bool = False,
    verify: bool = False,
    probe: Path | None = None,
    dense: bool = False,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "cpu",
    top_fraction: float = ProbeSettings.top_fraction,
    batch_tokens: int = ProbeSettings.batch_tokens,
    max_length: int | None = ProbeSettings.max_length,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> None:
    """Show the expert layers of a model, what a probe of it costs and, on demand, whether it is read right.

    Without --verify only the config is read, so that any size of model is inspected at once.

    Args:
        model: a directory, a config as a JSON file, or a hub id.
        revision: branch, tag or commit of a hub id.
        random_weights: verify with weights drawn from the config, and read no checkpoint.
        verify: run a few tokens and compare, in each layer, the contributions of all neurons with the layer's output.
            Exit status 1 and the layer's name if they differ by more than rounding.
        probe: a JSONL file of samples whose probe is costed; without it the built-in probe set.
        dense: also the MLPs of layers without experts.
        dtype: of the weights that are verified.
        device: that the weights are verified on.
        top_fraction: share of a layer's neurons that are a sample's key entries.
        batch_tokens: positions in a forward pass.
        max_length: tokens that longer samples are cut to; without it the model's context.
        trust_remote_code: run Python code that comes with the model. Never done unless this is given.
        allow_pickle: read weights that are in a pickle; without it only safetensors are read.
    """
    settings = ProbeSettings(top_fraction=top_fraction, max_length=max_length, batch_tokens=batch_tokens, dense=dense)
    from rich.console import Console

    from mui_callback.inspection.run import inspect_model
    from mui_callback.loading import ModelSource

    is_right = inspect_model(
        ModelSource(model, revision, trust_remote_code, allow_pickle),
        settings=settings,
        probe=probe,
        random_weights=random_weights,
        verify=verify,
        dtype=dtype,
        device=device,
        console=Console(),
    )
    if not is_right:
        sys.exit(1)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``mui-callback``."""
    try:
        from jsonargparse import auto_cli

        from mui_callback.options import OptionParser
    except ImportError:
        sys.exit("mui-callback's command line needs more packages: pip install 'mui-callback[hf,wandb,study]'")
    commands = {"demo": demo, "inspect": inspect}
    try:
        auto_cli(commands, args=arguments, prog="mui-callback", parser_class=OptionParser)
    except (MUIError, ValueError) as error:
        sys.exit(f"mui-callback: {error}")
    except ImportError as error:
        sys.exit(f"mui-callback: {error}. pip install 'mui-callback[hf,wandb,study]' installs what is missing.")
