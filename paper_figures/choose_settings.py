"""Chooses a stand-in's cfg, k and gamma on its validation split; the test set is never touched.

Generation seeds 100, 101, ... differ from the notebooks' 0, 1, ...; rows go to data/standin_settings_STAGE.csv.
Guidance is chosen at cfg 4: of the (k, gamma) that leave the finished images with a lower influence loss than
DiT's on the same noise, the one of the highest accuracy. Without that condition gamma alone would win.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pandas as pd

from igd_lib import experiment, files, methods, notebook, results
from igd_lib.progress import progress

DATA = Path(__file__).parent / "data"
PARTS = Path(__file__).parents[1] / "out" / "settings"
CFGS = (1.0, 1.5, 2.0, 3.0, 4.0)
GAMMAS = (120.0, 240.0, 480.0)  # the paper's, for 4,096 latent values
KS = (0.0, 15.0, 30.0, 50.0)
SHOWN = 6  # the class in the pictures


def candidates(given: argparse.Namespace, setup: experiment.Experiment) -> list[methods.Method]:
    """The settings that one stage compares."""
    if given.stage == "cfg":
        return [methods.Method(f"cfg {cfg}", cfg_scale=cfg) for cfg in CFGS]
    return methods.grid(setup, given.ks, given.gammas, given.backbone)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy (mean, sd, n) and mean influence loss of each setting, best accuracy first."""
    found = results.summary(rows[rows.metric == "top1"])
    found["influence loss"] = found.method.map(rows[rows.metric == "influence_loss"].groupby("method").value.mean())
    return found.sort_values("mean", ascending=False)


def finish(given: argparse.Namespace, name: str, rows: pd.DataFrame, setup: experiment.Experiment) -> None:
    """Write all rows and one class's images with every setting, and say which setting the rule chooses."""
    files.write(DATA / f"{name}.csv", rows.sort_values(["method", "metric", "seed"]).to_csv(index=False))
    tried = candidates(given, setup)
    one = replace(setup, classes=[SHOWN])
    sets = {(method.name, 0): one.distilled(method, given.ipc, 100) for method in tried}
    title = f"{setup.train.name}, {setup.train.classes[SHOWN]}, {setup.scale}, seed 100"
    one.keep_images(one.images_of(sets, SHOWN, seeds=1, first=given.ipc), [str(index) for index in range(given.ipc)], title, str(PARTS / name))
    for kind in ("csv", "png"):
        files.write(DATA / f"{name}.images.{kind}", (PARTS / name / f"images.{kind}").read_bytes())
    found = table(rows)
    print(found.round(4).to_string(index=False))
    plain = found[found.method == tried[0].name]["influence loss"] if given.stage == "guidance" else []
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
    parser.add_argument("--part", default="1/1", help="i/n: only every n-th setting, for n processes side by side; then --merge")
    parser.add_argument("--merge", action="store_true", help="join the parts")
    given = parser.parse_args()
    name = f"standin_settings_{given.stage}" + ("" if given.backbone == "dit" else f"_{given.backbone}")
    setup = notebook.prepare("choose_settings", "fashion-mnist", "small", ipc=given.ipc)
    setup = setup.on_validation()
    print("kept checkpoints, in epochs:", setup.fit_surrogate().epochs, flush=True)
    if given.merge:
        parts = [pd.read_csv(part) for part in sorted(PARTS.glob(f"{name}-[0-9]*.csv"))]
        return finish(given, name, pd.concat(parts, ignore_index=True), setup)
    part, parts = map(int, given.part.split("/"))
    frames = []
    for method in progress(candidates(given, setup)[part - 1 :: parts], "settings"):
        sets = {(method.name, 100 + seed): setup.distilled(method, given.ipc, 100 + seed) for seed in range(given.seeds)}
        frames += [setup.accuracy_rows(sets, given.ipc, "convnet3"), setup.influence_rows(sets, given.ipc)]
    rows = pd.concat(frames, ignore_index=True)
    if parts > 1:
        files.write(PARTS / f"{name}-{part}of{parts}.csv", rows.to_csv(index=False))
    else:
        finish(given, name, rows, setup)


if __name__ == "__main__":
    main()
