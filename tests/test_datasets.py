"""Every layout of a benchmark set, in miniature: right images, right names, right parts."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets as theirs

from tapt.core.errors import DataError
from tapt.data import LabelledImages, benchmarks, digest, load_data


def picture(path: Path, red: int) -> None:
    """A picture that is known by its red."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (red, 7, 7)).save(path)


def lines(path: Path, *rows: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")


def reds(data: LabelledImages) -> dict[str, list[int]]:
    """Red of every image by class name; JPEG moves it by a little."""
    found: dict[str, list[int]] = {}
    for image, label in data:
        found.setdefault(data.classes[label], []).append(image.convert("RGB").getpixel((0, 0))[0])
    return found


def caltech101(root: Path) -> dict:
    images = root / "caltech101" / "101_ObjectCategories"
    for red, name in enumerate(
        ["BACKGROUND_Google", "Faces", "Faces_easy", "accordion", "yin_yang"]
    ):
        picture(images / name / "image_0001.jpg", 40 * red)
    return {"off-center face": 40, "accordion": 120, "yin and yang symbol": 160}


def dtd(root: Path) -> dict:
    folder = root / "dtd" / "dtd"
    for red, name in enumerate(["banded", "polka-dotted"]):
        picture(folder / "images" / name / f"{name}_1.jpg", 50 * red)
        picture(folder / "images" / name / f"{name}_2.jpg", 200)
    lines(folder / "labels" / "test1.txt", "polka-dotted/polka-dotted_1.jpg", "banded/banded_1.jpg")
    lines(
        folder / "labels" / "train1.txt", "banded/banded_2.jpg", "polka-dotted/polka-dotted_2.jpg"
    )
    return {"banded": 0, "polka-dotted": 50}


def eurosat(root: Path) -> dict:
    for red, name in enumerate(["AnnualCrop", "River", "SeaLake"]):
        picture(root / "eurosat" / "2750" / name / f"{name}_1.jpg", 60 * red)
    return {"annual crop land": 0, "river": 60, "lake or sea": 120}


def pets(root: Path) -> dict:
    folder = root / "oxford-iiit-pet"
    rows = ("american_bulldog_1", 2, 30), ("Abyssinian_7", 1, 60), ("english_setter_2", 3, 90)
    for part, suffix, more in (("test", "", 0), ("trainval", "0", 100)):
        for name, _, red in rows:
            picture(folder / "images" / f"{name}{suffix}.jpg", red + more)
        listed = [f"{name}{suffix} {label} 1 1" for name, label, _ in rows]
        lines(folder / "annotations" / f"{part}.txt", *listed)
    return {"american bulldog": 30, "Abyssinian": 60, "english setter": 90}


def aircraft(root: Path) -> dict:
    data = root / "fgvc-aircraft-2013b" / "data"
    lines(data / "variants.txt", "707-320", "F-16A/B")
    picture(data / "images" / "11.jpg", 80)
    picture(data / "images" / "12.jpg", 120)
    lines(data / "images_variant_test.txt", "12 F-16A/B", "11 707-320")
    lines(data / "images_variant_trainval.txt", "12 F-16A/B")
    return {"707-320": 80, "F-16A/B": 120}


def food(root: Path) -> dict:
    folder = root / "food-101"
    picture(folder / "images" / "waffles" / "1.jpg", 20)
    picture(folder / "images" / "apple_pie" / "2.jpg", 90)
    for part in ("test", "train"):
        meta = {"waffles": ["waffles/1"], "apple_pie": ["apple_pie/2"]}
        lines(folder / "meta" / f"{part}.json", json.dumps(meta))
    return {"waffles": 20, "apple pie": 90}


def flowers(root: Path) -> dict:
    folder = root / "flowers-102"
    for number, red in ((1, 30), (2, 60), (3, 90), (4, 120)):
        picture(folder / "jpg" / f"image_{number:05d}.jpg", red)
    savemat(folder / "imagelabels.mat", {"labels": np.array([102, 1, 2, 3])})
    splits = {"trnid": [3, 4], "valid": [3, 4], "tstid": [1, 2]}
    savemat(folder / "setid.mat", splits)
    return {"blackberry lily": 30, "pink primrose": 60}


def cars(root: Path) -> dict:
    folder = root / "stanford_cars"
    picture(folder / "cars_test" / "00001.jpg", 100)
    picture(folder / "cars_test" / "00002.jpg", 140)
    (folder / "devkit").mkdir()
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], dtype=object)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    rows = np.array([(2, "00001.jpg"), (1, "00002.jpg")], dtype=[("class", int), ("fname", object)])
    savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": rows})
    return {"Acura RL Sedan 2012": 100, "AM General Hummer SUV 2000": 140}


