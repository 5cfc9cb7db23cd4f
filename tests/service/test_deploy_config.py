"""`ray-synth serve check`: every misspelt key of a Serve config is found, and nothing valid refused."""

import copy
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray.serve.config as ray_config
import ray.serve.schema as ray_schema
import yaml

from ray_synth.cli.command import main
from ray_synth.errors import UserError
from ray_synth.service import images_app
from ray_synth.service.app import ServeConfig, build
from ray_synth.service.deploy_config import check_serve_config, load_serve_config

ROOT = Path(__file__).resolve().parents[2]
EVERY_OPTION = Path(__file__).with_name("every_option.yaml")
# keys whose mappings are the user's own
FREE = {
    "runtime_env", "user_config", "resources", "policy_kwargs", "request_router_kwargs",
    "init_kwargs", "actor_options", "label_selector", "fallback_strategy",
    "placement_group_bundles", "placement_group_bundle_label_selector",
}  # fmt: skip


def serve_config(**application) -> dict:
    """The shipped config, with changes to its application."""
    values = yaml.safe_load((ROOT / "serve/config.yaml").read_text())
    values["applications"][0].update(application)
    return values


def paths_of(values, path=()):
    """Paths of all keys that are not of the user's own."""
    if isinstance(values, list):
        for position, entry in enumerate(values):
            yield from paths_of(entry, (*path, position))
    elif isinstance(values, dict):
        for key, value in values.items():
            yield (*path, key)
            theirs = path[-1:] == (1,) and key == "args"  # of another app than ours
            if key not in FREE and not theirs:
                yield from paths_of(value, (*path, key))


@pytest.mark.parametrize(
    ("name", "proxy"), [("config", "HeadOnly"), ("gpu", "HeadOnly"), ("config_gpu", "EveryNode")]
)
def test_the_shipped_configs_pass_and_listen_on_the_loopback_address(name, proxy):
    values = load_serve_config(ROOT / f"serve/{name}.yaml")
    assert values["http_options"] == {"host": "127.0.0.1", "port": 8000}
    assert values["proxy_location"] == proxy
    *_, application = values["applications"]
    build(ServeConfig(**application["args"]))


def test_the_images_config_passes_and_a_wrong_setting_in_it_is_named(tmp_path):
    values = load_serve_config(ROOT / "serve/images.yaml")
    assert values["http_options"] == {"host": "127.0.0.1", "port": 8001}
    images_app.build(images_app.ImagesConfig(**values["applications"][0]["args"]))
    values["applications"][0]["args"]["generation"]["wdith"] = 64
    with pytest.raises(ValueError, match=r"generation\.wdith: unknown key; did you mean 'width'"):
        check_serve_config(values)


def test_the_app_asks_the_model_that_is_deployed_beside_it():
    values = load_serve_config(ROOT / "serve/config_gpu.yaml")
    llm, ours = values["applications"]
    assert llm["import_path"] == "ray.serve.llm:build_openai_app"
    # ray.serve.llm itself needs vLLM to be imported; this is the schema that it reads its `args` by
    from ray.llm._internal.serve.core.configs.llm_config import LLMConfig

    (model,) = (LLMConfig.model_validate(entry) for entry in llm["args"]["llm_configs"])
    config = ServeConfig(**ours["args"])
    address = values["http_options"]
    where = f"http://{address['host']}:{address['port']}{llm['route_prefix']}/v1"
    assert (config.llm.backend, config.llm.base_url) == ("openai", where)
    assert config.llm.model == model.model_id
    scaling = model.deployment_config["autoscaling_config"]
    per_model = model.engine_kwargs["tensor_parallel_size"]
    counts = [
        per_model * scaling[f"{end}_replicas"] + config.clip.num_gpus * config.clip.replicas[i]
        for i, end in enumerate(("min", "max"))
    ]
    assert counts == [1.5, 8], "as its first lines say"
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        LLMConfig.model_validate({**llm["args"]["llm_configs"][0], "engine_kwarg": {}})


def test_the_config_for_gpus_has_models_of_a_hub_that_scale():
    (application,) = load_serve_config(ROOT / "serve/gpu.yaml")["applications"]
    config = ServeConfig(**application["args"])
    assert config.llm.model != "embedded" != config.clip.model
    counts = [
        sum(model.num_gpus * model.replicas[end] for model in (config.llm, config.clip))
        for end in (0, 1)
    ]
    assert counts == [1.5, 8], "as its first lines say"


