"""Pages from outside docs/, links that leave it, folders in the navigation; and what is held of the built site.

- ``OUTSIDE`` names files elsewhere in the repository that are pages of the site. They are read where they lie.
- A link from a page to any other file of the repository becomes one into ``repo_url``, or, as long as there is none,
  the file's path. In a plain repository browser all of these are ordinary relative links.
- An entry of the navigation that ends with "/" stands for all pages of that folder, by name, its README first.
- After the build: nothing is fetched from elsewhere, and every link within the site leads to a file.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LOG = logging.getLogger("mkdocs.plugins.pages")
ROOT = Path(__file__).parents[2]
OUTSIDE = {
    ROOT / "csrc" / "cuda_host" / "README.md": "cuda_host.md",
    ROOT / "CONTRIBUTING.md": "contributing.md",
    ROOT / "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
FETCHED = re.compile(r"<(?:script|img|source|iframe|link)\b[^>]*?(?:src|href)=\"?(?P<url>[^\s\">]+)", re.IGNORECASE)
FOLLOWED = re.compile(r"<a\b[^>]*?href=\"?(?P<url>[^\s\">]+)", re.IGNORECASE)


def on_config(config: MkDocsConfig) -> None:
    """Put the pages of a folder where the navigation names it."""
    config.nav = _filled(config.nav or [], Path(config.docs_dir))


def _filled(nav: list[Any], docs: Path) -> list[Any]:
    filled: list[Any] = []
    for entry in nav:
        if isinstance(entry, str) and entry.endswith("/"):
            filled += _pages_of(entry, docs)
        elif isinstance(entry, dict):
            ((title, value),) = entry.items()
            if isinstance(value, str) and value.endswith("/"):
                value = _pages_of(value, docs)
            filled.append({title: _filled(value, docs) if isinstance(value, list) else value})
        else:
            filled.append(entry)
    return filled


def _pages_of(folder: str, docs: Path) -> list[str]:
    pages = sorted((docs / folder).glob("*.md"), key=lambda page: (page.name != "README.md", page.name))
    return [page.relative_to(docs).as_posix() for page in pages]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages from outside."""
    for source, name in OUTSIDE.items():
        files.append(File.generated(config, name, abs_src_path=str(source)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that leave docs/ into what they are on the site; code blocks are left as they are."""
    if page.file.abs_src_path is None:
        return markdown
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    for place in range(0, len(parts), 2):
        parts[place] = LINK.sub(lambda link: _on_site(link, page, config), parts[place])
    return "".join(parts)


def _on_site(link: re.Match[str], page: Page, config: MkDocsConfig) -> str:
    target = link["target"]
    if "://" in target:
        return link[0]
    source, docs = Path(page.file.abs_src_path or ""), Path(config.docs_dir)
    path = Path(os.path.normpath(source.parent / target))
    if path in OUTSIDE:
        return _relative(link, OUTSIDE[path], page)
    if path.is_relative_to(docs):
        return _relative(link, path.relative_to(docs).as_posix(), page)
    if not path.exists():
        return link[0]  # which MkDocs reports
    name = path.relative_to(ROOT).as_posix()
    if config.repo_url:
        return f"[{link['text']}]({config.repo_url.rstrip('/')}/blob/main/{name}{link['anchor'] or ''})"
    plain = link["text"].replace("`", "")
    return f"`{name}`" if name.endswith(plain.rstrip("/")) else f"{link['text']} (`{name}`)"


def _relative(link: re.Match[str], uri: str, page: Page) -> str:
    target = os.path.relpath(uri, os.path.dirname(page.file.src_uri) or ".")
    return f"[{link['text']}]({Path(target).as_posix()}{link['anchor'] or ''})"


def on_post_build(config: MkDocsConfig) -> None:
    """Report what a page would fetch from elsewhere, and links within the site that lead nowhere."""
    site = Path(config.site_dir)
    for page in sorted(site.rglob("*.html")):
        html = page.read_text(encoding="utf-8")
        for url in _urls(FETCHED, html):
            if re.match(r"(https?:)?//", url):
                LOG.warning("%s fetches %s", page.relative_to(site), url)
        for url in {*_urls(FETCHED, html), *_urls(FOLLOWED, html)}:
            target = unquote(url.split("#")[0].split("?")[0])
            if page.name != "404.html" and target and ":" not in target and not (page.parent / target).exists():
                LOG.warning("%s links to %s, which is not there", page.relative_to(site), url)


def _urls(pattern: re.Pattern[str], html: str) -> Iterator[str]:
    return (found["url"] for found in pattern.finditer(html))
