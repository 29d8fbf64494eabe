"""The package itself: its version, where it lies, the revision of its code.

`import igd_lib` reads this file, so nothing here needs more than the standard library.
"""

from __future__ import annotations

import subprocess
from functools import cache
from importlib.resources import files
from pathlib import Path

VERSION = "0.3.0"
PACKAGE = Path(str(files("igd_lib")))
# What is of the project and not of the library (notebooks, paper_figures): in a checkout beside the package,
# in an installed one the part of it that the library reads.
IS_CHECKOUT = (PACKAGE.parent / "pyproject.toml").is_file()
PROJECT = PACKAGE.parent if IS_CHECKOUT else PACKAGE / "project"


@cache
def git_revision() -> str:
    """The code's revision, asked for once a process: the commit, "+" where tracked igd_lib files differ.

    For an installed package, or where git does not answer, it is the version: "igd_lib 0.1.0".
    """
    return _revision(PACKAGE)


def _revision(folder: Path) -> str:
    git = ["git", "--no-optional-locks", "-C", str(folder)]
    # The first because a package installed inside somebody's checkout (in its .venv) is no part of it.
    questions = (
        "ls-files --error-unmatch -- __init__.py",
        "rev-parse --short=12 HEAD",
        "status --porcelain --untracked-files=no -- .",
    )
    try:
        answers = [
            subprocess.run([*git, *question.split()], capture_output=True, text=True)
            for question in questions
        ]
    except OSError:  # no git
        return f"igd_lib {VERSION}"
    if any(answer.returncode for answer in answers):
        return f"igd_lib {VERSION}"
    return answers[1].stdout.strip() + ("+" if answers[2].stdout else "")
