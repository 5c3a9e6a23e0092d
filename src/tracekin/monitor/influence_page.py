"""The HTML page of proponents and opponents; like the report it is given plain values and image bytes alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tracekin.monitor.pages import render_template


@dataclass(frozen=True)
class Related:
    """A proponent or an opponent."""

    image: bytes
    """PNG."""
    label: str
    score: str
    agrees: bool | None
    """Whether its label is the explained image's; None without labels."""


@dataclass(frozen=True)
class Explained:
    """An image and those that its loss has most to do with, strongest first."""

    image: bytes
    """PNG."""
    key: str
    label: str
    proponents: Sequence[Related]
    opponents: Sequence[Related]


@dataclass(frozen=True)
class InfluencePage:
    title: str
    subtitle: str
    findings: Sequence[str]
    """Sentences at the top."""
    explained: Sequence[Explained]
    settings: Mapping[str, str]
    """What the scores depend on."""


def render(page: InfluencePage) -> str:
    """The page as HTML text; every string is escaped."""
    return render_template("influence.html.jinja", page=page)
