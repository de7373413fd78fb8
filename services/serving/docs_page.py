"""The page /docs: the server's routes with a command for each. It loads nothing, so that no script sees the token."""

from __future__ import annotations

from typing import Any

# FastAPI's own page loads its script from another server, and asks for the token.
HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}


def docs_page(schema: dict[str, Any], address: str) -> str:
    """Return the page for an OpenAPI description; `address` is that of the server, as in http://127.0.0.1:8000."""
    from jinja2 import (  # a replica that nobody asks for the page need not import it
        Environment,
        PackageLoader,
    )

    made = Environment(loader=PackageLoader("services.serving"), autoescape=True, trim_blocks=True)
    page = made.get_template("docs.html.j2")
    return page.render(
        info=schema["info"],
        paths=schema["paths"],
        security=schema.get("security"),
        address=address.rstrip("/"),
    )
