"""One's own folder: its name in the cache, its classes, and ImageNet's ids from a file, whole and broken."""

from __future__ import annotations

import unicodedata

import pytest
from PIL import Image
from torchvision.models import ResNet18_Weights

from igd_lib.data.images import load
from igd_lib.data.your_folder import IDS, imagenet_ids, your_folder

WNIDS = {"Samoyed": "n02111889", "dingo": "n02115641", "beagle": "n02088364"}
HEADER = "folder,wnid\n"


@pytest.fixture
def folder(tmp_path):
    """Three classes, two images each, and their ids, as a user would write them."""
    base = tmp_path / "dogs"
    for split in ("train", "test"):
        for shade, name in enumerate(WNIDS):
            place = base / split / name
            place.mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (12, 8), (40 * shade + number,) * 3).save(place / f"{number}.png")
    write(base)
    return base


def write(base, text: str | None = None, encoding: str = "utf-8") -> None:
    rows = "".join(f"{name},{wnid}\n" for name, wnid in WNIDS.items())
    (base / IDS).write_bytes((HEADER + rows if text is None else text).encode(encoding))


def test_ids_are_in_label_order(folder):
    """Against torchvision's list of the thousand names."""
    spec = your_folder(folder, image_size=8)
    assert spec.classes == ("Samoyed", "beagle", "dingo") == load(spec).classes
    theirs = ResNet18_Weights.DEFAULT.meta["categories"]
    assert (
        [theirs[number] for number in spec.label_ids] == ["Samoyed", "beagle", "dingo"] == list(spec.titles)
    )
    assert imagenet_ids(folder) == imagenet_ids(folder / IDS) == spec.label_ids == (258, 162, 273)
    assert imagenet_ids(folder, ("dingo", "Samoyed", "beagle")) == (273, 258, 162)
    (folder / "classes.txt").write_text("dingo\nbeagle\nSamoyed\n")
    assert imagenet_ids(folder) == your_folder(folder, image_size=8).label_ids == (273, 162, 258)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_as_spreadsheets_write_it(folder, encoding):
    """A byte order mark, carriage returns, quotes, an empty line at the end."""
    rows = "".join(f'"{name}", {wnid}\r\n' for name, wnid in WNIDS.items())
    write(folder, "folder,wnid\r\n" + rows + ",\r\n\r\n", encoding)
    assert imagenet_ids(folder) == (258, 162, 273)


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
def test_names_are_compared_in_the_composed_form(folder, on_disk):
    other = {"NFC": "NFD", "NFD": "NFC"}[on_disk]
    for split in ("train", "test"):
        (folder / split / "dingo").rename(folder / split / unicodedata.normalize(on_disk, "Döngo"))
    rows = "".join(f"{name},{wnid}\n" for name, wnid in WNIDS.items())
    write(folder, HEADER + rows.replace("dingo", unicodedata.normalize(other, "Döngo")))
    spec = your_folder(folder, image_size=8)
    assert spec.classes == ("D\u00f6ngo", "Samoyed", "beagle") and spec.label_ids == (273, 258, 162)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"ends with line 1 and has none for the class 'Samoyed' \(3 of 3"),
        ("wnid,folder\n", "line 1: the columns are folder,wnid, got wnid,folder"),
        ("folder;wnid\n", "line 1: the columns are folder,wnid, got folder;wnid"),
        (
            HEADER + "beagle,n02088364,2\n",
            "line 2: 3 values for the columns folder,wnid; a name with a comma",
        ),
        (HEADER + "beagle\n", "line 2: 1 values"),
        (HEADER + "\nbeagle,n99999999\n", "line 3: 'n99999999' is no wnid"),
        (HEADER + "beagle,beagle\n", "line 2: 'beagle' is no wnid"),
        (HEADER + "beagle,n02088364\nbeagle,n02115641\n", "line 3: the folder 'beagle' is in line 2 already"),
        (HEADER + "beagle,n02088364\ndingo,n02088364\n", "line 3: the wnid n02088364 is in line 2 already"),
        (HEADER + "poodle,n02113799\n", "line 2: there is no class folder 'poodle'"),
        (HEADER + "beagle,n02088364\n\ndingo,n02115641\n", r"ends with line 4 .*class 'Samoyed' \(1 of 3"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named_with_file_and_line(folder, text, message):
    write(folder, text)
    for read in (imagenet_ids, lambda path: your_folder(path, image_size=8)):
        with pytest.raises(ValueError, match=rf"dogs/imagenet_ids\.csv.*{message}"):
            read(folder)


def test_another_encoding_is_named_with_its_line(folder):
    write(folder, HEADER + "beagle,n02088364\nBärenhund,n02115641\n", "latin-1")
    with pytest.raises(ValueError, match=r"imagenet_ids\.csv, line 3 is not utf-8"):
        imagenet_ids(folder)


def test_without_the_file_there_are_no_ids(folder):
    (folder / IDS).unlink()
    spec = your_folder(folder, image_size=8)
    assert spec.label_ids == () and spec.classes == ("Samoyed", "beagle", "dingo")
    with pytest.raises(FileNotFoundError, match=r"no file .*imagenet_ids\.csv; write one with .*folder,wnid"):
        imagenet_ids(folder)


def test_the_name_says_which_files_are_there(folder):
    """Work in the cache is found by the data's name: another image, or a removed one, is another name."""
    names = [your_folder(folder, image_size=8).name]
    (folder / "notes.txt").write_text("no image")
    assert your_folder(folder, image_size=8).name == names[0] and names[0].startswith("dogs-")
    Image.new("RGB", (300, 8), (9, 200, 1)).save(folder / "train" / "beagle" / "0.png")
    names.append(your_folder(folder, image_size=8).name)
    (folder / "test" / "beagle" / "1.png").unlink()
    names.append(your_folder(folder, image_size=8).name)
    assert len(set(names)) == 3
    moved = folder.rename(folder.parent / "elsewhere")
    assert your_folder(moved, image_size=8).name == names[2].replace("dogs", "elsewhere")
