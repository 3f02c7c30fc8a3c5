"""What one probe pass brought home, and the file that it is kept in.

Shapes: N samples of the probe.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import numpy as np

from mui_callback.counts import KeySets, ProbeCounts
from mui_callback.layout import ExpertLayout, LayerShape
from mui_callback.metrics.utilization import ratio
from mui_callback.report_file import read_report, write_report
from mui_callback.sample_table import SampleTable
from mui_callback.settings import ProbeSettings

_Results = TypeVar("_Results", bound="PassResults")


@dataclass(frozen=True, eq=False, repr=False)
class PassResults:
    """The counts of one pass, and what was probed; what is counted of the pass itself."""

    layout: ExpertLayout
    task_names: tuple[str, ...]
    settings: ProbeSettings
    sample_table: SampleTable
    counts: ProbeCounts
    probe_set: str
    """Fingerprint of the probe set."""
    comm_bytes: int
    """Bytes that processes sent each other for the pass: rows of the head, what the transposed tails carry, candidates,
    counts and sets. What the forward of the model itself sends is not among them."""
    seconds: float
    """Duration of the pass."""

    @property
    def rules(self) -> tuple[str, ...]:
        """The rules that say what a key neuron is, as text; the metrics are those of the first."""
        return tuple(map(str, self.settings.parsed_rules))

    @property
    def n_samples(self) -> int:
        """Samples in the probe."""
        return len(self.sample_table.id)

    @property
    def tokens(self) -> int:
        """Response tokens in the probe."""
        return int(self.sample_table.n_tokens.sum())

    @property
    def truncated(self) -> int:
        """Samples that were cut from the left."""
        return int(self.sample_table.truncated.sum())

    @property
    def unscored(self) -> int:
        """Samples with no response token."""
        return int((self.sample_table.n_tokens == 0).sum())

    @property
    def not_finite(self) -> int:
        """Contributions that were NaN or infinite."""
        return int(self.counts.not_finite.sum())

    @property
    def dropped_tokens(self) -> float | None:
        """Share of pairs of token and expert that routers with a limited capacity would have dropped, had the probe not
        let them pass; None without such routers."""
        return ratio(int(self.counts.dropped.sum()), int(self.counts.assigned.sum()))

    @property
    def layer_dropped_tokens(self) -> tuple[float | None, ...]:
        """The same of each layer."""
        return tuple(map(ratio, self.counts.dropped.tolist(), self.counts.assigned.tolist()))

    @property
    def broken_samples(self) -> int:
        """Samples whose loss is NaN or infinite."""
        return int((~np.isfinite(self.counts.loss)).sum())

    @property
    def identity_error(self) -> float | None:
        """Largest relative error, over the layers, of Σ f = ⟨output of the layer, W_head[y]⟩ in the first batch."""
        errors = self.counts.identity_error[np.isfinite(self.counts.identity_error)]
        return float(errors.max()) if errors.size else None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report to one file: numpy arrays and a JSON header, no pickle. Replaces the file at once.

        Raises:
            OSError: it cannot be written.
        """
        header = {
            "layers": [asdict(layer) for layer in self.layout.layers],
            "task_names": self.task_names,
            "settings": asdict(self.settings),
            "sample_ids": self.sample_table.id,
            "probe_set": self.probe_set,
            "comm_bytes": self.comm_bytes,
            "seconds": self.seconds,
        }
        arrays = {f"counts.{field.name}": getattr(self.counts, field.name) for field in fields(ProbeCounts)[1:]}
        for field in fields(SampleTable)[1:]:
            arrays[f"samples.{field.name}"] = getattr(self.sample_table, field.name)
        for number, sets in enumerate(self.counts.key_sets):
            arrays |= {f"key_sets.{number}.neuron": sets.neuron, f"key_sets.{number}.end": sets.end}
        write_report(path, header, arrays)

    @classmethod
    def load(cls: type[_Results], path: str | os.PathLike[str]) -> _Results:
        """Read what `save` wrote.

        Raises:
            MUIError: the file is something else, or was written by another version of this format.
            OSError: there is none, or it cannot be read.
        """
        header, arrays = read_report(path)

        def part(prefix: str) -> dict[str, Any]:
            return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}

        settings = ProbeSettings(**header["settings"])
        sets = tuple(KeySets(**part(f"key_sets.{number}.")) for number in range(len(settings.rules)))
        return cls(
            layout=ExpertLayout([LayerShape.from_dict(layer) for layer in header["layers"]]),
            task_names=tuple(header["task_names"]),
            settings=settings,
            sample_table=SampleTable(id=tuple(header["sample_ids"]), **part("samples.")),
            counts=ProbeCounts(key_sets=sets, **part("counts.")),
            probe_set=header["probe_set"],
            comm_bytes=header["comm_bytes"],
            seconds=header["seconds"],
        )
