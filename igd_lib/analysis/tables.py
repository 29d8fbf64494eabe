"""How result rows are shown: mean, sd and n, paired differences in words, the paper's figures beside ours."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from igd_lib.analysis import results, statistics
from igd_lib.tools.locks import say_once
from igd_lib.tools.version import PROJECT

PAPER_REPORTED = PROJECT / "paper_figures" / "data" / "paper_reported.csv"


def top1(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the accuracy that the protocol reports."""
    return rows[rows.metric == "top1"]


def accuracy_table(
    rows: pd.DataFrame, influence: pd.DataFrame | None = None, by: Sequence[str] = ("method",)
) -> pd.DataFrame:
    """Each group's top-1 mean, sd (empty for one seed) and n, all rounded.

    With `influence` the methods' mean influence loss too.
    """
    table = results.summary(top1(rows), by).round({"mean": 1, "sd": 1}).rename(columns={"mean": "top-1 (%)"})
    table = _without_nan(table, "sd")
    if influence is not None:
        table["influence loss"] = table.method.map(
            results.summary(influence).set_index("method")["mean"]
        ).round(4)
    return table


def wide_table(rows: pd.DataFrame) -> pd.DataFrame:
    """A line a method: top-1 mean, sd, n; mean of other metrics but the protocol's other accuracies."""
    table = accuracy_table(rows).set_index("method")
    others = results.summary(rows[~rows.metric.str.startswith("top")], ("method", "metric"))
    return table.join(others.pivot(index="method", columns="metric", values="mean").round(4)).reset_index()


def cross_table(rows: pd.DataFrame, columns: str = "network") -> pd.DataFrame:
    """A line a method, a column a network (or other): "mean ± sd" of top-1 over n seeds; n comes last."""
    table = results.summary(top1(rows), ("method", columns))
    table["shown"] = [_plus_minus(mean, sd) for mean, sd in zip(table["mean"], table.sd, strict=True)]
    wide = table.pivot_table(index="method", columns=columns, values="shown", aggfunc="first", sort=False)
    return (
        wide.assign(n=table.groupby("method", sort=False)["n"].min()).reset_index().rename_axis(columns=None)
    )


def best_and_last(rows: pd.DataFrame) -> pd.DataFrame:
    """A line a method and way of reading it: "mean ± sd" of the best top-1 during training and of the last.

    The ways are test set, protocol and network; n seeds come last.
    """
    by = ["method", "dataset", "protocol", "network"]
    metrics = {"top1_best": "best (%)", "top1_last": "last (%)"}
    table = results.summary(rows[rows.metric.isin(metrics)], (*by, "metric"))
    table["shown"] = [_plus_minus(mean, sd) for mean, sd in zip(table["mean"], table.sd, strict=True)]
    wide = table.pivot_table(index=by, columns="metric", values="shown", aggfunc="first", sort=False)
    wide = wide[list(metrics)].rename(columns=metrics).assign(n=table.groupby(by, sort=False)["n"].min())
    return wide.reset_index().rename_axis(columns=None).rename(columns={"dataset": "tested on"})


def metric_table(*frames: pd.DataFrame) -> pd.DataFrame:
    """A line a method, a column a metric: "mean ± sd" over n seeds; of the accuracies top-1 alone."""
    rows = pd.concat(
        [
            frame[(frame.metric == "top1") | ~frame.metric.str.startswith("top")].assign(network="")
            for frame in frames
        ]
    )
    table = results.summary(rows, ("method", "metric"))
    places = {metric: _places(own) for metric, own in table.groupby("metric")}
    table["shown"] = [
        _plus_minus(mean, sd, places[metric])
        for metric, mean, sd in zip(table.metric, table["mean"], table.sd, strict=True)
    ]
    wide = table.pivot_table(index="method", columns="metric", values="shown", aggfunc="first", sort=False)
    # Accuracy first, the others as they come.
    wide = wide[sorted(wide.columns, key=lambda metric: metric != "top1")]
    return (
        wide.assign(n=table.groupby("method", sort=False)["n"].min())
        .rename(columns={"top1": "top-1 (%)"})
        .reset_index()
        .rename_axis(columns=None)
    )


def _places(table: pd.DataFrame) -> int:
    """Decimals of a metric's means: 1 from 10 on, else 3; up to 3 where its usual spread is below 0.1."""
    least = 1 if table["mean"].abs().median() >= 10 else 3
    spread = table.sd[table.sd > 0].median()
    return least if np.isnan(spread) else min(3, max(least, math.ceil(-math.log10(spread))))


def far_below(rows: pd.DataFrame) -> list[str]:
    """The methods so far below the others that one axis for all would hide what the others differ in.

    Below the widest gap between the values, where that is more than twice the range of those above it and no
    method has values on both sides.
    """
    ordered = rows.value.sort_values()
    gaps = ordered.diff().fillna(0.0)
    least = ordered.iloc[int(gaps.to_numpy().argmax())]
    spread = rows.groupby("method", sort=False)["value"].agg(["min", "max"])
    above, below = spread[spread["max"] >= least], spread[spread["max"] < least]
    apart = len(above) > 1 and bool((above["min"] >= least).all())
    return list(below.index) if apart and gaps.max() > 2 * (ordered.max() - least) else []


