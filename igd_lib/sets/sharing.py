"""`igd push`: whatever kind of work a folder holds, made ready to be shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from igd_lib.sets import hub, kinds, shareable, sums, terms
from igd_lib.sets.hub import Hub, Shareable, Shared
from igd_lib.sets.kinds import INDEX, METHODS, TRAJECTORY
from igd_lib.sets.shareable import MANIFEST, Declared
from igd_lib.sets.store import DistilledSet


def push(
    folder: str | Path,
    repo: str,
    *,
    declared: Declared | None = None,
    private: bool = False,
    client: Hub | None = None,  # None: huggingface_hub's HfApi, or a folder's for file:///PATH
) -> Shared:
    """Push a distilled set, a surrogate with its class gradients, a fine-tuned DiT or an adapter.

    Raises as `find` and `hub.push`.
    """
    path = Path(folder).expanduser().resolve()
    return hub.push(find(path, declared), repo, private=private, hub=client, beside=path.parent)


def find(folder: Path, declared: Declared | None = None) -> Shareable:
    """What a folder holds, as far as it may be shared.

    Raises FileNotFoundError without a folder; ValueError, with the reason, for real images, others' weights,
    what is damaged or not finished, files of other types, and folders that do not say how they were made.
    """
    declared = declared or Declared()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    sums.listed(folder)  # no links
    try:
        return _found(folder, declared)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder} is damaged, or of an earlier version ({error!r}): it is not pushed"
        ) from error


def _found(folder: Path, declared: Declared) -> Shareable:
    if (folder / MANIFEST).is_file():
        return _of_manifest(folder, sums.read_json(folder / MANIFEST), declared)
    if (folder / TRAJECTORY).is_file():
        return kinds.of_surrogate(folder, declared)
    if (folder / INDEX).is_file():
        return kinds.of_backbone(folder, declared)
    raise ValueError(
        f"nothing in {folder} says how it was made: sets, surrogates, fine-tuned DiTs and adapters of "
        f"igd_lib are pushed; {terms.ORIGINS['real']}, never are"
    )


def _of_manifest(folder: Path, manifest: dict[str, Any], declared: Declared) -> Shareable:
    if "format" in manifest:
        raise ValueError(f"{folder} is an export for other tools: push the set that it was made from")
    if manifest.get("kind") in METHODS:
        return kinds.of_method(folder, manifest, declared)
    if manifest.get("kind") == "adapter":
        return kinds.of_adapter(folder, manifest, declared)
    return shareable.of_set(DistilledSet(folder), declared)
