"""Tidy results: one row a measurement; tables, paired differences, and the paper's figures beside ours.

Tables have mean, sd and n.

Rows travel as JSON files, one each (`append`, `read`), then as one sorted CSV an artefact (`consolidate`,
`load`). Nothing here averages over different settings: where rows that would be merged differ in more than
their seed, it is an error.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from igd_lib.tools import files, keys


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement of one set. Decisions about a method use its fields; `method` is only its name."""

    artefact: str  # notebook, e.g. "00_quickstart"
    dataset: str
    ipc: int
    # the method
    method: str  # its label in the table
    kind: str  # the paper's name, or one made like it: "DiT-IGD", "DiT + G_D", "Random"
    family: str  # "sampled", or how else the set was made: "random", "rded", ...
    backbone: str  # "dit" or "minimax"
    guides: str  # "", "influence", "deviation", "influence+deviation", ...
    cfg: float  # classifier-free guidance; 0 where nothing is sampled, as with the next ones
    cfg_choice: str  # "best": chosen on validation data
    k: float
    gamma: float  # the paper's, for latents of 4,096 values
    guided_range: str  # "30-45"
    throughout: int  # 1: every step is guided
    solver: str
    steps: int
    selection: str  # the rule that chose the checkpoints where rows differ in it: "threshold 0.7", "regular"
    kept: int  # how many it chose
    surrogate: str
    shortcuts: str  # in words
    change: str  # FIELD=VALUE: the field of Fidelity that differs from the experiment's
    varies: str  # the fields that the table's rows differ in, joined by "+"
    # the measurement
    network: str
    protocol: str
    seed: int  # the generation seed
    metric: str  # e.g. "top1", "influence_loss"
    value: float
    scale: str  # "smoke", "small" or "paper": what the number may be compared with
    seconds: float
    device: str
    git_revision: str  # of the code that made the set
    settings_hash: str  # of the experiment's settings


_KINDS = {"str": str, "int": int, "float": float}
COLUMNS = {field.name: _KINDS[str(field.type)] for field in fields(Row)}
# What names a measurement.
IDENTITY = [name for name in COLUMNS if name not in ("value", "seconds", "device", "git_revision")]
SETTINGS = [name for name in IDENTITY if name != "seed"]  # what rows must share to be averaged
# What makes the method, beside its label: paired methods may differ in it.
METHOD = [
    "method",
    "kind",
    "family",
    "backbone",
    "guides",
    "cfg",
    "cfg_choice",
    "k",
    "gamma",
    "guided_range",
    "throughout",
    "solver",
    "steps",
    "selection",
    "kept",
    "surrogate",
    "shortcuts",
    "change",
    "varies",
]


SOLVERS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "dpmsolver++": "DPM-Solver++",
    "unipc": "UniPC",
    "configured": "own solver",
}


def look(fields: Mapping[str, Any]) -> str:
    """What figures tell a method by, from its fields: kind, every step guided or not, cfg chosen or not."""
    chosen = f", {fields['cfg_choice']} cfg" if fields["cfg_choice"] else ""
    return fields["kind"] + (" throughout" if fields["throughout"] else "") + chosen


def label(fields: Mapping[str, Any]) -> str:
    """What a method is called, from its fields: its look, and behind it what the table's rows differ in."""
    varies = fields["varies"].split("+") if fields["varies"] else []
    details = {
        "cfg": f"cfg {fields['cfg']:g}",
        "k": f"k {fields['k']:g}",
        "gamma": f"gamma {fields['gamma']:g}",
        "range": f"steps {fields['guided_range']}",
        "solver": f"{SOLVERS.get(fields['solver'])} {fields['steps']}",
        "selection": f"{fields['selection']} ({fields['kept']})",
        "surrogate": fields["surrogate"],
        "shortcuts": fields["shortcuts"],
        "fidelity": fields["change"],
    }
    # Rows that vary DiT-IGD leave its name out; a grid's rows are named after the backbone.
    first = look(fields)
    alone = fields["backbone"] == "dit" and fields["guides"] != ""
    if varies in (["selection"], ["shortcuts"], ["fidelity"], ["k", "gamma"]) and alone:
        return ", ".join(details[field] for field in varies)
    if varies == ["k", "gamma"]:
        first = first.removesuffix("-IGD")
    return ", ".join([first, *(details[field] for field in varies)])


