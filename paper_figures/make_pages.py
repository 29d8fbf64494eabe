"""Writes what executed notebooks showed as pages, for people who have not run them and for the site.

`python paper_figures/make_pages.py EXECUTED.ipynb ...` (as `make reproduce-small` leaves them in `out/small`)
writes pages/NAME.md: under the notebook's headings each code cell's text and tables, and in a picture's place
the one that `make_figures.py` drew from the same rows. A comment before each cell's part has its id, so that
a reader can put it behind the cell; the first comment has the digest of the notebook's code, by which
`is_current` tells whether the notebook has been changed since.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import sys
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup, Tag

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from igd_lib.tools import files
from igd_lib.tools.machine import cache_dir, data_dir
from igd_lib.tools.version import PROJECT
from paper_figures import make_figures

PAGES = Path(__file__).parent / "pages"
LARGEST = 200_000  # bytes of a page
PROGRESS = re.compile(r"^.+ \d+/\d+.*, [\d.]+ (s|min|h), [\d.]+ (s|min|h) left$")
WAITING = re.compile(r"^waiting for |: another run is sampling what is left; waiting for it$")
LAYOUT = (tokenize.COMMENT, tokenize.NL)  # tokens that change nothing
KEPT = re.compile(r'keep\(.*save_to, f?"(?P<name>[^"]+)"')

Cell = Mapping[str, Any]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path, help="executed ones, named as their runs")
    for path in parser.parse_args(argv).notebooks:
        page = as_page(json.loads(path.read_text()), path.stem)
        print("wrote", files.write(PAGES / f"{path.stem}.md", page))
    return 0


def as_page(notebook: Mapping[str, Any], run: str) -> str:
    """The page of an executed notebook. Raises ValueError where it is too large."""
    name = run if (PROJECT / "notebooks" / f"{run}.ipynb").is_file() else _notebook_of(run)
    parts = [f"<!-- notebook {name}, code {digest(notebook)} -->"]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            parts += re.findall(r"^#{1,2} .+$", _text(cell["source"]), flags=re.MULTILINE)
            continue
        shown = list(_outputs(cell, run))
        parts += [f"<!-- cell {cell['id']} -->", *shown] if shown else []
    parts.insert(2, _how(notebook))
    page = without_formulas(_without_places("\n\n".join(parts) + "\n", _saved_to(notebook)))
    if len(page.encode()) > LARGEST:
        raise ValueError(f"the page of {run} would have {len(page.encode())} bytes, more than {LARGEST}")
    return page


def digest(notebook: Mapping[str, Any]) -> str:
    """Of a notebook's code without comments, executed or not: papermill's own cell is left out."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    own = [_bare(c["source"]) for c in cells if "injected-parameters" not in c["metadata"].get("tags", [])]
    return hashlib.sha256("\0".join(own).encode()).hexdigest()[:16]


def _bare(source: str | list[str]) -> str:
    """A cell's code without its comments and its layout."""
    lines = io.StringIO(_text(source)).readline
    tokens = (token for token in tokenize.generate_tokens(lines) if token.type not in LAYOUT)
    return " ".join(token.string for token in tokens)


def is_current(page: str, notebook: Mapping[str, Any]) -> bool:
    """Whether a page shows what a notebook's present code printed."""
    return f", code {digest(notebook)} -->" in page.split("\n", 1)[0]


def _notebook_of(run: str) -> str:
    """The notebook of a run under another name, which begins with the notebook's."""
    names = sorted((path.stem for path in (PROJECT / "notebooks").glob("*.ipynb")), key=len)
    return next(name for name in reversed(names) if run.startswith(name))


def _text(source: str | list[str]) -> str:
    return source if isinstance(source, str) else "".join(source)


def _how(notebook: Mapping[str, Any]) -> str:
    """With which parameters it ran, when and how long."""
    about = notebook["metadata"]["papermill"]
    given = {key: value for key, value in about["parameters"].items() if key not in ("save_to", "scale")}
    words = "".join(f" `-p {key} {value}`" for key, value in given.items())
    minutes = about["duration"] / 60
    return (
        f"As it ran at scale `{about['parameters'].get('scale', 'auto')}`{' with' if words else ''}{words}, "
        f"{about['start_time'][:10]}, in {minutes:.1f} minutes (what was on disk already took none)."
    )


# --- a cell's outputs


