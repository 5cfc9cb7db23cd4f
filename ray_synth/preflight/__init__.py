"""Before a run: what it asks of the cluster against what there is, and what it will take.

Config and cluster in; a table, a refusal with its arithmetic, or an estimate out.
"""

from ray_synth.preflight.check import check_budget, preflight
from ray_synth.preflight.reach import Reach, cluster_reach

__all__ = ["Reach", "check_budget", "cluster_reach", "preflight"]
