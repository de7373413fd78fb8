"""The page /docs: the server's routes with a command for each. It loads nothing, so that no script sees the token."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

# FastAPI's own page loads its script from another server, and asks for the token.
HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
TOKEN = '-H "Authorization: Bearer $DEFUSE_SERVE_TOKEN" '
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.5 sans-serif; max-width: 55rem; margin: 2rem auto; padding: 0 1rem }}
pre {{ background: #eee; padding: 0.6rem; overflow-x: auto }}
</style></head><body>
<h1>{title}</h1><p>{summary} The whole description: <a href="openapi.json">openapi.json</a> (OpenAPI).</p>
{routes}
</body></html>
"""


def docs_page(schema: dict[str, Any], address: str) -> str:
    """Return the page for an OpenAPI description; `address` is that of the server, as in http://127.0.0.1:8000."""
    routes = "\n".join(_routes(schema, address.rstrip("/")))
    info = schema["info"]
    return PAGE.format(title=escape(info["title"]), summary=escape(info["summary"]), routes=routes)


def _routes(schema: dict[str, Any], address: str) -> Iterator[str]:
    """Yield each route as HTML: what it is for, a command, and what its answers mean."""
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            token = TOKEN if "401" in operation["responses"] and schema.get("security") else ""
            image = "-F image=@picture.png " if method == "post" else ""
            answers = "".join(
                f"<li>{code}: {escape(answer['description'])}</li>"
                for code, answer in operation["responses"].items()
            )
            yield (
                f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation['summary'])}</p>"
                f"<pre>curl {escape(f'{token}{image}{address}{path}')}</pre><ul>{answers}</ul>"
            )
