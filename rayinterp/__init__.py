"""rayinterp explains SAE features in words and says how far each explanation can be trusted.

Names are loaded when they are asked for, so that `rayinterp.subject` works where only torch and transformers are.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "FeatureId": "rayinterp.feature_id",
    "Rule": "rayinterp.explanation",
    "RunConfig": "rayinterp.config",
    "Tables": "rayinterp.tables",
    "UserError": "rayinterp.errors",
    "load_config": "rayinterp.config",
    "open_run": "rayinterp.run",
    "run_stage": "rayinterp.run",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rayinterp' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
