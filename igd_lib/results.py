"""Tidy results: one row a measurement, tables with mean, sd and n, paired differences."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pandas as pd

from igd_lib import files


@dataclass(frozen=True)
class Row:
    """One measurement. `seed` is the generation seed; `scale` says what the number may be compared with."""

    artefact: str  # notebook, e.g. "00_quickstart"
    dataset: str
    method: str
    backbone: str
    ipc: int
    surrogate: str
    network: str
    protocol: str
    seed: int
    metric: str  # e.g. "top1", "influence_loss"
    value: float
    scale: str  # "smoke", "small" or "paper"
    seconds: float
    device: str
    settings_hash: str


def settings_hash(settings: object) -> str:
    """Twelve hex digits that name a JSON-able collection of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def append(folder: str | Path, row: Row) -> Path:
    """Write one row as one JSON file, named by everything but its value, so that a rerun replaces it."""
    content = asdict(row)
    key = settings_hash({name: value for name, value in content.items() if name not in ("value", "seconds", "device")})
    return files.write(Path(folder) / f"{row.artefact}-{key}.json", json.dumps(content, sort_keys=True) + "\n")


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Rows as a data frame, one column a field."""
    return pd.DataFrame([asdict(row) for row in rows], columns=[field.name for field in fields(Row)])


def summary(rows: pd.DataFrame, by: Sequence[str] = ("method",)) -> pd.DataFrame:
    """mean, sd (n - 1) and n of `value`, in order of first appearance."""
    grouped = rows.groupby(list(by), sort=False)["value"]
    return grouped.agg(mean="mean", sd="std", n="count").reset_index()


def paired(rows: pd.DataFrame, method: str, reference: str) -> pd.Series:
    """Differences `method` - `reference` of the same seed, indexed by seed.

    Raises ValueError when a seed is there for one of the two only, or twice.
    """
    ours, theirs = (rows[rows.method == name].set_index("seed")["value"] for name in (method, reference))
    if sorted(ours.index) != sorted(theirs.index) or ours.index.has_duplicates:
        raise ValueError(f"{method!r} has seeds {sorted(ours.index)}, {reference!r} has {sorted(theirs.index)}; pairs need the same")
    return (ours - theirs.reindex(ours.index)).rename(f"{method} - {reference}")


def comparison(rows: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """A row a pair: mean and sd of the paired difference, n, and its standard error."""
    found = {f"{a} - {b}": paired(rows, a, b) for a, b in pairs}
    return pd.DataFrame(
        [
            {"difference": name, "mean": d.mean(), "sd": d.std(), "n": len(d), "standard error": d.std() / len(d) ** 0.5}
            for name, d in found.items()
        ]
    )
