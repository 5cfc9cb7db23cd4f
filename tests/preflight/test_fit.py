"""The preflight: every known hang refused with its arithmetic and a fix that works, and no more."""

import re
import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import ROOT
from test_packing import reference

from ray_synth.config import ReachConfig, load_config
from ray_synth.preflight.check import check_budget, fit_stages
from ray_synth.preflight.demands import Sizes, demands
from ray_synth.preflight.packing import Nodes
from ray_synth.preflight.reach import Reach, added_nodes, reach_of_cluster_yaml
from ray_synth.preflight.smallest_fix import Change, changed, fits, fixes
from ray_synth.stages import STAGES

QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"


BASE = load_config(QUICKSTART)


def reach(*nodes, **facts):
    """Nodes given as (CPUs, GPUs) or `Nodes`."""
    return Reach(tuple(n if isinstance(n, Nodes) else Nodes(1, *n) for n in nodes), **facts)


def config_of(*overrides):
    return load_config(QUICKSTART, list(overrides))


def problems(config, found, sizes=None):
    return [fit.problem for fit in fit_stages(config, found, sizes) if fit.problem]


def refused(config, found, sizes=None):
    """The message of the refusal; each of its fixes is tried and must be enough."""
    with pytest.raises(ValueError, match="does not fit the cluster") as error:
        check_budget(config, found, sizes)
    for way in fixes(config, found, sizes):
        if way.startswith("--set"):
            changes = [word for word in shlex.split(way) if word != "--set"]
            local = [c for c in changes if c.startswith("cluster.num_cpus=")]
            fixed = load_config(
                QUICKSTART, [*overrides_of(config), *(c for c in changes if c not in local)]
            )
            bigger = Nodes(1, float(local[0].split("=")[1]), found.gpus) if local else None
            check_budget(fixed, reach(bigger) if bigger else found, sizes)
        else:
            number, cpus, gpus = re.match(
                r"add (\d+) nodes? with ([\d.]+) CPUs?(?: and ([\d.]+) GPUs?)?", way
            ).groups()
            more = Nodes(int(number), float(cpus), float(gpus or 0))
            check_budget(config, reach(*found.nodes, more), sizes)
    return str(error.value)


def overrides_of(config):
    """All that differs from the quickstart, as overrides."""
    from ray_synth.config import flatten

    base = flatten(load_config(QUICKSTART).model_dump(mode="json"))
    mine = flatten(config.model_dump(mode="json"))
    return [f"{key}={value}" for key, value in mine.items() if base.get(key) != value]


TRAIN_ONE = ("training.num_cpus=1",)


@pytest.mark.parametrize("generator", [1, 0.5])
def test_hang_training_and_generation_on_two_cpus(generator):
    config = config_of(*TRAIN_ONE, f"generation.num_cpus={generator}")
    text = refused(config, reach((2, 0)))
    assert (
        f"training needs {2 + generator:g} CPUs (training.num_workers 1 x 1 + "
        f"generation.pool.min_size 1 x {generator:g} + a read task 1 x 1), the cluster reaches 2: "
        f"{generator:g} too few" in text
    )
    assert "--set generation.num_cpus" in text or "--set training.num_cpus" in text
    assert problems(config_of(), reach((2, 0))) == []  # 0.5 + 0.5 + a read task


def test_hang_on_a_laptop_is_fixed_by_logical_cpus():
    config = config_of("training.num_cpus=1", "generation.num_cpus=1")
    text = refused(config, reach((2, 0), local=True))
    assert "The smallest change that fits: --set cluster.num_cpus=3" in text


def test_hang_no_gpu_left_for_the_pool():
    config = config_of("training.num_gpus=1", "generation.num_gpus=1", "training.num_workers=4")
    four = [(16, 1)] * 4
    text = refused(config, reach(*four))
    assert (
        "training needs 5 GPUs (training.num_workers 4 x 1 + generation.pool.min_size 1 x 1), "
        "the cluster reaches 4: 1 too few" in text
    )
    assert "add 1 node with 1 CPU and 1 GPU" in text or "add 1 node with 16 CPUs and 1 GPU" in text
    assert problems(config, reach(*four, (16, 1))) == []


