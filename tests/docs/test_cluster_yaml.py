"""The cluster files are ones that Ray's launcher and the clouds take, and mean what their comments say.

Offline: Ray's part is the check that `ray up` makes before it calls the cloud (a private part of Ray,
used nowhere else), the clouds' part is what their own SDKs publish of what a machine may be.
"""

import copy
import importlib.resources
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

from ray_synth.config import load_config
from ray_synth.preflight.check import fit_stages
from ray_synth.preflight.reach import Reach, added_nodes, reach_of_cluster_yaml

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "aws": "cluster.yaml",
    "gcp": "docs/clusters/gcp.yaml",
    "azure": "docs/clusters/azure.yaml",
}
PAPER = sorted((ROOT / "jobs/configs").glob("imagenet_*.yaml"))


@pytest.fixture(params=FILES)
def cloud(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def text(cloud: str) -> str:
    return (ROOT / FILES[cloud]).read_text(encoding="utf-8")


@pytest.fixture
def written(text: str) -> dict[str, Any]:
    return yaml.safe_load(text)


@pytest.fixture
def prepared(written: dict[str, Any]) -> dict[str, Any]:
    """The config with Ray's defaults, validated."""
    config = prepare_config(copy.deepcopy(written))
    validate_config(config)
    return config


def _workers(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    types = config["available_node_types"]
    return {name: node for name, node in types.items() if name != config["head_node_type"]}


def _is_spot(node: dict[str, Any]) -> bool:
    machine = node["node_config"]
    return (
        machine.get("InstanceMarketOptions") == {"MarketType": "spot"}
        or machine.get("scheduling", {}).get("provisioningModel") == "SPOT"
        or machine.get("azure_arm_parameters", {}).get("priority") == "Spot"
    )


def test_ray_accepts_it(prepared: dict[str, Any], cloud: str) -> None:
    assert prepared["provider"]["type"] == cloud


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
    assert not _is_spot(head)


def test_gpu_workers_are_spot_with_a_few_on_demand_behind_them(prepared: dict[str, Any]) -> None:
    gpu = {n: node for n, node in _workers(prepared).items() if node["resources"]["GPU"]}
    assert {name for name, node in gpu.items() if _is_spot(node)} == {"gpu_spot"}
    assert set(gpu) == {"gpu_spot", "gpu_on_demand"}
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


@pytest.mark.parametrize("config", PAPER, ids=lambda path: path.stem)
def test_the_papers_runs_fit_what_it_can_grow_to(text: str, cloud: str, config: Path) -> None:
    reach = reach_of_cluster_yaml(text)
    run = load_config(config)
    assert not [fit.problem for fit in fit_stages(run, reach) if fit.problem]
    given = run.cluster.max_reach
    assert given is not None
    told = Reach(tuple(added_nodes(given, [])[0]))
    assert told.gpus == reach.gpus
    assert max(node.gpus for node in told.nodes) == max(node.gpus for node in reach.nodes)
    # The preflight may count on no CPU that the cluster cannot have; the configs are AWS's.
    assert told.cpus <= reach.cpus
    assert max(n.cpus for n in told.nodes) <= max(n.cpus for n in reach.nodes)


def test_each_node_type_gets_the_projects_image_of_its_kind(prepared: dict[str, Any]) -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version
    # The autoscaler's own merge of global and node-specific docker settings.
    autoscaling = AutoscalingConfig(prepared, skip_content_hash=True)
    for name, node in prepared["available_node_types"].items():
        docker = autoscaling.get_docker_config(name)
        device = "gpu" if node["resources"]["GPU"] else "cpu"
        assert docker["image"] == f"ray-synth-fill-in/ray-synth:{version[1]}-{device}"
        assert docker["container_name"] == "ray_synth"
        assert any(option.startswith("-v ray-synth-models:") for option in docker["run_options"])


def test_nodes_install_nothing_and_ask_for_the_token(prepared: dict[str, Any]) -> None:
    for role in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert prepared[role] == [], "Ray's defaults would download what no one pinned"
    assert "-e RAY_AUTH_MODE=token" in prepared["docker"]["run_options"]
    assert prepared["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}


def test_without_an_image_nodes_install_the_project_with_its_constraints() -> None:
    readme = (ROOT / "docs/docker/README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", readme, re.S)
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text()) | yaml.safe_load(block)
    config["available_node_types"]["cpu"]["docker"]["worker_image"] = config["docker"]["head_image"]
    config = prepare_config(config)
    validate_config(config)
    pin = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pin
    assert config["docker"]["image"] == f"rayproject/ray:{pin[1]}-py311-gpu"
    assert config["docker"]["head_image"] == f"rayproject/ray:{pin[1]}-py311-cpu"
    (command,) = config["setup_commands"]
    assert "cd /home/ray/ray-synth" in command and "/home/ray/ray-synth" in config["file_mounts"]
    assert command.count("pip install -c constraints.txt") == command.count("pip install") == 2
    assert {"**/.git/**", "**/runs/**"} <= set(config["rsync_exclude"])


def test_what_must_be_filled_in_is_said_at_the_top(text: str) -> None:
    head = text[: text.index("\ncluster_name:")]
    assert "Put in, where `ray-synth-fill-in` is written" in head
    assert f"ray up {FILES[yaml.safe_load(text)['provider']['type']]}" in head
    assert "ray get-auth-token --generate" in head
    assert "RAY_AUTH_MODE=token ray job submit" in head


# What the clouds say of a machine -------------------------------------------------------------


def _machines(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    config = yaml.safe_load((ROOT / FILES[name]).read_text(encoding="utf-8"))
    for node_type, node in config["available_node_types"].items():
        yield node_type, node["node_config"]


def test_ec2_knows_every_parameter() -> None:
    shape = botocore.session.get_session().get_service_model("ec2").shape_for("RunInstancesRequest")
    validator = botocore.validate.ParamValidator()
    for name, machine in _machines("aws"):
        # Ray gives the counts itself.
        report = validator.validate(machine | {"MinCount": 1, "MaxCount": 1}, shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
    report = validator.validate({"InstanceTipe": "m5.large", "MinCount": 1, "MaxCount": 1}, shape)
    assert "InstanceTipe" in report.generate_report()


def _gcp_errors(value: Any, schema: dict[str, Any], schemas: dict[str, Any], at: str) -> list[str]:
    """What of `value` Google's published description of its compute API does not know."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    if "properties" in schema:
        known = schema["properties"]
        errors = [f"{at}.{key} is unknown" for key in value if key not in known]
        return errors + [
            error
            for key in value
            if key in known
            for error in _gcp_errors(value[key], known[key], schemas, f"{at}.{key}")
        ]
    if schema.get("type") == "array":
        return [e for item in value for e in _gcp_errors(item, schema["items"], schemas, f"{at}[]")]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{at} is none of {schema['enum']}"]
    kinds = {"string": str, "boolean": bool, "integer": int}
    if schema.get("format") != "int64" and not isinstance(value, kinds[schema["type"]]):
        return [f"{at} is no {schema['type']}"]
    return []


def test_compute_engine_knows_every_field() -> None:
    folder = importlib.resources.files("googleapiclient.discovery_cache") / "documents"
    schemas = json.loads((folder / "compute.v1.json").read_text(encoding="utf-8"))["schemas"]
    for name, machine in _machines("gcp"):
        assert _gcp_errors(machine, {"$ref": "Instance"}, schemas, name) == []
        # A machine with a GPU cannot be moved to another host, nor a spot one.
        if name != "head":
            assert machine["scheduling"]["onHostMaintenance"] == "TERMINATE"
        if machine.get("scheduling", {}).get("provisioningModel") == "SPOT":
            assert machine["scheduling"]["instanceTerminationAction"] == "DELETE"
    wrong = {"scheduling": {"provisioningModel": "CHEAP", "preemptable": True}}
    assert len(_gcp_errors(wrong, {"$ref": "Instance"}, schemas, "wrong")) == 2


def test_rays_azure_template_has_every_parameter() -> None:
    folder = importlib.resources.files("ray.autoscaler._private._azure")
    template = json.loads((folder / "azure-vm-template.json").read_text(encoding="utf-8"))
    kinds = {"string": str, "int": int, "bool": bool, "object": dict, "array": list}
    for name, machine in _machines("azure"):
        (parameters,) = machine.values()
        for key, value in parameters.items():
            assert key in template["parameters"], f"{name}: {key}"
            assert isinstance(value, kinds[template["parameters"][key]["type"]]), f"{name}: {key}"


def test_rays_node_providers_import_with_the_pinned_sdks(cloud: str) -> None:
    module = {"azure": "_azure"}.get(cloud, cloud)
    importlib.import_module(f"ray.autoscaler._private.{module}.config")
    importlib.import_module(f"ray.autoscaler._private.{module}.node_provider")
