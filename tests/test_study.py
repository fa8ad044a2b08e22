"""The comparison of losses: effort, choice, resuming, the box head of distributions, and what the tables say."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if not all(map(find_spec, ("matplotlib", "PIL", "pycocotools", "rich", "sklearn"))):
    pytest.skip("the example's packages are not installed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import loss_tables

from examples.digits import compare, detector, pool, train

QUICK = ["--quick", "--device", "cpu", "--backend", "torch", "--val-pictures", "6", "--batch", "4"]
QUICK += ["--student-iterations", "2", "--long-iterations", "3"]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Training seeds the global generator; leave it as it was for the other tests."""
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[pool.Job]]:
    """Every way, in this process; the folder, and the jobs in order."""
    out = tmp_path_factory.mktemp("losses")
    jobs: list[pool.Job] = []
    work = pool.Bench.__call__

    def noted(bench: pool.Bench, job: pool.Job) -> tuple[train.Run, int]:
        jobs.append(job)
        run, trained = work(bench, job)
        assert trained == job.schedule.iterations
        return run, trained

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setattr(pool.Bench, "__call__", noted)
        assert compare.main([*QUICK, "--seeds", "0", "--workers", "1", "--out", str(out)]) == 0
    return out, jobs


def results_in(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "losses-digits.json").read_text())
    return found


def test_results_name_no_folder_of_this_machine(ran: tuple[Path, list[pool.Job]]) -> None:
    out, _ = ran
    assert results_in(out)["settings"]["out"] == "digits"
    assert str(out.parent) not in (out / "losses-digits.json").read_text()


def test_every_way_is_compared_with_equal_effort(ran: tuple[Path, list[pool.Job]]) -> None:
    out, jobs = ran
    arms, settings = results_in(out)["arms"], results_in(out)["settings"]
    assert list(arms) == list(compare.ways(compare.parse(QUICK)))
    assert sum(job.schedule.iterations for job in jobs) == compare.count(compare.parse([*QUICK, "--seeds", "0"]))
    effort: dict[str, Counter[tuple[int, int]]] = {}
    for job in jobs:
        label = job.label.partition(", ×")[0]
        effort.setdefault(label, Counter())[job.schedule.iterations, job.seed] += 1
    alone = effort.pop("student alone")
    first = effort["FRS (richness)"]
    assert all(each == first for each in effort.values())
    assert len(effort) == len(arms) - 1
    tuning, judging = set(settings["tuning_seeds"]), set(settings["seeds"])
    assert {seed for _, seed in first} == tuning | judging
    assert not tuning & judging
    assert {seed for _, seed in alone} == judging


def test_what_is_judged_is_the_best_of_three(ran: tuple[Path, list[pool.Job]]) -> None:
    for name, arm in results_in(ran[0])["arms"].items():
        if name == "alone":
            continue
        tried = {float(scale): found["AP"] for scale, found in arm["tuning"].items()}
        assert len(tried) == 3
        assert arm["scale"] == pytest.approx(compare.best(tried), rel=0.01)
        for term, start in arm["start"].items():
            assert start > 0
            assert arm["how"][f"{term}_weight"] == pytest.approx(arm["scale"] * start)
        assert arm["how"]["share"] is None


def test_the_scale_with_the_best_mean_is_chosen() -> None:
    assert compare.best({1 / 3: [1.0, 2.0], 1.0: [4.0, 0.0], 3.0: [9.0, -8.0]}) == 1.0
    assert compare.best({3.0: [1.0], 1.0: [1.0], 1 / 3: [0.0]}) == 1.0


def test_the_start_is_where_the_gradients_were_alike() -> None:
    run = train.Run(weights={"feat": [99.0, 99.0, 2.0, 8.0], "box": [1.0, 5.0]})
    assert compare.balance(run) == pytest.approx({"feat": 4.0, "box": 5.0})


