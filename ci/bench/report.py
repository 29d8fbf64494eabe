"""What `make bench` says of its report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def say(report: Mapping[str, Any]) -> None:
    """Print a report's ratios and rates."""
    for one in report["standins"]:
        rows, plain = one["rows"], one["rows"]["vanilla"]
        about = f"{one['checkpoints']} checkpoints of {one['surrogate']}, batch {one['batch']}"
        print(f"\n{one['stand-in']}, {about}, {report['machine']}, {report['threads']} threads")
        for name, row in rows.items():
            times, work = row["seconds"] / plain["seconds"], row["gflop"] / plain["gflop"]
            price = f"{times:6.2f} x vanilla  {work:6.2f} x its arithmetic"
            print(f"{name:42s} {row['seconds']:8.3f} s/image  {price}")
        for name in ("straight line", "released code"):
            times = rows[name]["seconds"] / rows["exact"]["seconds"]
            print(
                f"exact is {times:.1f} times as fast as the {name} (a backward a checkpoint, image by image)"
            )
    for name, row in report["paper"]["over 50 steps with 16 guided"].items():
        print(
            f"paper's shapes, {name:42s} {row['seconds / vanilla']:6.2f} x vanilla  "
            f"{row['tflop / vanilla']:6.2f} x its arithmetic"
        )
    whole = report["whole"]["rows"]
    for name, row in whole.items():
        times, work = (row[key] / whole["vanilla"][key] for key in ("seconds", "tflop"))
        print(f"a whole image there, {name:16s} {times:5.2f} x vanilla  {work:5.2f} x its arithmetic")
    for name, apart in report["same"].items():
        print(f"and {apart:.1e} of the latents' norm apart after all steps ({name})")
    for row in [*report["batches"], report["recompute"]]:
        print(
            f"batch {row['batch']:3d}: {row['images_per_second']:.2f} images/s, {row['peak_gib']:.2f} "
            f"GiB{', activations recomputed' * row['recompute']}"
        )
    for name, row in report["variants"].items():
        print(f"{name:14s} {row['vanilla']:.3f} and {row['exact']:.3f} s/image, vanilla and exact")
    for row in report["growth"]:
        print(
            f"{row['images']:5d} images of {row['classes']:4d} classes: {row['seconds_per_image']:.3f} "
            f"s/image, {row['peak_gib']:.2f} GiB"
        )
    for row in report["workers"]:
        print(f"{row['workers'] or 'no':>2} Ray workers: {row['images_per_second']:.3f} images/s")
    for row in report["notebooks"]:
        print(f"{row['notebook']}, IPC {row['ipc']}: {row['whole']:.1f} minutes")
        for stage, spent in row["stages"].items():
            print(f"  {spent:5.1f}  {stage}")