def test_there_is_nothing_but_yaml_for_an_operator():
    assert {path.suffix for path in (ROOT / "serve").iterdir()} == {".yaml"}


@pytest.mark.parametrize("path", ["serve.app:build", "serve.app.build"])
def test_the_apps_former_place_is_answered_with_the_new_one(path):
    with pytest.raises(UserError) as error:
        check_serve_config(serve_config(import_path=path), origin="my.yaml")
    assert str(error.value) == (
        "my.yaml:\n  applications.0.import_path: the app has moved: write ray_synth.service.app:build"
    )


def test_a_config_with_every_option_passes():
    values = load_serve_config(EVERY_OPTION)
    written = {key for path in paths_of(values) for key in path}
    for model in (
        ServeConfig, *ServeConfig.model_fields,
        ray_schema.ServeDeploySchema, ray_schema.HTTPOptionsSchema, ray_schema.gRPCOptionsSchema,
        ray_schema.ServeApplicationSchema, ray_schema.DeploymentSchema, ray_schema.LoggingConfig,
        ray_schema.RayActorOptionsSchema, ray_schema.TracingConfig, ray_config.ControllerOptions,
        ray_config.AutoscalingConfig, ray_config.AutoscalingPolicy, ray_config.BackpressureConfig,
        ray_config.RequestRouterConfig, ray_config.GangSchedulingConfig,
        ray_config.DeploymentActorConfig,
    ):  # fmt: skip
        if isinstance(model, str):
            model = ServeConfig.model_fields[model].annotation
        fields = getattr(model, "model_fields", {})
        assert set(fields) <= written, model


def test_every_misspelt_key_is_found_at_any_depth():
    values = load_serve_config(EVERY_OPTION)
    paths = list(paths_of(values))
    assert len(paths) > 150
    for *above, key in paths:
        changed = copy.deepcopy(values)
        parent = changed
        for step in above:
            parent = parent[step]
        wrong = key[:-1] + "q"
        parent[wrong] = parent.pop(key)
        with pytest.raises(ValueError, match="unknown key") as error:
            check_serve_config(changed)
        dotted = ".".join(map(str, [*above, wrong]))
        assert f"  {dotted}: unknown key; did you mean {key!r}?" in str(error.value)


def test_all_that_is_wrong_is_told_at_once():
    values = serve_config(
        args={"clipp": {}, "limits": {"max_imags": 3}},
        deployments=[{"name": "LLMM"}, {"name": "CLIP", "num_replica": 2}],
    )
    values["http_options"]["prot"] = 8000
    with pytest.raises(ValueError, match="my.yaml:") as error:
        check_serve_config(values, origin="my.yaml")
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 5
    for near in ("clip", "max_images", "LLM", "num_replicas", "port"):
        assert sum(f"did you mean {near!r}?" in line for line in lines) == 1


@pytest.mark.parametrize(
    ("application", "says"),
    [
        ({"args": {"llm": {"num_cpus": 0}}}, "args.llm.num_cpus: Input should be greater than 0"),
        ({"args": {"llm": {"backend": "openai"}}}, "args.llm: backend openai needs the model's"),
        ({"args": {"autoscaling": {"upscale_delay": 1}}}, "mean 'upscale_delay_s'"),
        ({"args": {"llm": {"max_retries": 2}}}, "llm.max_retries: removed; "),
        ({"args": {"autoscaling": {"look_back_period_s": -1}}}, "look_back_period_s"),
        ({"args": []}, "applications.0.args"),
        ({"import_path": "x"}, "applications.0.import_path"),
        ({"deployments": ["LLM"]}, "applications.0.deployments.0: give a mapping, not 'LLM'"),
        ({"deployments": [None]}, "applications.0.deployments.0: give a mapping, not None"),
        ({"deployments": {"name": "LLM"}}, "applications.0.deployments"),
        ({"deployments": [{"name": "Clip"}]}, "known: CLIP, Disambiguation, LLM"),
        ({"deployments": [{"num_replicas": 1}]}, "deployments.0.name: Field required"),
        ({"deployments": [{"name": "LLM", "num_replicas": 0}]}, "num_replicas"),
        (
            {"deployments": [{"name": "LLM", "autoscaling_config": {"min_replicas": "few"}}]},
            "autoscaling_config.min_replicas: Input should be a valid integer",
        ),
        (
            {"deployments": [{"name": "LLM", "gang_scheduling_config": {
                "gang_size": 2, "runtime_failure_policy": "RESTART_REPLICA"}}]},
            "RESTART_REPLICA policy is not yet implemented",
        ),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_its_place(application, says):
    with pytest.raises(ValueError, match="config:") as error:
        check_serve_config(serve_config(**application))
    assert type(error.value) is UserError, "the command line prints these without a traceback"
    assert says in str(error.value)


def test_fewest_replicas_may_be_given_alone():
    deployment = {"name": "LLM", "num_replicas": "auto", "autoscaling_config": {"min_replicas": 2}}
    check_serve_config(serve_config(deployments=[deployment]))
    check_serve_config(serve_config(import_path="ray_synth.service.app.build", args={}))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no Serve config at"),
        (b"a: [1", "is not valid YAML"),
        (b"\xff\xfe\x00\x00\xff", "is not valid YAML"),
        (b"", "holds no settings"),
        (b"- a\n- b\n", "holds no settings"),
        (b"{}", "applications: Field required"),
    ],
)
def test_what_is_no_config_is_told_in_one_clear_message(tmp_path, content, says):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        load_serve_config(path)
    with pytest.raises(ValueError, match="no Serve config at"):
        load_serve_config(tmp_path)  # a folder