def test_hang_a_gpu_pool_and_gpu_training_share_one_gpu_in_a_live_feed():
    config = config_of("training.num_gpus=1", "generation.num_gpus=1")
    text = refused(config, reach((8, 1)))
    assert "the cluster reaches 1: 1 too few" in text
    assert "--set training.feed=stored" in text
    stored = config_of("training.num_gpus=1", "generation.num_gpus=1", "training.feed=stored")
    assert problems(stored, reach((8, 1))) == []
    halves = config_of("training.num_gpus=0.5", "generation.num_gpus=0.5")
    assert problems(halves, reach((8, 1))) == []


def test_hang_serve_replicas_hold_what_training_needs():
    held = reach((0.9, 0), held_cpus=1.1, holders=("the Serve app 'disambiguation'",))
    text = refused(config_of(), held)
    assert "training needs 2 CPUs" in text
    assert "(1.1 more CPUs are held by the Serve app 'disambiguation')" in text


def test_hang_no_room_for_the_read_task():
    config = config_of("training.num_cpus=1", "generation.num_cpus=1")
    assert "a read task 1 x 1), the cluster reaches 2" in refused(config, reach((2, 0)))
    # In all there are 3 CPUs free, but nowhere a whole one.
    text = refused(config, reach((1.5, 0), (1.5, 0)))
    assert "training needs training.num_workers 1 x (1 CPUs)" in text
    assert "they cannot be shared out over 2 nodes with 1.5 CPUs" not in text
    assert "cannot be shared out over 1 node with 1.5 CPUs, 1 node with 1.5 CPUs" in text
    assert problems(config, reach((2, 0), (1, 0))) == []


def test_hang_a_pool_whose_min_size_cannot_start():
    config = config_of("generation.pool={min_size: 9, max_size: 16}", "generation.num_gpus=1")
    text = refused(config, reach(*[(8, 1)] * 8))
    assert "generation needs 9 GPUs (generation.pool.min_size 9 x 1)" in text
    assert "The smallest change that fits: --set generation.pool.min_size=8" in text


def test_hang_evaluation_actors_that_never_all_start():
    config = config_of("evaluation.num_actors=4", "evaluation.num_cpus=1")
    text = refused(config, reach((4, 0)))
    assert "evaluation needs 5 CPUs (evaluation.num_actors 4 x 1 + a read task 1 x 1)" in text


def test_hang_replicas_that_cannot_start():
    config = config_of("meaning.llm.num_gpus=1", "meaning.clip.num_gpus=0.5")
    text = refused(config, reach((8, 1)))
    assert "meaning needs 1.5 GPUs" in text
    assert "plan needs 1.5 GPUs" in text
    assert problems(config, reach((8, 2))) == []


def test_fractions_of_a_gpu_must_lie_on_one_gpu():
    config = config_of(
        "generation.num_gpus=0.6",
        "generation.pool={min_size: 3, max_size: 3}",
        "training.feed=stored",
    )
    assert "fractions of a GPU on one GPU" in refused(config, reach((16, 2)))
    assert problems(config, reach((16, 3))) == []


@pytest.mark.parametrize(
    ("workers", "gpus", "nodes", "way"),
    [
        (4, 1, [(16, 2)], "--set training.num_workers=2"),
        (2, 0.5, [(16, 1)], "--set training.num_workers=1"),
        (4, 0.5, [(16, 4)], "--set training.num_gpus=1"),
        ("[2, 4]", 0.5, [(16, 4)], "--set training.num_gpus=1"),
    ],
)
def test_training_workers_never_share_a_gpu(workers, gpus, nodes, way):
    """4 workers on 2 GPUs by halves were recommended, and NCCL refuses two ranks on one GPU."""
    config = config_of(
        f"training.num_workers={workers}", f"training.num_gpus={gpus}", "training.feed=stored"
    )
    text = refused(config, reach(*nodes))
    assert f"The smallest change that fits: {way}" in text.splitlines()
    assert "training.num_gpus=0." not in text
    if gpus < 1:
        assert "NCCL refuses two workers on one GPU" in text
    alone = config_of("training.num_gpus=0.5", "training.feed=stored")
    assert problems(alone, reach(*nodes)) == []


