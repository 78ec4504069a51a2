"""Answers by likelihood: the texts and ids that are compared, and the letters that come out."""

import json

import pytest
import torch
from benchmark_files import TASKS, draw, dump

from megatron_owl2.config.schema import ModelConfig, ParallelConfig, VisionConfig
from megatron_owl2.config.templates import OWL2, TEMPLATES
from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import benchmark, likelihood, runner
from megatron_owl2.evaluation.likelihood import Candidates
from megatron_owl2.evaluation.runner import Settings
from megatron_owl2.inference.likelihood import LogLikelihood
from megatron_owl2.mcore import setup


class Spelled:
    """A tokenizer whose ids are characters behind a dummy prefix, the space, as SentencePiece's."""

    bos_id, eos_id = 1, 2

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in " " + text]


def spell(ids) -> str:
    marks = {1: "<s>", 2: "</s>", -200: "<|image|>"}
    return "".join(marks.get(i) or chr(i) for i in ids)


class Likes:
    """A generator for which `loss(text)` is the loss of a text; it keeps what was asked."""

    tokenizer = Spelled()

    def __init__(self, loss):
        self.loss, self.asked, self.images = loss, [], []

    def log_likelihoods(self, prompts, continuations, images):
        pairs = [(spell(p), spell(c)) for p, c in zip(prompts, continuations, strict=True)]
        self.asked += pairs
        self.images += images
        return [
            LogLikelihood(-self.loss(text), len(ids), greedy=False)
            for (_, text), ids in zip(pairs, continuations, strict=True)
        ]


def compared(task: str, data, variant: str, loss) -> tuple[list[str], list]:
    """The letters for all questions, and the texts that were compared."""
    questions, _ = benchmark.read(TASKS[task], data, variant=variant)
    generator = Likes(loss)
    asked = [(q.candidates, [one.prompt("") for one in q.for_candidates()]) for q in questions]
    return likelihood.answers(generator, asked, [list(q.images) for q in questions]), generator


def mmlu(folder):
    for split, count in (("dev", 6), ("test", 1)):
        file = folder / split / f"world_religions_{split}.csv"
        file.parent.mkdir()
        file.write_text("".join(f"{split} {n} ,w,x,y,z,{'ABCD'[n % 4]}\n" for n in range(count)))
    return folder


EXAMPLES = "".join(
    f"dev {n}\nA. w\nB. x\nC. y\nD. z\nAnswer: {'ABCD'[n % 4]}\n\n" for n in range(5)
)
ASKED = "test 0\nA. w\nB. x\nC. y\nD. z\nAnswer:"


def test_mmlu_compares_whole_texts_as_opencompass_does(tmp_path):
    header = "The following are multiple choice questions (with answers) about  world religions."
    letters, generator = compared(
        "mmlu", mmlu(tmp_path), "opencompass", lambda text: 9 - text.endswith(" C")
    )
    assert letters == ["C"]
    assert generator.asked == [
        ("<s>", f" {header}\n\n{EXAMPLES}{ASKED} {letter}") for letter in "ABCD"
    ]


def test_mmlu_compares_letters_as_lm_eval_does(tmp_path):
    header = "The following are multiple choice questions (with answers) about world religions."
    letters, generator = compared("mmlu", mmlu(tmp_path), "lm_eval", lambda text: text != " B")
    assert letters == ["B"]
    assert generator.asked == [
        (f"<s> {header}\n\n{EXAMPLES}{ASKED}", f" {letter}") for letter in "ABCD"
    ]


def test_mmlu_weights_subjects_by_size_as_lm_eval_does():
    gold = {
        n: {"skill": "x" if n else "y", "answer": "A", "options": list("wxyz")} for n in range(4)
    }
    said = {0: "B", 1: "A", 2: "A", 3: "A"}
    for variant, accuracy in (("opencompass", 50.0), ("lm_eval", 75.0)):
        assert (
            benchmark.score(TASKS["mmlu"], said, gold, variant)["overall"]["accuracy"] == accuracy
        )


def test_arc_compares_options_in_three_ways(tmp_path):
    options = {"text": ["ice", "a very long reason"], "label": ["1", "2"]}
    row = {"id": "M", "question": "why?", "choices": options, "answerKey": "2"}
    (tmp_path / "ARC-Easy-Test.jsonl").write_text(json.dumps(row))
    after, whole = "Question: why?\nAnswer:", "<s>"

    # A loss per text of 8 and 12: 12 is less per character (of 3 and 18), and less per position,
    # of which the whole texts have 1 + 27 and 1 + 42.
    def loss(text):
        return 12.0 if text.endswith("reason") else 8.0

    assert compared("arc", tmp_path, "lm_eval", loss)[0] == ["A"]
    assert compared("arc", tmp_path, "lm_eval_norm", loss)[0] == ["B"]
    letters, generator = compared("arc", tmp_path, "opencompass", loss)
    assert letters == ["B"]
    assert generator.asked == [
        (whole, f" {after} ice"),
        (whole, f" {after} a very long reason"),
    ]
    _, generator = compared("arc", tmp_path, "lm_eval_norm", loss)
    assert generator.asked == [(f"<s> {after}", " ice"), (f"<s> {after}", " a very long reason")]
    assert likelihood.per_position(LogLikelihood(-6.0, 2, greedy=False), "x") == -2.0
    assert likelihood.per_character(LogLikelihood(-6.0, 2, greedy=False), " xyz") == -2.0
    assert likelihood.total(LogLikelihood(-6.0, 2, greedy=False), " xyz") == -6.0


