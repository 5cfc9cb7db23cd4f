"""How transformers' `generate` draws the next token, and where it ends an answer.

Scores of a batch come in at each step; what greedy decoding then picks is a sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TOP_K = 40  # likeliest tokens that one is drawn from (Fan et al., 2018)
SAMPLER = "noise by seed, step and token"  # another way of drawing gives other answers
GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64's step (Steele, Lea and Flood, 2014)
MIXERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))  # its shifts and factors


def gumbel_noise(seeds: torch.Tensor, step: int, tokens: torch.Tensor) -> torch.Tensor:
    """Gumbel noise of each token, a function of (seed, step, token) alone.

    So it is the same on every device and whatever the batch, it is drawn for the tokens asked for and
    no others, and tokens of equal score may come in any order.

    Args:
        seeds: (rows,) int64.
        step: how many tokens the answer has.
        tokens: (rows, k) int64.

    Returns:
        (rows, k) float32.
    """
    word = _mix(_mix(_mix(seeds[:, None]) + _signed(step * GOLDEN)) + tokens * _signed(GOLDEN))
    # 23 bits: with 24, adding the half would round the largest to 1, whose noise is infinite
    uniform = (((word >> 41) & (2**23 - 1)).float() + 0.5) / 2**23
    return -(-uniform.log()).log()


def _mix(word: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function on int64, whose products wrap as unsigned ones do."""
    for shift, factor in MIXERS:
        word = (word ^ ((word >> shift) & (2 ** (64 - shift) - 1))) * _signed(factor)
    return word


def _signed(value: int) -> int:
    """The number's lower 64 bits as an int64."""
    return (value + 2**63) % 2**64 - 2**63


def sampler(seeds: list[int], temperature: float) -> Any:
    """Top-k, then Gumbel noise by row: greedy decoding of the result draws a sample (Gumbel-max)."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    class RowSeededGumbel(LogitsProcessor):
        def __init__(self) -> None:
            self.seeds = torch.tensor([_signed(seed) for seed in seeds])
            self.step = 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            # twice as many, because half precision ties: all that equal the last of the k are kept
            size = scores.shape[-1]
            best, tokens = scores.float().topk(min(2 * TOP_K, size))
            best = best.masked_fill(best < best[:, min(TOP_K, size) - 1, None], -torch.inf)
            noise = gumbel_noise(self.seeds.to(scores.device), self.step, tokens)
            self.step += 1
            drawn = torch.full_like(scores, -torch.inf, dtype=torch.float32)
            return drawn.scatter_(1, tokens, best / temperature + noise)

    return LogitsProcessorList([RowSeededGumbel()] if temperature > 0 else [])


def stopper(tokenizer: Any, prompt_length: int, stop: tuple[str, ...]) -> Any:
    """Ends a row at a stop string, looked for in its decoded answer."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    class StopAtString(StoppingCriteria):
        def __call__(
            self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any
        ) -> torch.BoolTensor:
            texts = tokenizer.batch_decode(input_ids[:, prompt_length:])
            done = [any(mark in text for mark in stop) for text in texts]
            return torch.tensor(done, device=input_ids.device)  # type: ignore[return-value]

    return StoppingCriteriaList([StopAtString()] if stop else [])
