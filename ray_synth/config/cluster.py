"""Where a run is computed, and where it is tracked."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from ray_synth.config.section import Positive, Section, how


class NodeTypeConfig(Section):
    """Nodes of one kind, as many as an autoscaling cluster can have of them."""

    count: Positive = how()
    num_cpus: Annotated[float, Field(ge=0)] = how()
    num_gpus: Annotated[float, Field(ge=0)] = how(0)
    memory_gb: Annotated[float, Field(ge=0)] = how(0, description="of each node; 0: not known")
    accelerator: str = how("", description="the GPU's type: A10G, L4, A100-80G, H100, ...")


class ReachConfig(Section):
    """What an autoscaling cluster can grow to, nodes that run now included.

    Either types of nodes, or the cluster launcher's file.
    """

    nodes: list[NodeTypeConfig] = how(default_factory=list)
    file: str | None = how(None, description="the YAML file of `ray up`")

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, list):
            return {"nodes": value}
        return {"file": value} if isinstance(value, str) else value


class ClusterConfig(Section):
    """The Ray cluster: an address to join, or what to start on this machine."""

    address: str | None = how(None, description="default: RAY_ADDRESS, else a local Ray")
    num_cpus: Positive | None = how(None, description="logical CPUs of a local Ray")
    num_gpus: Annotated[int, Field(ge=0)] | None = how(None)
    max_reach: ReachConfig | None = how(
        None,
        description="what autoscaling can reach: a list of node types, or the path of the cluster "
        "launcher's file",
    )
    no_progress_timeout_s: Positive = how(900, description="a stalled pipeline is an error")
    price_per_gpu_hour: Annotated[float, Field(ge=0)] = how(
        0, description="for the cost of generation, in your currency"
    )
    price_per_cpu_hour: Annotated[float, Field(ge=0)] = how(0)


class TrackingConfig(Section):
    """MLflow."""

    enabled: bool = how(True)
    uri: str | None = how(None, description="default: sqlite in runs_dir")
    experiment: str = how("ray-synth")
