"""The version of the package, and the revision of its code."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

from igd_lib.tools.machine import PACKAGE

VERSION = "0.2.0"


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
