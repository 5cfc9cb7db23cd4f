"""The one rule for what is a secret in a text or a URI: it is never shown, and never kept."""

from __future__ import annotations

import os
import re

from ray_synth.errors import UserError

MARK = "***"
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "abfs": "AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN (or AZURE_TENANT_ID, AZURE_CLIENT_ID and "
    "AZURE_CLIENT_SECRET)",
}
SAME = {"gcs": "gs", "abfss": "abfs"}
# Each pattern is linear in the text's length: none rescans more than a bounded part of it.
# The user and password of a URI; a bare name before the @ of abfs:// is its container.
USER = re.compile(r"(?<=://)(?:(?<!abfs://)(?<!abfss://)[^/\s]*|[^/\s:]*:[^/\s]*)@")
# The same where the password was not encoded and holds a slash.
UNENCODED = re.compile(r"(?<=://)[^\s/:@]*:[^\s@?]{0,256}@")
OPTION = re.compile(
    r"\b((?:\w*_)?(?:key|token|secret|password|signature|sig)=)[^&\s'\"]+", re.IGNORECASE
)
BEARER = re.compile(r"(\bbearer\s+)[\w.~+/=-]+", re.IGNORECASE)
# Variables of the environment whose values are secrets.
VARIABLE = re.compile(r"(TOKEN|SECRET|PASSWORD|API_?KEY|ACCESS_KEY|CREDENTIAL)", re.IGNORECASE)
NO_SECRET = ("_FILE", "_PATH", "_DIR", "_URI")

_values: set[str] = set()


def redact(text: str) -> str:
    """The text without users, passwords and secret options of URIs, bearer tokens, and the values
    of the environment's secrets."""
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= 8 and VARIABLE.search(name) and not name.upper().endswith(NO_SECRET)
    }
    for value in sorted(values | _values, key=len, reverse=True):
        text = text.replace(value, MARK)
    text = UNENCODED.sub(f"{MARK}@", USER.sub(f"{MARK}@", text))
    return BEARER.sub(rf"\1{MARK}", OPTION.sub(rf"\1{MARK}", text))


def redact_value_of(variable: str) -> None:
    """From now on, redact the value of an environment variable whose name tells nothing."""
    if value := os.environ.get(variable):
        _values.add(value)


def refuse_secrets(uri: str) -> str:
    """The URI as it is. Raises UserError where it holds a secret; does not show it."""
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return uri
    kind = SAME.get(scheme.lower(), scheme.lower())
    key = kind == "s3" and "@" in rest.partition("/")[0]
    if key or re.match(r"[^/:@?]*:[^@?]*@", rest) or OPTION.search(rest.partition("?")[2]):
        names = CREDENTIALS.get(kind, "what the file system's package reads from the environment")
        raise UserError(
            f"{redact(uri)} holds a secret, which would be written to the run's config.yaml: take it "
            f"out, and set {names}"
        )
    return uri
