"""The embedded corpus: what the published files say agrees with what the images show."""

import hashlib
import io
import itertools
import json
import random
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy
import pytest
from PIL import Image

from data_prep import shapes
from data_prep.toy_corpus import formats as shapes_formats
from data_prep.toy_corpus import language, texts, world

pytestmark = pytest.mark.slow

SMALL = shapes.Parameters(seed=7, pairs=40, instructions=60, texts=200, eval=40)
HELD_OUT_TEXT = [" ".join(pair) for pair in world.HELD_OUT]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "corpus"
    assert shapes.build_corpus(folder, SMALL)
    return folder


def load(path: Path):
    return json.loads(path.read_text())


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def dialogue_of(record: dict) -> list[tuple[str, str]]:
    """(question, answer) pairs without placeholder and hint."""
    messages = record["conversations"]
    assert [m["from"] for m in messages] == ["human", "gpt"] * (len(messages) // 2)
    clean = [re.sub(r"^<image>\n", "", m["value"]) for m in messages]
    clean = [text.replace(language.ANSWER_HINT, "").strip() for text in clean]
    return list(zip(clean[::2], clean[1::2], strict=True))


# An oracle of its own: it reads the caption and works out the answer from that alone.


Things = dict[tuple[int, int], tuple[str, str]]


def parse(caption: str) -> Things:
    """{(row, column): (colour, shape) or ("letter", L)}."""
    scene = parse_free(caption)
    assert list(scene) == sorted(scene), "captions go in reading order"
    said = [part.split()[0] in ("top", "bottom") for part in caption.split(" , ")]
    assert all(said), "captions name the position first"
    return scene


def parse_free(telling: str) -> Things:
    """The same of a telling in any order."""
    assert telling.endswith(" .")
    scene = {}
    for part in telling.removesuffix(" .").split(" , "):
        words = part.split()
        at = next(i for i, word in enumerate(words) if word in ("top", "bottom"))
        vertical, horizontal, others = *words[at : at + 2], words[:at] + words[at + 2 :]
        place = ("top", "bottom").index(vertical), ("left", "right").index(horizontal)
        assert place not in scene and len(others) == 2
        scene[place] = tuple(sorted(others, key=[*world.COLORS, "letter", *others].index))
    return scene


def answer(caption: str, question: str) -> str:
    scene = parse(caption)
    shapes_ = {place: thing for place, thing in scene.items() if thing[0] != "letter"}

    def only(found):
        (one,) = found  # an ambiguous question is a defect
        return one

    def place_of(name):
        words = tuple(name.split())
        return only(p for p, t in scene.items() if t[-len(words) :] == words or t[0] == name)

    if match := re.fullmatch(
        r"what (color|shape) is the (top|bottom) (left|right) one \?", question
    ):
        kind, vertical, horizontal = match.groups()
        place = ("top", "bottom").index(vertical), ("left", "right").index(horizontal)
        return shapes_[place][kind == "shape"]
    if match := re.fullmatch(r"what color is the (\w+) \?", question):
        return only(color for color, shape in shapes_.values() if shape == match[1])
    if match := re.fullmatch(r"what shape is the (\w+) one \?", question):
        return only(shape for color, shape in shapes_.values() if color == match[1])
    if match := re.fullmatch(r"how many (?:(\w+) )?shapes are there \?", question):
        return str(sum(match[1] in (None, color) for color, _ in shapes_.values()))
    if match := re.fullmatch(r"is there a (\w+) (\w+) \?", question):
        return "yes" if match.groups() in shapes_.values() else "no"
    if match := re.fullmatch(r"where is the (.+) relative to the (.+) \?", question):
        (row, column), (other_row, other_column) = place_of(match[1]), place_of(match[2])
        assert (row == other_row) != (column == other_column)
        if row == other_row:
            return "left" if column < other_column else "right"
        return "above" if row < other_row else "below"
    if match := re.fullmatch(r"where is the (.+) \?", question):
        row, column = place_of(match[1])
        return f"{('top', 'bottom')[row]} {('left', 'right')[column]}"
    assert question == "what letter is there ?"
    return only(second for first, second in scene.values() if first == "letter")


def test_same_parameters_give_the_same_bytes_in_any_number_of_processes(corpus, tmp_path):
    shapes.build_corpus(tmp_path / "again", SMALL, workers=2)
    assert digests(tmp_path / "again") == digests(corpus)
    assert list(tmp_path.iterdir()) == [tmp_path / "again"]


def test_another_seed_gives_other_images():
    assert world.draw_image(7, "pairs", 0) == world.draw_image(7, "pairs", 0)
    others = [(8, "pairs", 0), (7, "instructions", 0), (7, "pairs", 1)]
    for other in others:
        assert world.draw_image(*other)[1] != world.draw_image(7, "pairs", 0)[1]


def test_pairs_are_an_img2dataset_folder(corpus):
    with tarfile.open(corpus / "pairs/00000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    expected = itertools.product(range(SMALL.pairs), ("jpg", "txt", "json"))
    assert list(members) == [f"{i:09d}.{extension}" for i, extension in expected]
    for i in range(SMALL.pairs):
        key = f"{i:09d}"
        image, text = members[f"{key}.jpg"], members[f"{key}.txt"].decode()
        scene, jpeg = world.draw_image(SMALL.seed, "pairs", i)
        assert image == jpeg
        if i % 2 == 0:
            assert text == language.caption(scene)
        assert parse_free(text) == parse(language.caption(scene))
        metadata = json.loads(members[f"{key}.json"])
        assert metadata.pop("url")
        assert metadata == {
            "caption": text,
            "key": key,
            "status": "success",
            "error_message": None,
            "width": 56,
            "height": 56,
            "original_width": 56,
            "original_height": 56,
            "sha256": hashlib.sha256(image).hexdigest(),
        }
    stats = load(corpus / "pairs/00000_stats.json")
    assert stats["count"] == stats["successes"] == SMALL.pairs
    assert stats["failed_to_download"] == stats["failed_to_resize"] == 0
    assert stats["status_dict"] == {"success": SMALL.pairs}


def test_pairs_continue_in_the_next_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes_formats, "SHARD_SIZE", 3)
    images = [world.draw_image(1, "pairs", i) for i in range(7)]
    shapes_formats.write_pairs(tmp_path / "pairs", images, 1, shapes_formats.AnswerRecord())
    counts = []
    for shard in range(3):
        counts.append(load(tmp_path / f"pairs/{shard:05d}_stats.json")["count"])
        with tarfile.open(tmp_path / f"pairs/{shard:05d}.tar") as tar:
            keys = [f"{shard:05d}{i:04d}" for i in range(counts[-1])]
            assert [name[:9] for name in tar.getnames()[::3]] == keys
    assert counts == [3, 3, 1]


def test_held_out_pairs_occur_in_no_training_file(corpus):
    training = (corpus / "pairs/00000.tar").read_bytes().decode("latin-1")
    for path in [*corpus.glob("instructions/*.json"), *corpus.glob("text/*.json")]:
        training += path.read_text()
    assert "red circle" in training  # the search finds pairs that are there
    assert [pair for pair in HELD_OUT_TEXT if pair in training] == []


def test_held_out_attributes_are_all_seen_in_other_pairs():
    assert len(set(world.HELD_OUT)) == 6 and len(world.TRAINING_PAIRS) == 24
    for color in world.COLORS:
        assert sum(pair[0] == color for pair in world.TRAINING_PAIRS) >= 3
    for shape in world.SHAPES:
        assert sum(pair[1] == shape for pair in world.TRAINING_PAIRS) >= 3
    scenes = [world.sample_scene(random.Random(i)) for i in range(2000)]
    seen = {shape.pair for scene in scenes for shape in scene.shapes}
    assert seen == set(world.TRAINING_PAIRS)


def test_training_never_asks_about_held_out_pairs():
    """Over many more dialogues than the small corpus has, adversarial negatives included."""
    for i in range(3000):
        rng = random.Random(i)
        scene = world.sample_scene(rng)
        turns = [*language.dialogue(scene, rng), *texts.text_dialogue("scene", rng)]
        said = " ".join(f"{turn.text} {turn.answer}" for turn in turns)
        assert not any(pair in said for pair in HELD_OUT_TEXT), said


def test_scenes_have_the_documented_frequencies():
    scenes = [world.sample_scene(random.Random(i)) for i in range(4000)]
    numbers = Counter(len(scene.shapes) for scene in scenes)
    expected = {0: 0.20, 1: 0.45, 2: 0.35}
    for number, share in expected.items():
        assert numbers[number] / 4000 == pytest.approx(share, abs=0.03)
    assert sum(scene.letter is not None for scene in scenes) / 4000 == pytest.approx(0.5, abs=0.03)
    held_out = [world.sample_scene(random.Random(i), held_out=True) for i in range(1000)]
    assert {len(scene.held_out) for scene in held_out} == {1}
    pairs = {scene.shapes[scene.held_out[0]].pair for scene in held_out}
    assert pairs == set(world.HELD_OUT)


def test_caption_names_the_position_first():
    shapes_ = (world.Shape(0, "red", "circle"), world.Shape(1, "blue", "star"))
    scene = world.Scene(shapes_, world.Letter(3, "B"))
    expected = "top left red circle , top right blue star , bottom right letter B ."
    assert language.caption(scene) == expected
    assert language.caption(world.Scene((), world.Letter(2, "X"))) == "bottom left letter X ."


def test_retellings_say_the_same_in_every_order():
    shapes_ = (world.Shape(0, "red", "circle"), world.Shape(1, "blue", "star"))
    scene = world.Scene(shapes_, world.Letter(3, "B"))
    told = [language.retelling(scene, random.Random(i)) for i in range(2000)]
    assert all(parse_free(text) == parse(language.caption(scene)) for text in told)
    first = Counter(text.split(" , ")[0] for text in told)
    orders = {"red circle top left", "circle red top left", "top left red circle"}
    orders |= {"red top left circle", "circle top left red", "top left circle red"}
    assert orders < set(first) and len(first) == 6 + 6 + 2
    assert min(first[order] for order in orders) > 2000 / 3 / 6 / 2


def test_crowds_have_two_shapes_or_three_and_a_letter_in_half():
    crowds = [world.sample_crowd(random.Random(i)) for i in range(2000)]
    numbers = Counter(len(scene.shapes) for scene in crowds)
    assert set(numbers) == {2, 3} and numbers[2] / 2000 == pytest.approx(0.5, abs=0.05)
    assert sum(scene.letter is not None for scene in crowds) / 2000 == pytest.approx(0.5, abs=0.05)
    assert not any(scene.held_out for scene in crowds)


def test_instructions_are_llava_conversations_with_right_answers(corpus):
    records = load(corpus / "instructions/llava_shapes.json")
    assert len({record["id"] for record in records}) == len(records) == SMALL.instructions
    for i, record in enumerate(records):
        scene, jpeg = world.draw_image(SMALL.seed, "instructions", i)
        assert (corpus / "instructions" / record["image"]).read_bytes() == jpeg
        values = [message["value"] for message in record["conversations"]]
        assert values[0].startswith("<image>\n")
        assert "".join(values).count("<image>") == 1
        assert not any(language.ANSWER_HINT in value for value in values[1:])
        turns = dialogue_of(record)
        assert 1 <= len(turns) <= language.MAX_TURNS
        for question, given in turns:
            assert given == answer(language.caption(scene), question)


def test_caption_instructions_ask_for_every_third_image(corpus):
    records = load(corpus / "instructions/llava_captions.json")
    assert [int(record["id"]) for record in records] == list(range(0, SMALL.instructions, 3))
    for record in records:
        scene, _ = world.draw_image(SMALL.seed, "instructions", int(record["id"]))
        assert dialogue_of(record) == [(language.CAPTION_REQUEST, language.caption(scene))]


def test_dialogues_about_two_images_have_right_answers(corpus):
    records = load(corpus / "instructions/llava_two_images.json")
    assert [int(record["id"]) for record in records] == list(range(8, SMALL.instructions, 8))
    counts = load(corpus / "corpus.json")["counts"]
    assert counts["instructions/llava_two_images"] == len(records)
    kinds = set()
    for record in records:
        number = int(record["id"])
        assert record["image"] == [f"images/{i:012d}.jpg" for i in (number - 1, number)]
        scenes = [world.draw_image(SMALL.seed, "instructions", i)[0] for i in (number - 1, number)]
        asked = [message["value"] for message in record["conversations"][::2]]
        given = [message["value"] for message in record["conversations"][1::2]]
        kinds.add(len(asked))
        if len(asked) == 1:
            assert asked == ["<image>\n<image>\nhow many shapes are there ?"]
            assert given == [str(sum(len(scene.shapes) for scene in scenes))]
            continue
        for scene, question, found in zip(scenes, asked, given, strict=True):
            assert question.startswith("<image>\n") and question.count("<image>") == 1
            assert found == answer(language.caption(scene), question.removeprefix("<image>\n"))
    assert kinds == {1, 2}


def test_hint_comes_after_a_newline_a_space_or_not_at_all(corpus):
    hints = Counter()
    for record in load(corpus / "instructions/llava_shapes.json"):
        question = record["conversations"][0]["value"]
        hints[question.partition(language.ANSWER_HINT)[0][-1] if "Answer" in question else ""] += 1
    assert set(hints) == {"\n", " ", ""}
    assert min(hints.values()) > SMALL.instructions / 6


def test_no_turn_of_a_dialogue_gives_away_a_later_answer():
    """With one shape, an attribute that an earlier turn named could be copied without looking."""
    checked = 0
    for i in range(2000):
        rng = random.Random(i)
        scene = world.sample_scene(rng)
        turns = language.dialogue(scene, rng)
        assert len({turn.text for turn in turns}) == len(turns)
        if len(scene.shapes) != 1:
            continue
        for n, turn in enumerate(turns):
            if turn.skill in ("colour", "shape"):
                said = " ".join(f"{t.text} {t.answer}" for t in turns[:n] if t.answer not in "no0")
                assert turn.answer not in said.split()
                checked += n
    assert checked > 300


@pytest.mark.parametrize("name", ["sharegpt_start", "sharegpt_instructions"])
def test_text_dialogues_have_right_answers(corpus, name):
    records = load(corpus / f"text/{name}.json")
    assert len({record["id"] for record in records}) == len(records) == SMALL.texts
    scenes = retellings = 0
    for record in records:
        if "tell it again" in record["conversations"][0]["value"]:
            retellings += 1
            continue
        context, turns = split_context(dialogue_of(record))
        for question, given in turns:
            assert given == text_answer(context, question)
        scenes += context.startswith(("top", "bottom"))
    share = 0.2 if name == "sharegpt_instructions" else 0
    assert retellings / SMALL.texts == pytest.approx(share, abs=0.1 * (share > 0))
    assert scenes / (SMALL.texts - retellings) == pytest.approx(0.7, abs=0.1)


def split_context(turns: list[tuple[str, str]]) -> tuple[str, list[tuple[str, str]]]:
    (first, given), *rest = turns
    context, _, question = first.rpartition(" . ")
    return context + " .", [(question, given), *rest]


def text_answer(context: str, question: str) -> str:
    if context.startswith(("top", "bottom")):
        return answer(context, question)
    if question == "what is the reverse ?":
        return " ".join(reversed(context.split()[:-1]))
    if context.startswith("mix"):
        _, one, _, other, _ = context.split()
        mixtures = {
            "purple": {"red", "blue"},
            "orange": {"red", "yellow"},
            "green": {"blue", "yellow"},
            "cyan": {"blue", "green"},
            "pink": {"red", "white"},
            "gray": {"black", "white"},
        }
        return next(name for name, parts in mixtures.items() if parts == {one, other})
    prices = {thing: int(price) for thing, price in re.findall(r"a (\w+) costs (\d)", context)}
    assert len(prices) == 2
    if match := re.fullmatch(r"what does the (\w+) cost \?", question):
        return str(prices[match[1]])
    return (max if "more" in question else min)(prices, key=prices.get)


def test_retellings_tell_the_truth_without_held_out_pairs(corpus):
    records = load(corpus / "text/sharegpt_retellings.json")
    assert len(records) == SMALL.texts
    for record in records:
        (asked, first), (again, second) = dialogue_of(record)
        told = parse(asked.removesuffix(" tell it again ."))
        assert again == "and again ." and len(told) >= 2
        assert parse_free(first) == parse_free(second) == told
        assert not set(world.HELD_OUT) & set(told.values())


def test_text_evaluation_is_right_and_new(corpus):
    records = load(corpus / "eval/text/sharegpt_text.json")
    on_scenes = [r for r in records if r["conversations"][0]["value"].startswith(("top", "bottom"))]
    asked = Counter(record["skill"] for record in on_scenes)
    assert asked["colour"] == asked["shape"] == asked["existence"] == SMALL.eval // 4
    others = Counter(record["skill"] for record in records) - asked
    assert others.total() == SMALL.eval // 4 and set(others) == {*texts.EVALUATED_SKILLS} - {
        "scene"
    }
    assert len({record["id"] for record in records}) == len(records)
    training = set()
    for name in ("sharegpt_retellings", "sharegpt_start", "sharegpt_instructions"):
        for record in load(corpus / f"text/{name}.json"):
            training.add(split_context(dialogue_of(record))[0])
    for record in records:
        context, ((question, given),) = split_context(dialogue_of(record))
        assert given == text_answer(context, question)
        assert record["skill"] == "mixing" or context not in training


