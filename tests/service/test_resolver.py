"""What the service answers of an error: the caller's mistakes, and nothing of its own insides."""

import asyncio

from fastapi import HTTPException
from ray.exceptions import RayTaskError

from ray_synth.errors import UserError
from ray_synth.service.resolver import Resolver, ServeConfig


def test_only_what_is_meant_for_callers_is_answered():
    """A ValueError of our own code, or of a replica's, is no question of the caller's to fix."""
    resolver = Resolver.__new__(Resolver)
    resolver.config = ServeConfig()

    def status_of(error):
        async def work():
            raise error

        try:
            asyncio.run(resolver.answered(work()))
        except HTTPException as refusal:
            return refusal.status_code, refusal.detail
        except Exception as other:
            return type(other)

    assert status_of(UserError("images[0]: no")) == (422, "images[0]: no")
    assert status_of(ValueError("5 is not in list")) is ValueError
    remote = [
        RayTaskError("f", "text", cause, pid=1, ip="10.0.0.1").as_instanceof_cause()
        for cause in (UserError("the server refuses"), ValueError("zip"))
    ]
    assert status_of(remote[0]) == (502, "the server refuses")
    assert status_of(remote[1]) is type(remote[1])
