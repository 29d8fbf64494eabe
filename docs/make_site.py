"""Builds the site into docs/_build/html: `make site`, offline, without running a notebook.

The sources are put together in docs/_build/source: this folder's pages, the project's (README as start page,
FINDINGS, REPRODUCING, CONTRIBUTING, CHANGELOG), the tables of paper_figures, and every notebook with what it
showed when `make reproduce-small` ran it (paper_figures/pages), behind the cell that showed it. A notebook
whose code has changed since, or that has no page, says so. Links among all of these lead to the site's pages;
others to the repository, where `[project.urls] Repository` names one.
"""

from __future__ import annotations

import argparse
import json
import posixpath
import re
import shutil
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

from paper_figures import make_figures, make_pages  # noqa: E402

BUILD = DOCS / "_build"
ROOT_PAGES = {
    "README.md": "index.md",
    "FINDINGS.md": "findings.md",
    "REPRODUCING.md": "reproducing.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(?P<before>!?\[[^\]]*\]\()(?P<target>[^)#\s]+)(?P<anchor>#[^)]*)?\)")
STALE = (
    ":::{warning}\nThe notebook's code has changed since it was run: what is shown below is of an earlier "
    "version.\n:::"
)
NOT_RUN = (
    ":::{note}\nThis notebook has not been run at scale `small` yet: the code is shown without what it "
    "prints.\n:::"
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notebooks", nargs="*", default=[], help="beginnings of names; default: all")
    parser.add_argument("--out", type=Path, default=BUILD / "html")
    given = parser.parse_args(argv)
    source = given.out.parent / "source"
    write_sources(source, given.notebooks)
    from sphinx.cmd.build import build_main

    options = ["-b", "html", "-W", "--keep-going", "-q", "-c", str(DOCS)]
    code = build_main([*options, str(source), str(given.out)])
    print(f"{'built' if code == 0 else 'FAILED:'} {given.out / 'index.html'}")
    return code


def write_sources(folder: Path, beginnings: Sequence[str] = ()) -> None:
    """All pages of the site as a new folder, with the notebooks whose names begin so, or all."""
    shutil.rmtree(folder, ignore_errors=True)
    notebooks = [
        path
        for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
        if not beginnings or path.stem.startswith(tuple(beginnings))
    ]
    pages = site_pages(notebooks)
    for origin, target in pages.items():
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        if origin.endswith(".ipynb"):
            path.write_text(json.dumps(shown(ROOT / origin, pages)))
        else:
            path.write_text(with_links((ROOT / origin).read_text(), origin, pages))
    (folder / "notebooks" / "index.md").write_text(notebook_index(notebooks))
    (folder / "tables" / "index.md").write_text(table_index(pages))
    with (folder / "index.md").open("a") as file:
        file.write(CONTENTS)
    shutil.copytree(ROOT / "paper_figures", folder / "pictures", ignore=no_pictures)


def no_pictures(folder: str, names: list[str]) -> list[str]:
    """Those of a folder's files that are none."""
    return [
        name for name in names if Path(folder, name).is_file() and Path(name).suffix not in (".svg", ".png")
    ]


def site_pages(notebooks: Sequence[Path]) -> dict[str, str]:
    """Every page's origin in the project and its place on the site."""
    found = {name: target for name, target in ROOT_PAGES.items() if (ROOT / name).is_file()}
    found |= {f"docs/{path.name}": path.name for path in sorted(DOCS.glob("*.md"))}
    found |= {
        f"paper_figures/{path.name}": f"tables/{path.name}"
        for path in sorted((ROOT / "paper_figures").glob("*.md"))
    }
    return found | {f"notebooks/{path.name}": f"notebooks/{path.name}" for path in notebooks}


CONTENTS = """
```{toctree}
:hidden:
:caption: Read

notebooks/index
findings
tables/index
```

```{toctree}
:hidden:
:caption: Do

notebooks
own_data
own_surrogate
paper_scale
share
reproducing
```

```{toctree}
:hidden:
:caption: Know

library
data_and_protocols
speed
api
contributing
changelog
```
"""


def notebook_index(notebooks: Sequence[Path]) -> str:
    intro = "# Notebooks\n\nEach with what it showed at scale `small`."
    return contents(intro, [path.stem for path in notebooks])


def table_index(pages: dict[str, str]) -> str:
    intro = "# The paper beside ours\n\nEvery table and figure from the saved rows."
    there = [Path(target).stem for target in pages.values() if target.startswith("tables/")]
    return contents(intro, sorted(there))


def contents(intro: str, names: Sequence[str]) -> str:
    """A page that lists others."""
    listed = "\n".join(names)
    return f"{intro}\n\n```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n"


# --- links


def with_links(text: str, origin: str, pages: dict[str, str]) -> str:
    """A page's text with its links as they are on the site."""
    place = pages[origin]

    def replaced(match: re.Match[str]) -> str:
        target = match["target"]
        if re.match(r"^[a-z]+:", target):
            return match[0]
        found = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        where = elsewhere(found, pages)
        if where is None:  # nowhere to lead to
            return match["before"].lstrip("!")[1:-2]
        own = where if where.startswith("http") else posixpath.relpath(where, posixpath.dirname(place) or ".")
        return f"{match['before']}{own}{match['anchor'] or ''})"

    return LINK.sub(replaced, text)


def elsewhere(found: str, pages: dict[str, str]) -> str | None:
    """Where the project's file or folder is on the site, or in the repository; None for neither."""
    if found in pages:
        return pages[found]
    if found.startswith("paper_figures/") and found.endswith((".png", ".svg")):
        picture = Path(found).with_suffix(".svg")
        shown = picture if (ROOT / picture).is_file() else Path(found)
        return f"pictures/{shown.relative_to('paper_figures').as_posix()}"
    folders = {"paper_figures": "tables/index.md", "paper_figures/pages": "notebooks/index.md"}
    if found in folders:
        return folders[found]
    address = repository()
    return f"{address}/blob/main/{found}" if address else None


def repository() -> str | None:
    """`[project.urls] Repository`, None where the project names none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project.get("urls", {}).get("Repository")


# --- notebooks


def shown(path: Path, pages: dict[str, str]) -> dict[str, Any]:
    """A notebook with what its cells showed behind them, as text."""
    notebook = json.loads(path.read_text())
    origin = f"notebooks/{path.name}"
    page = ROOT / "paper_figures" / "pages" / f"{path.stem}.md"
    parts = page_parts(page.read_text(), pages) if page.is_file() else {}
    cells: list[dict[str, Any]] = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell = {**cell, "source": with_links("".join(cell["source"]), origin, pages)}
        cells.append(cell)
        if cell.get("id") in parts:
            cells.append(text_cell(f"{cell['id']}-shown", parts[cell["id"]]))
    head = "\n\n".join(part for part in (how(page, notebook), buttons(path.name, repository())) if part)
    return {**notebook, "cells": [*cells[:1], text_cell("how", head), *cells[1:], *others(path.stem)]}


def text_cell(name: str, text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": text}


def how(page: Path, notebook: dict[str, Any]) -> str:
    """When the notebook ran, and whether that is its present code."""
    if not page.is_file():
        return NOT_RUN
    text = page.read_text()
    ran = next(line for line in text.splitlines() if line.startswith("As it ran"))
    return ran if make_pages.is_current(text, notebook) else f"{STALE}\n\n{ran}"


def buttons(name: str, address: str | None) -> str:
    """Links that run a notebook in Colab or Binder, which fetch it from GitHub; none for another host."""
    found = re.fullmatch(r"https://github\.com/([^/]+/[^/]+?)(\.git)?/?", address or "")
    if not found:
        return ""
    colab = f"https://colab.research.google.com/github/{found[1]}/blob/main/notebooks/{name}"
    binder = f"https://mybinder.org/v2/gh/{found[1]}/main?labpath=notebooks%2F{name}"
    return f"Run it: [Colab]({colab}) · [Binder]({binder})"


def page_parts(text: str, pages: dict[str, str]) -> dict[str, str]:
    """What each cell showed, by the cell's id, without the notebook's own headings."""
    found = re.split(r"<!-- cell (\S+) -->", text)
    parts = {}
    for name, part in zip(found[1::2], found[2::2], strict=True):
        own = re.sub(r"^#{1,2} .+$", "", part, flags=re.MULTILINE).strip()
        moved = own.replace("](../", "](../paper_figures/")  # as seen from notebooks/
        parts[name] = with_links(
            moved, "notebooks/x.ipynb", {**pages, "notebooks/x.ipynb": "notebooks/x.ipynb"}
        )
    return parts


def others(stem: str) -> list[dict[str, Any]]:
    """What other runs of the notebook, with other parameters, drew."""
    runs = [one for one in make_figures.ARTEFACTS if one.source.startswith(f"{stem}_")]
    there = [one for one in runs if (ROOT / "paper_figures" / f"{one.name}.md").is_file()]
    if not there:
        return []
    lines = [f"- [{one.heading.format(where=' on the stand-in')}](../tables/{one.name}.md)" for one in there]
    return [text_cell("others", "## Run with other parameters\n" + "\n".join(lines))]


if __name__ == "__main__":
    sys.exit(main())