def _outputs(cell: Cell, run: str) -> Iterator[str]:
    pictures = [match["name"] for match in KEPT.finditer(_text(cell["source"]))]
    streams: list[str] = []
    for output in cell.get("outputs", []):
        if output["output_type"] == "stream":
            streams.append(_text(output["text"]))
            continue
        yield from _printed(streams)
        data = output.get("data", {})
        if "image/png" in data:
            yield from _picture(pictures.pop(0) if pictures else "", run)
        elif "text/html" in data and "<table" in _text(data["text/html"]):
            yield _table(_text(data["text/html"]))
        elif "text/markdown" in data:
            yield from [_text(data["text/markdown"]).strip()] if _text(data["text/markdown"]).strip() else []
        elif "text/plain" in data:
            yield f"```text\n{_text(data['text/plain'])}\n```"
    yield from _printed(streams)


def _printed(streams: list[str]) -> Iterator[str]:
    """What was printed since the last output, without lines that only said how far the work was, or that it
    waited for another run.
    """
    printed = "".join(streams).splitlines()
    lines = [line for line in printed if not PROGRESS.match(line) and not WAITING.search(line)]
    streams.clear()
    text = "\n".join(lines).strip("\n")
    if text:
        yield f"```text\n{text}\n```"


def _picture(kept: str, run: str) -> Iterator[str]:
    """The picture that was drawn from the same rows; without one, nothing."""
    name = make_figures.drawn(run).get(kept)
    if name is not None:
        yield f"![{Path(name).name}](../{name}.png)"


def _table(html: str) -> str:
    """A data frame's HTML as a Markdown table, without an index that only counts."""
    table = BeautifulSoup(html, "html.parser").find("table")
    assert table is not None  # asked for above
    rows = _cells(table)
    heads = len(table.find("thead").find_all("tr"))  # type: ignore[union-attr]
    header, body = _merged(rows[:heads]), rows[heads:]
    if [row[0] for row in body] == [str(number) for number in range(len(body))] and not header[0]:
        header, body = header[1:], [row[1:] for row in body]
    lines = [header, ["---"] * len(header), *([_shown(cell) for cell in row] for row in body)]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def _cells(table: Tag) -> list[list[str]]:
    """The texts of a table's rows, a cell over several columns or rows repeated in each."""
    rows: list[list[str]] = []
    above: dict[int, tuple[str, int]] = {}  # by column, what reaches down, and how far
    for row in table.find_all("tr"):
        line: list[str] = []
        for cell in [*row.find_all(["th", "td"]), None]:
            while (reached := above.get(len(line), ("", 0)))[1]:
                above[len(line)] = (reached[0], reached[1] - 1)
                line.append(reached[0])
            if cell is not None:
                text, down = cell.get_text(" ", strip=True), int(cell.get("rowspan", 1)) - 1
                for _ in range(int(cell.get("colspan", 1))):
                    above[len(line)] = (text, down)
                    line.append(text)
        rows.append(line)
    return rows


def _merged(heads: list[list[str]]) -> list[str]:
    """One header of several lines; where the last has names of the index alone, they take the place of what
    the columns are called together.
    """
    width = max(len(line) for line in heads)
    lines = [line + [""] * (width - len(line)) for line in heads]
    names = list(filter(None, lines[-1]))
    if len(lines) > 1 and lines[-1][: len(names)] == names and len(names) < width:
        lines = [[""] * len(names) + line[len(names) :] for line in lines[:-1]] + lines[-1:]
    return [" ".join(filter(None, cells)) for cells in zip(*lines, strict=True)]


def _shown(cell: str) -> str:
    return "" if cell in ("NaN", "None", "nan") else cell


def _saved_to(notebook: Mapping[str, Any]) -> dict[str, str]:
    """The folder of an executed notebook's results, by the name that it has in every checkout."""
    folder = notebook["metadata"]["papermill"]["parameters"].get("save_to", "")
    return {folder: f"out/small/{Path(folder).name}"} if Path(folder).is_absolute() else {}


def without_formulas(page: str) -> str:
    """A page with its dollars, of variables such as $IGD_DATA, as such: they begin no formula."""
    parts = re.split(r"(```.*?```|`[^`\n]*`)", page, flags=re.DOTALL)  # every other one is code
    return "".join(
        part if number % 2 else re.sub(r"(?<!\\)\$", r"\$", part) for number, part in enumerate(parts)
    )


def _without_places(text: str, others: Mapping[str, str]) -> str:
    """Folders of this machine by the names that they have on every machine."""
    places = {str(data_dir()): "$IGD_DATA", str(cache_dir()): "$IGD_CACHE", str(PROJECT): "."}
    places |= {os.environ.get("HOME", "~"): "~", **others}
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(place, places[place])
    return text


if __name__ == "__main__":
    sys.exit(main())
