"""The site's sources: every notebook with what it showed, every link to where it leads there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from bs4 import BeautifulSoup

from docs import make_site
from paper_figures import make_figures, make_pages

NAME = "05_guidance_ablation"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A small project: a page of its own, a notebook, a table with its picture."""
    notebook = {
        "cells": [
            {
                "cell_type": "markdown", "id": "a", "metadata": {},
                "source": ["# Title\n", "See [start](../README.md)."],
            },
            {"cell_type": "code", "id": "b", "metadata": {}, "source": ["show()"], "outputs": []},
        ],
        "metadata": {}, "nbformat": 4, "nbformat_minor": 5,
    }  # fmt: skip
    for folder in ("docs", "notebooks", "paper_figures/pages"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "notebooks" / f"{NAME}.ipynb").write_text(json.dumps(notebook))
    page = [
        f"<!-- notebook {NAME}, code {make_pages.digest(notebook)} -->", "# Title",
        "As it ran at scale `small`, then, in 1.0 minutes.", "<!-- cell b -->", "| a |\n| --- |\n| 1 |",
        "![table05](../table05.png)", "## Next",
    ]  # fmt: skip
    (tmp_path / "paper_figures" / "pages" / f"{NAME}.md").write_text("\n\n".join(page))
    (tmp_path / "paper_figures" / "table05.md").write_text("# Table 5\n")
    for kind in ("svg", "png"):
        (tmp_path / "paper_figures" / f"table05.{kind}").write_text("picture")
    (tmp_path / "README.md").write_text(
        "# Start\n[notebook](notebooks/05_guidance_ablation.ipynb), [table](paper_figures/table05.md#top), "
        "![p](paper_figures/table05.png), [code](igd_lib/config.py), [out](https://example.org/x.md)\n"
    )
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    monkeypatch.setattr(make_site, "ROOT", tmp_path)
    monkeypatch.setattr(make_site, "DOCS", tmp_path / "docs")
    make_site.write_sources(tmp_path / "site")
    return tmp_path