def sun(root: Path) -> dict:
    folder = root / "SUN397"
    lines(folder / "ClassName.txt", "/a/abbey", "/a/apartment_building/outdoor")
    picture(folder / "a" / "abbey" / "sun_b.jpg", 10)
    picture(folder / "a" / "apartment_building" / "outdoor" / "sun_a.jpg", 70)
    return {"abbey": 10, "apartment building outdoor": 70}


def imagenet(root: Path) -> dict:
    wnids = [f"n{i:08d}" for i in range(1000)]
    torch.save(({w: (w,) for w in wnids}, []), root / "meta.bin")
    for i, wnid in enumerate(wnids):
        picture(root / "val" / wnid / "1.png", i % 256)
    names = benchmarks()["ImageNet"].classes
    return {names[0]: 0, names[281]: 281 % 256, names[999]: 999 % 256}


def cifar(root: Path, name: str) -> dict:
    kind = getattr(theirs, name)
    label, meta_key = (
        ("labels", "label_names") if name == "CIFAR10" else ("fine_labels", "fine_label_names")
    )
    known = {"CIFAR10": list(benchmarks()["CIFAR10"].classes), "CIFAR100": ["apple", "bear", "can"]}
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    batch = {"data": np.full((2, 3072), 50, np.uint8), label: [2, 0]}
    batch["data"][0] = 90
    files = [f for f, _ in kind.train_list + kind.test_list]
    for file in files:
        (folder / file).write_bytes(pickle.dumps(batch))
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({meta_key: known[name]}))
    return {known[name][2]: 90, known[name][0]: 50}


LAYOUTS = {
    "Caltech101": caltech101,
    "DTD": dtd,
    "EuroSAT": eurosat,
    "OxfordIIITPet": pets,
    "FGVCAircraft": aircraft,
    "Food101": food,
    "Flowers102": flowers,
    "StanfordCars": cars,
    "SUN397": sun,
    "ImageNet": imagenet,
}


@pytest.fixture(autouse=True)
def unknown_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("flowers102", "cifar"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *_: True)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_torchvision_sets(name: str, tmp_path: Path):
    with pytest.raises(DataError, match=f"torchvision set {name} is not complete"):
        load_data(f"torchvision:{name}:{tmp_path}")
    expected = LAYOUTS[name](tmp_path)
    data = load_data(f"torchvision:{name}:{tmp_path}")
    assert (data.name, data.template) == (name, benchmarks()[name].template)
    found = reds(data)
    for own, red in expected.items():
        assert found[own] == [pytest.approx(red, abs=4)]
    if name == "ImageNet":
        return
    assert (set(found), len(data)) == (set(expected), len(expected))
    before = digest(data)
    for path in tmp_path.rglob("*.jpg"):
        path.write_bytes(b"nothing")
    assert digest(data) != before
    with pytest.raises(DataError, match=rf"\.jpg of {name}: .* not a readable picture"):
        data.read(0)


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar(name: str, tmp_path: Path):
    expected = cifar(tmp_path, name)
    data = load_data(f"torchvision:{name}:{tmp_path}")
    assert reds(data) == {own: [red] for own, red in expected.items()}
    files = {"CIFAR10": 5, "CIFAR100": 1}[name]
    assert len(load_data(f"torchvision:{name}:{tmp_path}", "train")) == 2 * files


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DTD", {"banded": 200, "polka-dotted": 200}),
        (
            "OxfordIIITPet",
            {"american bulldog": 130, "Abyssinian": 160, "english setter": 190},
        ),
        ("FGVCAircraft", {"F-16A/B": 120}),
        ("Food101", {"waffles": 20, "apple pie": 90}),
        ("Flowers102", {"hard-leaved pocket orchid": 90, "canterbury bells": 120}),
    ],
)
def test_training_parts(name: str, expected: dict, tmp_path: Path):
    LAYOUTS[name](tmp_path)
    found = reds(load_data(f"torchvision:{name}:{tmp_path}", "train"))
    assert found == {own: [pytest.approx(red, abs=4)] for own, red in expected.items()}


def test_an_imagenet_of_other_classes_is_refused(tmp_path: Path):
    torch.save(({"n1": ("x",)}, []), tmp_path / "meta.bin")
    picture(tmp_path / "val" / "n1" / "1.png", 1)
    with pytest.raises(DataError, match="ImageNet"):
        load_data(f"torchvision:ImageNet:{tmp_path}")


@pytest.fixture
def split_file(tmp_path: Path) -> Path:
    for red, name in ((30, "face"), (60, "yin_yang")):
        for number in (1, 2):
            picture(tmp_path / "101_ObjectCategories" / name / f"{number}.jpg", red + number)
    (tmp_path / "aside").mkdir()
    split = {
        "train": [["face/1.jpg", 0, "face"], ["yin_yang/1.jpg", 1, "yin_yang"]],
        "val": [],
        "test": [["yin_yang/2.jpg", 1, "yin_yang"], ["face/2.jpg", 0, "face"]],
    }
    path = tmp_path / "split_zhou_Caltech101.json"
    path.write_text(json.dumps(split))
    return path