def labels(rows: pd.DataFrame) -> pd.Series:
    """The label that each row's fields give."""
    return pd.Series([label(record) for record in rows.to_dict("records")], index=rows.index, dtype=str)


def looks(rows: pd.DataFrame) -> dict[str, str]:
    """The look of each method, by its label."""
    return {str(name): look(fields) for name, fields in methods(rows).to_dict("index").items()}


def methods(rows: pd.DataFrame) -> pd.DataFrame:
    """The methods' fields, a line a method in order of appearance, indexed by label."""
    own = [name for name in METHOD if name in rows]
    return rows[own].drop_duplicates("method").set_index("method", drop=False)


# --- rows on disk


def append(folder: str | Path, row: Row) -> Path:
    """Write a row as one JSON file named by the measurement's identity, so that a rerun replaces it."""
    content = asdict(row)
    key = keys.settings_hash({name: content[name] for name in IDENTITY})
    return files.write(
        Path(folder) / f"{row.artefact}-{key}.json", json.dumps(content, sort_keys=True) + "\n"
    )


def read(folder: str | Path) -> pd.DataFrame:
    """All rows that `append` wrote into a folder.

    Raises ValueError naming any visible file that is damaged or no row.
    """
    records = []
    for path in sorted(path for path in Path(folder).iterdir() if not path.name.startswith(".")):
        try:
            records.append(_record(json.loads(path.read_bytes())))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path} is no result row ({error}); move it away, or delete it and run its notebook again"
            ) from error
    return _frame(records)


def consolidate(rows: pd.DataFrame | str | Path, path: str | Path) -> Path:
    """Write rows (a frame, or a folder of JSON files) as one CSV; the same rows are the same bytes.

    Sorted by IDENTITY, LF, floats exact.

    A measurement that is there more than once with the same value is written once. Raises ValueError on
    rows of scale "smoke", on values that are not finite, on one measurement with two values, and on rows
    that differ in nothing but `settings_hash` and what they measured.
    """
    found = (
        _frame(_record(record) for record in rows.to_dict("records"))
        if isinstance(rows, pd.DataFrame)
        else read(rows)
    )
    return files.write(path, _measurements(found).to_csv(index=False, lineterminator="\n"))


def load(path: str | Path) -> pd.DataFrame:
    """Rows of a CSV that `consolidate` wrote, sorted.

    Raises ValueError naming the file on what `consolidate` refuses, or damage.
    """
    try:
        content = io.StringIO(files.text(path), newline="")
        header, *lines = list(csv.reader(content, strict=True)) or [[]]
        _check_columns(header)
        records = []
        for number, line in enumerate(lines, 1):
            if len(line) != len(header):
                raise ValueError(f"row {number} has {len(line)} fields, the header {len(header)}")
            records.append(
                _record({name: COLUMNS[name](text) for name, text in zip(header, line, strict=True)})
            )
        return _measurements(_frame(records))
    except (ValueError, csv.Error) as error:
        where = "" if str(error).startswith(str(path)) else f"{path}: "
        raise ValueError(f"{where}{error}") from error


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Rows as a data frame, one column a field."""
    return _frame(asdict(row) for row in rows)


def _frame(records: Iterable[Mapping[str, object]]) -> pd.DataFrame:
    dtypes = {name: {str: str, int: "int64", float: "float64"}[kind] for name, kind in COLUMNS.items()}
    return pd.DataFrame(list(records), columns=list(COLUMNS)).astype(dtypes)


def _check_columns(found: Collection[str]) -> None:
    """Raise ValueError unless `found` is every column of a row, once each."""
    missing, unknown = (
        [name for name in COLUMNS if name not in found],
        [name for name in found if name not in COLUMNS],
    )
    if missing or unknown or len(found) > len(COLUMNS):
        raise ValueError(
            f"columns missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}; "
            "each is needed once"
        )


def _record(content: object) -> dict[str, object]:
    """A row's fields, each of its type (an int passes for a float); an empty string is not a missing one."""
    if not isinstance(content, dict):
        raise ValueError(f"fields and their values are needed, not {type(content).__name__}")
    _check_columns(content)
    for name, kind in COLUMNS.items():
        if type(content[name]) is not kind and not (kind is float and type(content[name]) is int):
            raise ValueError(
                f"{name} is {kind.__name__}, got {content[name]!r}; read CSV files by results.load"
            )
    return content


