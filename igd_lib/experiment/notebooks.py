"""The notebooks that come with the package: copied out, and executed headlessly."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from igd_lib.tools import files
from igd_lib.tools.version import PROJECT

FOLDER = PROJECT / "notebooks"
NEEDS = "executing notebooks needs the extra [notebooks]: pip install 'igd_lib[notebooks]'"


def find(name: str) -> Path:
    """A notebook by its file, its name or how that begins ("03"). Raises ValueError for none, and for two."""
    if Path(name).suffix == ".ipynb" and Path(name).is_file():
        return Path(name)
    known = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
    stem = Path(name).name.removesuffix(".ipynb")
    found = [path for path in known if path.stem == stem] or [
        path for path in known if stem and path.stem.startswith(stem)
    ]
    if len(found) != 1:
        raise ValueError(
            f"NOTEBOOK is a file, or one of {', '.join(path.stem for path in known)}, by a beginning that "
            f"only it has; got {name!r}"
        )
    return found[0]


def copy_into(folder: Path) -> list[str]:
    """Copy all notebooks into a folder and say what became of each; one that is there and differs stays."""
    folder = folder.expanduser()
    lines = []
    for path in sorted(FOLDER.glob("[0-9][0-9]_*.ipynb")):
        target = folder / path.name
        if not target.exists():
            files.write(target, path.read_bytes())
            lines.append(f"{target}")
        elif target.read_bytes() != path.read_bytes():
            lines.append(f"{target}: kept, though it differs from the package's; move it away to have that")
    return lines or [f"all notebooks are in {folder} already"]


def typed(text: str) -> str | int | float | bool:
    """A parameter's text as papermill's own command reads it: a number or a truth value where it is one."""
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def execute(name: str, given: Mapping[str, str], out: Path | None = None) -> Path:
    """Execute a notebook with parameters, saying what its cells print; returns the executed one.

    out: where that goes; None: NAME.ipynb in the present folder. Raises ValueError for a notebook or a
    parameter that there is not, and where it fails, FileExistsError where it would overwrite its source.
    """
    try:
        import papermill
        from papermill.exceptions import PapermillExecutionError
    except ImportError as error:
        raise ValueError(NEEDS) from error
    source = find(name)
    target = (out or Path(f"{source.stem}.ipynb")).expanduser().resolve()
    if target == source.resolve():
        raise FileExistsError(f"{target} is the notebook itself: name another file with --out")
    known = papermill.inspect_notebook(str(source))
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ValueError(f"{source.stem} has no parameter {unknown[0]!r}; it has {', '.join(known)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            str(source),
            str(target),
            {key: typed(value) for key, value in given.items()},
            kernel_name="python3",
            extra_arguments=["--log-level=ERROR"],
            progress_bar=False,
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
        )
    except PapermillExecutionError as error:
        raise ValueError(f"{source.stem} failed, see {target}: {error.ename}: {error.evalue}") from error
    return target
