"""The settings that a run's folder keeps, written by this version or an earlier one."""

from __future__ import annotations

from typing import Any

from ray_synth.config.earlier import without_retired
from ray_synth.config.parsing import parse_config
from ray_synth.config.whole import Config
from ray_synth.errors import UserError


def read_run_config(folder: Any) -> dict[str, Any]:
    """The settings in a run's config.yaml, without those that this version no longer has, and without
    the packages' versions (see `run_versions`).

    Args:
        folder: the run's `Folder`.
    """
    values = kept_config(folder)
    values.pop("versions", None)
    return without_retired(values)


def kept_config(folder: Any) -> dict[str, Any]:
    """A run's config.yaml as it was written, by whatever version.

    Raises:
        DamagedFile: it is cut off, or no mapping of settings.
    """
    import yaml

    from ray_synth.storage.damage import damaged

    try:
        values = yaml.safe_load(folder.read_bytes("config.yaml")) or {}
    except (yaml.YAMLError, ValueError) as error:
        why = " ".join(str(error).split())[:150]
        raise damaged(folder.address("config.yaml"), why) from None
    if not isinstance(values, dict):
        raise damaged(folder.address("config.yaml"), "it holds no settings")
    return values


def run_versions(folder: Any) -> dict[str, str]:
    """The versions of the packages that made a run, from its config.yaml."""
    return kept_config(folder).get("versions") or {}


def load_run_config(folder: Any) -> Config:
    """The config that a run's folder keeps.

    Raises:
        UserError: there is no run, or its settings are not valid now.
    """
    if not folder.exists("config.yaml"):
        raise UserError(f"no run at {folder.address()}: it has no config.yaml; name one with --run")
    return parse_config(read_run_config(folder), origin=folder.address("config.yaml"))
