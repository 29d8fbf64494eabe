"""A folder in the hub's place: the way to share work without a network."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from igd_lib.sets import cards, croissant, sums
from igd_lib.tools import files


class NoRepository(FileNotFoundError):
    """There is no such repository, or it is not to be seen."""


class FolderHub:
    """Repositories that are folders below `root`, each with its newest state alone; no network is needed.

    A commit is forty hex digits of the files' sums and paths, so equal content has the same one.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def _path(self, repo_id: str) -> Path:
        parts = repo_id.split("/")
        if any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"{repo_id!r} is no repository's name")
        return self.root.joinpath(*parts)

    def create_repo(
        self, repo_id: str, *, repo_type: str | None, private: bool | None, exist_ok: bool
    ) -> None:
        """Raise FileExistsError where the folder holds something that was not pushed."""
        path = self._path(repo_id)
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise FileExistsError(f"{path} is no folder; choose another one")
        pushed = all((path / name).is_file() for name in (sums.SUMS, sums.CARD))
        if path.is_dir() and any(path.iterdir()) and not (pushed and exist_ok):
            raise FileExistsError(f"{path} holds something that was not pushed there; choose another folder")

    def upload_folder(
        self,
        *,
        repo_id: str,
        repo_type: str | None,
        folder_path: str | Path,
        commit_message: str | None,
        delete_patterns: Any,
    ) -> Any:
        """Copy the folder beside its place, and put it there."""
        path = self._path(repo_id)
        new, old = (path.with_name(f".{path.name}.{which}.tmp") for which in ("new", "old"))
        for folder in (new, old):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(folder_path, new, copy_function=shutil.copyfile)
        if path.exists():
            os.rename(path, old)
        os.rename(new, path)
        shutil.rmtree(old, ignore_errors=True)
        return SimpleNamespace(oid=commit_of(path))

    def repo_info(self, repo_id: str, *, repo_type: str | None, revision: str | None) -> Any:
        """Of the newest state, which its commit, "main" and None name.

        Raises FileNotFoundError for another revision, NoRepository without a folder or for the other type.
        """
        path = self._path(repo_id)
        if not path.is_dir():
            raise NoRepository(f"there is no folder {path}")
        if repo_type is not None and _type_in(path) not in (None, repo_type):
            raise NoRepository(f"{path} holds no {repo_type}")
        names, commit = sums.listed(path), commit_of(path)
        if revision not in (None, "main", commit):
            raise FileNotFoundError(
                f"{path} has no revision {revision}: a folder has its newest alone, {commit}"
            )
        return SimpleNamespace(sha=commit, siblings=[SimpleNamespace(rfilename=name) for name in names])

    def snapshot_download(
        self, repo_id: str, *, repo_type: str | None, revision: str | None, local_dir: str | Path | None
    ) -> str:
        """Copy the folder's files. Raises FileNotFoundError as `repo_info`."""
        info = self.repo_info(repo_id, repo_type=repo_type, revision=revision)
        assert local_dir is not None  # always asked so
        for name in (one.rfilename for one in info.siblings):
            target = Path(local_dir) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._path(repo_id) / name, target)
        return str(local_dir)


def commit_of(folder: Path) -> str:
    """Forty hex digits of a folder's content, where it was pulled from aside."""
    names = (name for name in sums.listed(folder) if name != sums.PULLED)
    return croissant.listing_sha256({name: files.sha256(folder / name) for name in names})[:40]


def _type_in(folder: Path) -> str | None:
    """The type of what was pushed to a folder, None where it does not say."""
    try:
        kind = cards.read(folder).get("kind")
    except ValueError:
        return None
    return "dataset" if kind == "set" else "model"
