"""The one rule for what is a secret in a text or a URL: it is never shown, and never kept."""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import unquote

from ray_synth.errors import UserError

MARK = "***"
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "abfs": "AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN (or AZURE_TENANT_ID, AZURE_CLIENT_ID and "
    "AZURE_CLIENT_SECRET)",
}
# What to do in place of a secret in another URL.
INSTEAD = {
    "hf": "set HF_TOKEN",
    "postgresql": "set PGPASSWORD (or PGPASSFILE)",
    "mysql": "name a file of its driver's options, ?read_default_file=FILE",
    "http": "name what is stored by its own scheme (s3://, gs://, abfs://), with the credentials in "
    "the environment",
}
SAME = {"gcs": "gs", "abfss": "abfs", "https": "http", "postgres": "postgresql"}

# A name is split into words at its marks and capitals: X-Amz-Signature, accessToken, api_key.
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
SECRET = {
    "token", "secret", "password", "passwd", "passphrase", "credential", "credentials", "signature",
    "apikey", "accesskey", "secretkey", "accesstoken", "authtoken",
}  # fmt: skip
SECRET_AT_THE_END = {"key", "sig", "pwd", "pass", "sas", "jwt", "auth", "authorization", "hmac"}
KEYS_OF_LOCKS = SECRET | {"api", "access", "account", "auth", "private", "storage", "subscription"}
# What such a name ends with where it says where the secret is, or something about it.
ABOUT = frozenset(
    ["file", "path", "dir", "uri", "url", "env", "id", "name", "type", "mode", "sock"]
)

# Each pattern is linear in the text's length: none rescans more than a bounded part of it.
# The user, and a password, of a URL; a bare name before the @ of abfs:// is its container.
USER = re.compile(r"(?<=://)(?:(?<!abfs://)(?<!abfss://)[^/\s]*|[^/\s:]*:[^/\s]*)@")
# A password may hold anything where it was not encoded, so it ends at the last @; `host:8020/a@b` has a
# port, and none.
PASSWORD = re.compile(
    r"(?<=://)(?:[^/:?#\[\s]*:(?!\d{1,5}(?:[/?#,;)\]}]|$))|(?<=s3://)[^/:?#\s]*:)"
    r"(?:[^\s\"'<>]{1,1024}|[^/\s]+)@"
)
# A name alone is a key or a token there; hdfs://me@host is a name.
KEY = re.compile(r"(?:https?|s3a?|wss?|hf)://[^/?#@\s]+@", re.IGNORECASE)
OPTION = re.compile(r"(?<![\w.-])((?:[\w.-]|%(?!3D|26)[0-9A-F]{2})++)(?:=|%3D)", re.IGNORECASE)
VALUE = re.compile(r"(?:(?!%26|;\s?\w{1,40}=)[^&\s'\"])+", re.IGNORECASE)
QUOTED = re.compile(r"(?<=['\"])([\w.-]++)(['\"]\s{0,8}:\s{0,8}b?['\"])([^'\"\n]{1,4096})")
OPTIONS = re.compile("[?#;]")
BEARER = re.compile(r"(\bbearer\s+)[\w.~+/=-]+", re.IGNORECASE)
HEADER = re.compile(
    r"\b((?:authorization|x-api-key|api-key|x-auth-token|cookie)['\"]?\s{0,8}:\s{0,8}(?:b?['\"])?"
    r"(?:(?:basic|bearer|token|digest)\s{1,8})?)[^\s'\",]+",
    re.IGNORECASE,
)
# Tokens that are known by their own form.
TOKEN = re.compile(
    r"(?<![\w-])(?:hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[oprsu]_\w{30,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{20,}|xox[abeprs]-[\w-]{10,}|A(?:KIA|SIA)[0-9A-Z]{16}|AIza[\w-]{35}"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+)"
)

_values: set[str] = set()


