"""OwlEval and rating by people: blind sheets, their key, and tallies of what came back."""

import csv
import io
import json
from pathlib import Path

import pytest
from benchmark_files import TASKS, asked, draw, dump

from megatron_owl2.cli.evaluate import main
from megatron_owl2.errors import ScoreError, TaskError
from megatron_owl2.evaluation import benchmark, rating

ROWS = [
    {"image": "1.jpg", "question_id": 1, "question": "What is funny?", "ability": "a,b,e"},
    {"image": "1.jpg", "question_id": 2, "question": "Why,\nso?", "ability": "a, f"},
    {"image": "2.jpg", "question_id": 3, "question": "Who?", "ability": "b"},
]


@pytest.fixture
def owleval(tmp_path) -> Path:
    lines = (json.dumps(row | {"category": ["]single_turn"]}) + "\n" for row in ROWS)
    (tmp_path / "questions.jsonl").write_text("".join(lines))
    draw(tmp_path / "cases/1.jpg")
    draw(tmp_path / "images/2.jpg")
    return tmp_path


def answers(folder: Path, model: str) -> Path:
    path = folder / model / "predictions.jsonl"
    path.parent.mkdir()
    rows = [{"question_id": n, "answer": f'"{model[::-1]}" <b>\n{n}, é'} for n in (1, 2, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def filled(sheet: Path, rate) -> str:
    """The sheet with `rate(answer)` in its last column."""
    names, *rows = csv.reader(io.StringIO(sheet.read_text(encoding="utf-8-sig"), newline=""))
    assert names == ["item", "question", "answer", "rating"]
    table = io.StringIO()
    csv.writer(table).writerows([names, *([*row[:3], rate(row[2])] for row in rows)])
    return table.getvalue()


def test_owleval_is_asked_and_its_ratings_are_counted(owleval):
    questions, gold, prompts = asked("owleval", owleval)
    assert questions[1].images == (owleval / "cases/1.jpg",)
    assert questions[3].images == (owleval / "images/2.jpg",)
    assert questions[2].skill == "a, f, single-turn"
    assert prompts[2] == "USER: <|image|>Why,\nso? ASSISTANT:"
    assert not benchmark.has_answers(gold)
    name, content = TASKS["owleval"].submission({1: "x", 2: "y", 3: "z"}, gold)
    row = {"image": "2.jpg", "question_id": 3, "question": "Who?", "answer": "z"}
    assert name == "owleval_answer.jsonl" and json.loads(content.splitlines()[2]) == row
    table = benchmark.score(TASKS["owleval"], {1: "A", 2: "d ", 3: "A"}, gold)
    assert table["overall"] == {"A": 2, "B": 0, "C": 0, "D": 1, "n": 3}
    assert list(table["skills"]) == ["a", "b", "e", "f", "single-turn"]
    assert table["skills"]["a"] == {"A": 1, "B": 0, "C": 0, "D": 1, "n": 2}
    with pytest.raises(ScoreError, match="1 ratings are none of A, B, C and D, such as 'a dog'"):
        benchmark.score(TASKS["owleval"], {1: "A", 2: "a dog", 3: "A"}, gold)


def test_a_sheet_is_blind_and_its_tally_is_not(owleval, capsys):
    models = [answers(owleval, name) for name in ("owl2", "llava")]
    out = owleval / "sheet"
    make = ["rating-sheet", "--task", "owleval", "--data", owleval, "--output", out]
    make = [*map(str, make), "--seed", "7", "--predictions"]
    assert main([*make, *map(str, models)]) == 0
    assert capsys.readouterr().out.startswith(f"6 answers are in {out}/sheet.csv")
    blind = (out / "sheet.csv").read_text() + (out / "sheet.html").read_text()
    assert "llava" not in blind and "owl2" not in blind and "avall" in blind
    page = (out / "sheet.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3 and "<b>\n1" not in page
    assert "&#34;avall&#34; &lt;b&gt;\n1, é" in page
    key = json.loads((out / "key.json").read_text())
    assert {row["model"] for row in key.values()} == {"llava", "owl2"} and len(key) == 6

    def rate(answer):
        return ("A" if "avall" in answer else "c") if "2, " not in answer else ""

    one, two = owleval / "one.csv", owleval / "two.csv"
    one.write_text(filled(out / "sheet.csv", rate))
    two.write_text("\ufeff" + filled(out / "sheet.csv", lambda answer: "B"), encoding="utf-8")
    done = ["tally", "--key", out / "key.json", "--sheet", one, two]
    assert main([*map(str, done)]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["unrated"] == 2 and "published" not in table
    llava, owl2 = (table["models"][name] for name in ("llava", "owl2"))
    assert llava["overall"] == {"A": 2, "B": 3, "C": 0, "D": 0, "n": 5}
    assert owl2["overall"] == {"A": 0, "B": 3, "C": 2, "D": 0, "n": 5}
    assert owl2["skills"]["a"] == {"A": 0, "B": 2, "C": 1, "D": 0, "n": 3}
    assert owl2["skills"]["f"] == {"A": 0, "B": 1, "C": 0, "D": 0, "n": 1}

    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for name in ("sheet.csv", "key.json", "sheet.html"):  # nobody's work is written over
        assert main([*make, *map(str, models)]) == 2
        told = f"{out / name} exists, of a sheet that may be filled in; name another folder"
        assert told in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        (out / name).unlink()  # as if it were with a rater
        before.pop(name)
    for given in (f"owl2={models[1]}", models[0]):
        with pytest.raises(SystemExit):
            main([*make, str(models[0]), str(given)])
        assert "two models are called owl2; give NAME=FILE" in capsys.readouterr().err


def test_a_sheet_of_some_questions_takes_predictions_of_all(owleval, capsys):
    path, folder = answers(owleval, "one"), owleval / "sheet"
    arguments = ["rating-sheet", "--task", "owleval", "--data", str(owleval), "--limit", "2"]
    assert main([*arguments, "--predictions", str(path), "--output", str(folder)]) == 0
    assert "2 answers are in" in capsys.readouterr().out
    for limit in ("-1", "0"):  # -1 left the last question out
        with pytest.raises(SystemExit):
            main([*arguments[:-1], limit, "--predictions", str(path), "--output", f"{folder}2"])
        assert f"--limit: {limit} is not a positive whole number" in capsys.readouterr().err


def test_no_answer_is_a_formula_in_a_spreadsheet(owleval):
    questions, _, _ = asked("owleval", owleval)
    items = [rating.Item("x-1", questions[1], "one", '=HYPERLINK("http://x","y")')]
    rating.write_sheet(owleval / "sheet", items)
    rows = csv.reader(io.StringIO((owleval / "sheet" / rating.SHEET).read_text("utf-8-sig")))
    assert [row[2] for row in rows][1] == """'=HYPERLINK("http://x","y")"""


def test_the_order_comes_from_the_seed(owleval):
    questions, _ = benchmark.read(TASKS["owleval"], owleval)
    said = {name: {n: f"{name} {n}" for n in (1, 2, 3)} for name in "xyz"}

    def order(seed: int) -> list[tuple]:
        items = rating.shuffled_items(questions, said, seed)
        assert len({item.code for item in items}) == 9
        return [(item.code, item.question.id, item.model) for item in items]

    orders = [order(seed) for seed in range(8)]
    assert order(3) == orders[3] and len({str([row[1:] for row in o]) for o in orders}) == 8
    assert len({codes[0][0] for codes in orders}) == 8  # a sheet's mark is its own
    for rows in orders:
        assert sorted(row[1:] for row in rows) == [(i, m) for i in (1, 2, 3) for m in "xyz"]
        ids = [i for _, i, _ in rows]
        assert all(ids[n] == ids[n + 1] == ids[n + 2] for n in (0, 3, 6))  # side by side
    del said["y"][2]
    with pytest.raises(ScoreError, match="y: 1 of 3 gold questions have no prediction"):
        rating.shuffled_items(questions, said, 0)


def test_damaged_sheets_are_told_by_file_and_line(tmp_path):
    row = {"model": "x", "id": 1, "skills": ["a"]}
    key = dump(tmp_path / "key.json", {"k-1": row, "k-2": row})
    sheet = tmp_path / "s.csv"
    head = "item,question,answer,rating\n"
    for content, message in (
        (head + "k-1,q,a,E\n", "s.csv, line 2: the rating 'E' is none of A, B, C and D"),
        (head + 'k-1,"two\nlines",a,A\nk-3,q,a,A\n', "s.csv, line 4: there is no item 'k-3'"),
        (head + "k-1,q,a,A\nk-1,q,a,\n", "s.csv, line 3: item k-1 stands in line 2, too"),
        (head + "k-1,q\n", "s.csv, line 2: it has 2 cells only"),
        (head + 'k-1,"q,a,A\n', "s.csv, line 2: unexpected end of data"),
        ("item;question;answer;rating\n", "line 1: it must name the columns item and rating"),
        ("", "line 1: it must name the columns item and rating"),
    ):
        sheet.write_text(content)
        with pytest.raises(TaskError, match=message):
            rating.tally(key, [sheet])
    sheet.write_bytes("item,rating\nk-1,é\n".encode("latin-1"))
    with pytest.raises(TaskError, match="s.csv is not text in UTF-8"):
        rating.tally(key, [sheet])
    dump(key, {"k-1": {"model": "x"}})
    with pytest.raises(TaskError, match="'id' is missing"):
        rating.tally(key, [sheet])
    with pytest.raises(TaskError, match="gone.json cannot be read"):
        rating.tally(tmp_path / "gone.json", [sheet])