def _measurements(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows in order, each measurement once; raises what `consolidate` says."""
    if rows.empty:
        raise ValueError("there are no rows")
    other = sorted(set(rows.scale) - {"small", "paper"})
    if other:
        raise ValueError(
            f"rows of scale {', '.join(other)} are no results; keep those of small or paper only"
        )
    for name in ("value", "seconds"):
        check_finite(rows, name, "the table")
    rows = rows.sort_values([*IDENTITY, "value", "seconds", "device", "git_revision"]).drop_duplicates(
        [*IDENTITY, "value"], ignore_index=True
    )
    twice = rows[rows.duplicated(IDENTITY, keep=False)]
    if len(twice):
        name = twice[IDENTITY].iloc[0].to_dict()
        raise ValueError(
            f"one measurement has the values {twice.value.tolist()[:2]}: {name}; find out why they differ "
            "and keep one"
        )
    group = [name for name in SETTINGS if name != "settings_hash"]
    for key, hashes in rows.groupby(group, sort=False)["settings_hash"].unique().items():
        if len(hashes) > 1:
            raise ValueError(
                f"{dict(zip(group, key, strict=True))} has rows of the settings {', '.join(hashes)}: keep "
                "those of one of them"
            )
    return rows


# --- tables


def check_finite(rows: pd.DataFrame, column: str, what: str) -> None:
    if not np.isfinite(rows[column].to_numpy(float)).all():
        raise ValueError(f"{what} has a {column} that is not finite; find out why that run failed")


def check_alike(rows: pd.DataFrame, what: str, free: Collection[str]) -> None:
    """Raise ValueError where rows differ in a setting that is not free to; absent columns are skipped."""
    asked = [name for name in SETTINGS if name in rows and name not in free]
    mixed = {
        name: rows[name].drop_duplicates().tolist() for name in asked if rows[name].nunique(dropna=False) > 1
    }
    if mixed:
        names = "; ".join(f"{name} {', '.join(map(repr, values))}" for name, values in mixed.items())
        raise ValueError(
            f"{what} has rows of more than one {names}: they are not to be merged, select one or group by it"
        )


def summary(rows: pd.DataFrame, by: Sequence[str] = ("method",)) -> pd.DataFrame:
    """mean, sd (n - 1) and n of `value`, in order of first appearance.

    Raises ValueError when a group's rows differ in a setting (everything that identifies a measurement
    but its seed), have a seed twice, or a value that is not finite.
    """
    grouped = rows.groupby(list(by), sort=False, dropna=False)
    for key, group in grouped:
        what = ", ".join(map(str, key))
        check_alike(group, what, by)
        check_finite(group, "value", what)
        if "seed" in group and group.seed.duplicated().any():
            raise ValueError(
                f"{what} has a seed twice: {sorted(set(group.seed[group.seed.duplicated()].tolist()))}; n "
                "would count one measurement for two"
            )
    return grouped["value"].agg(mean="mean", sd="std", n="count").reset_index()


def compare(
    ours: pd.DataFrame, paper_reported: pd.DataFrame, *, by: Sequence[str] = ("method", "ipc", "network")
) -> pd.DataFrame:
    """The paper's figures beside ours, a row a cell of either.

    Columns paper_mean, paper_sd, ours_mean, ours_sd, n, difference, within, comparable.

    ours: rows as of `frame`. paper_reported: columns dataset, network, ipc, metric, value, sd (may be empty)
    and those of `by`. difference: ours - paper. within: |difference| is at most two pooled sds,
    sqrt((paper_sd^2 + ours_sd^2) / 2) each; one that is missing is taken from the other side, and with none,
    or one mean only, `within` is missing. comparable: True only where ours is of scale "paper" and both are
    of one dataset, metric, ipc and network; elsewhere the rest of the row says nothing about the paper.

    The two sds are not of one kind. The paper's code divides by n (numpy's default), over five training seeds
    of the best test accuracy; ours divides by n - 1, over generation seeds.

    Raises ValueError where a column is missing, the paper has a cell twice, or `summary` refuses ours.
    """
    by, shared = list(by), [name for name in ("dataset", "metric", "ipc", "network") if name not in by]
    for what, table, own in (
        ("our rows", ours, ["scale", "value"]),
        ("the paper's rows", paper_reported, ["value", "sd"]),
    ):
        missing = [name for name in [*by, *shared, *own] if name not in table]
        if missing:
            raise ValueError(f"{what} lack columns: {', '.join(missing)}")
    # As pandas reads the paper's table, empty text is NaN, and an ipc text or float where a row, of the full
    # data set, has none.
    kinds = {name: COLUMNS.get(name) for name in [*by, *shared]}
    ours, paper = (
        table.assign(
            **{name: table[name].astype(object).fillna("") for name, kind in kinds.items() if kind is str},
            **{
                name: pd.to_numeric(table[name]).astype("Int64")
                for name, kind in kinds.items()
                if kind is int
            },
        )
        for table in (ours, paper_reported)
    )
    twice = paper[paper.duplicated(by)]
    if len(twice):
        raise ValueError(
            f"the paper's rows have {twice[by].iloc[0].to_dict()} more than once: select one table or "
            "data set, or add columns to `by`"
        )
    about = ours[[*by, *shared, "scale"]].drop_duplicates()  # one a group: summary sees to that
    mine = summary(ours, by).merge(about, on=by).rename(columns={"mean": "ours_mean", "sd": "ours_sd"})
    theirs = paper[[*by, *shared, "value", "sd"]].rename(columns={"value": "paper_mean", "sd": "paper_sd"})
    keys = pd.concat([theirs[by], mine[by]]).drop_duplicates()
    found = keys.merge(theirs, on=by, how="left").merge(mine, on=by, how="left", suffixes=("_paper", "_ours"))
    found["difference"] = found.ours_mean - found.paper_mean
    pooled = (
        (found.paper_sd.fillna(found.ours_sd) ** 2 + found.ours_sd.fillna(found.paper_sd) ** 2) / 2
    ) ** 0.5
    within = found.difference.abs() <= 2 * pooled + 1e-9  # 1.1 - 1.0 is a little more than 0.1
    found["within"] = within.astype("boolean").where(found.difference.notna() & pooled.notna())
    agree = [(found[f"{name}_paper"] == found[f"{name}_ours"]).fillna(False) for name in shared]
    found["comparable"] = np.logical_and.reduce(
        [found.scale == "paper", found.difference.notna(), *agree]
    ).astype(bool)
    found["n"] = found.n.astype("Int64")
    return found[
        [*by, "paper_mean", "paper_sd", "ours_mean", "ours_sd", "n", "difference", "within", "comparable"]
    ]


def markdown(table: pd.DataFrame, digits: int | Mapping[str, int]) -> str:
    """A GitHub Markdown table; missing is empty, a bool yes or no.

    digits: decimals of floats, for all or by column.

    Raises ValueError when `digits` names a column that is not there, or lacks one with floats.
    """
    places = digits if isinstance(digits, Mapping) else dict.fromkeys(table.columns, digits)
    if set(places) - set(table.columns):
        raise ValueError(
            f"digits for {sorted(set(places) - set(table.columns))}, but the columns are "
            f"{list(table.columns)}"
        )

    def cell(name: str, value: Any) -> str:
        if pd.api.types.is_scalar(value) and pd.isna(value):
            return ""
        if isinstance(value, bool | np.bool_):
            return "yes" if value else "no"
        if isinstance(value, float | np.floating):
            if name not in places:
                raise ValueError(f"column {name!r} holds floats: give its digits")
            return f"{float(value):z.{places[name]}f}"  # z: no -0.0
        return str(value).replace("|", r"\|").replace("\n", " ")

    numeric = [
        pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_bool_dtype(kind) for kind in table.dtypes
    ]
    lines = [
        [cell("", str(name)) for name in table.columns],
        ["---:" if right else "---" for right in numeric],
    ]
    lines += [
        [cell(*pair) for pair in zip(table.columns, entry, strict=True)]
        for entry in table.itertuples(index=False, name=None)
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
