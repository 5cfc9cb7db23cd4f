"""Every family of language models answers a question the same in a batch, alone, and by plain `generate`.

Random weights, saved as folders and loaded as any model is; rows share their examples, differ in length,
and are longer than the sliding windows.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ray_synth.errors import UserError
from ray_synth.meaning.few_shot import FewShot
from ray_synth.meaning.transformers_llm import TransformersLLM, _refuse_offloaded

WORDS = 100
SIZES: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 3, "eos_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}  # fmt: skip
LATENT = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "kv_lora_rank": 16,
    "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": None,
}  # fmt: skip
WINDOW = {"sliding_window": 8}
# name -> its settings, and whether the examples' keys are shared
FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    "llama": ({}, True),
    "qwen3": ({}, True),
    "qwen3_moe": (EXPERTS, True),
    "phi3": ({}, True),
    "deepseek_v3": (LATENT, True),
    "bloom": ({"n_layer": 2, "n_head": 4}, True),  # positions are distances (ALiBi)
    "mpt": ({"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}, True),  # by column
    "gpt2": ({"n_embd": 64, "n_layer": 2, "n_head": 4}, True),  # learned positions
    "mistral": (WINDOW, False),
    "gemma2": (WINDOW, False),
    "gemma3_text": (WINDOW, False),
    "olmo3": (WINDOW, False),
    "gpt_oss": (WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2}, False),
    "qwen3_next": (LINEAR | EXPERTS | {"shared_expert_intermediate_size": 32}, False),
    "qwen3_5_text": (LINEAR, False),
    "lfm2": ({"layer_types": ["conv", "full_attention"] * 2}, False),
    "mamba": ({}, False),
}
# the others differ from these in little that matters here
QUICK = ("llama", "deepseek_v3", "mpt", "mistral", "gemma3_text", "gpt_oss", "qwen3_next", "lfm2")
EACH = [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAMILIES]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(WORDS)}, unk_token="t1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t2")


def words(count: int, generator: torch.Generator) -> str:
    return " ".join(f"t{i}" for i in torch.randint(4, WORDS, (count,), generator=generator))


def make(folder: Path, family: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    """A model of random weights, saved with its tokenizer."""
    torch.manual_seed(0)
    settings = SIZES | FAMILIES[family][0]
    given = {k: v for k, v in settings.items() if v is not None or k == "eos_token_id"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **given)).float().eval()
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.ndim > 1 else 1)  # clear favourites among the words
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", EACH)
def test_an_answer_is_that_of_plain_generate_whatever_the_batch(family, tokenizer, tmp_path: Path):
    model, shares = make(tmp_path, family, tokenizer), FAMILIES[family][1]
    rng = torch.Generator().manual_seed(1)
    task, examples = words(3, rng), tuple((words(4, rng), words(4, rng)) for _ in range(3))
    prompts = [FewShot(task, examples, words(n, rng)) for n in (3, 60, 11)]
    llm = TransformersLLM(str(tmp_path), dtype="float32", device="cpu")
    ask: dict[str, Any] = {"max_new_tokens": 6, "stop": ()}
    together = llm.complete(prompts, temperature=0, **ask)
    assert together == [llm.complete([p], temperature=0, **ask)[0] for p in prompts]
    for prompt, answer in zip(prompts, together, strict=True):
        ids = tokenizer(prompt.as_text(), return_tensors="pt")["input_ids"]
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
        )
        assert answer == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    ask["temperature"] = 2.0
    drawn = llm.complete(prompts, seeds=[4, 5, 6], **ask)
    assert drawn != together
    alone = [llm.complete([p], seeds=[4 + i], **ask)[0] for i, p in enumerate(prompts)]
    assert drawn == alone
    assert llm._prefix_is_exact == shares

    answers = [words(n, rng) for n in (1, 5, 2)]
    expected = [llm.likelihood([p], [a])[0] for p, a in zip(prompts, answers, strict=True)]
    assert llm.likelihood(prompts, answers) == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_a_model_spread_over_devices_answers_as_in_one(tokenizer, tmp_path: Path):
    make(tmp_path, "llama", tokenizer)
    prompts = [FewShot("t5 t6", (("t7", "t8"),), words) for words in ("t9", "t10 t11 t12")]
    one, spread = (
        TransformersLLM(str(tmp_path), dtype="float32", device="cpu", spread=spread)
        for spread in (False, True)
    )
    assert spread.device == "cpu"  # of which there is one here
    ask: dict[str, Any] = {"seeds": [1, 2], "max_new_tokens": 6, "stop": ()}
    assert one.complete(prompts, **ask) == spread.complete(prompts, **ask)


def test_a_model_larger_than_its_gpus_is_refused():
    places = {
        "model.embed_tokens": 0,
        "model.layers.0": 1,
        "model.layers.1": "cpu",
        "lm_head": "disk",
    }
    with pytest.raises(UserError, match=r"'big' is larger than its GPUs: 2 of 4.*llm\.num_gpus"):
        _refuse_offloaded("big", places, "cuda")
    _refuse_offloaded("big", {"": "cpu"}, "cpu")
    _refuse_offloaded("big", {"model": 0, "lm_head": 1}, "cuda")
