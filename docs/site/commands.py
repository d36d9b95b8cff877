"""The page of the command line: below what stands in docs/api/cli.md, what typer writes of the command itself."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
ASK = (sys.executable, "-m", "typer", "protomem_kernels.cli.app", "utils", "docs", "--name", "protomem")


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Add what typer says."""
    if page.file.src_uri != "api/cli.md":
        return markdown
    # Without the compiled part: `make test` may be building it at this moment.
    environment = os.environ | {"PROTOMEM_DISABLE_COMPILED": "1"}
    said = subprocess.run(ASK, cwd=ROOT, env=environment, capture_output=True, text=True)
    if said.returncode:
        raise RuntimeError(f"{' '.join(ASK)} failed:\n{said.stderr}")
    return markdown + plain(said.stdout)


def plain(markdown: str) -> str:
    """Return typer's page without its title and the colours of a terminal."""
    markdown = html.unescape(re.sub(r"</?span[^>]*>", "", markdown))
    markdown = re.sub(r"\[bold\]Example:\[/\] (.*)", r"```console\n$ \1\n```", markdown)
    markdown = re.sub(r"^\* `(.*?)`: ", r"* `\1`  \n    ", markdown, flags=re.MULTILINE)
    return markdown.split("\n", 1)[1]
