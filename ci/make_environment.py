"""Writes environment.yml from requirements.lock, so that conda and pip users get the same pins."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(lock: str) -> str:
    """The text of environment.yml for a lock file's text; environment markers stay, pip reads them there
    too.
    """
    pins = [line for line in lock.splitlines() if line and not line.startswith("#")]
    head = (
        "# Written by ci/make_environment.py from requirements.lock.\nname: igd\nchannels: "
        "[conda-forge]\ndependencies:\n"
    )
    return (
        head
        + "  - python=3.11\n  - pip\n  - pip:\n"
        + "".join(f"      - '{pin}'\n" for pin in pins)
        + "      - '-e .'\n"
    )


if __name__ == "__main__":
    (ROOT / "environment.yml").write_text(environment((ROOT / "requirements.lock").read_text()))
