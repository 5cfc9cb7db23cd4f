"""The service's operations as a page: made from its OpenAPI, with no code and nothing from elsewhere."""

from __future__ import annotations

from html import escape
from typing import Any

DOCS_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code{font-family:ui-monospace,monospace}table{border-collapse:collapse;width:100%}"
    "th,td{text-align:left;vertical-align:top;border-bottom:1px solid #8884;padding:.3rem .6rem}"
    "@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}a{color:#8cf}}"
)


def docs_page(openapi: dict[str, Any]) -> str:
    """HTML with each operation, the fields of its body, and its answers."""
    info = openapi["info"]
    schemas = openapi.get("components", {}).get("schemas", {})
    parts = [
        _operation(method, path, operation, schemas)
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(info["title"])}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f"<h1>{escape(info['title'])}</h1><p>{escape(info.get('summary') or '')} "
        '<a href="openapi.json">OpenAPI</a></p>' + "".join(parts) + "</html>"
    )


def _operation(method: str, path: str, operation: dict[str, Any], schemas: Any) -> str:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    fields = _fields(body.get("schema", {}), schemas)
    answers = ", ".join(
        f"<code>{escape(status)}</code> {escape(answer.get('description', ''))}"
        for status, answer in operation.get("responses", {}).items()
    )
    text = escape(operation.get("description") or operation.get("summary") or "")
    return (
        f"<h2><code>{escape(method.upper())} {escape(path)}</code></h2><p>{text}</p>"
        f"{fields}<p>Answers: {answers}</p>"
    )


def _fields(schema: dict[str, Any], schemas: Any) -> str:
    found = schemas.get(schema.get("$ref", "").rpartition("/")[2], schema)
    rows = [
        f"<tr><td><code>{escape(name)}</code><td>{escape(_type(field, schemas))}"
        f"<td>{'' if name in found.get('required', ()) else 'optional'}"
        f"<td>{escape(field.get('description') or '')}</tr>"
        for name, field in found.get("properties", {}).items()
    ]
    return f"<table><tr><th>field<th>type<th><th></tr>{''.join(rows)}</table>" if rows else ""


def _type(field: dict[str, Any], schemas: Any) -> str:
    """In words: "list of string, or null"."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        inner = schemas.get(name, {}).get("properties")
        return f"{{{', '.join(inner)}}}" if inner else name
    if "anyOf" in field:
        return ", or ".join(_type(one, schemas) for one in field["anyOf"])
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}), schemas)}"
    return str(field.get("type", "any"))


__all__ = ["DOCS_POLICY", "docs_page"]
