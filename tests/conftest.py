"""What has to be so before torch and transformers are imported."""

import os
import tempfile
from pathlib import Path

from hypothesis import settings

# Workers, and the processes that tests start, would get in each other's way with as many threads as there are cores.
os.environ["OMP_NUM_THREADS"] = "1"
# The code of remote models is copied to one place by the name of their folder: each worker needs its own.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules")
os.environ["HF_HUB_OFFLINE"] = "1"
# No test leaves anything in the cache of whoever runs it, or finds something there.
os.environ["MUI_CALLBACK_CACHE"] = "off"
# Processes that tests start find what these tests have in common, the one that others are forked from among them.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
# How long an example takes depends on what else the machine does.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
