"""What each of several forked processes would import by itself; done once, in the process that they are forked from."""

from __future__ import annotations

import gc
import os
from contextlib import suppress

os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported, which keeps it

import hypothesis  # noqa: F401
import pytest  # noqa: F401
import torch.utils.cpp_extension  # noqa: F401
import transformers.models.qwen2_moe.modeling_qwen2_moe
import transformers.trainer  # noqa: F401

import backend_training  # noqa: F401

with suppress(ImportError):
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - part of every engine, and all of torch.compile

gc.freeze()  # or each would copy all of this when it looks for what is no longer needed
