"""The one rule of redaction: what is a secret, what is none, and how long it takes."""

import time
from typing import get_args, get_origin

import pytest
from pydantic import BaseModel

from ray_synth.config import Config, parse_config
from ray_synth.errors import UserError
from ray_synth.storage.folder import Folder
from ray_synth.storage.secrets import redact

SECRETS = [
    ("s3://KEY:hush@bucket/runs", "AWS_SECRET_ACCESS_KEY"),
    ("s3://KEY:hu/hush+sh@bucket/runs?region=x", "AWS_SECRET_ACCESS_KEY"),  # not encoded
    ("s3://hush@bucket/runs", "AWS_SECRET_ACCESS_KEY"),
    ("s3://bucket/runs?region=x&secret_key=hush", "AWS_SECRET_ACCESS_KEY"),
    ("abfs://box:hush@account/runs", "AZURE_STORAGE_KEY"),
    ("abfss://box@account/runs?sas_token=hush", "AZURE_STORAGE_SAS_TOKEN"),
    ("sftp://me:hush@host/runs", "environment"),
]


@pytest.mark.parametrize(("uri", "names"), SECRETS)
def test_a_secret_in_a_uri_is_refused_and_not_shown(uri, names):
    sources = {"data": {"train": {"format": "parquet", "path": uri}, "test": {"format": "digits"}}}
    digits = {"data": {"train": {"format": "digits"}, "test": {"format": "digits"}}}
    for work in (
        lambda: Folder(uri),
        lambda: parse_config({"name": "a", "training": {"steps": 1}, "runs_dir": uri, **digits}),
        lambda: parse_config({"name": "a", "training": {"steps": 1}, **sources}),
    ):
        with pytest.raises(ValueError, match=names) as error:
            work()
        assert "hush" not in str(error.value)
    assert "hush" not in redact(f"cannot open {uri}: no")


def test_what_is_no_secret_is_kept():
    for uri in (
        "gs://anonymous@bucket/runs",
        "abfs://box@account.dfs.core.windows.net/runs",
        "hdfs://me@host:8020/runs",
        "s3://bucket/a@b?region=us-east-1&endpoint_override=127.0.0.1:9000",
    ):
        assert Folder(uri).uri == uri


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgres://me:pass@host/db", "postgres://***@host/db"),
        ("s3://b/r?access_key=AK&secret_key=xyz&region=eu", "s3://b/r?access_key=***&secret_key=***&region=eu"),
        ("Authorization: Bearer abc.def-1", "Authorization: Bearer ***"),
        ("https://h/x?sig=1&token=t0k", "https://h/x?sig=***&token=***"),
        ("128 tokens, key=value of a dict; 12:30:01", None),
        ("seed 7: s3://bucket/runs/a@b", None),
        ("s3://bucket/a@b", None),
        ("abfs://box@account.dfs.core.windows.net/runs", None),
        ("abfss://box:hush@account/runs", "abfss://***@account/runs"),
        ("s3://KEY:with@sign@bucket/a", "s3://***@bucket/a"),
        ("pg://me:p@ss/w@host/db failed", "pg://***@host/db failed"),
        ("http://localhost:8000/v1/a@b", None),
        ("https://h/x?X-Amz-Signature=ab1&X-Amz-Date=2", "https://h/x?X-Amz-Signature=***&X-Amz-Date=2"),
        ("meaning.llm.base_url=https://h/v1?api_key=a?b", "meaning.llm.base_url=https://h/v1?api_key=***"),
        ("AccountName=x;AccountKey=ab==;Suffix=y", "AccountName=x;AccountKey=***;Suffix=y"),
        ('{"apiKey": "hush", "key": "x"}', '{"apiKey": "***", "key": "x"}'),
        ("Authorization: Basic aGVsbG8=", "Authorization: Basic ***"),
        ("no model hf_abcdefghijklmnopqrstuv here", "no model *** here"),
        ("image_key: jpg, monkey=3, max_tokens=7, 5 of 'key': 'x'", None),
    ],
)  # fmt: skip
def test_what_looks_like_a_secret_is_redacted(text, shown):
    found = redact(text)
    assert found == (shown or text.replace("key=value", "key=***"))


