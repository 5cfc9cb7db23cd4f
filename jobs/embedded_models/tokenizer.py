"""The tokenizer of both embedded models: CLIP's byte-pair merges, cut to the most frequent ones.

In: the merge list that open_clip carries. Out: a folder that transformers' `CLIPTokenizer` loads.
"""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jobs.embedded_models.settings import Settings

VOCABULARY = 8192
CONTEXT = 64
BEGIN, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"
BEGIN_ID, END_ID, PAD_ID = VOCABULARY - 2, VOCABULARY - 1, 0
_SPECIAL = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": PAD}


def build_tokenizer(settings: Settings) -> Path:
    """Writes `work/tokenizer` (vocab.json, merges.txt and two small configs); returns it."""
    import open_clip
    from open_clip.tokenizer import bytes_to_unicode

    source = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        # The first line names the version; 512 entries are single bytes, 2 are begin and end.
        merges = lines.read().split("\n")[1 : 1 + VOCABULARY - 512 - 2]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["".join(merge.split()) for merge in merges] + [BEGIN, END]
    assert len(words) == len(set(words)) == VOCABULARY

    folder = settings.work / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: index for index, word in enumerate(words)}
    config: dict[str, Any] = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": CONTEXT,
        **_SPECIAL,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
    }
    texts = {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "\n".join(merges) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=1),
        "special_tokens_map.json": json.dumps(_SPECIAL),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def load_tokenizer(settings: Settings) -> Any:
    """The tokenizer of this run, built first if need be."""
    from transformers import CLIPTokenizer

    folder = settings.work / "tokenizer"
    if not (folder / "vocab.json").exists():
        build_tokenizer(settings)
    return CLIPTokenizer.from_pretrained(folder)


def token_ids(tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """`(len(texts), 64) int16`: padded and cut to the context."""
    rows = tokenizer(
        list(texts),
        padding="max_length",
        truncation=True,
        max_length=CONTEXT,
        return_tensors="np",
    )
    return rows["input_ids"].astype(np.int16)