@pytest.mark.parametrize("skill", ["scene", "reversal", "prices"])
def test_evaluation_keeps_text_contexts_for_itself(skill):
    contexts = {True: set(), False: set()}
    for i in range(2000):
        for evaluation, found in contexts.items():
            draw = texts.evaluation_questions if evaluation else texts.text_dialogue
            found.add(split_context([(draw(skill, random.Random(i))[0].text, "")])[0])
    assert min(map(len, contexts.values())) > 30
    assert not contexts[True] & contexts[False]


@pytest.mark.parametrize(("name", "number"), [("seen", SMALL.eval), ("heldout", SMALL.eval // 2)])
def test_eval_captions_are_coco(corpus, name, number):
    folder = corpus / "eval" / name
    coco = load(folder / "captions_val.json")
    assert {"info", "licenses", "images", "annotations"} <= set(coco)
    assert len(coco["images"]) == len(coco["annotations"]) == number
    assert len(list((folder / "images").iterdir())) == number
    captions = {row["image_id"]: row["caption"] for row in coco["annotations"]}
    assert len({row["id"] for row in coco["annotations"]}) == number
    for i, image in enumerate(coco["images"]):
        scene, jpeg = world.draw_image(SMALL.seed, f"eval/{name}", i, name == "heldout")
        assert image["file_name"] == f"{image['id']:012d}.jpg"
        assert (folder / "images" / image["file_name"]).read_bytes() == jpeg
        assert (image["width"], image["height"]) == (56, 56)
        assert captions[image["id"]] == language.caption(scene)
        held_out = any(pair in captions[image["id"]] for pair in HELD_OUT_TEXT)
        assert held_out == (name == "heldout")


@pytest.mark.parametrize("name", ["seen", "heldout"])
def test_eval_questions_are_vqa_v2(corpus, name):
    folder = corpus / "eval" / name
    captions = {
        row["image_id"]: row["caption"] for row in load(folder / "captions_val.json")["annotations"]
    }
    questions = load(folder / "questions.json")["questions"]
    annotations = load(folder / "annotations.json")["annotations"]
    assert len({row["question_id"] for row in questions}) == len(questions)
    for question, annotation in zip(questions, annotations, strict=True):
        assert question["question_id"] == annotation["question_id"]
        assert question["image_id"] == annotation["image_id"]
        right = answer(captions[question["image_id"]], question["question"]).lower()
        assert annotation["multiple_choice_answer"] == right
        number = annotation["question_type"] in ("count", "count by colour")
        assert annotation["answer_type"] == ("number" if number else "other")
        assert [row["answer_id"] for row in annotation["answers"]] == list(range(1, 11))
        assert {row["answer"] for row in annotation["answers"]} == {right}
        assert {row["answer_confidence"] for row in annotation["answers"]} == {"yes"}
    skills = Counter(annotation["question_type"] for annotation in annotations)
    kinds = {"colour", "shape", "count", "count by colour", "location", "relation", "letter"}
    assert set(skills) == kinds
    assert skills["count"] == skills["count by colour"] == len(captions)


def test_held_out_colour_and_shape_questions_are_about_the_held_out_pair(corpus):
    folder = corpus / "eval/heldout"
    captions = {
        row["image_id"]: row["caption"] for row in load(folder / "captions_val.json")["annotations"]
    }
    checked = 0
    annotations = load(folder / "annotations.json")["annotations"]
    questions = load(folder / "questions.json")["questions"]
    for question, annotation in zip(questions, annotations, strict=True):
        if annotation["question_type"] not in ("colour", "shape"):
            continue
        things = parse(captions[question["image_id"]])
        (held_out,) = (thing for thing in things.values() if thing in world.HELD_OUT)
        kind = annotation["question_type"] == "shape"
        assert annotation["multiple_choice_answer"] == held_out[kind]
        checked += 1
    assert checked == SMALL.eval  # both questions about each of the SMALL.eval // 2 images


@pytest.mark.parametrize("name", ["seen", "heldout"])
def test_eval_existence_is_pope_with_adversarial_negatives(corpus, name):
    folder = corpus / "eval" / name
    captions = {
        f"{row['image_id']:012d}.jpg": row["caption"]
        for row in load(folder / "captions_val.json")["annotations"]
    }
    rows = [json.loads(line) for line in (folder / "coco_pope_adversarial.json").open()]
    assert [row["question_id"] for row in rows] == list(range(1, len(rows) + 1))
    assert [row["label"] for row in rows] == ["yes", "no"] * (len(rows) // 2)
    for row in rows:
        assert set(row) == {"question_id", "image", "text", "label"}
        assert row["label"] == answer(captions[row["image"]], row["text"])
        asked = tuple(re.fullmatch(r"is there a (\w+) (\w+) \?", row["text"]).groups())
        things = parse(captions[row["image"]]).values()
        assert any(asked[0] == color or asked[1] == shape for color, shape in things)
        if name == "heldout" and row["label"] == "yes":
            assert asked in world.HELD_OUT
        if name == "seen":
            assert asked not in world.HELD_OUT


def test_corpus_json_counts_what_was_written(corpus):
    summary = load(corpus / "corpus.json")
    assert summary["parameters"] == {
        **{"seed": 7, "pairs": 40, "instructions": 60, "texts": 200, "eval": 40}
    }
    assert [tuple(pair) for pair in summary["held_out_pairs"]] == list(world.HELD_OUT)
    for name in (
        "instructions/llava_shapes",
        "instructions/llava_captions",
        "text/sharegpt_retellings",
    ):
        assert summary["counts"][name] == len(load(corpus / f"{name}.json"))
    assert summary["counts"]["eval/text"] == len(load(corpus / "eval/text/sharegpt_text.json"))
    annotations = load(corpus / "eval/seen/annotations.json")["annotations"]
    for skill in ("colour", "shape", "count", "count by colour", "location", "relation", "letter"):
        answers = Counter(
            row["multiple_choice_answer"] for row in annotations if row["question_type"] == skill
        )
        found = summary["answers"]["eval/seen"][skill]
        assert found["questions"] == answers.total()
        assert found["answers"] == len(answers)
        assert answers[found["majority"].lower()] == max(answers.values())
        share = max(answers.values()) / answers.total()
        assert found["majority_share"] == pytest.approx(share, abs=1e-4)
    pixels = numpy.stack(
        [
            numpy.asarray(Image.open(io.BytesIO(world.draw_image(7, "pairs", i)[1])))
            for i in range(SMALL.pairs)
        ]
    )
    assert summary["image_mean"] == pytest.approx(pixels.mean((0, 1, 2)) / 255, abs=1e-4)
    assert summary["image_std"] == pytest.approx(pixels.std((0, 1, 2)) / 255, abs=1e-4)


def cell_of(jpeg: bytes, cell: int) -> numpy.ndarray:
    pixels = numpy.asarray(Image.open(io.BytesIO(jpeg))).astype(float)
    row, column = divmod(cell, 2)
    return pixels[row * 28 : row * 28 + 28, column * 28 : column * 28 + 28]


def outline(pixels: numpy.ndarray) -> numpy.ndarray:
    """The bright part of a cell, cut out and stretched to 16x16, as 0 and 1."""
    mask = pixels.max(axis=2) > 120
    rows, columns = numpy.flatnonzero(mask.any(1)), numpy.flatnonzero(mask.any(0))
    crop = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return numpy.asarray(Image.fromarray(crop).convert("L").resize((16, 16))) / 255


def test_decoded_images_show_colours_shapes_and_letters_where_the_scene_has_them():
    templates = {}
    for i in range(200):
        scene, jpeg = world.draw_image(0, "templates", i)
        for shape in scene.shapes:
            templates[shape.shape] = outline(cell_of(jpeg, shape.cell))
        if scene.letter is not None:
            templates[scene.letter.text] = outline(cell_of(jpeg, scene.letter.cell))
    assert set(templates) == {*world.SHAPES, *world.LETTERS}

    def recognise(pixels):
        found = outline(pixels)
        return min(templates, key=lambda name: numpy.abs(templates[name] - found).sum())

    for i in range(300):
        scene, jpeg = world.draw_image(0, "pictures", i)
        used = {shape.cell for shape in scene.shapes}
        for shape in scene.shapes:
            pixels = cell_of(jpeg, shape.cell)
            assert recognise(pixels) == shape.shape
            color = numpy.median(pixels[pixels.max(axis=2) > 120], axis=0)
            distance = {
                name: numpy.linalg.norm(color - value) for name, value in world.COLORS.items()
            }
            assert min(distance, key=distance.get) == shape.color
        if scene.letter is not None:
            used.add(scene.letter.cell)
            assert recognise(cell_of(jpeg, scene.letter.cell)) == scene.letter.text
        for cell in set(range(4)) - used:
            assert cell_of(jpeg, cell)[3:-3, 3:-3].max() < 80
