"""What MkDocs does besides rendering: pages from files that live elsewhere, public names, and the commands' help.

A link in a page is written as it is true in the repository (``../CONTRIBUTING.md``); here it becomes the link that is
true on the site. Whatever is wrong is logged as a warning, and a strict build fails on any warning.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
from enum import Enum
from pathlib import Path, PurePosixPath

from click.testing import CliRunner
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import dynrank_fx as dr
from dynrank_fx.cli.main import cli

log = logging.getLogger("mkdocs.hooks.dynrank")
ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "benchmarks/study"


def _elsewhere() -> dict[str, str]:
    """Page or picture of the site to the file that it is made from, outside of docs/."""
    pages = {
        "index.md": "README.md",
        "contributing.md": "CONTRIBUTING.md",
        "changelog.md": "CHANGELOG.md",
        "zoo/RESULTS.md": "tests/zoo/RESULTS.md",
        "torture/RESULTS.md": "tests/torture/RESULTS.md",
    }
    study = {f"study/{path.name}": path for path in [*STUDY.glob("*.md"), *STUDY.glob("*.png")]}
    return pages | {uri: path.relative_to(ROOT).as_posix() for uri, path in study.items()}


ELSEWHERE = _elsewhere()
PAGE_OF = {source: uri for uri, source in ELSEWHERE.items()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The site also has the files that live elsewhere."""
    for uri, source in ELSEWHERE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site needs them; then what the page asks for by ``::: name`` and ``::: help command``."""
    uri = page.file.src_uri
    markdown = _with_links(markdown, uri)
    if uri == "commands.md":
        markdown = re.sub(r"^::: help ?(\w*)$", lambda found: help_of(found[1]), markdown, flags=re.MULTILINE)
    if uri == "api.md":
        markdown = re.sub(r"^::: (dynrank_fx\S+)$", lambda found: reference(found[1]), markdown, flags=re.MULTILINE)
    return markdown


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> None:
    """A page that fetches anything from elsewhere could not be read without a network."""
    for fetched in re.findall(r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?://[^"]+)', output):
        log.warning("%s fetches %s", page.file.src_uri, fetched)


def _with_links(markdown: str, uri: str) -> str:
    """Relative links of a page from the repository's paths to the site's."""
    source = PurePosixPath(ELSEWHERE.get(uri, f"docs/{uri}"))

    def on_the_site(found: re.Match[str]) -> str:
        path, mark, anchor = found[2].partition("#")
        if "://" in path or not path:
            return found[0]
        target = os.path.normpath(source.parent / path)
        there = PAGE_OF.get(target, target.removeprefix("docs/"))
        return f"{found[1]}({os.path.relpath(there, PurePosixPath(uri).parent)}{mark}{anchor})"

    return re.sub(r"(\])\(([^)\s]+)\)", on_the_site, markdown)


def help_of(command: str) -> str:
    """What ``dynrank-fx COMMAND --help`` prints, as a block of text."""
    words = [command, "--help"] if command else ["--help"]
    result = CliRunner().invoke(cli, words, prog_name="dynrank-fx", terminal_width=90, max_content_width=90)
    if result.exit_code:
        log.warning("no help of the command %r: %s", command, result.output)
    return f"```text\n{result.output}```"


def reference(name: str) -> str:
    """A heading with the public name, and mkdocstrings' order for the object, which lives in some room of the package.

    The object is found by importing it: a function like ``capture`` and the package it lives in may have one name.
    """
    *home, short = name.split(".")[1:]
    target = getattr(getattr(dr, home[0]) if home else dr, short)
    text = target.__doc__ or ""
    if not text.strip() or text.startswith(f"{short}("):  # a dataclass without one gets its signature
        log.warning("the public name %s has no docstring", name)
    place = f"{target.__module__}.{target.__qualname__}" if not inspect.ismodule(target) else target.__name__
    options = {"heading": name.replace("dynrank_fx", "dr", 1), "toc_label": name.replace("dynrank_fx", "dr", 1)}
    if inspect.isclass(target) and issubclass(target, Enum):
        options["show_if_no_docstring"] = "true"  # its members are what a user chooses from
    if short.endswith("Layout"):
        options["members"] = "false"  # a user names it, and calls nothing of it
    return "\n".join([f"::: {place}", "    options:", *(f"      {key}: {value}" for key, value in options.items()), ""])
