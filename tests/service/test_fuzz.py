"""Strangers' input: broken and hostile images, and whatever the service's own OpenAPI allows."""

import base64
import io
import json
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image
from samples import draw
from service import ask, memory_of_workers, send


def saved(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def png_that_says(width: int, height: int) -> bytes:
    """A tiny file whose header promises a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def bomb() -> bytes:
    """3 kB that decode to 36 million pixels."""
    return saved(Image.new("1", (6000, 6000)), "PNG", optimize=True)


def images() -> dict[str, tuple[bytes, int]]:
    """Name -> file, and the status that it deserves."""
    photo = draw(1, (64, 48))
    frames = [draw(i) for i in range(5)]
    deep = Image.fromarray((np.arange(48 * 64).reshape(48, 64) * 20).astype(np.uint16))
    whole = saved(photo, "JPEG")
    return {
        "truncated jpeg": (whole[: len(whole) // 2], 422),
        "truncated png": (saved(photo, "PNG")[:200], 422),
        "bomb": (bomb(), 422),
        "lying header": (png_that_says(100_000, 100_000), 422),
        "short of data": (png_that_says(900, 900), 422),
        "16 bit": (saved(deep, "PNG"), 200),
        "16 bit tiff": (saved(deep, "TIFF"), 200),
        "cmyk": (saved(photo.convert("CMYK"), "JPEG"), 200),
        "palette with transparency": (saved(photo.convert("P"), "PNG", transparency=0), 200),
        "animated gif": (saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), 200),
        "animated webp": (saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]), 200),
        "one pixel": (saved(draw(1, (1, 1)), "PNG"), 200),
        "very wide": (saved(draw(1, (5000, 1)), "PNG"), 200),
        "zero bytes": (b"", 422),
        "text with another name": (b"class_name,label\ncrane,1\n", 422),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>x</script></svg>", 422),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 422),
        "zip": (b"PK\x03\x04" + b"\0" * 100, 422),
    }


def question(data: bytes) -> dict:
    picture = base64.b64encode(data).decode()
    return {"class_name": "thing", "images": [picture], "meanings": ["a thing"], "num_meanings": 0}


@pytest.mark.parametrize("kind", images())
def test_every_kind_of_image_is_answered_or_refused_by_name(url, kind):
    data, expected = images()[kind]
    status, answer = ask(url, "/disambiguate", question(data))
    assert status == expected, answer
    if status == 422:
        assert answer["detail"].startswith("images")


def test_bombs_do_not_fill_the_memory(url):
    ask(url, "/disambiguate", question(saved(draw(1), "PNG")))
    before = memory_of_workers()
    assert before > 0
    for data in (bomb(), png_that_says(60_000, 60_000)):
        body = {"classes": [{**question(data), "class_name": f"c{i}"} for i in range(20)]}
        for c in body["classes"]:
            del c["num_meanings"]
        status, _, raw = send(url, "/disambiguate/batch", {**body, "num_meanings": 0})
        assert status == 200
        assert all("over the limit" in json.loads(x)["problem"]["detail"] for x in raw.splitlines())
    assert memory_of_workers() - before < 300_000_000


def test_mutated_images_never_break_the_service(url):
    chance = random.Random(0)
    originals = [
        saved(draw(2, (40, 30)), kind)
        for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
    ]

    def mutate(data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(chance.choice([1, 3, 20])):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        return bytes(changed[: chance.choice([len(changed), chance.randrange(1, len(changed))])])

    statuses = []
    for _ in range(12):
        classes = [
            {
                "class_name": f"class {i}",
                "images": question(mutate(chance.choice(originals)))["images"],
                "meanings": ["a thing"],
            }
            for i in range(20)
        ]
        status, _, raw = send(url, "/disambiguate/batch", {"classes": classes, "num_meanings": 0})
        assert status == 200
        lines = [json.loads(line) for line in raw.splitlines()]
        assert len(lines) == 20
        statuses += [line.get("problem", {"status": 200})["status"] for line in lines]
    assert set(statuses) == {200, 422}
    assert ask(url, "/readyz")[0] == 200


@pytest.fixture(scope="module")
def gibberish(url, tmp_path_factory):
    """The same app beside it, with a language model of random weights: quick, and never sensible."""
    from ray import serve
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from ray_synth.config import ClipConfig, LlmConfig
    from ray_synth.service.app import ServeConfig, build

    folder = tmp_path_factory.mktemp("gibberish")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<end>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>"
    ).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(vocab), num_attention_heads=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    llm = LlmConfig(model=str(folder), num_cpus=0.1)
    app = build(ServeConfig(llm=llm, clip=ClipConfig(num_cpus=0.1)))
    serve.run(app, name="gibberish", route_prefix="/gibberish")
    yield f"{url}/gibberish"
    serve.delete("gibberish")


def test_nonsense_from_the_model_is_counted_and_the_bare_name_stands(gibberish):
    status, entry = ask(gibberish, "/disambiguate", {**question(saved(draw(1), "PNG")), "meanings": []}
                        | {"num_meanings": 3})  # fmt: skip
    assert status == 200
    assert entry["num_refused"] > 0 and len(entry["raw_answers"]) >= 9
    assert {candidate["source"] for candidate in entry["candidates"]} >= {"name"}


def test_the_service_keeps_what_its_openapi_says(gibberish, tmp_path):
    """schemathesis makes requests from the schema: no 5xx, and answers as they are documented."""
    checks = (
        "not_a_server_error,status_code_conformance,content_type_conformance,"
        "response_schema_conformance,unsupported_method,negative_data_rejection"
    )
    options = {
        "--url": gibberish, "--checks": checks, "--max-examples": "8", "--seed": "1",
        "--request-timeout": "120", "--phases": "coverage,fuzzing", "--suppress-health-check": "all",
    }  # fmt: skip
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{gibberish}/openapi.json"]
    command += [word for option in options.items() for word in option]
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=400, check=False, cwd=tmp_path
    )
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    assert "7 passed" in found.stdout, found.stdout[-3000:]
