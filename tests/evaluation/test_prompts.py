"""Prompts by name: the published strings to the byte, and the ids official code makes of them."""

from pathlib import Path

import pytest
import sentencepiece
from benchmark_files import TASKS, draw, dump, mmbench_rows, write_tsv

from megatron_owl2.config.templates import OWL2, TEMPLATES
from megatron_owl2.data.conversation import prompt_ids
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import benchmark
from megatron_owl2.evaluation.benchmark import Question

SHORT = "Answer the question using a single word or phrase. ASSISTANT: "
LETTER = "Answer with the option\u2019s letter from the given choices directly."
ADAPTER = f"\n\n{LETTER}  \nASSISTANT: "
ABOUT_IMAGE = {
    "vqav2": f"what? {SHORT}",
    "okvqa": f"what? {SHORT}",
    "textvqa": f"what? {SHORT}",
    "textvqa_ocr": f"what?\n{SHORT}",
    "gqa": f"what?\n{SHORT}",
    "pope": f"what?\n{SHORT}",
    "vizwiz": "what?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
    + SHORT,
    "mme": f"what?\n{SHORT}",
    "mmbench": f"what?\n{LETTER} ASSISTANT: ",
    "scienceqa": f"what?{ADAPTER}",
    "seed_bench": f"what?{ADAPTER}",
    "q_bench": f"what?{ADAPTER}",
    "mmvet": "what?\nAnswer the question directly.  \nASSISTANT: ",
    "mmhal_bench": "what? ASSISTANT: ",
    "hallusionbench": "what? ASSISTANT: ",
}


def official(task: str, question: Question) -> str:
    entry = TASKS[task]
    return entry.prompt_text(question, "official", entry.suffix_of("official"), OWL2)


@pytest.mark.parametrize("task", ABOUT_IMAGE)
def test_the_official_prompt_is_the_published_one(task):
    question = Question(1, "what?", (Path("1.jpg"),), "skill", None)
    assert official(task, question) == f"USER: <|image|>{ABOUT_IMAGE[task]}"
    entry = TASKS[task]
    suffix = entry.suffix_of("owl2")
    ours = entry.prompt_text(question, "owl2", suffix, OWL2)
    assert suffix == entry.suffix and ours == f"USER: <|image|>what?{entry.suffix} ASSISTANT:"
    # The official strings have no system text, whatever the model was trained with.
    vicuna = TEMPLATES["vicuna_v1"]
    assert entry.prompt_text(question, "official", " x", vicuna) == (
        f"USER: <|image|>what? x{entry.official.assistant}"
    )
    assert entry.suffix_of("official", " x") == " x"


def test_official_questions_of_published_files(tmp_path):
    draw(tmp_path / "mme/images/count/1.jpg")
    lines = "1.jpg\tIs it? Please answer yes or no.\tYes\n1.jpg\tA cat?\tNo\n"
    (tmp_path / "mme/count.txt").write_text(lines)
    first, second = benchmark.read(TASKS["mme"], tmp_path / "mme")[0]
    assert official("mme", first) == f"USER: <|image|>Is it? \n{SHORT}"
    assert official("mme", second) == f"USER: <|image|>A cat?\n{SHORT}"
    assert first.prompt("\nAnswer.") == "USER: <|image|>Is it? \nAnswer. ASSISTANT:"
    file = write_tsv(tmp_path / "mmbench_dev.tsv", mmbench_rows())
    questions = benchmark.read(TASKS["mmbench"], file)[0]
    asked = [official("mmbench", question) for question in questions[:2]]
    assert asked == [
        f'USER: <|image|>look\nis it\n"red"?\nA. yes\nB. no\n{LETTER} ASSISTANT: ',
        f"USER: <|image|>N/A\nwhich?\nA. x\nB. y\nC. z\n{LETTER} ASSISTANT: ",
    ]
    dump(tmp_path / "captions.json", {
        "images": [{"id": 1, "file_name": "1.jpg"}],
        "annotations": [{"image_id": 1, "caption": "a cat"}],
    })  # fmt: skip
    draw(tmp_path / "images/1.jpg")
    (caption,) = benchmark.read(TASKS["caption"], tmp_path / "captions.json")[0]
    said = "USER: <|image|>Provide a one-sentence caption for the provided image. ASSISTANT: "
    assert official("caption", caption) == said
    problem = {"question": "q?", "choices": ["x", "y"], "answer": 1, "subject": "s"}
    problem |= {"hint": "h", "image": "image.png", "split": "test"}
    dump(tmp_path / "problems.json", {"7": problem, "8": problem | {"hint": ""}})
    for number in (7, 8):
        draw(tmp_path / f"images/test/{number}/image.png")
    hinted, bare = benchmark.read(TASKS["scienceqa"], tmp_path / "problems.json")[0]
    assert official("scienceqa", hinted) == f"USER: <|image|>Hint: h\nq?\nA. x\nB. y{ADAPTER}"
    assert official("scienceqa", bare) == f"USER: <|image|>q?\nA. x\nB. y{ADAPTER}"


def test_white_space_of_a_question_stays_in_the_official_prompt_alone():
    question = Question(1, " what? ", (Path("1.jpg"),), "skill", None)
    assert official("vqav2", question) == f"USER: <|image|> what?  {SHORT}"
    assert question.prompt("") == "USER: <|image|>what? ASSISTANT:"


def test_official_ids_have_the_token_of_the_last_space(tmp_path):
    model = train(tmp_path)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    question = Question(1, "what is it?", (Path("1.jpg"),), "skill", None)
    text = official("vqav2", question)
    before, after = text.split("<|image|>")
    # Official code tokenises the text on each side of the image and keeps the first BOS.
    wanted = [1, *pieces.encode(before), -200, *pieces.encode(after)]
    assert after.endswith(": ") and pieces.id_to_piece(wanted[-1]) == "\u2581"
    assert prompt_ids(text, Tokenizer(model)) == wanted
    ours = question.prompt(TASKS["vqav2"].suffix)
    assert prompt_ids(ours, Tokenizer(model)) == wanted[:-1]


def train(folder: Path) -> Path:
    """A model with LLaMA's options: no normalisation, bytes, a dummy prefix."""
    sentences = [
        "USER: what is it? Answer the question using a single word or phrase. ASSISTANT: red",
        "a cat and a dog sit on the red chair; how many chairs are there?",
    ]
    (folder / "text.txt").write_text("\n".join(sentences * 4))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def test_prompts_that_do_not_exist_are_named():
    with pytest.raises(TaskError, match="no prompt 'mine'; known: owl2, official"):
        TASKS["vqav2"].suffix_of("mine")


def test_splits_are_read_from_the_names_of_files(tmp_path):
    for task, name, split in (
        ("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json", "val"),
        ("vqav2", "v2_OpenEnded_mscoco_test-dev2015_questions.json", "testdev"),
        ("gqa", "testdev_balanced_questions.json", "testdev"),
        ("textvqa", "TextVQA_0.5.1_val.json", "val"),
        ("pope", "coco_pope_adversarial.json", "adversarial"),
        ("coco_caption", "dataset_coco.json", "test"),
        ("mmbench", "mmbench_dev_20230712.tsv", "dev"),
        ("mmvet", "mm-vet.json", None),
        ("vizwiz", "contest.json", None),
    ):
        assert benchmark.split_of(TASKS[task], tmp_path / name) == split
