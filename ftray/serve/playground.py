"""The page at `/` for trying versions. It is one file without a build step, and talks to this server alone."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import HTMLResponse

PAGE = Path(__file__).with_name("playground.html")


router = APIRouter(include_in_schema=False)


@router.get("/")
async def playground() -> HTMLResponse:
    """Routed only where `http.playground` says so."""
    page, headers = _page()
    return HTMLResponse(page, headers=headers)


@cache
def _page() -> tuple[str, dict[str, str]]:
    page = PAGE.read_text(encoding="utf-8")
    return page, {
        "Content-Security-Policy": policy(page),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }


def policy(page: str) -> str:
    """Allows the page's own script and style, by their hashes, and requests to its own server. Nothing else, so that
    text which a model made up could do nothing even if it became markup."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hashes(page, 'script')}",
            f"style-src {_hashes(page, 'style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        ]
    )


def _hashes(page: str, tag: str) -> str:
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    assert blocks, f"the page has no <{tag}>"
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(b.encode()).digest()).decode()}'" for b in blocks)
