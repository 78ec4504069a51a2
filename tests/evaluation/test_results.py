"""Results beside the paper's, the page of mistakes, and suites of several tasks."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from benchmark_files import TASKS, draw, dump
from evaluations import build_corpus, build_model, write_vqa
from paths import ROOT

from megatron_owl2.cli.evaluate import main
from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import mistakes, results, suite
from megatron_owl2.evaluation.benchmark import Question
from megatron_owl2.evaluation.paper import FIGURES, NOTES, PAPER_TASKS

ABOUT = {"model": "m|n", "blind": False, "limit": None, "prompt": "owl2", "questions": 3}


def result(task: str, **changes) -> dict:
    entry = TASKS[task]
    default = next(iter(entry.variants), None)
    more = {"task": task, "variant": default, "prompt_suffix": entry.suffix, "split": entry.split}
    return ABOUT | more | changes


def test_rows_stand_beside_the_figures_of_the_paper():
    scored = {"overall": {"accuracy": 50.0, "n": 9}, "skills": {}}
    (row,) = results.rows_of(result("okvqa", **scored, split="val"))
    assert (row.ours, row.paper, row.n, row.table, row.split) == (50.0, 57.7, 9, 1, "val")
    assert row.remarks == () and row.variant == "owl2" and row.prompt == "owl2"
    mme = {"overall": {"accuracy": 50.0, "n": 9}, "skills": {}}  # not all tasks: no sum
    (row,) = results.rows_of(result("mme", **mme, limit=9, prompt_suffix="", blind=True))
    assert row.ours is None and row.paper == 1450.19
    assert row.remarks == (
        "black images",
        "the first 9 questions only",
        "another suffix of the prompt",
    )
    arc = {"overall": {"accuracy": 1.0, "n": 4}, "skills": {"ARC-Easy": {"accuracy": 2.0, "n": 4}}}
    (row,) = results.rows_of(result("arc", **arc))
    assert (row.metric, row.ours, row.paper) == ("ARC-Easy accuracy", 2.0, 79.9)
    assert [row.paper for row in results.rows_of(result("mmbench", **scored))] == [64.5, 65.4]
    rows = results.rows_of(result("pope", **scored, split="popular"))
    assert {row.metric: row.paper for row in rows}["recall"] == 82.06 and len(rows) == 5
    (row,) = results.rows_of(result("q_bench", **scored, split="dev"))
    assert row.paper_model == "mPLUG-Owl2"
    judged = [row.paper for row in results.rows_of(result("msvd_qa", **scored, variant="judged"))]
    assert judged == [65.4, 3.5]
    rows = results.rows_of(result("msvd_qa", **scored))
    assert [(row.ours, row.paper) for row in rows] == [(50.0, 42.4), (None, 65.4), (None, 3.5)]
    assert "judge" in rows[1].remarks[0]
    (row,) = results.rows_of(result("mmvet"))
    assert (row.ours, row.paper, row.n) == (None, 36.2, 3) and "judge" in row.remarks[0]


def test_figures_of_both_versions_stand_beside_what_a_judge_says():
    judged = {"accuracy": 50.0, "qAcc": 20.0, "fAcc": 21.0, "easy": 22.0, "hard": 23.0, "n": 9}
    file = {"questions_file": "HallusionBench.json", "overall": judged, "skills": {}}
    rows = results.rows_of(result("hallusionbench", **file, variant="judged"))
    assert [(r.paper_model, r.metric, r.ours, r.paper) for r in rows if r.metric != "accuracy"] == [
        ("mPLUG-Owl", "qAcc", 20.0, 9.45),
        ("mPLUG-Owl", "fAcc", 21.0, 10.4),
        ("mPLUG-Owl", "easy", 22.0, 39.34),
        ("mPLUG-Owl", "hard", 23.0, 29.77),
        ("mPLUG-Owl2", "qAcc", 20.0, 13.85),
        ("mPLUG-Owl2", "fAcc", 21.0, 19.94),
        ("mPLUG-Owl2", "easy", 22.0, 44.84),
        ("mPLUG-Owl2", "hard", 23.0, 39.07),
    ]
    first, *others = results.rows_of(result("hallusionbench", **file))
    assert (first.metric, first.ours, first.paper, first.remarks) == ("accuracy", 50.0, None, ())
    assert len(others) == 10 and {row.ours for row in others} == {None}
    assert {row.remarks for row in others} == {("no judge was asked",)}
    (alone,) = results.rows_of(
        result("hallusionbench", **file | {"questions_file": "HallusionBench_v00.json"})
    )
    assert (alone.ours, alone.paper) == (50.0, None)
    assert "hallusionbench" not in PAPER_TASKS


def test_hallusionbench_figures_follow_from_whole_numbers_of_answers():
    # Of 1,129 questions, 455 with figure 0, 430 with others, and 346 figures.
    sizes = {"accuracy": 1129, "qAcc": 455, "fAcc": 346, "easy": 455, "hard": 430}
    figures = [f for f in FIGURES if f.task == "hallusionbench" and f.value is not None]
    assert len(figures) == 10
    for figure in figures:
        count = round(figure.value * sizes[figure.metric] / 100)
        assert round(100 * count / sizes[figure.metric], 2) == figure.value


@pytest.mark.parametrize(
    ("task", "file", "papers"),
    [
        ("mmbench", "MMBench_DEV_EN.tsv", [64.5, 65.4]),
        ("mmbench", "mmbench_test_20230712.tsv", [64.5, 65.4]),
        ("mmbench", "MMBench_DEV_CN.tsv", [None]),
        ("mmbench", "MMBench_DEV_EN_V11.tsv", [None]),
        ("pope", "coco_pope_adversarial.json", [None, None, None, 83.8, None]),
        ("pope", "aokvqa_pope_adversarial.json", [None]),
    ],
)
def test_other_questions_than_the_papers_stand_alone(task, file, papers):
    scored = {"overall": {"accuracy": 50.0, "n": 9}, "skills": {}}
    rows = results.rows_of(result(task, **scored, split="adversarial", questions_file=file))
    assert [row.paper for row in rows] == papers and {row.data for row in rows} == {file}


def test_models_are_named_with_their_adapters(tmp_path):
    scored = {"overall": {"accuracy": 50.0, "n": 9}, "skills": {}, "max_new_tokens": 3}
    results.write(tmp_path, [result("gqa", **scored, adapter="lora", precision="bf16")])
    page = (tmp_path / "results.md").read_text()
    assert "Model: m\\|n, lora, bf16\n" in page and "max_new_tokens 3" in page
    assert json.loads((tmp_path / "results.json").read_text())["models"] == ["m|n, lora, bf16"]


def test_figures_have_known_notes_and_values_that_scores_have():
    assert {note for figure in FIGURES for note in figure.notes} == set(NOTES)
    # Table 9 follows from whole numbers of answers; what is cut off is what NOTES say.
    for split, hits, wrong, no in (("random", 1233, 74, 1410), ("popular", 1231, 145, 1500)):
        yes, n = hits + wrong, 1500 + no
        counted = {
            "accuracy": (hits + no - wrong) / n,
            "precision": hits / yes,
            "recall": hits / 1500,
            "f1": 2 * hits / (yes + 1500),
            "yes_ratio": yes / n,
        }
        for figure in FIGURES:
            if figure.task == "pope" and figure.split == split:
                assert 0 <= 100 * counted[figure.metric] - figure.value + 0.005 < 0.015


def test_the_files_tell_all_rows_and_what_is_missing(tmp_path):
    scored = {"overall": {"accuracy": 50.0, "n": 9}, "skills": {}}
    done = [result("gqa", **scored, split="testdev"), result("q_bench", **scored)]
    results.write(tmp_path, done, ["mme", "okvqa"], {"vizwiz": "one|two\nthree"})
    page = (tmp_path / "results.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("| gqa"))
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "gqa", "exact match", "50.00", "56.10[^2]", "mPLUG-Owl2", "9", "owl2", "exact", "-",
        "testdev (test-balanced in the paper)", "1", "",
    ]  # fmt: skip
    assert f"[^1]: {NOTES['q_bench']}" in page and "Model: m\\|n" in page
    assert "No data: mme, okvqa." in page and "Failed: vizwiz: one\\|two three" in page
    tree = json.loads((tmp_path / "results.json").read_text())
    assert [row["task"] for row in tree["rows"]] == ["gqa", "q_bench"]
    assert tree["without_data"] == ["mme", "okvqa"] and tree["failed"] == {
        "vizwiz": "one|two\nthree"
    }


def test_mistakes_are_shown_escaped_and_within_bounds(tmp_path, monkeypatch):
    picture, evil = draw(tmp_path / "1.png"), "<script>alert(1)</script>"
    questions = [Question(n, f"what {n}?", (picture,), "color", "red") for n in range(20)]
    questions[3] = Question(3, evil, (picture.read_bytes(), tmp_path / "none.png"), evil, evil)
    rows = [
        {"answer": f"<b>{n}", "score": 100.0 * (n % 4 != 3), "question": q.text, "skill": q.skill}
        | {"gold": q.gold}
        for n, q in enumerate(questions)
    ]
    monkeypatch.setattr(mistakes, "_SHOWN", {"wrong": 300, "right": 5, "not scored": 5})
    monkeypatch.setattr(mistakes, "_THUMBNAILS", 6)
    page = tmp_path / mistakes.MISTAKES
    mistakes.write_mistakes(page, TASKS["vqav2"], questions, rows, result("vqav2", model=evil))
    html = page.read_text()
    assert (
        evil not in html and "<b>3" not in html and "&lt;b&gt;3" in html and "<script" not in html
    )
    assert html.count('class="card wrong') == 5 and html.count('class="card right') == 5
    assert "5 of 5 wrong" in html and "5 of 15 right" in html
    assert html.count('src="data:image/jpeg;base64,') == 5 and html.count("no thumbnail") == 1
    assert "At most 6 images, of at most 224 pixels" in html and "5 more are not shown" in html
    assert not re.search(r"(src|href)=.(?!data:)", html)  # one self-contained page
    # A filter for each verdict and each skill, by style rules that name no text of the data.
    assert 'id="wrong"' in html and "#wrong:checked ~ main .card:not(.wrong)" in html
    skills = re.findall(r'id="(skill-\d+)"', html)
    assert skills == ["skill-0", "skill-1"]
    assert all(f"#{name}:checked ~ main .card:not(.{name})" in html for name in skills)
    rows = [row | {"score": None, "gold": None} for row in rows]
    mistakes.write_mistakes(page, TASKS["vqav2"], questions, rows, result("vqav2", blind=True))
    html = page.read_text()
    assert "5 of 20 not scored" in html and "data:image" not in html and "shown black" in html


def test_jobs_are_found_by_the_folders_of_tasks(tmp_path):
    write_vqa(tmp_path / "vqav2")
    for name in ("random", "popular"):
        dump(tmp_path / f"pope/coco_pope_{name}.json", [])
    dump(tmp_path / "okvqa/notes.txt", [])
    (tmp_path / "mme").mkdir()
    (tmp_path / "mme/count.txt").touch()
    output = tmp_path / "out"
    jobs, without = suite.find_jobs(["vqav2", "pope", "okvqa", "mme"], tmp_path, output)
    assert without == ["okvqa"]
    assert [(job.data.name, str(job.output.relative_to(output))) for job in jobs] == [
        ("v2_OpenEnded_mscoco_val2014_questions.json", "vqav2"),
        ("coco_pope_popular.json", "pope/coco_pope_popular"),
        ("coco_pope_random.json", "pope/coco_pope_random"),
        ("mme", "mme"),
    ]
    next((tmp_path / "vqav2").glob("*annotations.json")).unlink()
    (job,), _ = suite.find_jobs(["vqav2"], tmp_path, output)
    assert not job.with_gold  # for the server
    with pytest.raises(
        TaskError, match="has no data for any of okvqa, gqa; the files of a task go"
    ):
        suite.find_jobs(["okvqa", "gqa"], tmp_path, output)


@pytest.mark.distributed
def test_a_suite_goes_on_after_a_failure_and_from_where_it_was(tmp_path, capsys):
    corpus = build_corpus(tmp_path / "corpus")
    model = build_model(corpus / "tokenizer/tokenizer.model", tmp_path / "run")
    root, output = tmp_path / "data", tmp_path / "out"
    shutil.copytree(corpus / "eval/seen", root / "pope")
    shutil.copytree(corpus / "eval/seen", root / "vqav2")
    write_vqa(root / "okvqa")
    broken = root / "okvqa/images/COCO_val2014_000000000012.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(b"no image")
    options = ["--checkpoint", model, "--suite", "paper", "--data", root, "--output", output]
    options = list(map(str, [*options, "--limit", 3, "--batch-size", 2]))
    assert main(options) == 1
    printed = capsys.readouterr()
    assert "failed: okvqa" in printed.out and "the image of question 3" in printed.err
    tree = json.loads((output / "results.json").read_text())
    assert list(tree["failed"]) == ["okvqa"] and "gqa" in tree["without_data"]
    assert {row["task"] for row in tree["rows"]} == {"vqav2", "pope"}
    assert "Failed: okvqa: " in (output / "results.md").read_text()
    assert (output / "okvqa/journal-0.jsonl").read_bytes().count(b"\n") == 2
    before = (output / "vqav2/scores.json").stat().st_mtime_ns
    asked = (output / "okvqa/journal-0.jsonl").read_text()
    broken.write_bytes(whole)
    assert main(options) == 0  # what was answered about other images stays
    answers = json.loads(asked.splitlines()[1])["answers"]
    rows = (output / "okvqa/predictions.jsonl").read_text().splitlines()
    assert [json.loads(row)["answer"] for row in rows][:2] == answers
    assert (output / "vqav2/scores.json").stat().st_mtime_ns == before
    tree = json.loads((output / "results.json").read_text())
    assert not tree["failed"] and {row["task"] for row in tree["rows"]} == {
        "vqav2",
        "pope",
        "okvqa",
    }
    page = (output / "okvqa/results.md").read_text()
    assert "| okvqa | VQA accuracy |" in page and "the first 3 questions only" in page
    # The same by names of tasks.
    by_name = [*options[:2], "--task", "pope", "--task", "vqav2", *options[4:]]
    assert main(by_name) == 0
    tree = json.loads((output / "results.json").read_text())
    assert {row["task"] for row in tree["rows"]} == {"vqav2", "pope"}
    with pytest.raises(SystemExit):
        main([*by_name, "--variant", "owl2"])
    assert "--variant is of one task" in capsys.readouterr().err


def test_scoring_needs_no_torch(tmp_path):
    gold = dump(tmp_path / "coco_pope_x.json", [
        {"question_id": n, "image": "1.jpg", "text": "is it?", "label": "yes"} for n in range(12)
    ])  # fmt: skip
    said = dump(tmp_path / "said.json", [{"question_id": 0, "answer": "yes"}])
    blocked = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in ('torch', 'megatron', 'transformers'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from megatron_owl2.cli.evaluate import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = ["score", "--task", "pope", "--predictions", said, "--gold", gold]
    done = subprocess.run(
        [sys.executable, "-c", blocked, *map(str, command)], capture_output=True, text=True
    )
    assert done.returncode == 2
    listed = "11 of 12 gold questions have no prediction: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ...; "
    assert listed in done.stderr and "--missing wrong" in done.stderr


def test_the_documentation_lists_all_tasks():
    text = (ROOT / "docs/evaluation.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert set(TASKS) <= listed