def test_a_gpu_and_a_half_is_no_number_of_gpus():
    config = config_of("generation.num_gpus=1.5")
    assert "asks for 1.5 GPUs each" in refused(config, reach((16, 8)))


def test_units_that_are_too_large_for_any_node():
    text = refused(config_of("training.num_cpus=8"), reach((4, 0), (4, 0), (4, 0), (4, 0)))
    assert "training: training.num_workers asks for 8 CPUs on one node, the largest has 4" in text


def test_sums_that_fit_on_no_shared_out_nodes():
    config = config_of("training.num_cpus=5", "training.num_workers=9")
    nodes = [(8, 0)] * 8  # 64 CPUs for 45 + 1.5, but only one worker per node
    assert "cannot be shared out" in refused(config, reach(*nodes))
    assert problems(config, reach(*nodes, (8, 0))) == []


def test_the_quickstart_fits_two_cpus_and_not_one():
    assert problems(config_of(), reach((2, 0))) == []
    text = refused(config_of(), reach((1, 0)))
    assert (
        "training.num_workers 1 x 0.5 + generation.pool.min_size 1 x 0.5 + a read task 1 x 1"
        in text
    )


def test_stages_that_ask_for_nothing_need_nothing():
    config = config_of(
        "meaning.enabled=false", "prompting.mix={plain: 1}", "generation.checks.policy=off",
        "training.feed=stored",
    )  # fmt: skip
    asked = demands(config, Sizes(real=50))
    assert [stage for stage in STAGES if not asked[stage]] == ["meaning", "plan", "quality"]
    assert [part.what for part in asked["training"]] == ["training.num_workers"]
    many = demands(config, Sizes(real=1_000_000))
    assert [part.what for part in many["training"]] == ["training.num_workers", "a read task"]


def test_only_the_stages_that_are_still_to_do_are_counted():
    config = config_of("training.num_workers=500")
    check_budget(config, reach((2, 0)), stages=("meaning", "plan", "generation"))
    with pytest.raises(ValueError, match="training needs"):
        check_budget(config, reach((2, 0)), stages=("training",))


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 2)), min_size=1, max_size=3),
    st.fixed_dictionaries(
        {
            "training.feed": st.sampled_from(["live", "stored"]),
            "training.num_workers": st.integers(1, 2),
            "training.num_cpus": st.sampled_from([0.5, 1, 2, 3]),
            "training.num_gpus": st.sampled_from([0, 0.4, 0.5, 1]),
            "generation.pool.min_size": st.integers(1, 2),
            "generation.num_cpus": st.sampled_from([0.5, 1, 2]),
            "generation.num_gpus": st.sampled_from([0, 0.6, 1]),
        }
    ),
)
@settings(max_examples=100, deadline=None)
def test_whatever_fits_is_admitted_and_nothing_else(nodes, chosen):
    config = changed(BASE, [Change(key, value, 0) for key, value in chosen.items()])
    found = reach(*nodes)
    fitting = all(reference(parts, found.nodes)[0] for parts in demands(config).values())
    training = config.training
    fitting &= training.num_workers == 1 or not 0 < training.num_gpus < 1  # NCCL refuses
    assert (not problems(config, found)) == fitting
    assert (problems(config, found) == []) == fits(config, found, None, STAGES)