def shown(project) -> list[str]:
    cells = json.loads((project / "site" / "notebooks" / f"{NAME}.ipynb").read_text())["cells"]
    return [cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"]) for cell in cells]


def test_a_notebook_has_what_it_showed_behind_the_cell(project):
    title, how, code, behind, *_ = shown(project)
    assert title == "# Title\nSee [start](../index.md)." and code == "show()"
    assert how == "As it ran at scale `small`, then, in 1.0 minutes."
    assert behind == "| a |\n| --- |\n| 1 |\n\n![table05](../pictures/table05.svg)"
    assert (project / "site" / "pictures" / "table05.svg").is_file()


def test_a_notebook_that_was_changed_says_so(project):
    path = project / "notebooks" / f"{NAME}.ipynb"
    path.write_text(path.read_text().replace("show()", "show(2)"))
    make_site.write_sources(project / "site")
    assert shown(project)[1].startswith(make_site.STALE)
    (project / "paper_figures" / "pages" / f"{NAME}.md").unlink()
    make_site.write_sources(project / "site")
    assert shown(project)[1] == make_site.NOT_RUN and len(shown(project)) == 3


def test_links_lead_to_the_site_to_the_repository_or_nowhere(project):
    start = (project / "site" / "index.md").read_text()
    assert "[notebook](notebooks/05_guidance_ablation.ipynb), [table](tables/table05.md#top)" in start
    assert "![p](pictures/table05.svg), code, [out](https://example.org/x.md)" in start
    (project / "pyproject.toml").write_text('[project.urls]\nRepository = "https://example.org/r"\n')
    make_site.write_sources(project / "site")
    assert (
        "[code](https://example.org/r/blob/main/igd_lib/config.py)"
        in (project / "site" / "index.md").read_text()
    )


@pytest.mark.parametrize(
    ("address", "there"),
    [
        ("https://github.com/somebody/igd", True),
        ("https://github.com/somebody/igd.git", True),
        ("https://example.org/somebody/igd", False),
        (None, False),
    ],
)
def test_buttons_are_there_where_the_project_names_a_repository_on_github(project, address, there):
    if address:
        (project / "pyproject.toml").write_text(f'[project.urls]\nRepository = "{address}"\n')
    make_site.write_sources(project / "site")
    text = shown(project)[1]
    links = [
        f"https://colab.research.google.com/github/somebody/igd/blob/main/notebooks/{NAME}.ipynb",
        f"https://mybinder.org/v2/gh/somebody/igd/main?labpath=notebooks%2F{NAME}.ipynb",
    ]
    assert [link in text for link in links] == [there, there]


def test_every_link_of_the_real_sources_leads_to_a_file(tmp_path):
    """Pages' and notebooks', to pages and pictures."""
    make_site.write_sources(tmp_path / "source")
    count, pictures = 0, 0
    for path, text in texts(tmp_path / "source"):
        for match in make_site.LINK.finditer(text):
            if not re.match(r"^[a-z]+:", match["target"]):
                count += path.suffix == ".md"
                pictures += path.suffix == ".ipynb" and match["before"].startswith("!")
                assert (path.parent / match["target"]).is_file(), f"{path.name}: {match['target']}"
    assert count > 60 and pictures > 20


def texts(folder) -> Iterator[tuple[Path, str]]:
    """What is written in the sources: pages, and the notebooks' cells of text."""
    for path in folder.rglob("*.md"):
        yield path, path.read_text()
    for path in folder.rglob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "markdown":
                yield path, "".join(cell["source"])


def test_no_page_names_a_folder_of_one_machine():
    pages = sorted((make_site.ROOT / "paper_figures" / "pages").glob("*.md"))
    assert len(pages) > 10
    for page in pages:
        found = re.findall(r"(?<![\w$.~/])/(?:home|root|tmp|work|Users|mnt)/\S*", page.read_text())
        assert not found, (page.name, found)


def test_what_a_notebook_showed_has_a_table():
    for page in (make_site.ROOT / "paper_figures" / "pages").glob("*.md"):
        assert "\n| ---" in page.read_text(), page.name


def test_every_page_is_in_a_table_of_contents(tmp_path):
    make_site.write_sources(tmp_path / "source")
    texts = [path.read_text() for path in (tmp_path / "source").rglob("*.md")]
    listed = {
        name
        for text in texts
        for part in re.findall(r"```\{toctree\}(.*?)```", text, re.DOTALL)
        for name in part.split()
    }
    for path in (tmp_path / "source").rglob("*.md"):
        name = path.relative_to(tmp_path / "source").with_suffix("").as_posix()
        assert name == "index" or name in listed or path.stem in listed, name


# --- the site itself


def broken(folder) -> list[str]:
    """Every link and picture of a site's pages that leads nowhere, its anchor included."""
    pages = {path: BeautifulSoup(path.read_text(), "html.parser") for path in sorted(folder.rglob("*.html"))}
    anchors = {path: {node["id"] for node in page.find_all(id=True)} for path, page in pages.items()}
    lines = []
    for path, page in pages.items():
        targets = [node["href"] for node in page.find_all("a", href=True)]
        for target in [*targets, *(node["src"] for node in page.find_all("img", src=True))]:
            place, _, anchor = target.partition("#")
            if re.match(r"^[a-z]+:", target):
                continue
            found = (path.parent / unquote(place)).resolve() if place else path
            if not found.is_file():
                lines.append(f"{path.name}: {target}")
            elif anchor and found in anchors and unquote(anchor) not in anchors[found]:
                lines.append(f"{path.name}: {target} has no such place")
    return lines


def from_elsewhere(folder) -> list[str]:
    """Scripts, styles and pictures that a page would fetch from another host."""
    found = []
    for path in sorted(folder.rglob("*.html")):
        page = BeautifulSoup(path.read_text(), "html.parser")
        for node in page.select("script[src], link[rel=stylesheet], img[src]"):
            target = node.get("src") or node["href"]
            found += [f"{path.name}: {target}"] if re.match(r"^([a-z]+:)?//", target) else []
    return found


def check(folder) -> None:
    """Each notebook that was run has a table, and a picture for each that is drawn of it."""
    for path in sorted((folder / "notebooks").glob("[0-9]*.html")):
        page = BeautifulSoup(path.read_text(), "html.parser")
        text = (make_site.ROOT / "paper_figures" / "pages" / f"{path.stem}.md").is_file()
        assert text == ("As it ran at scale" in page.get_text()), path.name
        if text:
            assert page.find("table"), path.name
            source = (make_site.ROOT / "notebooks" / f"{path.stem}.ipynb").read_text().replace('\\"', '"')
            kept = make_pages.KEPT.findall(source)
            drawn = set(make_figures.drawn(path.stem)) & set(kept)
            assert len(page.select("article img")) >= len(drawn), path.name
            assert "\N{EN DASH}revision" not in page.get_text(), path.name  # of a command, to be copied
    assert (folder / "searchindex.js").stat().st_size > 10_000


def test_two_notebooks_and_all_other_pages_are_built_and_linked(tmp_path):
    out = tmp_path / "html"
    assert make_site.main(["--notebooks", "02", "05", "--out", str(out)]) == 0
    assert {path.stem for path in (out / "notebooks").glob("[0-9]*.html")} == {
        "02_checkpoints",
        "05_guidance_ablation",
    }
    assert broken(out) == []
    check(out)
    assert (
        from_elsewhere(out) == [] and b"<math" not in (out / "notebooks" / "02_checkpoints.html").read_bytes()
    )
    page = BeautifulSoup((out / "notebooks" / "05_guidance_ablation.html").read_text(), "html.parser")
    assert page.select("article img[src$='table05.svg']") and "--revision" in page.get_text()


@pytest.mark.slow
def test_the_whole_site(tmp_path):
    out = tmp_path / "html"
    assert make_site.main(["--out", str(out)]) == 0
    assert broken(out) == []
    check(out)
    assert from_elsewhere(out) == [] and b"<math" in (out / "notebooks" / "18_lesson.html").read_bytes()
