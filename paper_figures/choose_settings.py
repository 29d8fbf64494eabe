"""Chooses a stand-in's cfg, k and gamma on its validation split; the test set is never touched.

Generation seeds 100, 101, ... differ from the notebooks' 0, 1, ...; rows go to
data/standin_settings_STAGE.csv. Guidance is chosen at cfg 4: of the (k, gamma) that leave the finished images
with a lower influence loss than DiT's on the same noise, the one of the highest accuracy. Without that
condition gamma alone would win.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from igd_lib.analysis import results
from igd_lib.experiment import comparisons, measures, pictures
from igd_lib.experiment.experiment import Experiment, Sets, prepare
from igd_lib.experiment.methods import Method
from igd_lib.experiment.run import Run
from igd_lib.tools import files
from igd_lib.tools.progress import progress

DATA = Path(__file__).parent / "data"
PARTS = Path(__file__).parents[1] / "out" / "settings"
CFGS = (1.0, 1.5, 2.0, 3.0, 4.0)
GAMMAS = (120.0, 240.0, 480.0)  # the paper's, for 4,096 latent values
KS = (0.0, 15.0, 30.0, 50.0)
SHOWN = 6  # the class in the pictures


def candidates(given: argparse.Namespace, experiment: Experiment) -> list[Method]:
    """The settings that one stage compares."""
    if given.stage == "cfg":
        return [Method(cfg_scale=cfg, varies=("cfg",)) for cfg in CFGS]
    return comparisons.grid(experiment, given.ks, given.gammas, given.backbone)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy (mean, sd, n) and mean influence loss of each setting, best accuracy first."""
    found = results.summary(rows[rows.metric == "top1"])
    found["influence loss"] = found.method.map(
        rows[rows.metric == "influence_loss"].groupby("method").value.mean()
    )
    return found.sort_values("mean", ascending=False)


def finish(given: argparse.Namespace, name: str, rows: pd.DataFrame, experiment: Experiment) -> None:
    """Write all rows and one class's images with every setting, and say which setting the rule chooses."""
    files.write(DATA / f"{name}.csv", rows.sort_values(["method", "metric", "seed"]).to_csv(index=False))
    tried = candidates(given, experiment)
    sets = Sets(given.ipc, {(method, 0): experiment.set(method, 100, given.ipc) for method in tried})
    title = f"{experiment.train.name}, {experiment.train.classes[SHOWN]}, {experiment.scale.name}, seed 100"
    pictures.one_class(sets, SHOWN, title=title, count=given.ipc).save(experiment, str(PARTS / name))
    for kind in ("csv", "png"):
        files.write(DATA / f"{name}.images.{kind}", (PARTS / name / f"images.{kind}").read_bytes())
    found = table(rows)
    print(found.round(4).to_string(index=False))
    plain = found[found.method == tried[0].label]["influence loss"] if given.stage == "guidance" else []
    fit = found[found["influence loss"] < plain.item()] if len(plain) else found
    print("chosen:", fit.iloc[0].method)


def numbers(text: str) -> tuple[float, ...]:
    """Comma-separated numbers."""
    return tuple(float(part) for part in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("cfg", "guidance"))
    parser.add_argument("--backbone", default="dit", choices=("dit", "minimax"))
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
    name = f"standin_settings_{given.stage}" + ("" if given.backbone == "dit" else f"_{given.backbone}")
    experiment = prepare("choose_settings", "fashion-mnist", "small", run=Run(ipc=given.ipc))
    experiment = experiment.on_validation()
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