@pytest.mark.parametrize(
    "name", ["imagenet_resnet50", "imagenet_convnext", "imagenet_vit_large", "imagenet_lt"]
)
def test_the_paper_configs_fit_the_cluster_that_ships(name):
    config = load_config(ROOT / "jobs" / "configs" / f"{name}.yaml")
    ships = reach_of_cluster_yaml((ROOT / "cluster.yaml").read_text())
    check_budget(config, ships)
    assert config.training.feed == "stored"  # images are made first, and training follows
    assert ships.gpus >= max(config.training.num_workers, config.generation.pool.max_size)
    given = config.cluster.max_reach
    nodes, _ = added_nodes(given, [])
    assert Reach(tuple(nodes)).cpus == ships.cpus
    assert Reach(tuple(nodes)).gpus == ships.gpus
    check_budget(config, Reach(tuple(nodes)))


def test_reach_can_be_types_or_the_launchers_file():
    file = str(ROOT / "cluster.yaml")
    types = [
        {"count": 9, "num_cpus": 8},
        {"count": 56, "num_cpus": 8, "num_gpus": 1, "accelerator": "A10G"},
    ]
    for form, name in ((file, "file"), (types, "nodes")):
        parsed = ReachConfig.model_validate(form)
        assert getattr(parsed, name)
        nodes, _ = added_nodes(parsed, [])
        assert sum(n.count * n.cpus for n in nodes) == 520
        assert sum(n.count * n.gpus for n in nodes) == 56
        # The head runs: it is one of the nodes, not one more.
        fewer, _ = added_nodes(parsed, [(8, 0)])
        assert sum(n.count * n.cpus for n in fewer) == 512
        assert sum(n.count * n.gpus for n in fewer) == 56


def test_a_config_takes_all_forms_of_reach_and_refuses_others(tmp_path):
    assert config_of("cluster.max_reach=cluster.yaml").cluster.max_reach.file == "cluster.yaml"
    types = config_of("cluster.max_reach=[{count: 2, num_cpus: 8}]").cluster.max_reach.nodes
    assert (types[0].count, types[0].num_cpus) == (2, 8)
    with pytest.raises(ValueError, match="did you mean 'num_gpus'"):
        config_of("cluster.max_reach=[{count: 2, num_cpus: 8, num_gpu: 1}]")
    with pytest.raises(ValueError, match="no such file 'nowhere.yaml'"):
        added_nodes(ReachConfig(file="nowhere.yaml"), [])
    other = tmp_path / "other.yaml"
    other.write_text("a: 1")
    with pytest.raises(ValueError, match="not a cluster launcher's file"):
        added_nodes(ReachConfig(file=str(other)), [])


def test_max_workers_bounds_what_all_types_add():
    text = """
head_node_type: head
max_workers: 3
available_node_types:
  head: {resources: {CPU: 4}}
  small: {resources: {CPU: 4}, max_workers: 3}
  large: {resources: {CPU: 16}, max_workers: 2}
"""
    whole = reach_of_cluster_yaml(text)
    three_large = config_of("training.num_workers=3", "training.num_cpus=16")
    assert problems(three_large, whole)
    six = config_of("training.num_workers=4", "training.num_cpus=4", "generation.num_cpus=16")
    assert problems(six, whole) == []
    seven = config_of(
        "training.num_workers=6", "training.num_cpus=4", "generation.num_cpus=16",
        "generation.pool={min_size: 2, max_size: 2}",
    )  # fmt: skip
    assert problems(seven, whole)


def test_a_stage_that_needs_luck_is_admitted_and_said_so(caplog):
    config = config_of("training.num_cpus=4", "generation.num_cpus=2")
    # The generator on the larger node would leave the worker without a place.
    check_budget(config, reach((4, 0), (3, 0)))
    assert "training fits the cluster only if Ray places its units well" in caplog.text


def test_mends_of_large_demands_are_found_soon():
    config = config_of("training.num_workers=500", "generation.pool={min_size: 48, max_size: 64}")
    text = refused(config, reach((1, 0)))
    assert "add 1 node" in text or "nodes" in text
