"""A language model that sleeps, and then says what one would have said: OpenAI's interface, real text.

Started as `python -m rehearsal.language_server PORT SECONDS`, the time that each answer takes.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import sys
from typing import Any

from aiohttp import web

from ray_synth.prompting.contexts import EXAMPLES, load_pool

POOL = load_pool()
PHRASES = {
    "foreground": [phrase for scene in POOL.scenes for phrase in scene[0]],
    "background": [phrase for scene in POOL.scenes for phrase in scene[1]],
    "lighting": list(POOL.lightings),
    "camera_angle": list(POOL.camera_angles),
}
MEANINGS = (
    "{name}, the animal that lives in the wild",
    "{name}, a tool that people use at work",
    "{name}, a vehicle that carries people",
    "{name}, food that is served on a plate",
    "{name}, a piece of clothing",
)


def reply(messages: list[dict[str, str]], seed: int) -> str:
    """An answer to the last thing that was asked: phrases of a scene, or a meaning.

    What is asked for is told by the worked examples that come before the question.
    """
    question = messages[-1]["content"]
    rng = random.Random(hashlib.sha256(f"{question}{seed}".encode()).digest())
    shown = {message["content"] for message in messages}
    example = next(iter(EXAMPLES.values()))
    for field, phrases in PHRASES.items():
        if example[field] in shown:
            some = rng.sample(phrases, 3)
            return "; ".join(f"{phrase} {_detail(rng)}" for phrase in some)
    name = question.rpartition(":")[2].strip()
    return rng.choice(MEANINGS).format(name=name)


def _detail(rng: random.Random) -> str:
    """A few words more, so that scenes of a thousand classes differ."""
    where = ("by the sea", "in the hills", "in an old town", "far from home", "near a lake")
    when = ("in spring", "in summer", "in autumn", "in winter", "on a holiday")
    return f"{rng.choice(where)} {rng.choice(when)}"


def application(seconds: float) -> web.Application:
    """The server; `GET /` tells how many questions came."""
    asked = 0

    async def complete(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        body: dict[str, Any] = await request.json()
        await asyncio.sleep(seconds)
        text = reply(body["messages"], int(body.get("seed") or 0))
        told = {"message": {"role": "assistant", "content": text}}
        used = {"prompt_tokens": 200, "completion_tokens": 24, "total_tokens": 224}
        choice = {"index": 0, "finish_reason": "stop", **told}
        return web.json_response(
            {"id": "1", "object": "chat.completion", "created": 0, "model": body.get("model", ""),
             "choices": [choice], "usage": used}
        )  # fmt: skip

    async def told(request: web.Request) -> web.Response:
        return web.json_response({"questions": asked})

    app = web.Application(client_max_size=1 << 24)
    app.router.add_get("/", told)
    app.router.add_post("/v1/chat/completions", complete)
    return app


if __name__ == "__main__":
    web.run_app(
        application(float(sys.argv[2])), host="127.0.0.1", port=int(sys.argv[1]), print=None
    )
