"""Statistics of result rows: paired differences between methods, and which of them a table claims.

Every page shows `differences`: effect, 95 % interval and n of each, and "gain" or "loss" only after a paired
t-test with Holm's correction over the table's claims, which are one family. A claim is a pair of methods,
decided on their fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from igd_lib.analysis import results
from igd_lib.analysis.results import check_alike, check_finite
from igd_lib.baselines import coresets

Pairs = list[tuple[str, str]]  # of methods' labels: the first minus the second
Claims = Callable[[pd.DataFrame], Pairs]  # a table's, of the rows that it has
LEVEL = 0.05  # of tests, after the correction
UNCLEAR = "no clear difference"


def paired(rows: pd.DataFrame, method: str, reference: str) -> pd.Series:
    """Differences `method` - `reference` of the same seed, indexed by seed.

    Raises ValueError when a seed is there for one of the two only, or twice; when a value is not finite;
    and when the two differ in a setting that does not belong to the method.
    """
    name = f"{method} - {reference}"
    both = rows[rows.method.isin([method, reference])]
    for one in (method, reference):
        check_alike(both[both.method == one], one, ())
    check_alike(both, name, results.METHOD)
    check_finite(both, "value", name)
    ours, theirs = (both[both.method == one].set_index("seed")["value"] for one in (method, reference))
    if sorted(ours.index) != sorted(theirs.index) or ours.index.has_duplicates:
        raise ValueError(
            f"{method!r} has seeds {sorted(ours.index)}, {reference!r} has {sorted(theirs.index)}; pairs "
            "need the same"
        )
    return (ours - theirs.reindex(ours.index)).rename(name)


def differences(rows: pd.DataFrame, claims: Claims, by: Sequence[str] = ()) -> pd.DataFrame:
    """The paired differences that a table makes claims about, which are one family of tests.

    rows: of one metric. by: columns, such as "network", for whose values the claims are made in turn.
    A line a claim: `by`, difference, mean, its two-sided 95 % interval `low` ... `high` and p by a paired
    t-test over generation seeds, sd of the differences, n, p after Holm's correction over all lines, and a
    verdict: a gain or a loss (of another metric than accuracy: higher or lower) where that p is below 5 %.
    With one pair alone, and where all pairs differ by the same but 0, there is no spread to test against, so
    neither interval nor p; the line counts in the family all the same.

    Raises ValueError where pairs do not fit (`paired`).
    """
    groups = rows.groupby(list(by), sort=False) if by else [((), rows)]
    lines = [
        {**dict(zip(by, key, strict=True)), **_tested(paired(own, *pair))}
        for key, own in groups
        for pair in claims(own)
    ]
    found = pd.DataFrame(lines, columns=[*by, "difference", "mean", "low", "high", "sd", "n", "p"])
    found["p (Holm)"] = holm(found.p)
    words = ("gain", "loss") if rows.metric.str.startswith("top").all() else ("higher", "lower")
    clear = np.where(found["mean"] > 0, *words)
    return found.assign(verdict=np.where(found["p (Holm)"] < LEVEL, clear, UNCLEAR))


def _tested(found: pd.Series) -> dict[str, object]:
    """Of paired differences: mean, 95 % interval, sd, n and p of the two-sided t-test; 1 if all are 0."""
    n, mean, sd = len(found), found.mean(), found.std()
    spread = n > 1 and not np.allclose(found, mean, rtol=1e-9, atol=0.0)
    tested = spread or (n > 1 and mean == 0)
    half = stats.t.ppf(1 - LEVEL / 2, n - 1) * sd / n**0.5 if tested else np.nan
    p = stats.ttest_1samp(found, 0.0).pvalue if spread else 1.0 if tested else np.nan
    interval = {"low": mean - half, "high": mean + half}
    return {"difference": found.name, "mean": mean, **interval, "sd": sd, "n": n, "p": float(p)}


def holm(p: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values of a family of tests, in their order; one that is missing stays so.

    The smallest of m is multiplied by m, the next by m - 1 and so on, none below the one before, at most 1.
    m counts the missing ones too.
    """
    values = np.asarray(p, dtype=float)
    order = values.argsort(kind="stable")  # missing ones last
    raised = np.maximum.accumulate((len(values) - np.arange(len(values))) * values[order]).clip(max=1.0)
    return raised[order.argsort()].tolist()


