"""HTML pages from the templates beside this file: one frame, every string escaped, pictures inside the page."""

import base64
from pathlib import Path


def render_template(name: str, **values: object) -> str:
    """The page of the template ``name``; ``data_uri`` is there as a filter that turns PNG bytes into a source."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = lambda content: "data:image/png;base64," + base64.b64encode(content).decode()
    return environment.get_template(name).render(**values)
