"""Sharing: a folder of files with its card and their sums, to the Hugging Face hub or a folder, and back.

A repository is named OWNER/NAME on the hub (datasets/OWNER/NAME, models/OWNER/NAME where that is to be said),
or file:///PATH, a folder: the way without a network. Who talks to the hub is a `Hub`: huggingface_hub's HfApi
unless another is given.

What is pulled is pinned to a commit, checked file by file against the sums that were pushed, and appears in
its place only when it is whole. No file is unpickled, and no code comes with it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlparse

from huggingface_hub import HfApi, errors
from huggingface_hub.utils import validate_repo_id

from igd_lib.data.datasets import DATASETS
from igd_lib.data.images import ImageData
from igd_lib.data.sources.base import composed
from igd_lib.sets import cards, croissant, sums
from igd_lib.sets.cards import Card, RepoType
from igd_lib.sets.folder_hub import FolderHub, NoRepository
from igd_lib.tools import files
from igd_lib.tools.machine import cache_dir

TYPES: tuple[RepoType, ...] = ("dataset", "model")  # in the order in which they are looked for
OFFLINE = "without a network, push to a folder (file:///PATH), copy it, and pull it from there"


class Hub(Protocol):
    """What is asked of huggingface_hub's `HfApi`, and all of it."""

    def create_repo(
        self, repo_id: str, *, repo_type: str | None, private: bool | None, exist_ok: bool
    ) -> Any: ...

    def upload_folder(
        self,
        *,
        repo_id: str,
        repo_type: str | None,
        folder_path: str | Path,
        commit_message: str | None,
        delete_patterns: Any,
    ) -> Any:
        """A result whose `oid` is the commit."""
        ...

    def repo_info(self, repo_id: str, *, repo_type: str | None, revision: str | None) -> Any:
        """A result whose `sha` is the commit and whose `siblings` have the files' names as `rfilename`."""
        ...

    def snapshot_download(
        self, repo_id: str, *, repo_type: str | None, revision: str | None, local_dir: str | Path | None
    ) -> Any: ...


@dataclass(frozen=True)
class Address:
    """Where shared work is."""

    given: str
    hub: Hub
    repo_id: str
    repo_type: RepoType | None  # None: not said

    @classmethod
    def of(cls, repo: str, hub: Hub | None = None) -> Address:
        """From what a user gave. Raises ValueError for what can be no repository."""
        if repo.startswith("file:"):
            parsed = urlparse(repo)
            path = Path(unquote(parsed.path))
            if parsed.netloc not in ("", "localhost") or not path.is_absolute() or not path.name:
                raise ValueError(f"a folder's address is file:///PATH, an absolute path, got {repo!r}")
            return cls(repo, FolderHub(path.parent), path.name, None)
        first, _, rest = repo.partition("/")
        kind: RepoType | None = {"datasets": TYPES[0], "models": TYPES[1]}.get(first) if "/" in rest else None
        try:
            validate_repo_id(rest if kind else repo)
        except ValueError as error:
            raise ValueError(f"a repository is OWNER/NAME, or a folder file:///PATH, got {repo!r}") from error
        return cls(repo, hub or HfApi(), rest if kind else repo, kind)

    @property
    def url(self) -> str:
        """Its page, or the folder."""
        if self.given.startswith("file:"):
            return self.public
        middle = "datasets/" if self.repo_type == "dataset" else ""
        return f"https://huggingface.co/{middle}{self.repo_id}"

    @property
    def public(self) -> str:
        """How a card names it: a folder by its name alone, for where it lies is its owner's."""
        return f"file:///PATH/{self.repo_id}" if self.given.startswith("file:") else self.given

    @property
    def owner(self) -> str:
        """Who shares it, as far as the address says."""
        return self.repo_id.partition("/")[0] if "/" in self.repo_id else "unknown"

    def typed(self, kind: RepoType) -> Address:
        """The same as a repository of that type. Raises ValueError where the other one was said."""
        if self.repo_type not in (None, kind):
            raise ValueError(f"{self.given} is a {self.repo_type} repository, this is pushed to a {kind}'s")
        return Address(self.given, self.hub, self.repo_id, kind)


@dataclass(frozen=True)
class Shareable:
    """Work that may be shared: its files by their paths in the repository, and its card."""

    card: Card
    files: Mapping[str, Path]


