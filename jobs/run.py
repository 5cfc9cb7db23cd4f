"""`ray-synth run` as a job: `ray job submit --working-dir . -- python jobs/run.py ...`.

Every other verb: `ray job submit --working-dir . -- python -m ray_synth.cli VERB ...`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the uploaded copy, not another

from ray_synth.cli.command import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
