"""Chooses a stand-in's cfg, gamma and k on its validation split; the test set is never touched.

Generation seeds 100, 101, ... differ from the notebooks' 0, 1, ...; rows go to data/standin_settings_STAGE.csv.
k was chosen at gamma 120; everything else is `experiment.STAND_IN_SETTINGS`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from igd_lib import experiment, files, results
from igd_lib.data import load
from igd_lib.progress import progress

DATA = Path(__file__).parent / "data"


def candidates(stage: str, setup: experiment.Experiment) -> list[experiment.Method]:
    """The settings that one stage compares, at cfg 4 where it is guidance that is chosen."""
    guidance = setup.guidance
    if stage == "cfg":
        return [experiment.Method(f"cfg {cfg}", cfg_scale=cfg) for cfg in (1.0, 1.5, 2.0, 3.0, 4.0)]
    if stage == "gamma":
        scale = 256 / 4096
        return [experiment.Method(f"gamma {gamma}", replace(guidance, k=0.0, gamma=gamma * scale)) for gamma in (60, 120, 240, 480)]
    return [experiment.Method(f"k {k}", replace(guidance, k=k)) for k in (1.0, 5.0, 15.0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("cfg", "gamma", "k"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ipc", type=int, default=10)
    arguments = parser.parse_args()
    setup = experiment.prepare("choose_settings", "fashion-mnist", "small", ipc=arguments.ipc)
    setup.test = load("fashion-mnist", "validation").first(200)
    if arguments.stage == "k":
        print("kept checkpoints, in epochs:", setup.fit_surrogate().epochs, flush=True)
    cells = [(method, 100 + seed) for method in candidates(arguments.stage, setup) for seed in range(arguments.seeds)]
    sets = {(method.name, seed): setup.distilled(method, arguments.ipc, seed) for method, seed in progress(cells, "sets")}
    rows = setup.accuracy_rows(sets, arguments.ipc, "convnet3")
    files.write(DATA / f"standin_settings_{arguments.stage}.csv", rows.to_csv(index=False))
    print(results.summary(rows).round(2).to_string(index=False))


if __name__ == "__main__":
    main()
