"""The digits example: data, decoding, resuming, and the whole of it with --quick."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if not all(map(find_spec, ("matplotlib", "PIL", "pycocotools", "rich", "sklearn"))):
    pytest.skip("the example's packages are not installed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from examples.digits import coco, detector, digits, study, train
from examples.digits.__main__ import main
from examples.digits.voc import convert

ARMS = {"teacher", "alone", "both", "features", "head", "ones", "alone-long", "both-long"}
ARMS |= {"whole-teacher", "16-bit-teacher", "small-adapter"}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Training seeds the global generator; leave it as it was for the other tests."""
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits")
    assert main(["--quick", "--device", "cpu", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def splits(quick: Path) -> tuple[coco.Split, coco.Split]:
    folder = quick / "data-64"
    return coco.read_split(folder, "train", 64), coco.read_split(folder, "val", 64)


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """A user's data: odd sizes, sparse ids, a picture without object, a crowd, no areas."""
    folder = tmp_path / "own"
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        images, annotations = [], []
        (folder / split).mkdir(parents=True)
        (folder / "annotations").mkdir(exist_ok=True)
        for number, (width, height) in enumerate([(97, 41), (33, 150), (64, 64), (200, 90)]):
            name = f"picture {number}.png"
            pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / name)
            images.append({"id": 1000 - 7 * number, "file_name": name})
            if number == 2:
                continue
            for category, box in ((90, [3, 5, 20.5, 30]), (7, [8, 2, 24, 28])):
                annotations.append({"image_id": 1000 - 7 * number, "category_id": category, "bbox": box})
        crowd = {"image_id": 1000, "category_id": 7, "bbox": [40, 0, 50, 40], "iscrowd": 1}
        annotations.append(crowd)
        categories = [{"id": 90, "name": "late"}, {"id": 7, "name": "early"}]
        truth = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(truth))
    return folder


def truth_as_detections(split: coco.Split) -> list[coco.Detections]:
    found = []
    for boxes, labels in zip(split.boxes, split.labels, strict=True):
        real = labels >= 0
        found.append(coco.Detections(boxes[real], torch.ones(int(real.sum())), labels[real]))
    return found