# --- which differences a table's claims are about, as far as its rows have the methods: decided on fields


def best_coresets(rows: pd.DataFrame) -> dict[str, str]:
    """By protocol, the label of the choice of real images with the highest mean.

    Raises ValueError where there is none.
    """
    real = rows[rows.family.isin(coresets.NAMES)]
    if real.empty:
        raise ValueError("no row chooses real images; let Random or a coreset be among the methods")
    table = results.summary(real, ("protocol", "method"))
    best = table.loc[table.groupby("protocol", sort=False)["mean"].idxmax()]
    return dict(zip(best.protocol, best.method, strict=True))


def against_coresets(best: Mapping[str, str]) -> Claims:
    """Every method that does not choose real images against the protocol's best that does."""

    def claims(rows: pd.DataFrame) -> Pairs:
        others = rows[~rows.family.isin(coresets.NAMES)]
        return [(method, best[protocol]) for protocol, method in _each(others, "protocol", "method")]

    return claims


def _each(rows: pd.DataFrame, *columns: str) -> list[tuple[str, ...]]:
    """The different values of some columns, in order of appearance."""
    return list(rows[list(columns)].drop_duplicates().itertuples(index=False, name=None))


def find(rows: pd.DataFrame, **wanted: object) -> str | None:
    """The label of the first method whose fields are as wanted, None where there is none."""
    table = results.methods(rows)
    for field, value in wanted.items():
        table = table[table[field] == value]
    return None if table.empty else str(table.index[0])


def _plain(rows: pd.DataFrame, backbone: str, guides: str, cfg_choice: str = "") -> str | None:
    """A sampled method by its guides, where nothing of it is varied."""
    fields = dict(family="sampled", backbone=backbone, guides=guides, cfg_choice=cfg_choice, varies="")
    return find(rows, **fields)


def _known(pairs: Sequence[tuple[str | None, str | None]]) -> Pairs:
    """The pairs of which both are there."""
    return [(one, other) for one, other in pairs if one is not None and other is not None]


BOTH = "influence+deviation"
PLAIN_DIT: dict[str, object] = {"family": "sampled", "backbone": "dit", "guides": "", "cfg_choice": ""}


def table_claims(rows: pd.DataFrame) -> Pairs:
    """Of a table of methods: the paper's claims, the controls, what influence guidance adds, and whether each
    method is worth more than real images drawn at random.

    Other methods are compared where their networks are trained as Random's are.
    """
    dit, tuned = (
        {guides: _plain(rows, backbone, guides) for guides in ("", "deviation", BOTH)}
        for backbone in ("dit", "minimax")
    )
    best, random = _plain(rows, "dit", "", "best"), find(rows, family="random")
    others = _optimised_or_chosen(rows)
    return _known(
        [
            (dit[BOTH], dit[""]),
            (best, dit[""]),
            (dit[BOTH], dit["deviation"]),
            (dit[BOTH], best),
            *((dit[BOTH], other) for other in others),
            (tuned[""], dit[""]),
            (tuned[BOTH], tuned[""]),
            (tuned[BOTH], dit[BOTH]),
            *((method, random) for method in (*others, dit[""], dit[BOTH])),
        ]
    )


def _optimised_or_chosen(rows: pd.DataFrame) -> list[str]:
    """Labels of the methods that are no guided sampling, but Random, under the protocol of most rows."""
    usual = rows.protocol[rows.protocol != ""].mode()
    own = rows[~rows.family.isin(["sampled", "random"]) & rows.protocol.isin(usual)]
    return list(dict.fromkeys(own.method))


def ablation_claims(rows: pd.DataFrame) -> Pairs:
    """Of Table 5: each guidance alone, both, what influence guidance adds to the other, and the control."""
    pairs = [(_plain(rows, "dit", "", "best"), _plain(rows, "dit", ""))]
    for backbone in ("dit", "minimax"):
        own = {guides: _plain(rows, backbone, guides) for guides in ("", "influence", "deviation", BOTH)}
        pairs += [(own[guides], own[""]) for guides in ("influence", "deviation", BOTH)] + [
            (own[BOTH], own["deviation"])
        ]
    return _known(pairs)


