"""What text becomes before it meets the denoiser: each distinct prompt is encoded once and kept.

In: a loaded diffusers pipeline and prompts. Out: keyword arguments for its call, embeddings where its
family is known and plain strings where it is not.

Families with a language model for their text encoder (Qwen-Image, Z-Image, Kandinsky 5) have
embeddings as long as their prompt. In a batch they are padded to its longest prompt: pixels would depend
on the other prompts, and each length would be compiled anew. Such families get strings, one at a time.
"""

from __future__ import annotations

import inspect
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("ray_synth")
Encoded = dict[str, "Tensor"]

SHORT = "a cat"
LONG = "a photo of a large red cat that sits on a small chair beside the window, and of a bird"
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
DIMENSIONS = {"prompt_embeds": 3, "pooled_prompt_embeds": 2, "prompt_attention_mask": 2}
_EMBEDS = frozenset({"prompt_embeds"})
_POOLED = frozenset({"prompt_embeds", "pooled_prompt_embeds"})
_MASKED = frozenset({"prompt_embeds", "prompt_attention_mask"})
# What `encode_prompt` returns, by the embeddings that the call takes and by whether `encode_prompt`
# takes a negative prompt. A test holds this against the source of every pipeline in diffusers; ""
# is an item that the call works out again.
RETURNS: dict[tuple[frozenset[str], bool], tuple[str, ...]] = {
    (_EMBEDS, True): ("prompt_embeds", "negative_prompt_embeds"),
    (_POOLED, True): (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
    (_POOLED, False): ("prompt_embeds", "pooled_prompt_embeds", ""),
    (_MASKED, True): (
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    ),
    (_MASKED, False): ("prompt_embeds", "prompt_attention_mask"),
}


class PromptEncoder:
    """The text encoders of one pipeline, and a bounded memory of what they said.

    An embedding depends on its own text alone: text encoders round otherwise in batches of other
    sizes, so every forward pass has exactly `chunk` rows, the last one repeated where fewer are new.

    Args:
        pipeline: any loaded diffusers pipeline that takes prompts.
        capacity: distinct texts kept, on the pipeline's device. Two bytes per number make one 0.1 MB
            in Stable Diffusion 1.5, 0.3 MB in SDXL, 2.7 MB in SD 3, and 4 MB in Flux.
        chunk: texts per forward pass. 1 wastes nothing; more is faster where many prompts are new.
        context: tokens that the text encoder reads; 0: the default of the pipeline's call.
        guided_above: the guidance scale above which the pipeline makes a second, negative pass.

    Attributes:
        varies: whether embeddings are as long as their prompt, so that each needs a call of its own.

    Raises:
        ValueError: `capacity` or `chunk` is below 1.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        capacity: int = 256,
        chunk: int = 1,
        context: int = 0,
        guided_above: float = 1.0,
    ) -> None:
        if capacity < 1 or chunk < 1:
            raise ValueError(f"capacity {capacity} and chunk {chunk} must be at least 1")
        self.pipeline = pipeline
        self.capacity = capacity
        self.chunk = chunk
        self.guided_above = guided_above
        self._call = inspect.signature(type(pipeline).__call__).parameters
        self._lengths = {"max_sequence_length": context} if context else {}
        self._returns = returned_names(pipeline)
        self.varies = self._varies()
        if self.varies:
            self._returns = None
        self._kept: OrderedDict[tuple[bool, str], Encoded] = OrderedDict()
        self._warned = False

    @property
    def caches(self) -> bool:
        """Whether prompts are encoded here; otherwise the pipeline is given strings."""
        return self._returns is not None

    def arguments(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str],
        guidance_scale: float,
        *,
        embedded: bool = True,
    ) -> dict[str, Any]:
        """Keyword arguments for `pipeline(**arguments)`, without the guidance scale itself.

        Args:
            prompts: one per image.
            negative_prompts: one per image. They matter with guidance alone. In embeddings "" is no
                negative prompt, which SDXL has as zeros; where strings are passed, it is "".
            guidance_scale: above `guided_above`, the pipeline makes a second, negative pass.
            embedded: False for strings in every family.

        Returns:
            Embeddings with n rows, on the pipeline's device; or lists of n strings.
        """
        guided = guidance_scale > self.guided_above
        if self._returns is None or not embedded:
            return self._strings(prompts, negative_prompts, guided)
        takes_negative = "negative_prompt_embeds" in self._returns and (
            "negative_prompt_embeds" in self._call
        )
        if guided and not takes_negative and any(negative_prompts):
            self._warn("takes no negative prompts: they are left out")
        try:
            stacked = _stack(self._encoded(prompts, negative=False))
            if guided and takes_negative:
                negative = _stack(self._encoded(negative_prompts, negative=True))
                _check_pairs(stacked, negative)
                stacked |= negative
        except _UnknownFamily as error:
            self._returns = None
            self._kept.clear()
            self._warn(f"encodes prompts in a way of its own ({error}): none are kept")
            return self._strings(prompts, negative_prompts, guided)
        if "negative_prompt_embeds" in stacked and "negative_prompt" in self._call:
            return {**stacked, "negative_prompt": None}  # PixArt's own default forbids embeddings
        return dict(stacked)

    def _strings(
        self, prompts: Sequence[str], negative_prompts: Sequence[str], guided: bool
    ) -> dict[str, Any]:
        arguments: dict[str, Any] = {"prompt": list(prompts)}
        if guided and "negative_prompt" in self._call:
            arguments["negative_prompt"] = list(negative_prompts)
        elif guided and any(negative_prompts):
            self._warn("takes no negative prompts: they are left out")
        return arguments | {n: v for n, v in self._lengths.items() if n in self._call}

    def _varies(self) -> bool:
        """Whether a long prompt has another shape than a short one; no where it cannot be asked."""
        if not hasattr(self.pipeline, "encode_prompt"):
            return False
        try:
            return _shapes(self._ask([SHORT], negative=False)) != _shapes(
                self._ask([LONG], negative=False)
            )
        except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
            log.info(
                "%s cannot be asked for a prompt alone: %s", type(self.pipeline).__name__, error
            )
            return False

    def _encoded(self, texts: Sequence[str], *, negative: bool) -> list[Encoded]:
        """The embeddings of each text, each with one row."""
        found: dict[str, Encoded] = {}
        new: list[str] = []
        for text in dict.fromkeys(texts):
            kept = self._kept.get((negative, text))
            if kept is None:
                new.append(text)
            else:
                found[text] = kept
        # No negative prompt is not an empty one (SDXL has zeros for it): it has a pass of its own.
        alone = [[""]] if negative and "" in new else []
        rest = [text for text in new if not (negative and text == "")]
        chunks = [rest[at : at + self.chunk] for at in range(0, len(rest), self.chunk)]
        for chunk in alone + chunks:
            found |= zip(chunk, self._encode(chunk, negative=negative), strict=True)
        for text, encoded in found.items():
            self._kept[negative, text] = encoded
            self._kept.move_to_end((negative, text))  # the least recently used goes first
        while len(self._kept) > self.capacity:
            self._kept.popitem(last=False)
        return [found[text] for text in texts]

    def _encode(self, texts: list[str], *, negative: bool) -> list[Encoded]:
        """One forward pass over at most `chunk` texts, as the pipeline's own call makes it."""
        import torch

        assert self._returns is not None
        padded = texts + [texts[-1]] * (self.chunk - len(texts))
        returned = self._ask(padded, negative=negative, none=negative and texts == [""])
        if not isinstance(returned, tuple) or len(returned) != len(self._returns):
            raise _UnknownFamily("it returns another number of things")
        named = {
            name: value
            for name, value in zip(self._returns, returned, strict=True)
            if name and name.startswith("negative_") is negative
        }
        for name, value in named.items():
            dimensions = DIMENSIONS[name.removeprefix("negative_")]
            if not isinstance(value, torch.Tensor) or value.shape[:1] != (self.chunk,):
                raise _UnknownFamily(f"{name} is not a tensor with one row per prompt")
            if value.ndim != dimensions:
                raise _UnknownFamily(f"{name} has {value.ndim} dimensions, not {dimensions}")
        # Cloned, so that a row does not keep its whole chunk in memory.
        return [
            {name: value[row : row + 1].clone() for name, value in named.items()}
            for row in range(len(texts))
        ]

    def _ask(self, texts: list[str], *, negative: bool, none: bool = False) -> Any:
        """What `encode_prompt` returns for texts, or as negative prompts for them.

        Args:
            none: the negative prompts are the pipeline's own for none.
        """
        import torch

        given: dict[str, Any] = {
            "prompt": list(texts),  # some pipelines write into it
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": negative,
            "device": self.pipeline._execution_device,
        }
        if negative:
            given["negative_prompt"] = self._call["negative_prompt"].default if none else texts
        encode = inspect.signature(self.pipeline.encode_prompt).parameters
        for name in encode.keys() - given.keys() - set(self._returns or ()):
            # Defaults differ between the two (clean_caption, max_sequence_length): the call's hold.
            if name in self._lengths:
                given[name] = self._lengths[name]
            elif name in self._call and name != "kwargs":
                given[name] = self._call[name].default
            elif encode[name].default is inspect.Parameter.empty and name != "kwargs":
                given[name] = None
        given = {name: value for name, value in given.items() if name in encode}
        with torch.no_grad(), _silent():
            return self.pipeline.encode_prompt(**given)

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("%s %s", type(self.pipeline).__name__, what)


class _UnknownFamily(Exception):
    """What `encode_prompt` returns is not what its signature made believe."""


def _stack(rows: list[Encoded]) -> Encoded:
    """Embeddings of one row each, as one batch."""
    import torch

    for name, value in rows[0].items():
        if any(row[name].shape != value.shape for row in rows):
            raise _UnknownFamily(f"{name} is as long as its prompt")
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _check_pairs(positive: Encoded, negative: Encoded) -> None:
    for name, value in positive.items():
        if negative[f"negative_{name}"].shape != value.shape:
            raise _UnknownFamily(f"{name} is as long as its prompt")


def returned_names(pipeline: Any) -> tuple[str, ...] | None:
    """The names of what `pipeline.encode_prompt` returns; None for a family that is not known.

    Only diffusers' own code is known: a class from elsewhere may mean other things by these names.
    """
    kind = pipeline if isinstance(pipeline, type) else type(pipeline)
    encode = getattr(kind, "encode_prompt", None)
    if encode is None or not _is_diffusers(encode) or not _is_diffusers(kind.__call__):
        return None
    parts = inspect.signature(kind).parameters
    if any("tokenizer" in part and part not in TOKENIZERS for part in parts):
        return None  # another model reads the prompt as well, such as a prior
    call = inspect.signature(kind.__call__).parameters
    takes = frozenset(
        name
        for name in call
        if ("embeds" in name or "mask" in name) and "prompt" in name and "negative" not in name
    )
    return RETURNS.get((takes, "negative_prompt" in inspect.signature(encode).parameters))


def _shapes(value: Any) -> list[tuple[int, ...]]:
    """The shapes of all tensors in nested tuples, lists and mappings, in order."""
    import torch

    if isinstance(value, torch.Tensor):
        return [tuple(value.shape)]
    if isinstance(value, dict):
        value = list(value.values())
    items = value if isinstance(value, tuple | list) else ()
    return [shape for item in items for shape in _shapes(item)]


@contextmanager
def _silent() -> Iterator[None]:
    """Without diffusers' word on each prompt that CLIP cuts at 77 tokens while T5 reads it whole."""
    from diffusers.utils import logging as diffusers_logging

    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before)


def _is_diffusers(function: Any) -> bool:
    return inspect.unwrap(function).__module__.startswith("diffusers.")
