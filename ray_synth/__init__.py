"""ray-synth: better image classifiers from synthetic images, at cluster scale.

The names in `__all__` are what other programs may rely on. All but the version and the error are
imported when they are first asked for: `import ray_synth` alone loads neither Ray nor torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ray_synth.errors import UserError

if TYPE_CHECKING:
    from ray_synth.config import Config, load_config
    from ray_synth.pipeline.api import Run, evaluate, generate, plan, resolve_meanings, train
    from ray_synth.pipeline.dry_run import dry_run
    from ray_synth.pipeline.runner import run_pipeline
    from ray_synth.service.client import Client
    from ray_synth.training.dual_bn import convert_dual_bn

__version__ = "0.1.0"
__all__ = [
    "Client",
    "Config",
    "Run",
    "UserError",
    "__version__",
    "convert_dual_bn",
    "dry_run",
    "evaluate",
    "generate",
    "load_config",
    "plan",
    "resolve_meanings",
    "run_pipeline",
    "train",
]
_HOMES = {
    "Client": "ray_synth.service.client",
    "Config": "ray_synth.config",
    "Run": "ray_synth.pipeline.api",
    "convert_dual_bn": "ray_synth.training.dual_bn",
    "dry_run": "ray_synth.pipeline.dry_run",
    "evaluate": "ray_synth.pipeline.api",
    "generate": "ray_synth.pipeline.api",
    "load_config": "ray_synth.config",
    "plan": "ray_synth.pipeline.api",
    "resolve_meanings": "ray_synth.pipeline.api",
    "run_pipeline": "ray_synth.pipeline.runner",
    "train": "ray_synth.pipeline.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ray_synth' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
