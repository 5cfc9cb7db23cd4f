"""The preflight: sums, refusals, and the cluster file that ships."""

import pytest
from samples import ROOT

from ray_synth.budget import Capacity, capacity_of_cluster_yaml, check_budget, demands, shortfalls
from ray_synth.config import load_config

QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"


def capacity(cpus, gpus=0.0):
    return Capacity(cpus, gpus, cpus, gpus)


def test_the_quickstart_fits_two_cpus_and_not_one():
    config = load_config(QUICKSTART)
    assert shortfalls(config, capacity(2)) == []
    with pytest.raises(ValueError, match="does not fit") as error:
        check_budget(config, capacity(1))
    text = str(error.value)
    assert "training needs 2 CPUs" in text
    assert (
        "training.num_workers 1 x 0.5 + generation.pool.min_size 1 x 0.5 + a read task 1 x 1"
        in text
    )


def test_no_gpu_left_for_the_pool_is_refused():
    config = load_config(
        QUICKSTART, ["training.num_gpus=1", "generation.num_gpus=1", "training.num_workers=4"]
    )
    lines = shortfalls(config, capacity(64, 4))
    assert lines == [
        "training needs 5 GPUs (training.num_workers 4 x 1 + generation.pool.min_size 1 x 1), "
        "the cluster reaches 4: 1 too few"
    ]
    assert shortfalls(config, capacity(64, 5)) == []


def test_one_unit_must_fit_one_node():
    config = load_config(QUICKSTART, ["training.num_cpus=8"])
    lines = shortfalls(config, Capacity(16, 0, 4, 0))
    assert any("on one node, the largest has 4" in line for line in lines)


def test_stored_training_does_not_count_the_pool():
    config = load_config(QUICKSTART, ["training.feed=stored"])
    assert [part.what for part in demands(config)["training"]] == [
        "training.num_workers",
        "a read task",
    ]


@pytest.mark.parametrize("name", ["imagenet_resnet50", "imagenet_convnext"])
def test_the_paper_configs_fit_the_cluster_that_ships(name):
    config = load_config(ROOT / "jobs" / "configs" / f"{name}.yaml")
    reach = capacity_of_cluster_yaml((ROOT / "cluster.yaml").read_text())
    assert shortfalls(config, reach) == []
    assert reach.gpus >= config.training.num_workers + config.generation.pool.max_size
    given = config.cluster.max_reach
    assert given is not None
    assert (given.num_cpus, given.num_gpus) == (reach.cpus, reach.gpus)
    assert (given.node_cpus, given.node_gpus) == (reach.node_cpus, reach.node_gpus)
