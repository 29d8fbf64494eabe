"""Fills in numbers of README.md, FINDINGS.md and other pages from the saved results. In these two none is
typed by hand.

`python paper_figures/make_texts.py` rewrites what is between `<!--= WHAT -->` and `<!--/-->`, which nobody
sees on the page; `--check` names what would change. WHAT is one of

    difference RUN; A - B        the paired difference in top-1, its 95 % interval, n and verdict
    claim RUN; A - B             the same in words: confirmed if it is a gain (or lower, with expect=lower)
    mean RUN; METHOD             top-1 mean ± sd and n
    where RUN                    data set, IPC and network
    table PAGE; COUNT            a table of the page paper_figures/PAGE.md, the first being 1
    minutes RUN                  of one core, from an empty cache in the order of all runs
    hours                        of one core, of all runs: a table by stage
    file FILE                    all of paper_figures/data/FILE.csv, as a table
    coresets RUN                 every method against the best choice of real images, by kind of labels
    cell FILE; LINE; COLUMN      of paper_figures/data/FILE.csv, the line by its first column

with `; metric=influence_loss`, `; network=convnet4`, `; protocol=...` and `; show=mean` (or interval, n,
verdict, and p after Holm's correction) behind it. In A, B and a metric a * stands for any text. A difference
is one of its table's claims, its verdict after Holm's correction over them.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pandas as pd

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from ci import reproduction_log
from igd_lib.analysis import results, statistics, tables
from igd_lib.tools import files
from igd_lib.tools.version import PROJECT
from paper_figures import make_figures

TEXTS = ("README.md", "FINDINGS.md", "REPRODUCING.md", "docs/speed.md")
DATA = Path(__file__).parent / "data"
MARK = re.compile(r"<!--= (?P<what>.+?) -->(?P<shown>.*?)<!--/-->", re.DOTALL)
OPTION = re.compile(r"^(metric|network|protocol|show|expect)=")
ONE_DIGIT = ("top", "coverage", "redundancy")  # metrics in percent; others have three


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, name what is stale")
    given, stale = parser.parse_args(argv), []
    for name in TEXTS:
        text = (PROJECT / name).read_text()
        filled = fill(text)
        stale += [f"{name}: {what}" for what in changed(text, filled)]
        if not given.check:
            files.write(PROJECT / name, filled)
    print("\n".join(stale) or "all numbers are those of the saved results")
    return int(bool(stale and given.check))


def fill(text: str) -> str:
    """The text with every number as the results have it. Raises ValueError for what they do not have."""
    return MARK.sub(lambda mark: f"<!--= {mark['what']} -->{value(mark['what'])}<!--/-->", text)


def changed(text: str, filled: str) -> list[str]:
    """Which marks of a text would show something else."""
    pairs = zip(MARK.finditer(text), MARK.finditer(filled), strict=True)
    return [
        f"{one['what']}: {one['shown']!r}, now {other['shown']!r}"
        for one, other in pairs
        if one[0] != other[0]
    ]


def value(what: str) -> str:
    """What a mark shows."""
    kind, _, rest = what.partition(" ")
    parts = [part.strip() for part in rest.split(";") if part.strip()]
    options = dict(part.split("=", 1) for part in parts if OPTION.match(part))
    plain = [part for part in parts if not OPTION.match(part)]  # a method's name may have a = too
    if kind not in KINDS:
        raise ValueError(f"a mark is one of {', '.join(KINDS)}, got {what!r}")
    try:
        return KINDS[kind](*plain, **options)
    except (KeyError, IndexError, StopIteration, TypeError, FileNotFoundError) as error:
        raise ValueError(f"no such result: {what!r} ({error!r})") from error


def _difference(run: str, pair: str, show: str = "", metric: str = "top1", **where: str) -> str:
    table = _differences(run, metric, tuple(sorted(where.items())))
    line = table[[fnmatchcase(name, pair) for name in table.difference]].iloc[0]
    digits = _digits(metric)
    mean = f"{line['mean']:+z.{digits}f}"
    interval = "" if pd.isna(line.low) else f"[{line.low:+z.{digits}f}, {line.high:+z.{digits}f}]"
    words = {"mean": mean, "interval": interval, "n": str(line.n), "verdict": line.verdict}
    words["p"] = f"{line['p (Holm)']:.3f}"
    return words[show] if show else f"{mean} {interval}, n = {line.n}, {line.verdict}"


def _digits(metric: str) -> int:
    return 1 if metric.startswith(ONE_DIGIT) else 3


@cache
def _differences(run: str, metric: str, where: tuple[tuple[str, str], ...]) -> pd.DataFrame:
    """The claims of a run's table, for the network that its page shows unless another is named."""
    artefact = next(one for one in make_figures.ARTEFACTS if one.source == run)
    return statistics.differences(_rows(run, metric, where), artefact.claims)


