"""Studies as each process of ``torchrun`` runs them: one for each way to share out the work."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import get_args

import torch
from torch import distributed

from mui_callback.trajectory.config import Distribute
from studies import SUMS, WORDS, run, save_tasks, study


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    tasks = save_tasks(directory / f"tasks-{rank}", sums=SUMS, words=WORDS[:1])  # fewer samples than processes
    seen = {}
    for distribute in get_args(Distribute):
        if distribute == "samples":  # or each study would make a process group, which a launcher allows once
            distributed.init_process_group("gloo")
        for response in ("gold", "generate"):
            name = f"{distribute}-{response}"
            options = {"distribute": distribute, "response": response}
            outcome, said = run(study(directory / name, directory / "run", tasks, **options))
            failures = sorted(one.label for one in outcome.failures)
            seen[name] = {"n_measured": outcome.n_measured, "failures": failures, "said": said}
    (directory / f"seen-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
