"""Answers on which the published rules are odd, and which must be read as they read them."""

import pytest
from benchmark_files import TASKS

from megatron_owl2.evaluation import benchmark
from megatron_owl2.evaluation.benchmarks import mme, mmhal_bench, mmvet, pope


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("yes, no", "yes"),  # the first word of both
        ("n/a yes", "other"),  # four characters are "n/a "
        ("eyes", "yes"),
        ("a no", "no"),
        ("an no", "other"),
        ("\nyes", "yes"),
        ("\n\nyes", "other"),
        ("NONE", "no"),
    ],
)
def test_mme_looks_into_four_characters(text, said):
    assert mme.yes_or_no(text) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("No\nway", "yes"),  # split at spaces alone
        ("no", "no"),
        (".no", "yes"),  # what is before the first period
        ("No,", "no"),
        ("Yes, and not no", "no"),
        ("Not", "yes"),
        ("n o", "yes"),
    ],
)
def test_pope_looks_for_three_words(text, said):
    assert pope.yes_or_no(text) == said


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("rating: 10", 1),  # begins with one
        ("Rating: 3.5", 3),
        ("rating: 5\nRating: 5", 5),  # one rating, twice
        ("rating: 5, not rating: 4", None),
        ("**Rating**: 5", None),
        ("My rating: 2 because", 2),
        ("Rating: ", None),  # cut
    ],
)
def test_mmhal_bench_finds_a_rating(reply, value):
    assert mmhal_bench.rating(reply) == value


@pytest.mark.parametrize(
    ("reply", "value"),
    [("0.5.", None), ("1e0", 1.0), ("nan", None), ("inf", None), ("0.", 0.0), ("0.7 0.9", 0.7)],
)
def test_mmvet_takes_the_first_word_as_a_number(reply, value):
    assert mmvet.grade(reply) == value


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("Correct", (True, True)),
        ("INCORRECT", (False, False)),
        ("It is not incorrect but correct.", (False, False)),  # "incorrect" is looked for first
        ("incorr", (False, True)),  # cut, and so unclear, which is right without a figure
        ("unclear", (False, True)),
        ("", (False, True)),
    ],
)
def test_hallusionbench_reads_its_judge(reply, right):
    row = {"answer": "1", "subcategory": "x", "set_id": 0, "question_id": 0, "figure_id": 0}
    row |= {"skill": "x", "category": "VD"}
    for category, expected in zip(("VD", "VS"), right, strict=True):
        gold = {"a": row | {"category": category}}
        table = benchmark.score(TASKS["hallusionbench"], {"a": reply}, gold, "judged")
        assert table["overall"]["accuracy"] == 100.0 * expected


@pytest.mark.parametrize(
    ("said", "right"), [("Yes..", True), ("yes ", False), (" yes", False), ("yes.!", False)]
)
def test_gqa_takes_off_periods_and_nothing_else(said, right):
    gold = {"a": {"answer": "yes", "types": {"structural": "verify"}}}
    assert benchmark.score(TASKS["gqa"], {"a": said}, gold)["overall"]["accuracy"] == 100.0 * right


@pytest.mark.parametrize(
    ("answers", "said", "owl2", "official", "evalai"),
    [
        (["a dog"] * 10, "dog", 0.0, 0.0, 100.0),  # unanimous gold stays as it is
        (["a dog"] * 9 + ["cat"], "a dog", 0.0, 100.0, 100.0),  # and owl2 leaves its articles
        (["dog."] * 9 + ["cat"], "dog", 100.0, 100.0, 100.0),  # but no periods
        (["dog."] * 10, "dog.", 0.0, 100.0, 100.0),
        (["x", "x", *"abcdefgh"], "x", 60.0, 60.0, 60.0),
        (["man's"] * 9 + ["cat"], "man 's", 0.0, 0.0, 100.0),
    ],
)
def test_the_three_vqa_rules_on_one_question(answers, said, owl2, official, evalai):
    gold = {1: {"answers": answers, "majority": answers[0], "skill": "x"}}
    for variant, expected in (("owl2", owl2), ("official", official), ("evalai", evalai)):
        table = benchmark.score(TASKS["vqav2"], {1: said}, gold, variant)
        assert table["overall"]["accuracy"] == expected, variant


def test_circular_groups_are_of_the_passes_that_the_file_has():
    def row(answer: str, count: int) -> dict:
        options = ["red", "blue", "green"][:count]
        return {"options": options, "answer": answer, "skill": "CP", "category": "x"}

    # Question 5 in one pass alone, question 6 with its second pass first.
    gold = {5: row("A", 2), 1_000_006: row("B", 3), 6: row("A", 3), 2_000_006: row("C", 3)}
    right = {i: r["answer"] for i, r in gold.items()}
    for changed, accuracy in ((None, 100.0), (5, 50.0), (2_000_006, 50.0)):
        said = right | ({changed: "B"} if changed else {})
        table = benchmark.score(TASKS["mmbench"], said, gold)
        assert (table["overall"]["accuracy"], table["overall"]["n"]) == (accuracy, 2)