@dataclass(frozen=True)
class Shared:
    """What has been pushed or pulled."""

    repo: str
    repo_type: str
    commit: str
    files: int
    bytes: int
    folder: Path | None = None  # where it was pulled to

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        place = {} if self.folder is None else {"folder": str(self.folder)}
        own = {"repo": self.repo, "repo_type": self.repo_type, "commit": self.commit}
        return own | {"files": self.files, "bytes": self.bytes} | place


# --- push


def push(
    work: Shareable,
    repo: str,
    *,
    private: bool = False,
    hub: Hub | None = None,
    beside: Path | None = None,  # where a temporary folder may be made; None: beside the work's first file
) -> Shared:
    """Push work with its card, sums and, for a set, Croissant metadata; the repository holds nothing else.

    The same push again changes nothing. Raises ValueError for a file that may not be shared, ConnectionError
    where the hub does not answer or refuses.
    """
    address = Address.of(repo, hub).typed(work.card.repo_type)
    place = beside or next(iter(work.files.values())).parent
    with _staged(work, address, place) as folder, _asking(address):
        address.hub.create_repo(address.repo_id, repo_type=address.repo_type, private=private, exist_ok=True)
        made = address.hub.upload_folder(
            repo_id=address.repo_id,
            repo_type=address.repo_type,
            folder_path=folder,
            commit_message=work.card.title,
            delete_patterns=["*"],  # what an earlier push left
        )
        names = sums.listed(folder)
        size = sum((folder / name).stat().st_size for name in names)
        return Shared(repo, work.card.repo_type, made.oid, len(names), size)


@contextmanager
def _staged(work: Shareable, address: Address, place: Path) -> Iterator[Path]:
    """A temporary folder, of hard links where possible, with all that is pushed."""
    folder = place / f".push-{sha256(address.given.encode()).hexdigest()[:8]}-{os.getpid()}.tmp"
    try:
        for name, path in work.files.items():
            sums.check_name(name)
            _linked(path, folder / name)
        found = sums.of(folder, work.files)
        if work.card.repo_type == "dataset":
            made = croissant.metadata(work.card, folder, found, address.url, address.owner)
            files.write(folder / sums.CROISSANT, croissant.dumped(made))
        files.write(folder / sums.CARD, croissant.dumped(work.card.record()))
        files.write(folder / sums.README, cards.text(work.card, address.public))
        found |= sums.of(folder, set(sums.listed(folder)) - set(found))
        files.write(folder / sums.SUMS, croissant.dumped(dict(sorted(found.items()))))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _linked(path: Path, target: Path) -> None:
    """A file of the same content. Raises ValueError for a link."""
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path} is a symbolic link, or no plain file: it is refused")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, target)
    except OSError:  # another file system, or one without them
        shutil.copyfile(path, target)


# --- pull


def pull(
    repo: str,
    into: str | Path | None = None,  # a new folder; None: in the cache, named by repository and commit
    *,
    revision: str | None = None,  # a branch, tag or commit; None: the newest
    data: str | ImageData | Sequence[str] | None = None,  # what it is to be used with: its class order
    repo_type: RepoType | None = None,  # None: as the address says, else whichever is there
    hub: Hub | None = None,
) -> Shared:
    """Pull shared work into the new folder `into`, which is there when all of it is, and say its commit.

    The commit and where it came from are noted in `pulled.json`. What is there already, from the same commit
    and unchanged, is left as it is; an interrupted pull goes on. Raises ValueError naming a file that is
    missing, was added or changed, or may not be shared, and the first class that is another one in `data`;
    FileNotFoundError without such a repository or revision; FileExistsError where `into` holds something
    else; ConnectionError where the hub does not answer.
    """
    address = Address.of(repo, hub)
    address, info = _found(address if repo_type is None else address.typed(repo_type), revision)
    for name in (one.rfilename for one in info.siblings or ()):
        if name != sums.GIT:
            sums.check_name(name)  # before anything is downloaded
    place = Path(into).expanduser().absolute() if into is not None else _usual_place(address, info.sha)
    lock = f".{place.name}.lock"
    with files.locked(place.parent, f"a pull into {place.name}", wait=True, name=lock):
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            _check_same(place, info.sha)
            check_classes(place, data)
        else:
            _fetch(address, info.sha, revision, place, data)
    names = sums.listed(place)
    size = sum((place / name).stat().st_size for name in names)
    return Shared(repo, address.repo_type or "", info.sha, len(names), size, place)


