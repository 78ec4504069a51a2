"""Scores against numbers worked out by hand."""

import pytest

from megatron_owl2.errors import ScoreError
from megatron_owl2.evaluation.benchmarks.pope import score as pope
from megatron_owl2.evaluation.benchmarks.pope import yes_or_no
from megatron_owl2.evaluation.scoring import exact_match
from megatron_owl2.evaluation.vqa_accuracy import normalize_answer
from megatron_owl2.evaluation.vqa_accuracy import score as vqa


def annotation(answers, kind="colour"):
    """Gold of VQA from its annotators' answers."""
    return {"skill": kind, "majority": max(answers, key=answers.count), "answers": answers}


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        (" A red\nhat ", "red hat"),
        ("Two", "2"),
        ("none", "0"),
        ("ten, of them", "10 of them"),  # a mark beside a space vanishes
        ("black/white", "black white"),  # elsewhere it becomes a space
        ("1,000 red-hats", "1000 redhats"),  # unless the text has a 1,000
        ("3.5 kg.", "3.5 kg"),
        ("U.S.A.", "usa"),
        ("dont", "don't"),
        ("couldn'tve", "couldn't've"),
        ("yall'll", "y'all'll"),
        ("well its ill", "well its ill"),
        ("The", ""),
    ],
)
def test_answers_are_normalised_as_published(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("matches", "score"), [(0, 0.0), (1, 30.0), (2, 60.0), (3, 90.0), (4, 100.0), (10, 100.0)]
)
def test_a_question_is_scored_against_the_other_annotators(matches, score):
    gold = {1: annotation(["red"] * matches + [f"other{i}" for i in range(10 - matches)])}
    assert vqa({1: "red"}, gold)["overall"]["accuracy"] == score


def test_vqa_per_question_type_with_majority():
    gold = {
        1: annotation(["red"] * 10),
        2: annotation(["red"] * 10),
        3: annotation(["blue"] * 10),
        4: annotation(["2"] * 8 + ["3"] * 2, "count"),
        5: annotation(["3"] * 10, "count"),
    }
    scores = vqa({1: "Red.", 2: "blue", 3: "the blue", 4: "three", 5: "2"}, gold)
    # 4: "3" was given by 2 of 10: 8 annotators see 2 matches (2/3), 2 see one (1/3): 0.6.
    # The majority answer of "count" is a tie, which the smaller answer "2" wins: 1.0 and 0.
    assert scores == {
        "overall": {"accuracy": 52.0, "majority": 60.0, "n": 5, "unreachable": 0},
        "skills": {
            "colour": {"accuracy": 66.67, "majority": 66.67, "n": 3, "unreachable": 0},
            "count": {"accuracy": 30.0, "majority": 50.0, "n": 2, "unreachable": 0},
        },
    }


def test_the_two_vqa_rules_differ_on_capitals_and_unanimous_gold():
    gold = {1: annotation(["B"] * 10, "letter"), 2: annotation(["two"] * 6 + ["2"] * 4, "count")}
    answers = {1: "B", 2: "Two"}
    owl2 = vqa(answers, gold)
    # The prediction becomes "b" and "2"; unanimous "B" stays, "two" loses punctuation only.
    assert owl2["skills"]["letter"] == {
        "accuracy": 0.0,
        "majority": 0.0,
        "n": 1,
        "unreachable": 1,
    }
    assert owl2["skills"]["count"]["accuracy"] == 100.0  # of 4 that say "2": six see 4, four see 3
    assert owl2["overall"]["unreachable"] == 1
    official = vqa(answers, gold, "official")
    assert official["overall"] == {
        "accuracy": 100.0,
        "majority": 100.0,
        "n": 2,
        "unreachable": 0,
    }
    assert vqa({1: "b", 2: "2"}, gold, "official")["overall"]["accuracy"] == 50.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("yes", "yes"),
        ("No", "no"),
        ("There is not, I think", "no"),
        ("no, there is none", "no"),
        ("Yes. But no second one", "yes"),  # only the first sentence counts
        ("nothing", "yes"),  # whole words only
        ("NO", "yes"),  # and only these three spellings
        ("", "yes"),
    ],
)
def test_pope_reads_yes_and_no(text, answer):
    assert yes_or_no(text) == answer


def test_pope_numbers():
    labels = ["yes"] * 4 + ["no"] * 6
    said = ["yes", "Yes.", "yes", "no", "yes", "No", "no", "not", "no, sir", "no"]
    gold = {i: {"label": label} for i, label in enumerate(labels)}
    overall = pope(dict(enumerate(said)), gold)["overall"]
    # 3 true positives, 1 false positive, 1 false negative, 5 true negatives.
    assert overall == {
        "accuracy": 80.0,
        "majority": 60.0,
        "n": 10,
        "precision": 75.0,
        "recall": 75.0,
        "f1": 75.0,
        "yes_ratio": 40.0,
        "unclear": 0,
    }
    never = pope({i: "no" for i in range(10)}, gold)
    assert never["overall"]["accuracy"] == 60.0
    assert never["overall"]["precision"] == never["overall"]["f1"] == 0.0
    assert never["skills"] == {"existence": never["overall"]}


def test_exact_match_ignores_white_space_only():
    gold = {
        "a": {"answers": ["a red  circle .", "one circle"], "skill": "caption"},
        "b": {"answers": ["a red circle ."], "skill": "caption"},
        "c": {"answers": ["tree book"], "skill": "reversal"},
    }
    scores = exact_match({"a": "one circle\n", "b": "A red circle .", "c": " tree  book"}, gold)
    assert scores["skills"] == {
        "caption": {"accuracy": 50.0, "majority": 100.0, "n": 2},
        "reversal": {"accuracy": 100.0, "majority": 100.0, "n": 1},
    }
    assert scores["overall"] == {"accuracy": 66.67, "majority": 100.0, "n": 3}


def test_predictions_must_belong_to_the_gold():
    gold = {1: annotation(["red"] * 10), 2: annotation(["red"] * 10)}
    with pytest.raises(ScoreError, match="1 of 2 gold questions have no prediction: 2$"):
        vqa({1: "red"}, gold)
    with pytest.raises(ScoreError, match="1 predictions have no gold, such as 3"):
        vqa({1: "red", 2: "red", 3: "red"}, gold)
    with pytest.raises(ScoreError, match="holds no question"):
        exact_match({}, {})