def guide_claims(rows: pd.DataFrame) -> Pairs:
    """Of every guide: each against DiT, the classifier's loss against G_I, MGD3's controls against MGD3, and
    MGD3 with G_D against either alone.
    """
    table = results.methods(rows)
    plain, modes, both = _plain(rows, "dit", ""), _plain(rows, "dit", "modes"), "deviation+modes"
    controls = [label for label in table.index if str(table.guides[label]).startswith("modes-")]
    pairs = [(label, plain) for label in table.index if label != plain]
    pairs += [(_plain(rows, "dit", "classifier"), _plain(rows, "dit", "influence"))]
    pairs += [(label, modes) for label in controls]
    pairs += [(_plain(rows, "dit", both), one) for one in (modes, _plain(rows, "dit", "deviation"))]
    return _known(pairs)


def early_stage_claims(rows: pd.DataFrame) -> Pairs:
    """Of Figure 2: every row against DiT, then guidance throughout against the guided range at the same k."""
    table, plain = results.methods(rows), _plain(rows, "dit", "")
    guided = table[table.guides != ""]
    pairs = [(label, plain) for label in guided.index]
    for early in guided[guided.throughout == 0].itertuples():
        pairs.append((find(rows, guides=early.guides, throughout=1, k=early.k), early.method))
    return _known(pairs)


def selection_claims(rows: pd.DataFrame) -> Pairs:
    """Of Table 6: every choice against no guidance.

    Then Algorithm 2's against as many checkpoints at regular intervals.
    """
    table = results.methods(rows)
    chosen, plain = table[table.selection != ""], find(rows, family="sampled", guides="")
    pairs = [(label, plain) for label in chosen.index]
    regular = chosen[chosen.selection == "regular"]
    for ours in chosen[chosen.selection != "regular"].itertuples():
        pairs += [(ours.method, label) for label in regular[regular.kept == ours.kept].index]
    return _known(pairs)


def solver_claims(rows: pd.DataFrame) -> Pairs:
    """Of Table 10, on each backbone: guidance with either solver, then the quick against the slow one."""
    pairs = []
    for backbone in ("dit", "minimax"):
        plain, guided, quick, guided_quick = (
            find(rows, family="sampled", backbone=backbone, solver=solver, guides=guides)
            for solver in ("ddim", "dpmsolver++")
            for guides in ("", BOTH)
        )
        pairs += [(guided, plain), (guided_quick, quick), (quick, plain), (guided_quick, guided)]
    return _known(pairs)


def against(reference: dict[str, object], **only: object) -> Claims:
    """Every other method, or those with `only`'s fields, against the one with `reference`'s fields."""

    def claims(rows: pd.DataFrame) -> Pairs:
        first, table = find(rows, **reference), results.methods(rows)
        for field, value in only.items():
            table = table[table[field] == value]
        return _known([(label, first) for label in table.index if label != first])

    return claims


def varied(**reference: object) -> Claims:
    """Every method that varies something against the first other one whose fields are as in `reference`."""

    def claims(rows: pd.DataFrame) -> Pairs:
        table = results.methods(rows)
        first = find(rows, family="sampled", varies="", **reference)
        return _known([(label, first) for label in table[table.varies != ""].index])

    return claims


def fidelity_claims(rows: pd.DataFrame) -> Pairs:
    """Every method with one field of `Fidelity` changed against the one that has the same guides and no
    change.
    """
    pairs = []
    for label, fields in results.methods(rows).iterrows():
        if fields.varies == "fidelity":
            pairs.append((str(label), _plain(rows, fields.backbone, fields.guides)))
    return _known(pairs)


def influence_claims(rows: pd.DataFrame) -> Pairs:
    """Influence loss: both guidances against neither, and what influence guidance adds to the other."""
    both = _plain(rows, "dit", BOTH)
    return _known([(both, _plain(rows, "dit", "")), (both, _plain(rows, "dit", "deviation"))])
