"""The figure of what `make bench` measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure


def figure(report: Mapping[str, Any]) -> Figure:
    """What `make bench` measured.

    Each mode's price over 50 steps at the paper's shapes, whole images of the quick solver beside them, and
    the stand-in's throughput and memory by batch.
    """
    modes = report["paper"]["over 50 steps with 16 guided"] | _quick(report["whole"]["rows"])
    names = sorted(modes, key=lambda name: -modes[name]["tflop / vanilla"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", width_ratios=(1.5, 1))
    for shift, key, colour, label in (
        (0.2, "seconds / vanilla", "#0072B2", "seconds"),
        (-0.2, "tflop / vanilla", "#E69F00", "counted arithmetic"),
    ):
        values = [modes[name][key] for name in names]
        left.barh(
            [position + shift for position in range(len(names))], values, 0.38, color=colour, label=label
        )
        for position, value in enumerate(values):
            left.text(value + 0.05, position + shift, f"{value:.2f}", va="center", fontsize=7)
    left.set_yticks(range(len(names)), names)
    left.set_xlim(0, 1.12 * max(modes[name][key] for name in names for key in modes[name]))
    left.set_xlabel("times vanilla sampling of 50 steps")
    own = report["paper"]
    left.set_title(
        f"DiT-XL/2 shapes, random weights; {own['device']}, {own['dtype']}, batch {own['batch']}\n"
        "16 of 50 steps guided, in FAST 7 of 20"
    )
    left.legend(loc="upper right")
    sizes = [row["batch"] for row in report["batches"]]
    right.plot(sizes, [row["images_per_second"] for row in report["batches"]], "o-", color="#0072B2")
    right.set_xscale("log", base=2)
    right.set_xticks(sizes, [str(size) for size in sizes])
    right.set_ylim(bottom=0)
    right.set_xlabel("batch")
    right.set_ylabel("images/s, exact guidance", color="#0072B2")
    memory = right.twinx()
    memory.plot(sizes, [row["peak_gib"] for row in report["batches"]], "s--", color="#D55E00")
    memory.set_ylim(bottom=0)
    memory.grid(False)
    memory.set_ylabel("peak memory (GiB)", color="#D55E00")
    one = report["standins"][-1]
    right.set_title(
        f"{one['stand-in']}, {one['steps']} steps\n{report['machine']}, {report['threads']} threads"
    )
    return figure


def _quick(rows: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """The price of whole images in other numbers of steps, as that of the modes is given."""
    plain = rows["vanilla"]
    return {
        name: {f"{what} / vanilla": row[what] / plain[what] for what in ("seconds", "tflop")}
        for name, row in rows.items()
        if name != "vanilla"
    }
