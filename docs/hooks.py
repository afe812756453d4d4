"""Makes the repository's pages readable as a site: links to files become their paths, and equations MathML."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

_EQUATION = re.compile(r"^\$\$(.+)\$\$$", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Turns a link out of the site into the path of the file, and an equation in LaTeX into what browsers render."""
    folder = posixpath.dirname(page.file.src_uri)

    def replace(match: re.Match[str]) -> str:
        text, target = match[1], posixpath.normpath(posixpath.join(folder, match[2]))
        if not target.startswith(".."):
            return match[0]
        path = target.removeprefix("../")
        if not (Path(config.config_file_path).parent / path).exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {path!r}, which the repository does not have.")
        return f"{text} (`{path}`)" if text.strip("`") != path else f"`{path}`"

    return _EQUATION.sub(_as_mathml, _LINK.sub(replace, markdown))


def _as_mathml(match: re.Match[str]) -> str:
    return f'<div style="overflow-x: auto">{convert(match[1], display="block")}</div>'
