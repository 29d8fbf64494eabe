"""What the runs of `reproduce_small.py` took: minutes by run and stage, in a log beside the cache's work.

A stage is what a cell of the notebook does: "sets" trains surrogates, tunes models and makes sets,
"evaluation" trains and tests networks and measures sets, some cells do both, "other" loads, tabulates and
draws. A run that was stopped is in the log by the cells that it had done and the time in the one it was at.
Minutes are the processor's, divided among the cells by the clock, so that other work on the machine does not
count; those of a run that was stopped are the clock's.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from igd_lib.tools import files

COLUMNS = ["run", "stage", "started", "minutes", "revision"]
STAGES = ("sets", "evaluation", "sets and evaluation", "other")


def stage_of(source: str) -> str:
    """The stage of a code cell."""
    work = {"sets": r"\.sets\(|\.similarities\(|\.trajectory\(", "evaluation": r"_rows\("}
    done = [stage for stage, calls in work.items() if re.search(calls, source)]
    return " and ".join(done) or "other"


def minutes_by_stage(notebook: dict[str, Any], ended: float | None = None) -> dict[str, float]:
    """Minutes by stage of an executed notebook, or of one that was stopped at the time `ended` (POSIX)."""
    found = dict.fromkeys(STAGES, 0.0)
    for cell in notebook["cells"]:
        clock = cell["metadata"].get("papermill", {})
        if cell["cell_type"] != "code" or not clock.get("start_time"):
            continue
        seconds = clock.get("duration")
        if seconds is None and ended is not None:
            seconds = max(0.0, ended - datetime.fromisoformat(clock["start_time"]).timestamp())
        found[stage_of("".join(cell["source"]))] += (seconds or 0.0) / 60
    return found


def note(
    log: Path,
    run: str,
    executed: Path,
    revision: str,
    *,
    used: float | None = None,
    ended: float | None = None,
) -> None:
    """Add what an executed notebook took to the log; once, however often it is asked.

    used: minutes of the processor, where they are known; ended: when a run was stopped (POSIX).
    """
    if not executed.is_file():
        return
    notebook = json.loads(executed.read_text())
    started = notebook["metadata"].get("papermill", {}).get("start_time", "")
    known = read(log)
    if ((known.run == run) & (known.started == started)).any():
        return
    found = minutes_by_stage(notebook, ended)
    share = 1.0 if used is None else used / max(sum(found.values()), 1e-9)
    lines = [
        {
            "run": run,
            "stage": stage,
            "started": started,
            "minutes": round(share * minutes, 2),
            "revision": revision,
        }
        for stage, minutes in found.items()
    ]
    whole = pd.DataFrame([*known.to_dict("records"), *lines], columns=COLUMNS)
    files.write(log, whole.to_csv(index=False, lineterminator="\n"))


def read(log: Path) -> pd.DataFrame:
    """The log's lines; none where there is no log."""
    if not log.is_file():
        return pd.DataFrame(columns=COLUMNS).astype({"minutes": float})
    return pd.read_csv(log, dtype={"revision": str, "run": str}, keep_default_na=False)


def summed(log: pd.DataFrame) -> pd.DataFrame:
    """A line a run: minutes of each stage and in all, and in how many goes; the last line is all runs."""
    table = log.pivot_table(index="run", columns="stage", values="minutes", aggfunc="sum", fill_value=0.0)
    table = table.reindex(columns=list(STAGES), fill_value=0.0)
    table.loc["all"] = table.sum()
    goes = log.groupby("run").started.nunique()
    table["in all"], table["goes"] = table.sum(axis=1), goes.reindex(table.index).fillna(goes.sum())
    return table.round(1).astype({"goes": int}).rename_axis(columns=None).reset_index()
