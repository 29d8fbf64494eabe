"""Chooses a stand-in's settings on its validation split; the test set is never touched.

Generation seeds 100, 101, ... differ from the notebooks' 0, 1, ...; rows go to
data/STANDIN_settings_STAGE.csv (behind STAGE the backbone, "soft" labels and another IPC than 10, where they
are). Stages, each with the others as `scales.STAND_INS` has them: cfg (of vanilla sampling); guidance (k and
gamma at cfg 4); range (guided steps); surrogate (its network); checkpoints (Algorithm 2's threshold); fast (k
and gamma in FAST's steps); transport (OT's beta). Of guided rows that leave the finished images with a lower
influence loss than the unguided row on the same noise, the one of the highest accuracy is chosen. Without
that condition gamma alone would win. cfg and beta are chosen by accuracy alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd

from igd_lib.analysis import results
from igd_lib.experiment import comparisons, guide_makers, measures, pictures
from igd_lib.experiment.experiment import Experiment, Sets, prepare
from igd_lib.experiment.methods import Method
from igd_lib.experiment.registry import GUIDES
from igd_lib.experiment.run import Run
from igd_lib.experiment.scales import STAND_INS
from igd_lib.protocols import SMALL_SOFT
from igd_lib.tools import files
from igd_lib.tools.progress import progress

DATA = Path(__file__).parent / "data"
PARTS = Path(__file__).parents[1] / "out" / "settings"
CFGS = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0)
GAMMAS = (0.0, 120.0, 480.0)  # the paper's, for 4,096 latent values
KS = (0.0, 10.0, 30.0, 60.0)
RANGES = ((15, 22), (12, 18), (7, 14), (10, 22), (18, 24))  # of 25 steps; the first is the paper's share
SURROGATES = ("convnet3-w16", "convnet3-w32", "convnet3-w64", "convnet3")
THRESHOLDS = (0.6, 0.7, 0.8)
FAST_KS = (3.0, 10.0, 30.0)
BETAS = (40.0, 80.0, 160.0, 320.0)  # for 4,096 latent values; 320 moves latents by a third of their norm
SHOWN = 7  # the class in the pictures


def candidates(given: argparse.Namespace, experiment: Experiment) -> list[Method]:
    """The settings that one stage compares, the unguided row first."""
    plain, guided = comparisons.plain_and_guided(experiment, given.backbone)
    stages: dict[str, Callable[[], list[Method]]] = {
        "cfg": lambda: [replace(plain, cfg_scale=cfg, varies=("cfg",)) for cfg in CFGS],
        "guidance": lambda: comparisons.grid(experiment, given.ks, given.gammas, given.backbone),
        "range": lambda: [plain, *comparisons.ranges(experiment, RANGES, given.backbone)],
        "surrogate": lambda: [
            plain,
            *(replace(guided, surrogate=name, varies=("surrogate",)) for name in SURROGATES),
        ],
        "checkpoints": lambda: comparisons.selections(experiment, THRESHOLDS, given.backbone),
        "transport": lambda: [plain, *(Method(guides=(transport(beta),)) for beta in BETAS)],
        "fast": lambda: comparisons.fast_grid(experiment, FAST_KS, GAMMAS[1:]),
    }
    return stages[given.stage]()


def transport(beta: float) -> str:
    """The name of a guide like OT of another strength, which is registered for it."""
    name = f"transport-{beta:g}"
    GUIDES[name] = replace(GUIDES["transport"], name=f"OT, beta {beta:g}", make=guide_makers.transport(beta))
    return name


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy (mean, sd, n) and mean influence loss of each setting, best accuracy first."""
    found = results.summary(rows[rows.metric == "top1"])
    found["influence loss"] = found.method.map(
        rows[rows.metric == "influence_loss"].groupby("method").value.mean()
    )
    return found.sort_values("mean", ascending=False)


def finish(given: argparse.Namespace, name: str, rows: pd.DataFrame, experiment: Experiment) -> None:
    """Write all rows, with k and gamma one class's images too, and say which setting the rule chooses."""
    files.write(DATA / f"{name}.csv", rows.sort_values(["method", "metric", "seed"]).to_csv(index=False))
    tried = candidates(given, experiment)
    if given.stage == "guidance":
        sets = Sets(given.ipc, {(method, 0): experiment.set(method, 100, given.ipc) for method in tried})
        own = f"{experiment.train.name}, {experiment.train.classes[SHOWN]}, {experiment.scale.name}, seed 100"
        pictures.one_class(sets, SHOWN, title=own, count=given.ipc).save(experiment, str(PARTS / name))
        for kind in ("csv", "png"):
            files.write(DATA / f"{name}.images.{kind}", (PARTS / name / f"images.{kind}").read_bytes())
    found = table(rows)
    print(found.round(4).to_string(index=False))
    if given.stage not in ("cfg", "transport"):
        plain = found[found.method == tried[0].label]["influence loss"].item()
        found = found[found["influence loss"] < plain]
    print("chosen:", found.iloc[0].method if len(found) else "none lowers the influence loss")


def numbers(text: str) -> tuple[float, ...]:
    """Comma-separated numbers."""
    return tuple(float(part) for part in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    stages = ("cfg", "guidance", "range", "surrogate", "checkpoints", "fast", "transport")
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--stand-in", default="cifar-10", choices=tuple(STAND_INS))
    parser.add_argument("--backbone", default="dit", choices=("dit", "minimax"))
    parser.add_argument("--labels", default="hard", choices=("hard", "soft"))
    parser.add_argument("--ks", type=numbers, default=KS, help="comma-separated")
    parser.add_argument("--gammas", type=numbers, default=GAMMAS, help="comma-separated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument(
        "--part",
        default="1/1",
        help="i/n: only every n-th setting, for n processes side by side; then --merge",
    )
    parser.add_argument("--merge", action="store_true", help="join the parts")
    given = parser.parse_args()
    name = f"{given.stand_in}_settings_{given.stage}"
    name += "" if given.backbone == "dit" else f"_{given.backbone}"
    name += "" if given.labels == "hard" else f"_{given.labels}"
    name += "" if given.ipc == 10 else f"_ipc{given.ipc}"
    run = Run(ipc=given.ipc, stand_in=given.stand_in)
    experiment = prepare("choose_settings", None, "small", run=run).on_validation()
    if given.labels == "soft":
        experiment = experiment.with_protocol(SMALL_SOFT)
    print("kept checkpoints, in epochs:", experiment.checkpoints.epochs, flush=True)
    if given.merge:
        parts = [pd.read_csv(part) for part in sorted(PARTS.glob(f"{name}-[0-9]*.csv"))]
        return finish(given, name, pd.concat(parts, ignore_index=True), experiment)
    part, parts = map(int, given.part.split("/"))
    frames = []
    for method in progress(candidates(given, experiment)[part - 1 :: parts], "settings"):
        seeds = [100 + seed for seed in range(given.seeds)]
        sets = Sets(given.ipc, {(method, seed): experiment.set(method, seed, given.ipc) for seed in seeds})
        frames += [
            measures.accuracy_rows(experiment, sets, "convnet3"),
            measures.influence_rows(experiment, sets),
        ]
    rows = pd.concat(frames, ignore_index=True)
    if parts > 1:
        files.write(PARTS / f"{name}-{part}of{parts}.csv", rows.to_csv(index=False))
    else:
        finish(given, name, rows, experiment)


if __name__ == "__main__":
    main()