def _usual_place(address: Address, commit: str) -> Path:
    """Where the cache keeps what was pulled."""
    return cache_dir() / "shared" / f"{address.repo_id.replace('/', '--')}-{commit[:12]}"


def _found(address: Address, revision: str | None) -> tuple[Address, Any]:
    """The repository, of whichever type is there, and what the hub says of its revision."""
    types = TYPES if address.repo_type is None else (address.repo_type,)
    for number, kind in enumerate(types, start=1):
        own = address.typed(kind)
        try:
            with _asking(own, revision):
                return own, own.hub.repo_info(own.repo_id, repo_type=kind, revision=revision)
        except NoRepository:
            if number == len(types):
                raise
    raise AssertionError


def _fetch(address: Address, commit: str, revision: str | None, place: Path, data: Any) -> None:
    """Download beside the place, check, move. What was downloaded is kept unless it is wrong."""
    half = place.with_name(f".{place.name}.{commit[:12]}.half")
    with _asking(address, commit):
        address.hub.snapshot_download(
            address.repo_id, repo_type=address.repo_type, revision=commit, local_dir=half
        )
    try:
        shutil.rmtree(half / ".cache", ignore_errors=True)  # huggingface_hub's notes, for going on
        (half / sums.GIT).unlink(missing_ok=True)
        found = sums.check(half)
        check_classes(half, data)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise
    note: dict[str, Any] = {"repo": address.given, "repo_type": address.repo_type, "asked": revision}
    note |= {"commit": commit, "sums_sha256": files.sha256(half / sums.SUMS), "files": len(found)}
    files.write(half / sums.PULLED, croissant.dumped(note))
    if place.is_dir():  # an empty one
        place.rmdir()
    os.rename(half, place)


def _check_same(place: Path, commit: str) -> None:
    """Raise unless a folder is what would be pulled."""
    note = place / sums.PULLED
    known = sums.read_json(note) if note.is_file() else None
    there = known.get("commit") if isinstance(known, dict) else None
    if there != commit:
        own = "something else" if there is None else f"revision {there}"
        raise FileExistsError(f"{place} is not empty: it holds {own}; remove it, or choose another folder")
    sums.check(place)


def check_classes(folder: Path, data: str | ImageData | Sequence[str] | None) -> None:
    """Raise ValueError at the first label that is another class in `data` (a data set, its name, classes)."""
    ours = cards.read(folder)["classes"]
    if data is None:
        return
    theirs, where = _classes_of(data)
    for label in range(max(len(ours), len(theirs))):
        a, b = (repr(composed(own[label])) if label < len(own) else "none" for own in (ours, theirs))
        if a != b:
            raise ValueError(
                f"class orders differ: label {label} is {a} in what was shared and {b} in {where}"
            )


def _classes_of(data: str | ImageData | Sequence[str]) -> tuple[Sequence[str], str]:
    """Classes in label order, and whose they are."""
    if isinstance(data, ImageData):
        return data.classes, data.name
    if not isinstance(data, str):
        return data, "the data set"
    if data not in DATASETS:
        raise ValueError(f"unknown data set {data!r}; known: {', '.join(sorted(DATASETS))}")
    return DATASETS[data].classes, data


# --- errors in a line


# What the client raises where no answer comes; with an earlier one that is an OSError without a number.
_NO_ANSWER = (errors.HfHubHTTPError, getattr(errors, "HTTPError", ConnectionError), ConnectionError)


@contextmanager
def _asking(address: Address, revision: str | None = None) -> Iterator[None]:
    """Turn what the client raises into one line that says what to do."""
    try:
        yield
    except errors.RepositoryNotFoundError as error:
        message = f"no {address.repo_type} repository {address.given}, or it is private: hf auth login"
        raise NoRepository(message) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{address.given} has no revision {revision}") from error
    except errors.LocalTokenNotFoundError as error:
        raise ConnectionError(f"{address.given}: log in first, hf auth login; {OFFLINE}") from error
    except (*_NO_ANSWER, errors.LocalEntryNotFoundError) as error:
        raise ConnectionError(f"{address.given}: {_line(error)}; {OFFLINE}") from error


def _line(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or ["no answer"])[0]
    return f"the hub does not answer, or refuses ({type(error).__name__}: {first})"
