"""See inside Mixture-of-Experts language models while they train.

    from mui_callback import MUICallback
    trainer = Trainer(..., callbacks=[MUICallback()])

The names below are imported when they are first used: importing this package loads neither torch nor a trainer.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mui_callback.version import __version__ as __version__

if TYPE_CHECKING:
    from mui_callback.benchmarks.tasks import LMEval
    from mui_callback.callback import MUICallback
    from mui_callback.experts.adapters import MoEBlock, StackedWeight, register_adapter
    from mui_callback.monitor import MUIMonitor
    from mui_callback.monitoring.alert_rule import AlertRule
    from mui_callback.probe.probe_set import ProbeSet
    from mui_callback.probe.run import MUIProbe
    from mui_callback.report import MUIReport
    from mui_callback.sinks.memory import MemorySink

__all__ = [
    "AlertRule",
    "LMEval",
    "MUICallback",
    "MUIMonitor",
    "MUIProbe",
    "MUIReport",
    "MemorySink",
    "MoEBlock",
    "ProbeSet",
    "StackedWeight",
    "register_adapter",
]

_HOMES = {
    "AlertRule": "mui_callback.monitoring.alert_rule",
    "LMEval": "mui_callback.benchmarks.tasks",
    "MUICallback": "mui_callback.callback",
    "MUIMonitor": "mui_callback.monitor",
    "MUIProbe": "mui_callback.probe.run",
    "MUIReport": "mui_callback.report",
    "MemorySink": "mui_callback.sinks.memory",
    "MoEBlock": "mui_callback.experts.adapters",
    "ProbeSet": "mui_callback.probe.probe_set",
    "StackedWeight": "mui_callback.experts.adapters",
    "register_adapter": "mui_callback.experts.adapters",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
