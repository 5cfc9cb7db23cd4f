"""The preflight on a real cluster: what others hold, what comes free, what a study would start."""

import time

import pytest
from samples import ROOT

from ray_synth.config import load_config
from ray_synth.preflight import preflight
from ray_synth.preflight.reach import cluster_reach

pytestmark = pytest.mark.slow
QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("ray_synth.preflight.check.PATIENCE_S", 2.0)


def hold(ray, cpus):
    """An actor that somebody else started."""

    class Holder:
        def ready(self):
            return True

    actor = ray.remote(num_cpus=cpus)(Holder).remote()
    assert ray.get(actor.ready.remote(), timeout=120)
    return actor


def wait_until(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_what_an_actor_holds_is_not_free(local_ray, impatient):
    config = load_config(QUICKSTART)
    assert preflight(config).cpus == 4
    actor = hold(local_ray, 3)
    wait_until(lambda: cluster_reach(config).held_cpus == 3)
    with pytest.raises(ValueError, match=r"reaches 1 \(3 more CPUs are held by other jobs"):
        preflight(config)
    local_ray.kill(actor)
    wait_until(lambda: cluster_reach(config).held_cpus == 0)
    preflight(config)


def test_what_is_about_to_be_let_go_is_waited_for(local_ray):
    config = load_config(QUICKSTART)
    actor = hold(local_ray, 3)
    wait_until(lambda: cluster_reach(config).held_cpus == 3)
    local_ray.kill(actor)
    preflight(config)


def test_a_serve_app_is_named_and_ones_own_is_taken_over(local_ray, impatient):
    from ray import serve

    from ray_synth.service.apps import app_name

    @serve.deployment(name="LLM", ray_actor_options={"num_cpus": 2.5})
    class Held:
        def __call__(self):
            return 1

    config = load_config(QUICKSTART, ["meaning.llm.num_cpus=2.5"])
    serve.start(proxy_location="Disabled")
    try:
        serve.run(Held.bind(), name="somebodys", route_prefix=None)
        wait_until(lambda: cluster_reach(config).held_cpus == 2.5)
        assert cluster_reach(config).holders == ("the Serve app 'somebodys'",)
        with pytest.raises(ValueError, match="held by the Serve app 'somebodys'"):
            preflight(config)
        serve.delete("somebodys")
        serve.run(Held.bind(), name=app_name("quickstart"), route_prefix=None)
        wait_until(lambda: cluster_reach(config).held_cpus == 0)
        preflight(config)
    finally:
        serve.shutdown()


def test_each_driver_has_an_app_of_its_own_and_leaves_serve_to_others(local_ray):
    from ray import serve

    from ray_synth.service.apps import (
        APP_NAME,
        app_name,
        remove_left_behind,
        serve_is_running,
        take_down,
    )

    @serve.deployment(name="LLM", ray_actor_options={"num_cpus": 0})
    class Answers:
        def __init__(self, text):
            self.text = text

        def __call__(self):
            return self.text

    def deploy(name):
        return serve.run(Answers.bind(name), name=name, route_prefix=None)

    serve.start(proxy_location="Disabled")
    try:
        own, dead = app_name("q"), f"{APP_NAME}-q-ffffffff"
        theirs = deploy("somebodys")
        deploy(dead)
        handle = deploy(own)
        remove_left_behind()
        assert set(serve.status().applications) == {own, "somebodys"}, "a dead driver's is gone"
        assert (handle.remote().result(), theirs.remote().result()) == (own, "somebodys")
        take_down(own)
        assert theirs.remote().result() == "somebodys", "Serve is not taken from under others"
        take_down("somebodys")
        assert not serve_is_running()
    finally:
        serve.shutdown()


def test_a_study_that_does_not_fit_starts_nothing(local_ray, tmp_path):
    from ray_synth.studies.study import run_studies

    few = [f"runs_dir={tmp_path}", "studies.seeds=[0]", "tracking.enabled=false"]
    for settings, says in (
        (["generation.num_cpus=64"], "generation needs 65 CPUs .*generation.pool.min_size 1 x 64"),
        (["studies.parallel=40"], "The most that fits: --set studies.parallel=6"),
    ):
        with pytest.raises(ValueError, match=says):
            run_studies("ablation", load_config(QUICKSTART, [*few, *settings]))
        assert list(tmp_path.iterdir()) == []
