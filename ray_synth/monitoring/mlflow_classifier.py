"""The code that MLflow keeps with a logged classifier and runs to load it; needs timm, not ray-synth."""

import json
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import timm
import torch
from mlflow.pyfunc import PythonModel
from safetensors.torch import load_file
from torchvision.transforms import v2


class Classifier(PythonModel):
    """A timm model with its own way of resizing and normalising images."""

    def load_context(self, context):
        self.card = json.loads(Path(context.artifacts["card"]).read_text())
        self.model = timm.create_model(
            self.card["model"],
            num_classes=len(self.card["class_names"]),
            **self.card["model_kwargs"],
        )
        self.model.load_state_dict(load_file(context.artifacts["weights"]))
        self.model.eval()
        size = self.card["image_size"]
        self.transform = v2.Compose(
            [
                v2.Resize(
                    round(size / self.card["crop_pct"]),
                    interpolation=v2.InterpolationMode(self.card["interpolation"]),
                    antialias=True,
                ),
                v2.CenterCrop(size),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(self.card["mean"], self.card["std"]),
            ]
        )

    def predict(self, context, model_input: np.ndarray, params=None) -> pd.DataFrame:
        """(n, height, width, 3) uint8 RGB to one row per image: the best class and its probability."""
        images = torch.from_numpy(np.array(model_input, dtype=np.uint8)).permute(0, 3, 1, 2)
        height, width = images.shape[2:]
        most = 16 * min(
            height, width
        )  # scaled by the shorter side, a thin picture would be endless
        images = v2.functional.center_crop(images, [min(height, most), min(width, most)])
        with torch.inference_mode():
            probabilities = self.model(self.transform(images)).softmax(dim=1)
        top, best = probabilities.max(dim=1)
        names = [self.card["class_names"][at] for at in best.tolist()]
        return pd.DataFrame({"class_name": names, "probability": top.double().numpy()})


mlflow.models.set_model(Classifier())
