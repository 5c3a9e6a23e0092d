import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from tracekin.monitor.report import Page, Pair, RunPart, render

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Checker(HTMLParser):
    """Collects tags, attributes and text; complains about tags that do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        self.text += data


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def page(name: str = "tracin", metrics: list[dict[str, float | None]] | None = None) -> Page:
    lines = [
        {"step": n, "loss": 4 / n, "hit_rate": None if n < 3 else 0.3, "chance_rate": 0.2, "effective_rank": 9.0}
        for n in range(1, 9)
    ]
    pairs = [
        Pair(png(), png("blue"), "nevus", "melanoma", 0.125, False),
        Pair(png(), png(), "nevus", "nevus", 2.0, True),
        Pair(png(), png(), "", "", -1.0, None),
    ]
    return Page(
        title=f"{name} on skin",
        subtitle="12 images",
        header=["method", "kNN"],
        rows=[["pixels", "0.400 ±0.010"], [name, "0.500 ±0.010"]],
        caption=f"caption {name}",
        findings=[f"{name} exceeds pixels."],
        runs=[
            RunPart(name, lines if metrics is None else metrics, pairs, 8),
            RunPart("none", lines, note=f"no {name}"),
        ],
        settings={"mining.policy": [name, "none"]},
        facts={"cpu": name},
    )


def checked(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return checker


def test_page_parses_and_holds_what_it_was_given() -> None:
    found = checked(render(page()))
    for part in (
        "tracin on skin",
        "0.500 ±0.010",
        "tracin exceeds pixels.",
        "melanoma",
        "score 0.12",
        "no tracin",
        "step 8",
    ):
        assert part in found.text
    classes = [attributes.get("class", "") or "" for _, attributes in found.found]
    assert [sum(c.split() == ["pair", kind] for c in classes) for kind in ("hit", "miss")] == [1, 1]
    images = [attributes["src"] or "" for tag, attributes in found.found if tag == "img"]
    assert (
        sum(source.startswith("data:image/svg+xml;base64,") for source in images) == 3
    )  # no target_std, no such chart
    assert base64.b64decode(images[-1].partition(",")[2]) == png()


def test_page_loads_and_runs_nothing() -> None:
    html = render(page())
    found = checked(html)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", html))
    assert not {tag for tag, _ in found.found} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for _, attributes in found.found:
        assert not any(name.startswith("on") for name in attributes)
        assert all((attributes.get(name) or "data:").startswith("data:") for name in ("src", "href", "srcset"))
    policy = next(a["content"] or "" for _, a in found.found if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    for source in re.findall(r"svg\+xml;base64,([A-Za-z0-9+/=]+)", html):
        assert not re.search(rb"<script|<image|<!ENTITY|href=\"(?!#)", base64.b64decode(source))


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", '"><img src=x onerror=y>', "a & b $\\frac{$ {{ 7 * 7 }}"]
)
def test_names_are_text_wherever_they_stand(name: str) -> None:
    hostile = page(name)
    hostile.runs[0].gallery[0].__dict__["anchor_label"] = name
    found, plain = checked(render(hostile)), checked(render(page()))
    assert [tag for tag, _ in found.found] == [tag for tag, _ in plain.found]
    assert found.text.count(name) == plain.text.count("tracin") + 1


def test_the_same_runs_make_the_same_bytes() -> None:
    assert render(page()) == render(page())


def test_a_run_without_metrics_or_gallery_still_makes_a_page() -> None:
    bare = Page("t", "s", ["method"], [["none"]], "c", [], [RunPart("none", [])])
    found = checked(render(bare))
    assert "Training" not in found.text
    assert "thumbnails" not in found.text