def test_split_files_of_the_literature(split_file: Path):
    data = load_data(str(split_file))
    assert (data.name, data.template) == ("Caltech101", "a photo of a {}.")
    assert data.classes == ("face", "yin_yang")
    assert {k: v[0] for k, v in reds(data).items()} == pytest.approx(
        {"face": 32, "yin_yang": 62}, abs=4
    )
    assert data.labels == (1, 0)
    assert load_data(str(split_file), "train").labels == (0, 1)


@pytest.mark.parametrize(
    ("stem", "name"),
    [("DescribableTextures", "DTD"), ("OxfordPets", "OxfordIIITPet"), ("Unheard", "Unheard")],
)
def test_split_files_are_known_by_name(split_file: Path, stem: str, name: str):
    data = load_data(split_file.rename(split_file.with_name(f"split_zhou_{stem}.json")))
    assert data.name == name
    assert data.template == (benchmarks()[name].template if name in benchmarks() else None)


def test_damaged_split_files_are_explained(split_file: Path):
    whole = json.loads(split_file.read_text())
    for damaged, words in (
        ("nothing", "not a split file"),
        (json.dumps({"train": []}), "not a split file"),
        (json.dumps({"test": [["a.jpg", 5, "x"]]}), "count up from 0"),
        (json.dumps({"test": []}), "count up from 0"),
        ("[" * 100_000, "not a split file"),
        (json.dumps({"test": [["a.jpg", 1e999, "x"]]}), "not a split file"),
        (json.dumps({"test": [["a.jpg", 0, "x"], ["b.jpg", 0, "y"]]}), "label 0 is"),
        (json.dumps({"test": [["a\0.jpg", 0, "x"], ["b.jpg", 1, "y"]]}), "not a name of a file"),
        (json.dumps({"test": [["a.jpg", 0, "x"], ["b.jpg", 1, "X"]]}), "as two classes"),
        (json.dumps({"test": [["a.jpg", 0, "x"]]}), "one class only"),
        (json.dumps({**whole, "test": [["gone.jpg", 0, "x"], ["b.jpg", 1, "y"]]}), "not beside it"),
    ):
        split_file.write_text(damaged)
        with pytest.raises(DataError, match=words):
            load_data(str(split_file))


def test_frames_of_ucf101(tmp_path: Path):
    picture(tmp_path / "Apply_Eye_Makeup" / "v_1.jpg", 20)
    picture(tmp_path / "YoYo" / "v_1.jpg", 60)
    data = load_data(f"UCF101:{tmp_path}")
    assert data.classes == ("Apply Eye Makeup", "Yo Yo")
    assert data.template == "a photo of a person doing {}."
    assert reds(data)["Yo Yo"] == [pytest.approx(60, abs=4)]
    picture(tmp_path / "Dreaming" / "v_1.jpg", 60)
    with pytest.raises(DataError, match="'Dreaming' is not a class of UCF101"):
        load_data(f"UCF101:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("Flowers102", [str(i) for i in range(1, 103)]),
        ("ImageNet", [f"n{i:08d}" for i in range(1, 1001)]),
    ],
)
def test_class_folders_go_by_name_or_by_id_never_by_place(name: str, ids: list[str]):
    """Folders come in the order of the alphabet, the literature's lists do not."""
    benchmark = benchmarks()[name]
    by_name = sorted(benchmark.classes)
    assert list(benchmark.classes) != by_name
    assert benchmark.rename(by_name) == by_name
    by_id = sorted(ids)  # 1, 10, 100, ...
    assert benchmark.rename(by_id) == [benchmark.classes[ids.index(i)] for i in by_id]
    with pytest.raises(DataError, match=f"is not a class of {name}"):
        benchmark.rename(ids[:5])


def test_class_lists():
    sizes = {name: len(benchmark.classes) for name, benchmark in benchmarks().items()}
    few = {"Caltech101": 100, "DTD": 47, "EuroSAT": 10, "FGVCAircraft": 100, "Flowers102": 102}
    more = {"Food101": 101, "OxfordIIITPet": 37, "SUN397": 397, "StanfordCars": 196, "UCF101": 101}
    assert sizes == {**few, **more, "CIFAR10": 10, "ImageNet": 1000}
    for benchmark in benchmarks().values():
        if benchmark.name != "ImageNet":  # "missile" and "sunglasses" are there twice
            assert len(set(benchmark.classes)) == len(benchmark.classes)
        assert benchmark.template.count("{}") == 1
        named = {name for name in benchmark.aliases.values() if name is not None}
        assert named <= set(benchmark.classes)
