"""For mkdocs: pages and pictures from outside docs/, and links that work on the site as they do among the files.

A page links to a file by its place in the repository, `../examples/digits/README.md` from docs/math.md. On the site
what is in docs/ lies at the top, everything else under its own path. A link to what is not on the site (a source file,
a folder) leads to `repo_url` where mkdocs.yml has one, else only its words are left.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OTHERS = ("CONTRIBUTING.md", "CHANGELOG.md", "examples/*/README.md", "benchmarks/results/*/*.png")
FENCE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, *, config: Any) -> Files:
    for pattern in OTHERS:
        for path in sorted(ROOT.glob(pattern)):
            place = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    here = _in_repository(page.file.src_uri)

    def mend(match: re.Match[str]) -> str:
        picture, words, target, anchor = match.groups()
        place = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        if not (ROOT / place).exists():
            return match[0]  # mkdocs says so
        for found in (place, f"{place}/README.md"):
            there = found.removeprefix("docs/")
            if files.get_file_from_path(there) is not None:
                link = posixpath.relpath(there, posixpath.dirname(page.file.src_uri) or ".")
                return f"{picture}[{words}]({link}{anchor or ''})"
        if config.repo_url:
            return f"[{words}]({config.repo_url.rstrip('/')}/blob/HEAD/{place})"
        return words

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(mend, part) for part in parts)


def _in_repository(place: str) -> str:
    return f"docs/{place}" if (ROOT / "docs" / place).exists() else place
