"""From a matplotlib figure to SVG twice: for the page, colored by its CSS variables, and as a file that stands alone."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape

from matplotlib.figure import Figure

from robustlayers.report.style import FONT_SIZE, PAPER, VARIABLES

__all__ = ["FONTS", "for_file", "for_page", "to_svg"]

FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_TAG = re.compile(r"<[^>]*>")
_COLOR = re.compile(r"#[0-9a-f]{6}\b")
_ID = re.compile(r'\s+id="([^"]*)"')
_REFERENCE = re.compile(r'(url\(#|href="#)([^")]+)')
_FONT = re.compile(r"font(?:-family)?: ?(?:([\d.]+px) )?'[^;\"]*(?:; ?)?")


def to_svg(figure: Figure) -> str:
    """Return a figure as bare SVG: no prolog, no metadata, no namespaces, no font names, and only the ids that are used."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    for noise in (r"<!--.*?-->", r"\s*<metadata>.*?</metadata>", r"\s*<style.*?</style>", r"\s*<defs>\s*</defs>"):
        text = re.sub(noise, "", text, flags=re.DOTALL)
    used = {target for tag in _TAG.findall(text) for _, target in _REFERENCE.findall(tag)}

    def clean(tag: str) -> str:
        tag = tag.replace("xlink:href", "href").replace("\n", " ")
        tag = re.sub(r'\s+xmlns(?::\w+)?="[^"]*"', "", tag)
        tag = re.sub(r'\s+transform="rotate\(-0 [^"]*"', "", tag)
        tag = _FONT.sub(lambda match: f"font-size: {match[1]}; " if match[1] else "", tag)
        return _ID.sub(lambda match: match[0] if match[1] in used else "", tag)

    text = _in_tags(text, clean)
    text = re.sub(r"\s*<g\s*/>", "", text)
    return re.sub(r">\s*\n\s*<", ">\n<", text).strip()


def _in_tags(text: str, change: Callable[[str], str]) -> str:
    """Apply `change` to every tag and leave what stands between tags, the words of the user, alone."""
    return _TAG.sub(lambda match: change(match[0]), text)


def _open(text: str, attributes: str) -> str:
    """Replace the attributes of the root element, but for its view box."""
    head, _, body = text.partition(">")
    box = re.search(r'viewBox="[^"]+"', head)
    return f"<svg {box[0] if box else ''} {attributes}>{body}"


def for_page(text: str, name: str, label: str) -> str:
    """Return bare SVG to stand in the page: colors are variables, ids begin with `name`, `label` is read aloud."""

    def change(tag: str) -> str:
        tag = _ID.sub(lambda match: f' id="{name}-{match[1]}"', tag)
        tag = _REFERENCE.sub(lambda match: f"{match[1]}{name}-{match[2]}", tag)
        return _COLOR.sub(lambda match: f"var({VARIABLES[match[0]][0]})" if match[0] in VARIABLES else match[0], tag)

    attributes = f'class="drawing" role="img" aria-label="{escape(label)}" font-size="{FONT_SIZE:g}"'
    return _open(_in_tags(text, change), f'{attributes} stroke-linejoin="round"')


def for_file(text: str, label: str) -> str:
    """Return bare SVG as a document of its own, on light paper."""
    size = re.search(r'viewBox="[\d.]+ [\d.]+ ([\d.]+) ([\d.]+)"', text)
    width, height = (size[1], size[2]) if size else ("100%", "100%")
    head = (
        f'xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-size="{FONT_SIZE:g}" '
        f'font-family="{FONTS}" stroke-linejoin="round"'
    )
    opened, _, body = _open(text, head).partition(">")
    ground = f'\n<title>{escape(label)}</title>\n<rect width="100%" height="100%" fill="{PAPER}"/>'
    return f'<?xml version="1.0" encoding="utf-8"?>\n{opened}>{ground}{body}\n'
