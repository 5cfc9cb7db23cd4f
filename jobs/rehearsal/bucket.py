"""A bucket with ImageNet's counts and none of its bytes: what S3 answers, for pictures made on request.

Only what a reader needs is answered: listings by page, and objects, whole or a stretch of them. Started
as `python -m rehearsal.bucket PORT PER_CLASS LATENCY_MS`; the log of requests is a count, printed at
`GET /`.
"""

from __future__ import annotations

import asyncio
import io
import sys
from bisect import bisect_right
from functools import cache
from xml.sax.saxutils import escape

import numpy as np
from aiohttp import web
from PIL import Image

SIDE = 32
VARIANTS = 4  # pictures of a class that differ
PAGE = 1_000  # keys of a listing, as S3's
TIME = "2026-01-01T00:00:00.000Z"


class Keys:
    """All keys of the bucket in S3's order, without a list of them.

    Args:
        sets: images per class of each image set, by the folder that holds it.
        classes: names of the class folders.
    """

    def __init__(self, sets: dict[str, int], classes: list[str]) -> None:
        self.folders = sorted((f"{name}/{c}/", name, c) for name in sets for c in classes)
        self.sets, self.place = sets, {folder: at for at, (folder, *_) in enumerate(self.folders)}

    def page(self, prefix: str, after: str, most: int) -> tuple[list[str], bool]:
        """Keys under a prefix that come after one, and whether there are more."""
        found: list[str] = []
        at = max(0, bisect_right(self.folders, (max(after, prefix), "~", "~")) - 1)
        for folder, name, label in self.folders[at:]:
            if folder > prefix and not folder.startswith(prefix) and not prefix.startswith(folder):
                break
            for number in range(self.sets[name]):
                key = f"{folder}{label}_{number:06d}.JPEG"
                if key > after and key.startswith(prefix):
                    if len(found) == most:
                        return found, True
                    found.append(key)
        return found, False

    def object(self, key: str) -> bytes | None:
        """The picture under a key; None where there is none."""
        folder, _, file = key.rpartition("/")
        at = self.place.get(f"{folder}/")
        if at is None:
            return None
        _, name, label = self.folders[at]
        stem, _, ending = file.partition(".")
        start, _, number = stem.rpartition("_")
        if start != label or ending != "JPEG" or not number.isdigit():
            return None
        if int(number) >= self.sets[name]:
            return None
        return picture(label, int(number) % VARIANTS)


@cache
def picture(label: str, variant: int) -> bytes:
    """A small JPEG whose colours tell its class, roughly."""
    rng = np.random.default_rng([*label.encode()])
    colours = rng.integers(0, 255, (4, 4, 3))
    noise = np.random.default_rng(variant).normal(0, 24, (SIDE, SIDE, 3))
    pixels = np.repeat(np.repeat(colours, SIDE // 4, 0), SIDE // 4, 1) + noise
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def listing(keys: Keys, query: dict[str, str]) -> str:
    """ListObjectsV2's answer."""
    after = query.get("continuation-token") or query.get("start-after") or ""
    most = min(PAGE, int(query.get("max-keys") or PAGE))
    found, more = keys.page(query.get("prefix", ""), after, most)
    entries = "".join(
        f"<Contents><Key>{escape(key)}</Key><LastModified>{TIME}</LastModified>"
        f"<Size>{len(keys.object(key) or b'')}</Size></Contents>"
        for key in found
    )
    token = f"<NextContinuationToken>{escape(found[-1])}</NextContinuationToken>" if more else ""
    return (
        '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<IsTruncated>{str(more).lower()}</IsTruncated><KeyCount>{len(found)}</KeyCount>"
        f"{token}{entries}</ListBucketResult>"
    )


def application(keys: Keys, latency_s: float) -> web.Application:
    """The server; `GET /` tells how many requests of each kind came."""
    count: dict[str, int] = {}

    async def answer(request: web.Request) -> web.Response:
        _, _, key = request.match_info["path"].partition("/")
        kind = "list" if not key else request.method.lower()
        count[kind] = count.get(kind, 0) + 1
        await asyncio.sleep(latency_s)
        if not key:
            return web.Response(
                text=listing(keys, dict(request.query)), content_type="application/xml"
            )
        data = keys.object(key)
        if data is None:
            return web.Response(status=404)
        part = request.http_range
        body = data[part] if part.start is not None else data
        headers = {"ETag": '"0"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        if part.start is not None:
            headers["Content-Range"] = (
                f"bytes {part.start}-{part.start + len(body) - 1}/{len(data)}"
            )
        status = 206 if part.start is not None else 200
        return web.Response(body=body, status=status, headers=headers)

    async def told(request: web.Request) -> web.Response:
        return web.json_response(count)

    app = web.Application()
    app.router.add_get("/", told)
    app.router.add_get("/{path:.+}", answer)
    return app


if __name__ == "__main__":
    from timm.data import ImageNetInfo

    port, per_class, latency_ms = (int(word) for word in sys.argv[1:4])
    wnids = sorted(ImageNetInfo().label_names())[: int(sys.argv[4]) if sys.argv[4:] else None]
    share = per_class / 1_281  # of ImageNet's own counts
    tests = {"val": 50, "sketch": 50, "r": 30}
    sets = {"train": per_class} | {name: max(1, round(share * n)) for name, n in tests.items()}
    web.run_app(
        application(Keys(sets, wnids), latency_ms / 1000), host="127.0.0.1", port=port, print=None
    )