def names_secret(name: str, *, in_mapping: bool = False) -> bool:
    """Whether an option or a variable holds a secret by what it is called.

    Args:
        in_mapping: it is a mapping's key, where `image_key` and `key` are no secrets.
    """
    words = [word.lower() for word in WORD.findall(unquote(name))]
    if not words or words[-1] in ABOUT:
        return False
    if in_mapping and words[-1] == "key" and KEYS_OF_LOCKS.isdisjoint(words):
        return False
    return words[-1] in SECRET_AT_THE_END or not SECRET.isdisjoint(words)


def redact(text: str) -> str:
    """The text without users, passwords and secret options of URLs, secret headers and tokens, and
    the values of the environment's secrets."""
    values = {value for name, value in os.environ.items() if len(value) >= 8 and names_secret(name)}
    for value in sorted(values | _values, key=len, reverse=True):
        text = text.replace(value, MARK)
    text = USER.sub(f"{MARK}@", PASSWORD.sub(f"{MARK}@", text))
    text = QUOTED.sub(_without_entry, _without_options(text))
    text = HEADER.sub(rf"\1{MARK}", BEARER.sub(rf"\1{MARK}", text))
    return TOKEN.sub(MARK, text)


def _without_options(text: str) -> str:
    """`name=***` for each option that is a secret by its name; a value may hold options of its own."""
    parts, at = [], 0
    while found := OPTION.search(text, at):
        value = VALUE.match(text, found.end()) if names_secret(found[1]) else None
        parts += [text[at : found.end()], MARK if value else ""]
        at = value.end() if value else found.end()
    return "".join([*parts, text[at:]])


def _without_entry(found: re.Match[str]) -> str:
    name, mark, _ = found.groups()
    return f"{name}{mark}{MARK}" if names_secret(name, in_mapping=True) else found[0]


def redact_value_of(variable: str) -> None:
    """From now on, redact the value of an environment variable whose name tells nothing."""
    if value := os.environ.get(variable):
        _values.add(value)


def holds_secret(text: str) -> bool:
    """Whether a setting's text is a token, or a URL or a connection string with a secret in it."""
    return any(
        TOKEN.search(form)
        or ("://" in form and (PASSWORD.search(form) or KEY.search(form)))
        or any(
            names_secret(found[1]) and VALUE.match(options, found.end())
            for options in OPTIONS.split(form, maxsplit=1)[1:]
            for found in OPTION.finditer(options)
        )
        for form in {text, unquote(text)}
    )


def refuse_secrets(text: str, *, instead: str | None = None) -> str:
    """The text as it is. Raises UserError where it holds a secret; does not show it.

    Args:
        instead: what to do in its place; default: by the URL's scheme.
    """
    if not holds_secret(text):
        return text
    scheme, mark, _ = text.partition("://")
    kind = scheme.lower().partition("+")[0] if mark else ""
    kind = SAME.get(kind, kind)
    if kind in CREDENTIALS:
        instead = f"set {CREDENTIALS[kind]}"
    shown = redact(text)
    if holds_secret(shown.replace(MARK, "")):  # in a form that only a decoder reads
        shown = f"{scheme}{mark}{MARK}" if mark else MARK
    instead = instead or INSTEAD.get(kind, "set what its client reads from the environment")
    raise UserError(
        f"{shown} holds a secret, which would be written to the run's config.yaml: take it out, and "
        f"{instead}"
    )


def refuse_in_setting(value: Any, *, free: bool = False, instead: str | None = None) -> None:
    """Raises UserError where a text in a setting's value, at any depth, holds a secret.

    Args:
        free: its keys are another program's settings, and a key that is named like a secret holds one.
    """
    if isinstance(value, str):
        refuse_secrets(value, instead=instead)
    elif isinstance(value, dict):
        for key, item in value.items():
            refuse_in_setting(key, instead=instead)
            if free and item and isinstance(item, str) and names_secret(str(key), in_mapping=True):
                raise UserError(
                    f"{key} is a secret, which would be written to the run's config.yaml: take it "
                    "out, and have it read from the environment"
                )
            refuse_in_setting(item, free=free, instead=instead)
    elif isinstance(value, list | tuple):
        for item in value:
            refuse_in_setting(item, free=free, instead=instead)