def _coresets(run: str) -> str:
    """Every method's difference to the best choice of real images, a column a kind of labels; gain and loss
    in bold.
    """
    validation, accuracy = make_figures.labelled(make_figures.in_order(results.load(DATA / f"{run}.csv")))
    best = statistics.best_coresets(validation)
    found = tables.differences(accuracy, statistics.against_coresets(best), by=("protocol",))
    found["method"] = [name.rpartition(" - ")[0] for name in found.difference]
    verdicts = found.verdict.map({"gain": " **gain**", "loss": " **loss**"}).fillna("")
    found["shown"] = found["mean [95 %]"] + verdicts
    labels = {name: name.partition(", ")[2] or "hard labels" for name in best}
    table = found.pivot(index="method", columns="protocol", values="shown").loc[
        found.method.unique(), [*best]
    ]
    table.columns = [f"{labels[name]}, against {best[name]}" for name in best]
    table["n"] = found.groupby("method").n.min()
    return f"\n{results.markdown(table.reset_index(), 1)}\n"


def _claim(run: str, pair: str, expect: str = "gain", metric: str = "top1", **where: str) -> str:
    """Whether a difference is as expected; it is not confirmed where nothing is clear."""
    opposite = {"gain": "loss", "loss": "gain", "lower": "higher", "higher": "lower"}[expect]
    verdict = _difference(run, pair, "verdict", metric, **where)
    words = {expect: "confirmed", opposite: "the opposite is found"}.get(verdict, "not confirmed")
    shown = [_difference(run, pair, part, metric, **where) for part in ("mean", "interval", "n")]
    return f"**{words}**: {shown[0]} {shown[1]}, n = {shown[2]}"


def _where(run: str) -> str:
    one = _rows(run, "top1", ()).iloc[0]
    return f"{one.dataset}, IPC {one.ipc}, {one.network}"


def _mean(run: str, method: str, show: str = "", metric: str = "top1", **where: str) -> str:
    rows = _rows(run, metric, tuple(sorted(where.items())))
    line = results.summary(rows[rows.method == method]).iloc[0]
    digits = _digits(metric)
    mean, sd = f"{line['mean']:.{digits}f}", f"{line.sd:.{digits}f}"
    words = {"mean": mean, "sd": sd, "n": str(line.n)}
    return words[show] if show else f"{mean} ± {sd} (n = {line.n})"


@cache
def _loaded(path: Path) -> pd.DataFrame:
    """A run's own rows: not its sets read in other ways, and nothing of validation images."""
    rows = results.load(path)
    return rows[~rows.artefact.str.endswith(("_readings", "_validation"))]


@cache
def _rows(run: str, metric: str, where: tuple[tuple[str, str], ...]) -> pd.DataFrame:
    rows = _loaded(DATA / f"{run}.csv")
    rows = make_figures.in_order(rows[[fnmatchcase(name, metric) for name in rows.metric]])
    asked = dict(where)
    if "network" not in asked:
        asked["network"] = rows.network.iloc[0]
    for column, wanted in asked.items():
        rows = rows[rows[column] == wanted]
    return rows


def _table(page: str, count: str) -> str:
    parts = (PROJECT / "paper_figures" / f"{page}.md").read_text().split("\n\n")
    there = [part.strip() for part in parts if part.startswith("|")]
    return f"\n{there[int(count) - 1]}\n"


def _log() -> pd.DataFrame:
    return reproduction_log.summed(reproduction_log.read(DATA / "reproduction.csv")).set_index("run")


def _minutes(run: str) -> str:
    log = _log()
    if run not in log.index:
        return "not recorded"
    minutes = log.loc[run, "in all"]
    return f"{minutes:.0f}" if minutes >= 1 else "< 1"


def _hours() -> str:
    """A line a stage, and all of them."""
    log = _log()
    minutes = log.loc["all", [*reproduction_log.STAGES, "in all"]].rename(
        {"in all": f"all {len(log) - 1} runs"}
    )
    table = pd.DataFrame(
        {"stage": minutes.index, "hours of one core": (minutes.astype(float) / 60).to_numpy()}
    )
    return f"\n{results.markdown(table, 1)}\n"


def _file(file: str) -> str:
    table = pd.read_csv(DATA / f"{file}.csv", dtype=str, keep_default_na=False)
    return f"\n{results.markdown(table, 0)}\n"


def _cell(file: str, line: str, column: str) -> str:
    table = pd.read_csv(DATA / f"{file}.csv", dtype=str, keep_default_na=False)
    return str(table.set_index(table.columns[0]).loc[line, column])


KINDS: dict[str, Callable[..., str]] = {
    "difference": _difference,
    "claim": _claim,
    "coresets": _coresets,
    "mean": _mean,
    "where": _where,
    "table": _table,
    "minutes": _minutes,
    "hours": _hours,
    "file": _file,
    "cell": _cell,
}


if __name__ == "__main__":
    sys.exit(main())
