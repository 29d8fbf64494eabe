"""`python -m igd_lib doctor` and `python -m igd_lib verify FOLDER`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m igd_lib")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what this machine has, and what each notebook would do on it")
    check = commands.add_parser("verify", help="read a distilled set again and name what is missing or damaged")
    check.add_argument("folder", type=Path)
    check.add_argument("--repair", action="store_true", help="remove what is damaged, so that the next run samples it anew")
    given = parser.parse_args(argv)
    if given.command == "doctor":
        from igd_lib.doctor import report

        print(report())
        return 0
    from igd_lib.distill import DistilledSet

    try:
        lines = DistilledSet(given.folder).verify(repair=given.repair)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(lines) if lines else "complete and unchanged")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
