"""A driver that makes a plan's images, to be killed by tests: drive.py RUN_FOLDER CONFIG_JSON."""

import sys

from ray_synth.cluster.connection import connect
from ray_synth.config import ClusterConfig, GenerationConfig
from ray_synth.generation.maker import GenerationJob
from ray_synth.generation.store import ImageStore
from ray_synth.generation.stream import make_images
from ray_synth.prompting.plan_file import PlanFile
from ray_synth.storage.folder import Folder


def main(run: str, config: str) -> None:
    folder = Folder(run)
    settings = GenerationConfig.model_validate_json(config)
    with connect(ClusterConfig(num_cpus=4)):
        make_images(GenerationJob(settings, PlanFile(folder), ImageStore(folder.child("images"))))


if __name__ == "__main__":
    main(*sys.argv[1:])
