"""The table of the ablation: means and spreads over the seeds, from the scores of the runs."""

import itertools
import json
import runpy
import sys

import pytest
from paths import ROOT
from PIL import Image


def test_means_and_spreads_are_those_of_the_scores(tmp_path, monkeypatch, capsys):
    values = itertools.count(10)
    expected = {}
    for split, data, task in itertools.product(
        ("on", "off"), ("text", "images", "joint"), ("vqav2", "text")
    ):
        for seed in "12":
            folder = tmp_path / f"scores/{split}-{data}-{seed}-{task}"
            folder.mkdir(parents=True)
            accuracy = next(values) * 1.0
            expected.setdefault((split, data, task), []).append(accuracy)
            (folder / "scores.json").write_text(json.dumps({"overall": {"accuracy": accuracy}}))
    monkeypatch.setattr(sys, "argv", ["ablation_table.py", str(tmp_path), "1 2"])
    main = runpy.run_path(str(ROOT / "examples/ablation_table.py"))["main"]
    assert main() == 0
    head, _, on, off, _, note = (tmp_path / "table.md").read_text().splitlines()
    assert head.split(" | ")[1:3] == ["text only: VQA", "text only: text"]
    assert on.startswith("| with modality split | 10.5 ± 0.7 | 12.5 ± 0.7 | 14.5 ± 0.7 |")
    assert off.startswith("| without | 22.5 ± 0.7 |") and note.endswith("over 2 seeds")
    assert capsys.readouterr().out == (tmp_path / "table.md").read_text()
    found = json.loads((tmp_path / "table.json").read_text())
    assert found["off"]["joint"]["text"] == expected["off", "joint", "text"] == [32.0, 33.0]
    assert Image.open(tmp_path / "table.png").width > 800
    monkeypatch.setattr(sys, "argv", ["ablation_table.py", str(tmp_path), "1 3"])
    with pytest.raises(FileNotFoundError, match="on-text-3-vqav2"):
        main()