@pytest.mark.parametrize("verb", ["check", "run", "deploy"])
def test_the_command_refuses_before_anything_is_started(tmp_path, capsys, verb):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(serve_config(args={"llm": {"modle": "x"}})))
    with pytest.raises(SystemExit) as stopped:
        main(["serve", verb, str(path)])
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert "applications.0.args.llm.modle: unknown key; did you mean 'model'?" in told.err
    assert "Traceback" not in told.err and not told.out


def test_a_good_config_is_handed_over_to_serves_own_command(monkeypatch, capsys):
    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    handed: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda program, arguments, env: handed.append(arguments))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    path = str(ROOT / "serve/config.yaml")
    dashboard = ThreadingHTTPServer(("127.0.0.1", 0), Dashboard)
    threading.Thread(target=dashboard.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{dashboard.server_port}"

    def command(*arguments: str) -> int:
        with pytest.raises(SystemExit) as stopped:
            main(["serve", *arguments])
        return stopped.value.code or 0

    status = 200
    assert command("check", path) == command("run", path) == 0
    assert command("deploy", path, "--address", address) == 0
    assert "nothing is wrong with it" in capsys.readouterr().out
    serve = [sys.executable, "-m", "ray.serve.scripts"]
    deploy = [*serve, "deploy", path, "--address", address]
    assert handed == [[*serve, "run", path], deploy]

    status = 401
    assert command("deploy", path, "--address", address) == 2
    assert "asks for a token: set RAY_AUTH_MODE=token" in capsys.readouterr().err
    dashboard.shutdown()
    dashboard.server_close()
    assert command("deploy", path, "--address", address) == 2
    assert f"error: no Ray dashboard answers at {address}" in capsys.readouterr().err
    assert len(handed) == 2


def test_kuberay_deploys_the_same_app():
    manifest = yaml.safe_load((ROOT / "docs/kuberay/rayservice.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    deployed = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    check_serve_config(deployed)
    args = deployed["applications"][0]["args"]
    gpus = 0
    for model in ("llm", "clip"):
        assert args[model].pop("replicas") == [1, 4]
        gpus += 4 * args[model].pop("num_gpus")
    assert deployed.pop("proxy_location") == "EveryNode"
    assert deployed["http_options"].pop("host") == "0.0.0.0"
    shipped = serve_config()
    del shipped["proxy_location"], shipped["http_options"]["host"]
    assert deployed == shipped

    cluster = manifest["spec"]["rayClusterConfig"]
    assert cluster["enableInTreeAutoscaling"] is True
    (group,) = cluster["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (0, 4)
    (worker,) = group["template"]["spec"]["containers"]
    assert gpus == 4 * int(worker["resources"]["limits"]["nvidia.com/gpu"])
    assert worker["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": 8000}
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    assert "readinessProbe" not in head, "Serve's config waits for a head that is ready"
    assert manifest["spec"]["excludeHeadPodFromServeSvc"] is True
    for container in (head, worker):
        (token,) = container["env"]
        assert token["name"] == "RAY_SYNTH_SERVE_TOKEN" and "value" not in token
        assert token["valueFrom"]["secretKeyRef"]["name"]
    import ray

    assert cluster["rayVersion"].rsplit(".", 1)[0] == ray.__version__.rsplit(".", 1)[0]
