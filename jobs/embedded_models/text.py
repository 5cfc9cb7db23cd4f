"""Stage `text`: the text tower learns the sentence embeddings of all-MiniLM-L6-v2.

In: WordNet, the caption grammar, the MiniLM folder. Out: `work/text.safetensors` (open_clip's
names) and `work/text_encoder` (transformers').
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from jobs.embedded_models import captions
from jobs.embedded_models.clip_model import EMBEDDING, clip_model, is_visual, text_encoder
from jobs.embedded_models.clock import Clock, step_down
from jobs.embedded_models.settings import Settings, autocast
from jobs.embedded_models.tokenizer import load_tokenizer, token_ids
from jobs.embedded_models.wordnet import Lexicon, read_lexicon

SENTENCES = 400_000
TEACHER_BATCH = 2048
TEMPERATURE = 0.05


def sentence_maker(lexicon: Lexicon, rng: random.Random) -> Callable[[], str]:
    """A function that makes one training sentence per call.

    A fifth are captions of digits, a seventh captions of photographs, the rest WordNet: names,
    glosses, kinds, and names in photographs.
    """
    lights = [light for lights in captions.LIGHT.values() for light in lights]
    styles = [style for styles in captions.STYLES.values() for style in styles]

    def style(share: float) -> str | None:
        return rng.choice(list(captions.STYLES)) if rng.random() < share else None

    def about_wordnet() -> str:
        noun = rng.choice(lexicon.corpus)
        name, gloss = rng.choice(noun.lemmas), noun.gloss
        thing = captions.article(name, rng)
        kind = f", a kind of {noun.hypernyms[0]}" if noun.hypernyms else ""
        other = captions.article(rng.choice(lexicon.corpus).lemmas[0], rng)
        forms = (
            (0.25, name),
            (0.45, gloss),
            (0.60, f"{name}, {gloss}"),
            (0.68, f"{name}{kind}"),
            (0.80, f"a photo of {thing}"),
            (0.86, f"a photo of {thing}, {gloss}"),
            (0.93, f"a photo of {thing} next to {other}, {rng.choice(lights)}"),
            (1.00, f"a {rng.choice(styles)} of {thing}"),
        )
        draw = rng.random()
        return next(text for share, text in forms if draw < share)

    def sentence() -> str:
        draw = rng.random()
        if draw < 0.2:
            thing = captions.digit_phrase(rng.randrange(10), rng)
            return captions.caption(thing, [rng.choice(lights)], rng, style=style(0.2))
        if draw < 0.35:
            thing = captions.noun_phrase(rng.choice(lexicon.classes), rng)
            details = [rng.choice(lights), rng.choice(captions.CLOSE)]
            return captions.caption(thing, details, rng, style=style(0.3))
        return about_wordnet()

    return sentence


@torch.no_grad()
def teacher_embeddings(folder: Path, texts: Sequence[str], device: str) -> torch.Tensor:
    """Mean-pooled, normalised embeddings of a sentence model: `(len(texts), 384) float16`.

    Raises:
        ValueError: the model's embeddings have another width.
    """
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    dtype = torch.float16 if device == "cuda" else torch.float32
    teacher: Any = AutoModel.from_pretrained(folder, dtype=dtype).to(device).eval()
    if teacher.config.hidden_size != EMBEDDING:
        raise ValueError(
            f"The teacher in {folder} has embeddings of {teacher.config.hidden_size} numbers, not "
            f"{EMBEDDING}: use all-MiniLM-L6-v2."
        )
    # Sorted by length, so that a batch has little padding.
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    embeddings = torch.empty(len(texts), EMBEDDING, dtype=torch.float16)
    for start in range(0, len(texts), TEACHER_BATCH):
        rows = order[start : start + TEACHER_BATCH]
        batch = tokenizer(
            [texts[row] for row in rows],
            padding=True,
            truncation=True,
            max_length=128,
            return_tensors="pt",
        ).to(device)
        words = teacher(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None].float()
        mean = (words * mask).sum(1) / mask.sum(1)
        embeddings[rows] = functional.normalize(mean, dim=-1).half().cpu()
    return embeddings


def train_text(settings: Settings) -> Path:
    """Distils the teacher into the text tower; returns `work/text_encoder`."""
    from safetensors.torch import save_file

    device = settings.device
    lexicon = read_lexicon(settings.output_of("wordnet", "wordnet.json"))
    teacher = settings.input("minilm", "the folder of sentence-transformers/all-MiniLM-L6-v2")
    sentence = sentence_maker(lexicon, random.Random(0))
    texts = [sentence() for _ in range(settings.batch(SENTENCES, 100))]
    ids = torch.from_numpy(token_ids(load_tokenizer(settings), texts)).long().to(device)
    targets = teacher_embeddings(teacher, texts, device).to(device)

    torch.manual_seed(0)
    model = clip_model().to(device)
    parameters = [tensor for name, tensor in model.named_parameters() if not is_visual(name)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    batch, clock = settings.batch(2048, 16), Clock("text", settings)
    for _ in clock.steps():
        clock.set_learning_rate(optimizer, peak=1.2e-3)
        rows = torch.randint(0, len(texts), (batch,), device=device)
        with autocast(device):
            student = model.encode_text(ids[rows])
        student = functional.normalize(student.float(), dim=-1)
        target = targets[rows].float()
        cosine = (student * target).sum(-1).mean()
        # Besides each sentence's place, its distances to the others of the batch.
        divergence = functional.kl_div(
            (student @ student.T / TEMPERATURE).log_softmax(-1),
            (target @ target.T / TEMPERATURE).log_softmax(-1),
            log_target=True,
            reduction="batchmean",
        )
        step_down((1 - cosine) * 4 + divergence, optimizer, parameters)
        clock.log(cosine=cosine, divergence=divergence)

    weights = {
        name: tensor.half().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if not is_visual(name)
    }
    save_file(weights, settings.work / "text.safetensors")
    encoder = text_encoder(model.cpu().float())
    _assert_same_function(model, encoder, ids[:8].cpu())
    folder = settings.work / "text_encoder"
    encoder.save_pretrained(folder)
    return folder


@torch.no_grad()
def _assert_same_function(model: Any, encoder: Any, ids: torch.Tensor) -> None:
    """The two forms of the text tower give the same embeddings (read at the last token)."""
    model.eval()
    encoder.eval()
    ends = encoder(ids).last_hidden_state[torch.arange(len(ids)), ids.argmax(-1)]
    difference = (model.encode_text(ids) - ends @ model.text_projection).abs().max()
    assert difference < 1e-3, difference
