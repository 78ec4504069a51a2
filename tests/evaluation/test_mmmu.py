"""MMMU: images between words, answers of two kinds, and the official reading of both."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmark_files import LETTER, TASKS, asked, marks, png

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import benchmark
from megatron_owl2.evaluation.benchmarks.mmmu import pick_option

OPTIONS = {"options": ["a red owl", "an owl", "no bird", "a bird"]}


def mmmu(number: int, **changes) -> dict:
    row = {"id": f"validation_Art_Theory_{number}", "question": "See <image 1>: which?"}
    row |= {"options": "['an owl', \"it's <image 2>\"]", "question_type": "multiple-choice"}
    row |= {"answer": "B", "image_1": {"bytes": png("red"), "path": None}}
    row |= {"image_2": {"bytes": png("blue"), "path": None}, "image_3": None}
    return row | changes


def test_mmmu_shows_images_where_the_text_names_them(tmp_path):
    open_one = {"question_type": "open", "options": "[]"}
    tables = {
        "Art_Theory": [
            mmmu(1),
            mmmu(2, question="<image 2> <image 2>how much?", answer="['1,000', '1 k']", **open_one),
        ],
        "Math": [mmmu(1, id="validation_Math_1", question="no image?", answer="x", **open_one)],
    }
    for subject, rows in tables.items():
        (tmp_path / subject).mkdir()
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, tmp_path / subject / "validation-00000-of-00001.parquet")
        pq.write_table(table, tmp_path / subject / "test-00000-of-00001.parquet")
    questions, gold, prompts = asked("mmmu", tmp_path)
    short = "\nAnswer the question using a single word or phrase. ASSISTANT:"
    assert list(prompts.values()) == [
        f"USER: See <|image|>: which?\nA. an owl\nB. it's <|image|>{LETTER}",
        f"USER: <|image|><|image|>how much?{short}",
        f"USER: <|image|><|image|>no image?{short}",
    ]
    red, blue = png("red"), png("blue")
    assert [q.images for q in questions.values()] == [(red, blue), (blue, blue), (red, blue)]
    said = dict(zip(gold, ["(B).", "The total is 1000.", "y"], strict=True))
    assert marks("mmmu", said, gold) == {
        "Art and Design": (100.0, 2),
        "Science": (0.0, 1),
        "Art_Theory": (100.0, 2),
        "Math": (0.0, 1),
        "all": (66.67, 3),
    }
    assert marks("mmmu", said, gold, "owl2")["all"] == (33.33, 3)
    one = tmp_path / "Math/validation-00000-of-00001.parquet"
    assert list(asked("mmmu", one)[0]) == ["validation_Math_1"]
    for change, message in (
        ({"question": "<image 3>?"}, "names image_3, which it does not have"),
        ({"answer": "C"}, "has the answer 'C', no option of it"),
        ({"options": "['a'"}, "'options' is not the text of a list"),
        ({"question": "<|image|> <image 1>?"}, r"holds <\|image\|>, which stands for images only"),
    ):
        pq.write_table(pa.Table.from_pylist([mmmu(1, **change)]), one)
        with pytest.raises(TaskError, match=message):
            asked("mmmu", one)
    one.write_bytes(b"PAR1")
    with pytest.raises(TaskError, match="it is not Parquet, or cut or damaged"):
        asked("mmmu", one)


@pytest.mark.parametrize(
    ("answer", "picked"),
    [
        ("B", "B"),
        ("(A) or rather (B), not C", "B"),
        ("A or rather C", "C"),
        ("B.", "B"),
        ("a bird", ""),  # five words at most are no sentence
        ("I think that it is a red owl", "A"),
        ("I think that it is an owl, yes, a bird", "D"),
        ("None of these can be seen here", ""),
    ],
)
def test_mmmu_takes_the_last_option_of_an_answer(answer, picked):
    assert pick_option(answer, OPTIONS) == picked


@pytest.mark.parametrize(
    ("answer", "wanted", "right"),
    [
        ("1000", ["1,000"], True),
        ("about 3.14159", ["3.14"], True),
        ("3.15", ["3.14"], False),
        ("x = 4, so y = -2", ["-2"], True),
        ("y = 2", ["-2"], False),
        ("1.5e3 watts", ["1500"], True),
        ("The answer is Paris.", ["paris"], True),
        ("Not Paris\nThe answer is Rome", ["Paris"], False),  # a line with its mark counts alone
        ("a", ["A"], True),
        ("cat", ["a"], False),
        ("", ["a"], False),
    ],
)
def test_mmmu_compares_numbers_and_texts_of_open_answers(answer, wanted, right):
    row = {"options": [], "answer": wanted[0], "answers": wanted, "skill": "s", "domain": "d"}
    table = benchmark.score(TASKS["mmmu"], {"i": answer}, {"i": row})
    assert table["overall"]["accuracy"] == 100.0 * right
