"""The page's templates, filled. Everything that is put into them is text: Jinja escapes it."""

from __future__ import annotations

import functools
from pathlib import Path

import jinja2

from edge_agent.gateway.page import Look
from edge_agent.gateway.page.view import view_of


def render(template: str, look: Look | None) -> str:
    """
    Args:
        look: None for whoever has brought no token.
    """
    return _environment().get_template(template).render(view=view_of(look) if look else None)


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("files")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
