"""The command line: it parses and calls, nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

from mui_callback.errors import MUIError


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


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``mui-callback``."""
    try:
        from jsonargparse import auto_cli
    except ImportError:
        sys.exit("mui-callback's command line needs more packages: pip install 'mui-callback[hf,wandb,study]'")
    try:
        auto_cli({"demo": demo}, args=arguments, prog="mui-callback")
    except MUIError as error:
        sys.exit(f"mui-callback: {error}")
    except ImportError as error:
        sys.exit(f"mui-callback: {error}. pip install 'mui-callback[hf,wandb,study]' installs what is missing.")
