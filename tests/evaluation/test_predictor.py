"""One actor of a test: what it says of a batch, in either precision."""

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save
from samples import encoded

from ray_synth.config import EvaluationConfig
from ray_synth.evaluation.accuracy import VERDICT
from ray_synth.evaluation.predictor import Predictor, prepare
from ray_synth.storage.folder import Folder

COUNT = 12


@pytest.fixture
def folder(tmp_path) -> Folder:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    found = Folder(tmp_path)
    found.write_bytes("models/arm.main.safetensors", save(model.state_dict(), {"format": "pt"}))
    card = {
        "model": "test_resnet", "model_kwargs": {}, "class_names": ["a", "b", "c"],
        "image_size": 32, "crop_pct": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3,
        "interpolation": "bilinear", "bns": ["main"],
    }  # fmt: skip
    found.write_json("models/arm.json", card)
    return found


def block() -> dict[str, np.ndarray]:
    """Images as Ray Data gives them; the fourth is no image."""
    images = [encoded(number) for number in range(COUNT)]
    images[3] = b"broken"
    return {
        "image": np.array(images, dtype=object),
        "class_index": np.arange(COUNT) % 3,
        "image_id": np.array([f"i{number}" for number in range(COUNT)]),
        "test_set": np.array(["x"] * COUNT),
    }


def verdicts(folder: Folder, batch: dict, **settings) -> np.ndarray:
    predictor = Predictor(folder, ["arm"], 10**6, config=EvaluationConfig(**settings))
    output = predictor(batch)
    assert output["corrupt"].tolist() == [number == 3 for number in range(COUNT)]
    assert not output["model/arm"][3].any()
    return output["model/arm"]


def test_images_decoded_before_or_here_get_the_same_verdicts(folder):
    card = folder.read_json("models/arm.json")
    decoded = prepare(block(), card=card, max_pixels=10**6)
    assert "image" not in decoded
    assert decoded["pixels"].shape == (COUNT, 3, 32, 32)
    assert decoded["pixels"].dtype == np.uint8
    assert np.array_equal(verdicts(folder, decoded), verdicts(folder, block()))


def test_half_precision_is_an_option_and_full_the_default(folder):
    full = verdicts(folder, block())
    assert np.array_equal(full, verdicts(folder, block(), dtype="float32"))
    half = verdicts(folder, block(), dtype="bfloat16")
    loss = VERDICT.index("nll")
    assert not np.array_equal(half, full)
    assert np.allclose(half[:, loss], full[:, loss], atol=0.05)