def test_seed_bench_compares_options_as_answers_about_the_image(tmp_path):
    row = {"question_id": 1, "question": "which?", "answer": "D", "data_type": "image"}
    row |= {f"choice_{x}": f"{x}." for x in "abcd"} | {"data_id": "i", "question_type_id": 1}
    dump(tmp_path / "SEED-Bench.json", {"questions": [row]})
    image = draw(tmp_path / "images/i")
    letters, generator = compared(
        "seed_bench", tmp_path, "likelihood", lambda text: "d" not in text
    )
    assert letters == ["D"] and generator.images == [[image]] * 4
    prompt = "<s> USER: <|image|> which? ASSISTANT:"
    assert generator.asked == [(prompt, f" {x}.</s>") for x in "abcd"]
    gold = benchmark.read_gold(TASKS["seed_bench"], tmp_path)
    assert benchmark.score(TASKS["seed_bench"], {1: "D"}, gold, "likelihood")["overall"][
        "accuracy"
    ] == 100.0  # fmt: skip


def test_egoschema_asks_of_each_option_whether_it_is_right(tmp_path):
    options = {f"option {n}": "abcde"[n] for n in range(5)}
    dump(tmp_path / "questions.json", [{"q_uid": "u", "question": "why", **options}])
    frames = [draw(tmp_path / f"images/u/{n}.png") for n in (1, 2)]
    letters, generator = compared("egoschema", tmp_path, "yes", lambda text: 1.0)
    assert letters == ["A"] and generator.images == [frames] * 5  # the first of equals
    assert generator.asked[4] == (
        "<s> USER: <|image|><|image|> Given question 'why', is answer 'e' correct?\nDo you think "
        "that the answer to the given question is correct. Please answer yes or no. ASSISTANT:",
        " Yes",
    )


def test_egoschema_asks_to_the_byte_as_version_1_was_asked(tmp_path):
    options = {f"option {n}": "{b}" if n == 1 else "abcde"[n] for n in range(5)}
    dump(tmp_path / "questions.json", [{"q_uid": "u", "question": "why {C}?", **options}])
    for n in (1, 2, 3):
        draw(tmp_path / f"images/u/image_{n}.jpg")
    task = TASKS["egoschema"]
    (question,), _ = benchmark.read(task, tmp_path, variant="yes")
    suffix = task.suffix_of("official", None, "yes")
    for template in (OWL2, TEMPLATES["vicuna_v1"]):
        prompts = task.prompts_of(question, "official", suffix, template)
        # The text of run_mplug.py for three frames; the line breaks of the images' lines are its.
        assert len(prompts) == 5 and prompts[1] == (
            "The following is a conversation between a curious human and AI assistant. The "
            "assistant gives helpful, detailed, and polite answers to the user's questions.\n"
            "            Human: <|image|>\nHuman: <|image|>\nHuman: <|image|>\n"
            "\n"
            "            Human: Given question 'why {C}?, is answer '{b}' correct?\n"
            "            Human: Do you think that the answer to the given question is correct. "
            "Please answer yes or no.\n"
            "            AI:"
        )
    (asked, *_) = task.prompts_of(question, "official", " Now.", OWL2)
    assert asked.endswith("Please answer yes or no. Now.\n            AI:")


def test_the_evaluation_asks_and_scores_a_variant_by_likelihood(tmp_path, monkeypatch):
    class Model(Likes):
        def __init__(self, loaded):
            super().__init__(lambda text: text != " B")
            self.config = loaded.config
            shown.append(self)

    shown: list[Likes] = []
    monkeypatch.setattr(runner, "Generator", Model)
    setup.initialize(ParallelConfig())
    loaded = type("Loaded", (), {"config": ModelConfig(vision=VisionConfig(image_size=28))})
    arguments = (loaded, "mmlu", *benchmark.read(TASKS["mmlu"], mmlu(tmp_path), variant="lm_eval"))
    settings = Settings(variant="lm_eval")
    result = runner.evaluate(*arguments, tmp_path / "out", settings, {})
    assert result["overall"]["accuracy"] == 0.0 and result["prompt_suffix"] == ""
    (row,) = (tmp_path / "out/predictions.jsonl").read_text().splitlines()
    assert json.loads(row)["answer"] == "B" and len(shown[0].asked) == 4
    with pytest.raises(TaskError, match="after which no prompt suffix can stand"):
        settings = Settings(variant="lm_eval", suffix=" Say it.")
        runner.evaluate(*arguments, tmp_path / "out", settings, {})


def test_texts_of_plain_candidates_are_tokenised_with_their_context():
    candidates = Candidates((("a", " b"), ("", "c")), likelihood.total)
    generator = Likes(lambda text: 1.0)
    likelihood.answers(generator, [(candidates, ["", ""])], [[torch.zeros(1)]])
    assert generator.asked == [("<s> a", " b"), ("<s>", " c")] and generator.images == [[], []]
