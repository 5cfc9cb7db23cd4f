"""The typed configuration of a run: YAML in, a validated and frozen `Config` out.

A module for each section; the names that others use are these.
"""

from ray_synth.config.cluster import ClusterConfig, ReachConfig
from ray_synth.config.data import IN_DOMAIN, ClassInfo, DataConfig, SourceConfig, TakeOverConfig
from ray_synth.config.earlier import RETIRED, of_today
from ray_synth.config.generation import (
    AdapterConfig,
    GenerationConfig,
    PoolConfig,
    QualityConfig,
    ReferenceConfig,
    TuningConfig,
)
from ray_synth.config.loading import load_config
from ray_synth.config.meaning import ClipConfig, LlmConfig, MeaningConfig
from ray_synth.config.parsing import parse_config
from ray_synth.config.prompting import (
    MOST_CANDIDATES,
    Kind,
    PracticeConfig,
    PracticeGuidanceConfig,
    PracticeSelectConfig,
    PromptingConfig,
)
from ray_synth.config.recipes import load_recipe, recipe_names
from ray_synth.config.recorded import kept_config, load_run_config, read_run_config, run_versions
from ray_synth.config.section import Positive, Replicas, Section
from ray_synth.config.studies import CorruptionConfig
from ray_synth.config.training import BASELINES, EvaluationConfig, OptimizerConfig, TrainingConfig
from ray_synth.config.whole import Config, changes_result, default_of, flatten

__all__ = [
    "BASELINES",
    "IN_DOMAIN",
    "MOST_CANDIDATES",
    "RETIRED",
    "AdapterConfig",
    "ClassInfo",
    "ClipConfig",
    "ClusterConfig",
    "Config",
    "CorruptionConfig",
    "DataConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "Kind",
    "LlmConfig",
    "MeaningConfig",
    "OptimizerConfig",
    "PoolConfig",
    "Positive",
    "PracticeConfig",
    "PracticeGuidanceConfig",
    "PracticeSelectConfig",
    "PromptingConfig",
    "QualityConfig",
    "ReachConfig",
    "ReferenceConfig",
    "Replicas",
    "Section",
    "SourceConfig",
    "TakeOverConfig",
    "TrainingConfig",
    "TuningConfig",
    "changes_result",
    "default_of",
    "flatten",
    "kept_config",
    "load_config",
    "load_recipe",
    "load_run_config",
    "of_today",
    "parse_config",
    "read_run_config",
    "recipe_names",
    "run_versions",
]
