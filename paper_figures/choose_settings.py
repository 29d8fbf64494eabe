"""Chooses a stand-in's cfg, k and gamma on its validation split; the test set is never touched.

Generation seeds 100, 101, ... differ from the notebooks' 0, 1, ...; rows go to data/standin_settings_STAGE.csv.
Guidance is chosen at cfg 4: of the (k, gamma) that leave the finished images with a lower influence loss than
DiT's on the same noise, the one of the highest accuracy. Without that condition gamma alone would win.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from igd_lib import experiment, files, methods, notebook, results
from igd_lib.progress import progress

DATA = Path(__file__).parent / "data"
PARTS = Path(__file__).parents[1] / "out" / "settings"
CFGS = (1.0, 1.5, 2.0, 3.0, 4.0)
GAMMAS = (120.0, 240.0, 480.0)  # the paper's, for 4,096 latent values
KS = (0.0, 15.0, 30.0, 50.0)


def candidates(stage: str, setup: experiment.Experiment) -> list[methods.Method]:
    """The settings that one stage compares."""
    if stage == "cfg":
        return [methods.Method(f"cfg {cfg}", cfg_scale=cfg) for cfg in CFGS]
    return methods.grid(setup, KS, GAMMAS)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy (mean, sd, n) and mean influence loss of each setting, best accuracy first."""
    found = results.summary(rows[rows.metric == "top1"])
    found["influence loss"] = found.method.map(rows[rows.metric == "influence_loss"].groupby("method").value.mean())
    return found.sort_values("mean", ascending=False)


def finish(name: str, rows: pd.DataFrame) -> None:
    """Write all rows and say which setting the rule chooses."""
    files.write(DATA / f"{name}.csv", rows.sort_values(["method", "metric", "seed"]).to_csv(index=False))
    found = table(rows)
    print(found.round(4).to_string(index=False))
    plain = found[found.method == "DiT"]["influence loss"]
    fit = found[found["influence loss"] < plain.item()] if len(plain) else found
    print("chosen:", fit.iloc[0].method)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("cfg", "guidance"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--part", default="1/1", help="i/n: only every n-th setting, for n processes side by side; then --merge")
    parser.add_argument("--merge", action="store_true", help="join the parts")
    arguments = parser.parse_args()
    name = f"standin_settings_{arguments.stage}"
    if arguments.merge:
        return finish(name, pd.concat([pd.read_csv(part) for part in sorted(PARTS.glob(f"{name}-*.csv"))], ignore_index=True))
    setup = notebook.prepare("choose_settings", "fashion-mnist", "small", ipc=arguments.ipc)
    setup = setup.on_validation()
    print("kept checkpoints, in epochs:", setup.fit_surrogate().epochs, flush=True)
    part, parts = map(int, arguments.part.split("/"))
    methods = candidates(arguments.stage, setup)[part - 1 :: parts]
    frames = []
    for method in progress(methods, "settings"):
        sets = {(method.name, 100 + seed): setup.distilled(method, arguments.ipc, 100 + seed) for seed in range(arguments.seeds)}
        frames += [setup.accuracy_rows(sets, arguments.ipc, "convnet3"), setup.influence_rows(sets, arguments.ipc)]
    rows = pd.concat(frames, ignore_index=True)
    if parts > 1:
        files.write(PARTS / f"{name}-{part}of{parts}.csv", rows.to_csv(index=False))
    else:
        finish(name, rows)


if __name__ == "__main__":
    main()
