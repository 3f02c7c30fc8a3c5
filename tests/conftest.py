"""What has to be so before transformers is imported."""

import os
import tempfile

# The code of remote models is copied to one place by the name of their folder: each worker needs its own.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules")
os.environ["HF_HUB_OFFLINE"] = "1"