def read_results(out: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    return results


def test_quick_run_writes_everything(quick: Path) -> None:
    results = read_results(quick)
    assert set(results["arms"]) == ARMS
    assert set(results["arms"]["both"]["seeds"]) == {"0", "1"}
    assert results["arms"]["both-long"]["gain_over"] == "alone-long"
    assert any(name.startswith("fsr_loss, ") for name in results["loss_ms"])
    assert all(value > 0 for value in results["loss_ms"].values())
    for name in ("masks.png", "detections.png", "curves.png"):
        assert 1_000 < (quick / name).stat().st_size < 400_000
        with Image.open(quick / name) as picture:
            assert min(picture.size) > 200


def test_second_run_trains_nothing(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_results(quick)["arms"]

    def forbidden(*args: object) -> None:
        raise AssertionError("a finished training was trained again")

    monkeypatch.setattr(train, "detection_loss", forbidden)
    assert main(["--quick", "--device", "cpu", "--out", str(quick)]) == 0
    assert read_results(quick)["arms"] == before


def test_interrupted_training_goes_on(splits: tuple[coco.Split, coco.Split], tmp_path: Path) -> None:
    schedule = train.Schedule(iterations=6, lr=1e-2, batch=4, warmup=2, check_every=2)

    def student(folder: str, stop: int = 99) -> tuple[detector.Detector, train.Run]:
        def advance(done: int, total: int | None = None, note: str | None = None) -> None:
            if done == stop:
                raise KeyboardInterrupt

        return train.train(
            detector.STUDENT,
            splits,
            schedule,
            tmp_path / folder,
            seed=3,
            device=torch.device("cpu"),
            advance=advance,
        )

    whole, whole_run = student("whole")
    with pytest.raises(KeyboardInterrupt):
        student("parts", stop=5)
    parts, parts_run = student("parts")
    assert len(parts_run.losses["detection"]) == schedule.iterations
    assert parts_run.losses["detection"] == pytest.approx(whole_run.losses["detection"], rel=1e-3)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_truth_as_detections_is_perfect(splits: tuple[coco.Split, coco.Split]) -> None:
    metrics = coco.evaluate(splits[1], truth_as_detections(splits[1]), digits.DIGIT_SIDES)
    assert metrics["AP"] == pytest.approx(100)
    assert metrics["small"] == pytest.approx(100)
    none = [coco.Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long())]
    assert coco.evaluate(splits[1], none * len(splits[1]))["AP"] == 0


def test_splits_share_no_scan(quick: Path) -> None:
    wanted = digits.split_scans()
    assert not set(wanted["train"]) & set(wanted["val"])
    assert len(wanted["train"]) + len(wanted["val"]) == 1797
    for split, scans in wanted.items():
        truth = json.loads((quick / "data-64" / "annotations" / f"{split}.json").read_text())
        assert {item["scan"] for item in truth["annotations"]} <= set(scans.tolist())


def test_digits_are_reproducible(quick: Path, tmp_path: Path) -> None:
    digits.make_digits(tmp_path, counts={"train": 2, "val": 12}, image_size=64)
    name = Path("annotations/val.json")
    assert (tmp_path / name).read_text() == (quick / "data-64" / name).read_text()


def test_boxes_encode_and_decode() -> None:
    points = torch.tensor([[12.0, 20.0], [40.0, 40.0]])
    strides = torch.tensor([8.0, 16.0])
    boxes = torch.tensor([[2.0, 4.0, 20.0, 33.0], [39.0, 8.0, 64.0, 41.0]])
    coded = detector.encode(points, strides, boxes)
    torch.testing.assert_close(detector.decode(points, strides, coded), boxes)


def test_perfect_outputs_decode_to_perfect_detections(
    splits: tuple[coco.Split, coco.Split],
) -> None:
    """Outputs that say what `assign` trains for are detected as the objects they stand for."""
    val = splits[1]
    count, size = len(val), 64
    shapes = [(count, 1, size // stride, size // stride) for stride in detector.STRIDES]
    points, strides = detector.make_points([torch.zeros(shape) for shape in shapes])
    found = detector.assign(points, strides, val.boxes, val.labels)
    logits = torch.full((count, len(points), 10), -9.0)
    picture, point = torch.nonzero(found >= 0, as_tuple=True)
    column = found[picture, point]
    logits[picture, point, val.labels[picture, column]] = 9.0
    coded = torch.zeros(count, len(points), 4)
    coded[picture, point] = detector.encode(points[point], strides[point], val.boxes[picture, column])

    def levels(flat: torch.Tensor) -> list[torch.Tensor]:
        parts = flat.transpose(1, 2).split([shape[2] ** 2 for shape in shapes], 2)
        return [part.reshape(count, -1, *shape[2:]) for part, shape in zip(parts, shapes, strict=True)]

    outputs = detector.Outputs([], levels(logits), levels(coded))
    assert detector.detection_loss(outputs, val.boxes, val.labels) < 0.01
    detections = detector.detect(outputs, size)
    reached = sum(len(set(row[row >= 0].tolist())) for row in found)
    assert sum(len(item.boxes) for item in detections) == reached
    assert reached >= 0.9 * int((val.labels >= 0).sum())


def test_own_folder_maps_back(own_folder: Path) -> None:
    split = coco.read_split(own_folder, "val", 64)
    assert split.category_ids == [7, 90]
    assert split.names == ["early", "late"]
    assert split.pictures.shape == (4, 3, 64, 64)
    assert (split.labels >= 0).sum(1).tolist() == [2, 2, 0, 2]  # the crowd is no object
    assert coco.evaluate(split, truth_as_detections(split))["AP"] == pytest.approx(100)


def test_own_folder_trains(own_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = ["--quick", "--no-ablation", "--seeds", "5", "--data", str(own_folder)]
    assert main([*argv, "--device", "cpu", "--out", str(out)]) == 0
    results = read_results(out)
    assert set(results["arms"]) == {"teacher", "alone", "both"}
    assert results["data"]["categories"] == ["early", "late"]
    assert results["arms"]["alone"]["spread"]["AP"] is None


def break_missing(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def break_layout(folder: Path) -> None:
    (folder / "annotations" / "train.json").unlink()


def break_json(folder: Path) -> None:
    (folder / "annotations" / "train.json").write_text("{")


def break_keys(folder: Path) -> None:
    (folder / "annotations" / "train.json").write_text('{"images": []}')


def break_category(folder: Path) -> None:
    path = folder / "annotations" / "train.json"
    truth = json.loads(path.read_text())
    truth["annotations"][1]["category_id"] = 8
    path.write_text(json.dumps(truth))


def break_picture(folder: Path) -> None:
    (folder / "train" / "picture 1.png").write_bytes(b"no picture")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_missing, "no data folder at"),
        (break_layout, "train.json is missing"),
        (break_json, "is not a COCO annotation file"),
        (break_keys, "is not a COCO annotation file"),
        (break_category, "annotation 2 names an unknown image or category"),
        (break_picture, "cannot read"),
    ],
)
def test_bad_folder_is_one_clear_line(
    own_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Any,
    message: str,
) -> None:
    damage(own_folder)
    assert main(["--quick", "--data", str(own_folder), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_study_keeps_every_way_and_what_it_pulled_with(quick):
    """On the pictures and the teacher that the quick run has made."""
    few = ["--masks", "boxes", "--normalizers", "total_mass", "--scales", "1", "--shares", "1"]
    assert study.main(["--quick", "--device", "cpu", "--out", str(quick), *few]) == 0
    arms = json.loads((quick / "study.json").read_text())["arms"]
    assert [arm["how"] and (arm["how"]["mask"], arm["how"]["share"]) for arm in arms] == [
        None, ("boxes", None), ("boxes", 1.0),
    ]  # fmt: skip
    assert arms[0]["pull"] == {}
    for arm in arms[1:]:
        assert set(arm["pull"]) == {"feat", "feat rest", "cls", "cls rest"}
        assert all(len(norms) == 3 and min(norms) > 0 for norms in arm["pull"].values())


def test_a_voc_folder_becomes_a_coco_folder(tmp_path):
    """Boxes follow their pictures, mirrored or not."""
    voc = tmp_path / "voc"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (voc / folder).mkdir(parents=True)
    box = "<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>12</xmax><ymax>8</ymax></bndbox>"
    for name, split in (("a", "trainval"), ("b", "test")):
        picture = Image.new("L", (40, 20))
        picture.paste(255, (2, 3, 12, 8))
        picture.convert("RGB").save(voc / "JPEGImages" / f"{name}.png")
        text = f"<annotation><object><name>cell</name>{box}</object></annotation>"
        (voc / "Annotations" / f"{name}.xml").write_text(text)
        (voc / "ImageSets" / "Main" / f"{split}.txt").write_text(f"{name}\n")
    assert convert(voc, tmp_path / "coco", flips=True) == {"train": 4, "val": 1}
    for split, count in (("train", 4), ("val", 1)):
        made = json.loads((tmp_path / "coco" / "annotations" / f"{split}.json").read_text())
        assert len(made["images"]) == len(made["annotations"]) == count
        for image, found in zip(made["images"], made["annotations"], strict=True):
            x, y, width, height = map(int, found["bbox"])
            pixels = np.asarray(Image.open(tmp_path / "coco" / split / image["file_name"]).convert("L"))
            assert pixels.sum() == 255 * width * height
            assert (pixels[y : y + height, x : x + width] == 255).all()
    assert coco.read_split(tmp_path / "coco", "train", 32).names == ["cell"]