def test_two_workers_train_what_is_new_and_nothing_twice(
    ran: tuple[Path, list[pool.Job]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another seed to judge with; nothing is trained in this process."""
    out = ran[0]
    before = results_in(out)["arms"]

    def checkpoints() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (out / "digits" / "trainings").glob("*/checkpoint.pt")}

    def forbidden(*args: object) -> None:
        raise AssertionError("trained in this process")

    kept = checkpoints()
    monkeypatch.setattr(train, "detection_loss", forbidden)
    few = ["--seeds", "0", "5", "--out", str(out), "--results", str(tmp_path), "--ways", "pkd", "ld"]
    assert compare.main([*QUICK, *few, "--workers", "2"]) == 0
    after = results_in(tmp_path)
    assert after["machine"]["workers"] == 2
    assert list(after["arms"]) == ["alone", "pkd", "ld"]
    for name, arm in after["arms"].items():
        for plan in ("short", "long"):
            assert arm[plan]["seeds"]["0"] == before[name][plan]["seeds"]["0"]
            assert set(arm[plan]["seeds"]) == {"0", "5"}
        assert arm.get("tuning") == before[name].get("tuning")
    now = checkpoints()
    assert {path: now[path] for path in kept} == kept
    assert len(now) == len(kept) + 3 * 2


def test_seeds_that_tune_do_not_judge(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, words in (
        (["--tuning-seeds", "1", "7"], "share 1"),
        (["--ways", "frs", "fsr"], "fsr are not among"),
        (["--bins", "0"], "--bins"),
    ):
        with pytest.raises(SystemExit):
            compare.parse([*QUICK, *wrong])
        assert words in capsys.readouterr().err


def test_the_time_left_counts_what_was_trained() -> None:
    assert pool.time_left(60.0, 100, 12_000) == "2 h 00 min left"
    assert pool.time_left(60.0, 0, 12_000) == pool.time_left(60.0, 100, 0) == ""


# The box head of distributions


def distributions(sides: Tensor, bins: int) -> Tensor:
    """Logits (D, 4 bins) whose expectations are the sides, split between the two bins beside each."""
    place = sides * (bins - 1) / detector.REACH
    shares = (1 - (place[..., None] - torch.arange(bins)).abs()).clamp(min=0)
    return (shares + 1e-9).log().flatten(-2)


def test_the_expectation_is_the_box() -> None:
    points, strides = torch.tensor([[12.0, 20.0], [40.0, 40.0]]), torch.tensor([8.0, 16.0])
    boxes = torch.tensor([[2.0, 4.0, 20.0, 33.0], [39.0, 8.0, 64.0, 41.0]])
    sides = detector.sides_of(points, strides, boxes)
    for bins in (8, 17):
        found = detector.decode(points, strides, distributions(sides, bins))
        torch.testing.assert_close(found, boxes, rtol=1e-4, atol=1e-3)


def test_the_loss_of_distributions_is_least_at_the_side() -> None:
    sides = torch.tensor([[0.0, 1.3, 2.0, 4.0], [0.2, 3.9, 9.0, 0.6]])
    told = distributions(sides.clamp(max=detector.REACH), 8)
    least = detector.distribution_loss(told, sides)
    assert least.shape == (2,)
    for seed in range(5):
        noise = torch.randn(told.shape, generator=torch.Generator().manual_seed(seed))
        assert (detector.distribution_loss(told + noise, sides) > least).all()
    # A side on a bin costs nothing there; beyond the last it is the last.
    assert detector.distribution_loss(distributions(torch.full((1, 4), 4.0), 8), torch.full((1, 4), 9.0)) < 1e-6


def test_a_head_of_distributions_learns_boxes() -> None:
    torch.manual_seed(0)
    model = detector.Detector(detector.Size((4, 4, 4, 4, 4), 8, bins=8), 3)
    pictures, boxes = torch.rand(2, 3, 64, 64) * 255, torch.tensor([[[10.0, 12.0, 30.0, 36.0]]] * 2)
    outputs = model(pictures)
    assert [level.shape[1] for level in outputs.distances] == [32, 32, 32]
    loss = detector.detection_loss(outputs, boxes, torch.zeros(2, 1, dtype=torch.long))
    loss.backward()
    assert model.box_head.weight.grad.view(4, 8, -1).norm(dim=-1).gt(0).all()
    assert len(detector.detect(outputs, 64)) == 2
    plain = detector.Detector(detector.Size((4, 4, 4, 4, 4), 8), 3)
    assert plain.box_head.out_channels == 4


# What the tables say


def arm(label: str, short: list[float], long: list[float], scale: float | None = 1.0) -> dict[str, Any]:
    def judged(values: list[float]) -> dict[str, Any]:
        mean = sum(values) / len(values)
        gain = {"gain": {"mean": mean - 30, "spread": 0.5}} if scale else {}
        return {
            "seeds": {str(seed): {"AP": value} for seed, value in enumerate(values)},
            "mean": {"AP": mean},
            "spread": {"AP": 0.1},
            **gain,
        }

    how = {"feat_weight": 0.0047, "cls_weight": 2.46, "box_weight": 0.0}
    tuned = {"scale": scale, "how": how} if scale else {}
    return {"label": label, "short": judged(short), "long": judged(long), **tuned}


def fake(ones: float) -> dict[str, Any]:
    noise = [0.0, 0.1, -0.1, 0.2, -0.2]
    return {
        "alone": arm("student alone", [30 + e for e in noise], [30 - e for e in noise], None),
        "frs": arm("FRS (richness)", [35 + e for e in noise], [35 - e for e in noise]),
        "frs-ones": arm("FRS (all-ones mask)", [ones - e for e in noise], [ones + e for e in noise], 3.0),
        "cwd": arm("CWD (features)", [30 - e for e in noise], [20 - e for e in noise], 1 / 3),
    }


@pytest.mark.parametrize(
    ("ones", "words"),
    [
        (33.0, "beats a mask of ones"),
        (35.0, "is not told apart from a mask of ones"),
        (37.0, "loses to a mask of ones"),
    ],
)
def test_the_sentence_about_ones_says_what_came_out(ones: float, words: str) -> None:
    said = " ".join(loss_tables.meant(fake(ones)))
    verdict = words.split(" a mask")[0]
    assert f"The richness mask {words} on the short schedule ({35 - ones:+.1f} ± 0.3 AP, seed by seed)" in said
    assert f"and {verdict} it on the long schedule ({35 - ones:+.1f} ± 0.3 AP, seed by seed)." in said


def test_the_sentence_about_ones_may_differ_between_schedules() -> None:
    arms = fake(33.0)
    arms["frs-ones"]["long"] = fake(37.0)["frs-ones"]["long"]
    said = loss_tables.duel(arms["frs"], arms["frs-ones"], "The richness mask", "a mask of ones")
    assert "beats a mask of ones on the short schedule" in said
    assert "and loses to it on the long schedule" in said


def test_a_table_of_a_result_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = {
        "arms": fake(35.0),
        "teacher": {"AP": 60.0},
        "settings": {"student_iterations": 500, "long_iterations": 1500, "seeds": [0] * 5, "tuning_seeds": [100, 101]},
        "data": {"pictures": {"val": 500}},
        "machine": {"cpu": "A CPU", "cores": 2, "threads": 1},
    }
    monkeypatch.setattr(loss_tables, "STUDIES", tmp_path)
    assert loss_tables.which_loss() == []
    for name in ("bccd", "digits"):
        (tmp_path / f"losses-{name}.json").write_text(json.dumps(results))
    lines = loss_tables.which_loss()
    assert lines[0].startswith("On the digits; the teacher reaches 60.0 AP.")
    assert "|  | weights | AP, 500 iterations | gain | AP, 1,500 iterations | gain |" in lines
    assert (
        "| FRS (richness) | feat 0.0047, cls 2.5 (× 1) | 35.0 ± 0.1 | +5.0 ± 0.5 | 35.0 ± 0.1 | +5.0 ± 0.5 |" in lines
    )
    said = " ".join(line for line in lines if line.startswith("- "))
    assert "Not told apart from it: FRS (all-ones mask). Not shown to be better than alone: CWD (features)." in said
    assert "The smallest of the three weights was the best for CWD (features)" in said
    assert "The largest of the three weights was the best for FRS (all-ones mask)" in said


def test_the_tables_of_a_run(ran: tuple[Path, list[pool.Job]]) -> None:
    lines = list(loss_tables.compared("digits", results_in(ran[0])))
    assert sum(line.startswith("| ") for line in lines) == 1 + len(results_in(ran[0])["arms"])