def test_short_values_and_paths_of_secrets_are_no_secrets(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token")
    assert redact("false: /var/run/token") == "false: /var/run/token"


@pytest.mark.parametrize(
    "piece",
    [
        "://a:",
        "://",
        "a://b@",
        "key=",
        "_key_",
        "k_",
        "bearer ",
        "bearer",
        "?sig",
        "://a:a/",
        "a-",
        "a.b_c-",
        "'key': '",
        '"api_key":',
        "authorization:",
        "eyJabcdefghijk",
        "-eyJabcdefghijk.eyJ",
        "sk-",
        "token=;a",
        "a=",
        "@",
        "://:@?",
        " ",
    ],
)
def test_long_hostile_texts_take_linear_time(piece):
    text = piece * (100_000 // len(piece))
    started = time.process_time()
    redact(text)
    assert time.process_time() - started < 2


PLANTED = "Zq7planted-hush"
# URLs that hold it, as users of this job have them.
FORMS = [
    f"https://me:{PLANTED}@host/v1",
    f"https://{PLANTED}@host/v1",
    f"https://host/v1?api-key={PLANTED}",
    f"https://bucket.s3.amazonaws.com/x?X-Amz-Date=1&X-Amz-Signature={PLANTED}",
    f"https://a.blob.core.windows.net/c?sv=1&sig={PLANTED}%3D",
    f"https://host/v1?X-Goog-%53ignature={PLANTED}",
    f"https://host/cb#access_token={PLANTED}",
    f"postgresql+psycopg2://me:{PLANTED}/+@host/db",
    f"https://me:{PLANTED}?#w@host/",
]


def text_settings(model, prefix=""):
    """Dotted names of all settings that take a text; in a mapping by the key `any`, in a list at 0."""
    for name, field in model.model_fields.items():
        shape = str(field.annotation)
        below = [t for t in (field.annotation, *get_args(field.annotation)) if isinstance(t, type)]
        sections = [t for t in below if issubclass(t, BaseModel)]
        if sections:
            inside = {dict: "any.", list: "0."}.get(get_origin(field.annotation), "")
            yield from text_settings(sections[0], f"{prefix}{name}.{inside}")
        elif "str" in shape and "Literal" not in shape.replace("Literal['off'", ""):
            yield f"{prefix}{name}"


def planted(dotted, value):
    """A small config with the value at this place."""
    values = {
        "name": "a", "training": {"steps": 1},
        "data": {"train": {"format": "digits"}, "test": {"format": "digits"}},
    }  # fmt: skip
    *parents, leaf = dotted.split(".")
    node = values
    for parent, after in zip(parents, [*parents[1:], ""], strict=False):
        if parent == "0":
            node.append({"count": 1, "num_cpus": 1})
            node = node[0]
        else:
            node = node.setdefault(parent, [] if after == "0" else {})
    if "any" in parents:
        node["format"] = "digits"
    node[leaf] = value
    return values


def test_a_secret_in_any_setting_is_refused_by_its_name_and_not_shown():
    settings = sorted(set(text_settings(Config)))
    assert {"meaning.llm.base_url", "tracking.uri", "data.ood.any.path", "cluster.address"} <= {
        *settings
    }
    assert len(settings) > 30
    for setting in settings:
        for form in FORMS:
            for value in (form, [form], {"x": form}, {form: "x"}, {"x": {"y": [form]}}):
                with pytest.raises(UserError) as error:
                    parse_config(planted(setting, value))
                assert PLANTED not in str(error.value), (setting, form)
                assert setting in str(error.value)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("meaning.llm.base_url", "set the variable that api_key_env names"),
        ("tracking.uri", "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("data.train.path", "s3://"),
    ],
)
def test_the_message_says_where_the_secret_belongs(setting, says):
    with pytest.raises(
        UserError, match=rf"{setting}: https://\*\*\*@host/v1 holds a secret.*{says}"
    ):
        parse_config(planted(setting, FORMS[0]))


def test_a_secret_of_a_plug_in_is_refused_by_the_name_of_its_key():
    for key in ("api_key", "authToken", "PASSWORD", "client-secret"):
        with pytest.raises(UserError, match=rf"generation.generator_kwargs: {key} is a secret"):
            parse_config(planted("generation.generator_kwargs", {"client": {key: PLANTED}}))
    kept = {"image_key": "jpg", "max_tokens": 7, "api_key_env": "MY_KEY", "key": "x"}
    parse_config(planted("generation.generator_kwargs", kept))
    parse_config(planted("data.train.class_map", {"token": "coin", "password": "x"}))
