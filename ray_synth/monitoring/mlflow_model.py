"""A trained arm as an MLflow model: uint8 images in, class names and probabilities out.

"Models from code": MLflow keeps `mlflow_classifier.py` and the safetensors file; nothing is pickled.
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

from ray_synth.storage.folder import Folder

CODE = Path(__file__).with_name("mlflow_classifier.py")
NEEDS = ("torch", "torchvision", "timm", "safetensors", "numpy", "pandas")


def log_model(handle: dict[str, str], folder: Folder, arm: str) -> str:
    """Log `models/<arm>` with its main BN to the run; the model's uri, for `mlflow.pyfunc.load_model`.

    Args:
        handle: the tracking uri and the run's id.
        folder: the run's directory.
    """
    import mlflow
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, Schema, TensorSpec

    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))]),
        outputs=Schema([ColSpec("string", "class_name"), ColSpec("double", "probability")]),
    )
    card: dict[str, Any] = folder.read_json(f"models/{arm}.json")
    card.pop("curve", None)
    with tempfile.TemporaryDirectory() as local:
        weights, about = Path(local) / "model.safetensors", Path(local) / "card.json"
        weights.write_bytes(folder.read_bytes(f"models/{arm}.main.safetensors"))
        about.write_text(json.dumps(card))
        mlflow.set_tracking_uri(handle["uri"])
        with mlflow.start_run(run_id=handle["run_id"]):
            logged = mlflow.pyfunc.log_model(
                name=arm,
                python_model=str(CODE),
                artifacts={"weights": str(weights), "card": str(about)},
                signature=signature,
                pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in NEEDS],
            )
    return logged.model_uri
