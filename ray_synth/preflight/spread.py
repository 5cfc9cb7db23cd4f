"""A generator that is spread over several GPUs: which part goes where, by diffusers' own rule; pure.

`device_map: balanced` gives whole parts (denoiser, text encoders, autoencoder) to GPUs in turn, the
largest first, and splits none. What does not fit the GPU whose turn it is lands on the CPU.
"""

from __future__ import annotations

from typing import Any

GIB = 2**30


def place(parts: dict[str, int], gpus: int, room: int) -> list[str]:
    """The parts that would land on the CPU.

    Args:
        parts: bytes of each part's weights.
        gpus: GPUs of one actor.
        room: bytes of memory of each.
    """
    from diffusers.pipelines.pipeline_loading_utils import _assign_components_to_devices

    largest_first = dict(sorted(parts.items(), key=lambda item: item[1], reverse=True))
    rooms: dict[Any, Any] = dict.fromkeys(range(gpus), room)
    placed = _assign_components_to_devices({**largest_first}, rooms)
    on_gpus = {name for device, names in placed.items() if device != "cpu" for name in names}
    return [name for name in largest_first if name not in on_gpus]


def spread_problem(parts: dict[str, int], gpus: int, room: int, kind: str) -> str:
    """Why a generator cannot be spread over an actor's GPUs; "" where it can.

    Args:
        kind: the GPUs' type, for people.
    """
    left = place(parts, gpus, room)
    if not left:
        return ""
    name = left[0]
    alone = parts[name] > room
    return (
        f"generation.num_gpus {gpus}: the {name} of the model takes {parts[name] / GIB:.1f} GiB, "
        + (f"more than one {kind} has" if alone else f"and has no {kind} with room for it")
        + f" ({room / GIB:.0f} GiB); diffusers splits no part, it would run on the CPU: take GPUs with "
        + ("more memory" if alone else "more memory, or more of them")
        + ", half precision, or a smaller model"
    )
