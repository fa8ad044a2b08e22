"""The demonstration with --quick: every part of it, on a few pictures."""

from __future__ import annotations

import json
import re

from detectors import CONFIGS, NAMES, ROOT, forget_runners

from examples.mmdet.__main__ import ARMS, DETECTORS, main


def test_the_whole_of_it(tmp_path, capsys):
    forget_runners()
    assert main(["--quick", "--ablation", "--seeds", "0", "1", "--detector", "fcos", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["arms"]) == {"teacher", *ARMS}
    for name, arm in results["arms"].items():
        assert set(arm["seeds"]) == ({"0"} if name == "teacher" else {"0", "1"})
        assert arm["step_ms"] > 0
        assert 0 <= arm["mean"]["AP"] <= 100
    shown = capsys.readouterr().out
    assert "fcos: COCO mAP on 8 pictures" in shown
    assert "Average Precision" not in shown
    assert len(list(tmp_path.glob("fcos_distil-seed0/*/vis_data/vis_image/frs_mask_*.png"))) == 4
    assert (tmp_path / "fcos_distil-features-seed1" / "iter_4_student.pth").is_file()


def test_the_readme_names_what_is_there():
    readme = (ROOT / "examples" / "mmdet" / "README.md").read_text()
    configs = {path.stem for path in (CONFIGS / "coco").glob("*_r50_r101_*.py")}
    assert {name for name in re.findall(r"^\| `(\w+)`", readme, re.MULTILINE) if "r101" in name} == configs
    assert set(DETECTORS) == set(NAMES)
    for name in configs:
        checkpoint = re.search(r"/(\w[\w.-]+\.pth)", (CONFIGS / "coco" / f"{name}.py").read_text())[1]
        assert checkpoint in readme
    for path in re.findall(r"examples/mmdet/configs/[\w/]+\.py", readme):
        assert (ROOT / path).is_file(), path
