"""The image-text model that judges meanings against images.

PIL images or texts go in, unit-norm float32 embeddings come out; any open_clip model will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_synth.config import ClipConfig
from ray_synth.data.images import not_too_thin
from ray_synth.device import pick_device, pick_dtype
from ray_synth.embedded import clip_folder
from ray_synth.errors import UserError, first_line
from ray_synth.storage.checkpoints import check_open_clip, no_code
from ray_synth.storage.hub import fetch, open_clip_repo

if TYPE_CHECKING:
    from PIL import Image


# "the number 7" and "the number seven" are 0.95 to 0.98 alike to the embedded model, neighbours among
# the numbers 0.85 at most; models trained on photographs put whole scenes closer together.
EMBEDDED_MERGE, MERGE = 0.9, 0.98


class ClipModel:
    """An open_clip model with its own preprocessing and tokenizer.

    Args:
        model: "embedded", an open_clip model name, "hf-hub:ID" (or ID@REVISION), or "local-dir:FOLDER".
        pretrained: open_clip's tag of the weights, for a model name.
        device: "auto" or a torch device.
        dtype: "auto" is float32 on a CPU and half precision elsewhere.
        num_threads: CPU threads of torch in this process; None leaves them.
        max_batch_size: images or texts in one forward.

    Raises:
        UserError: a model name comes without `pretrained`, so its weights would be random; or it
            cannot be loaded, or its configuration has keys that are not listed.
    """

    def __init__(
        self,
        model: str = "embedded",
        pretrained: str | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        num_threads: int | None = None,
        max_batch_size: int = 64,
    ) -> None:
        import open_clip
        import torch

        if num_threads is not None:
            torch.set_num_threads(num_threads)
        if pretrained is None and not model.startswith(("embedded", "local-dir:", "hf-hub:")):
            raise UserError(
                f"clip.model {model!r} needs clip.pretrained (a tag such as 'laion2b_s34b_b79k'); "
                "without it the weights would be random"
            )
        self.name = model
        self.device = pick_device(device)
        self.dtype = pick_dtype(
            dtype, self.device, gpu="float16"
        )  # bfloat16 moves cosines by 0.002
        self.max_batch_size = max_batch_size
        source = f"local-dir:{clip_folder()}" if model == "embedded" else model
        if model.startswith("hf-hub:"):  # of which open_clip itself takes no revision
            source = f"local-dir:{fetch(open_clip_repo(model))}"
        try:
            no_code()  # of text towers that open_clip has transformers load
            if source.startswith("local-dir:"):
                check_open_clip(source.removeprefix("local-dir:"))
            # in float32 first: the packed weights are float8, which open_clip casts while loading
            network, self._preprocess = open_clip.create_model_from_pretrained(
                source, pretrained=pretrained
            )
            self._tokenizer: Any = open_clip.get_tokenizer(source)
        except UserError:
            raise
        except Exception as error:  # of the hub, a file, open_clip or torch
            raise UserError(
                f"cannot load the CLIP model {model!r}, pretrained {pretrained!r} ({first_line(error)}): "
                "clip.model takes 'embedded', a model name and clip.pretrained tag that open_clip "
                "lists, hf-hub:ID that this machine can reach, or local-dir:FOLDER"
            ) from None
        self._model: Any = network.to(device=self.device, dtype=self.dtype).eval()

    @property
    def merge_similarity(self) -> float:
        """Cosine similarity from which two phrases are taken to mean the same."""
        return EMBEDDED_MERGE if self.name == "embedded" else MERGE

    def warm_up(self) -> None:
        """One image and one text through the model, so that the first request does not pay for it."""
        from PIL import Image

        self.encode_images([Image.new("RGB", (32, 32))])
        self.encode_texts(["warm up"])

    @property
    def context_length(self) -> int:
        """Tokens of a text that the model sees, start and end marks included."""
        return int(self._tokenizer.context_length)

    def count_tokens(self, text: str) -> int:
        """Tokens of `text` before any truncation, start and end marks included."""
        # tokenised into a buffer that is surely long enough; padding is 0, which open_clip's byte
        # pair vocabularies also give to "!", so trailing zeros are counted off, not all zeros
        row = self._tokenizer([text], context_length=4 + 4 * len(text.encode()))[0].tolist()
        pad = getattr(getattr(self._tokenizer, "tokenizer", None), "pad_token_id", None) or 0
        while row and row[-1] == pad:
            row.pop()
        return len(row)

    def encode_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Embed RGB images of any size: (n, embed_dim) float32, each row of length 1."""
        return self._in_batches(
            list(images), lambda batch: self._forward([self.preprocess(image) for image in batch])
        )

    def preprocess(self, image: Image.Image) -> Any:
        """The model's own input for an RGB image: a (3, side, side) float32 tensor, on the CPU."""
        return self._preprocess(not_too_thin(image).convert("RGB"))

    @property
    def image_size(self) -> int:
        """The longer side of the model's input: twice this is enough of any picture."""
        size = self._model.visual.image_size
        return size if isinstance(size, int) else max(size)

    def encode_pixels(self, pixels: Sequence[Any]) -> np.ndarray:
        """As `encode_images`, of what `preprocess` gave."""
        return self._in_batches(list(pixels), self._forward)

    def _forward(self, batch: list[Any]) -> Any:
        import torch

        pixels = torch.stack(batch)
        return self._model.encode_image(pixels.to(self.device, self.dtype))

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts: (n, embed_dim) float32, each row of length 1; long texts are truncated."""
        import torch

        def forward(batch: list[str]) -> torch.Tensor:
            return self._model.encode_text(self._tokenizer(batch).to(self.device))

        return self._in_batches(list(texts), forward)

    def _in_batches(self, items: list[Any], forward: Any) -> np.ndarray:
        import torch

        parts = []
        with torch.inference_mode():
            for start in range(0, max(len(items), 1), self.max_batch_size):
                batch = items[start : start + self.max_batch_size]
                if batch:
                    # in float32: half precision leaves lengths of 0.997
                    rows = torch.nn.functional.normalize(forward(batch).float(), dim=-1)
                    parts.append(rows.cpu().numpy())
        if not parts:
            return np.zeros((0, self._embed_dim()), np.float32)
        return np.concatenate(parts)

    def _embed_dim(self) -> int:
        return int(self.encode_texts([""]).shape[1])


def load_clip(config: ClipConfig, *, num_threads: int | None = None) -> ClipModel:
    """The CLIP that a config names."""
    return ClipModel(
        config.model,
        config.pretrained,
        device=config.device,
        dtype=config.dtype,
        num_threads=num_threads,
        max_batch_size=config.max_batch_size,
    )