def rank_correlations(rows: pd.DataFrame, distances: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation of each metric with top-1 over all sets, with its p-value and n.

    A set is a method and seed.

    Without the methods far below the others, which would make any metric that sees them correlate; a column
    names them.
    """
    keys, found = ["method", "seed"], top1(rows)
    below = far_below(found)
    accuracy = found[~found.method.isin(below)].set_index(keys)["value"]
    entries = []
    for metric, own in distances.groupby("metric", sort=False):
        entry: dict[str, object] = {"metric": metric, "rank correlation with top-1": "", "p": ""}
        values = own.set_index(keys)["value"].reindex(accuracy.index)
        # Two sets are perfectly correlated whatever is measured, and nothing is where nothing differs.
        if len(accuracy) > 2 and min(values.nunique(), accuracy.nunique()) > 1:
            test = stats.spearmanr(values, accuracy)
            entry |= {"rank correlation with top-1": round(test.statistic, 2), "p": p_value(test.pvalue)}
        entry["n"] = len(accuracy)
        entries.append(entry | ({"without": ", ".join(below)} if below else {}))
    return pd.DataFrame(entries)


def correlations_by(rows: pd.DataFrame, distances: pd.DataFrame, by: str = "network") -> pd.DataFrame:
    """`rank_correlations` for every value of a column in turn."""
    found = top1(rows)
    parts = [
        rank_correlations(found[found[by] == value], distances).assign(**{by: value})
        for value in dict.fromkeys(found[by])
    ]
    return pd.concat(parts, ignore_index=True)


def differences(
    rows: pd.DataFrame, claims: statistics.Claims, by: Sequence[str] = (), digits: int = 1
) -> pd.DataFrame:
    """`statistics.differences` for showing: effect with its 95 % interval, n, p by paired t, p after Holm."""
    found = statistics.differences(rows, claims, by)
    shown = found[[*by, "difference"]].copy()
    shown["mean [95 %]"] = [
        f"{mean:+z.{digits}f}"
        if pd.isna(low)
        else f"{mean:+z.{digits}f} [{low:+z.{digits}f}, {high:+z.{digits}f}]"
        for mean, low, high in zip(found["mean"], found.low, found.high, strict=True)
    ]
    shown["n"] = found.n
    for column, name in (("p", "p (paired t)"), ("p (Holm)", "p (Holm)")):
        shown[name] = ["" if pd.isna(p) else p_value(p) for p in found[column]]
    return shown.assign(verdict=found.verdict)


def p_value(p: float) -> str:
    """For showing: four digits, and never 0."""
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def reported(table: int, **cells: object) -> pd.DataFrame:
    """The paper's rows of a table with the values given, e.g. `dataset="imagewoof", ipc=10`.

    Where it has none, that is said once, and there are no rows.
    """
    rows = pd.read_csv(PAPER_REPORTED, keep_default_na=False, na_values={"value": [""], "sd": [""]})
    rows = rows[rows.table == table]
    for column, value in cells.items():
        fitting = rows[rows[column].astype(str) == str(value)]
        if fitting.empty and len(rows):
            known = sorted(set(rows[column].astype(str)) - {""}, key=lambda text: (len(text), text))
            has = f"has no {column} {value}, but {', '.join(known)}"
            say_once(f"the paper's Table {table} {has}: nothing to compare with")
        rows = fitting
    if "ipc" in cells:  # a column of text because the rows of the full data set have none
        rows = rows.assign(ipc=rows.ipc.astype(int))
    return rows


def beside_paper(rows: pd.DataFrame, paper: pd.DataFrame, *, by: Sequence[str] = ("method",)) -> pd.DataFrame:
    """The paper's figures and ours in one table, a row a cell of either, for showing.

    Methods that this project has not run here have the paper's figure only. The difference is shown where the
    two are comparable: at the paper's scale, on the same data and network.
    """
    by = list(by)
    ours = top1(rows)
    if "method" in by:  # the paper's names are those that the fields give, whatever a row is called
        ours = ours.assign(method=results.labels(ours))
    label = f"ours ({ours.dataset.iloc[0]}, {ours.scale.iloc[0]})"
    found = results.compare(ours, paper[paper.metric == "top1"], by=by)
    shown = found[by].copy()
    shown["paper"] = [
        _plus_minus(mean, sd) for mean, sd in zip(found.paper_mean, found.paper_sd, strict=True)
    ]
    shown[label] = [_plus_minus(mean, sd) for mean, sd in zip(found.ours_mean, found.ours_sd, strict=True)]
    shown["n"] = ["" if pd.isna(n) else str(n) for n in found.n]
    if found.comparable.any():
        shown["difference"] = [
            f"{value:+.1f}" if ok else ""
            for value, ok in zip(found.difference, found.comparable, strict=True)
        ]
        words = found.within.map({True: "yes", False: "no"}).fillna("").where(found.comparable, "")
        shown["within two sds"] = words.astype(str)
    return shown


def paper_table(paper: pd.DataFrame) -> pd.DataFrame:
    """The paper's accuracies alone: a row a method, a column a data set, IPC and network, in its order."""
    found = paper[paper.metric == "top1"]
    cells = found.dataset + ", IPC " + found.ipc + ", " + found.network
    shown = [_plus_minus(mean, sd) for mean, sd in zip(found.value, found.sd, strict=True)]
    wide = (
        found.assign(cell=cells, shown=shown).pivot(index="method", columns="cell", values="shown").fillna("")
    )
    return (
        wide.reindex(index=dict.fromkeys(found.method), columns=dict.fromkeys(cells))
        .rename_axis(columns=None)
        .reset_index()
    )


def _plus_minus(mean: float, sd: float, places: int = 1) -> str:
    """The mean, with its sd where there is one; nothing without a mean."""
    if pd.isna(mean):
        return ""
    return f"{mean:.{places}f}" if pd.isna(sd) else f"{mean:.{places}f} ± {sd:.{places}f}"


def _without_nan(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The table with what is missing in these columns empty; unchanged where nothing is."""
    lacking = [name for name in columns if table[name].isna().any()]
    shown = {name: table[name].astype(object).where(table[name].notna(), "") for name in lacking}
    return table.assign(**shown)
