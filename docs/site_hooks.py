"""What the site does to a page: pages of the top folder are included, and their links to docs/ start one folder deeper there."""

from __future__ import annotations

from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Make `--8<-- "PAGE.md"` of the top folder one with the links of this one."""
    text = markdown.strip()
    if not text.startswith('--8<-- "'):
        return markdown
    with open(text.split('"')[1], encoding="utf-8") as included:
        return (
            included.read()
            .replace("](docs/", "](")
            .replace("](ARCHITECTURE.md", "](architecture.md")
            .replace("](CONTRIBUTING.md", "](contributing.md")
        )
