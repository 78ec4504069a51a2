"""Language of the embedded corpus about its scenes: captions, retellings, questions, dialogues."""

import random
from dataclasses import dataclass

from data_prep.toy_corpus.world import COLORS, PAIRS, POSITIONS, TRAINING_PAIRS, Scene

CAPTION_REQUEST = "Provide a one-sentence caption for the provided image."
ANSWER_HINT = "Answer the question using a single word or phrase."
# LLaVA's training data put the hint on a new line, mPLUG-Owl2's VQA evaluation puts it after a
# space, and a user leaves it out: one third of the dialogues each.
_HINTS = (f"\n{ANSWER_HINT}", f" {ANSWER_HINT}", "")

MAX_TURNS = 6
_BOTH = 0.25  # share of the dialogues on two images with a question about both
# A skill's tickets in the draw for a dialogue's turns: the more, the earlier and the more often.
_TICKETS = {
    "colour": 3,
    "shape": 3,
    "count": 1,
    "count by colour": 1,
    "location": 1,
    "relation": 3,
    "existence": 3,
    "letter": 1,
}


@dataclass(frozen=True)
class Question:
    """Question with its answer; `asks` and `tells` are the facts it needs and gives away."""

    skill: str
    text: str
    answer: str
    asks: frozenset = frozenset()
    tells: frozenset = frozenset()


def caption(scene: Scene) -> str:
    """Caption in reading order, position first: "top left red circle , top right letter B ."."""
    parts = _things(scene)
    return " , ".join(" ".join(parts[cell]) for cell in sorted(parts)) + " ."


def retelling(scene: Scene, rng: random.Random) -> str:
    """Caption in free order, of the things and of the words for each: "letter B top right , red top
    left circle ."

    Whoever predicts it from another telling must find each thing by whatever comes first of it.
    """
    parts = list(_things(scene).values())
    rng.shuffle(parts)
    return " , ".join(" ".join(rng.sample(words, len(words))) for words in parts) + " ."


def _things(scene: Scene) -> dict[int, list[str]]:
    """Words for the thing in each cell, position first."""
    things = {s.cell: [POSITIONS[s.cell], s.color, s.shape] for s in scene.shapes}
    if scene.letter is not None:
        cell = scene.letter.cell
        things[cell] = [POSITIONS[cell], f"letter {scene.letter.text}"]
    return things


def candidate_questions(scene: Scene, rng: random.Random) -> dict[str, list[Question]]:
    """Questions of each skill that the scene can answer; skills without one are left out.

    Colour, shape and existence questions are about the held-out pairs if the scene has any. The
    wrong pair of a negative existence question keeps the colour or the shape of one in the image;
    on a training image it is a training pair.
    """
    subjects = scene.held_out or tuple(range(len(scene.shapes)))
    found = {
        "colour": [q for i in subjects for q in _color_questions(scene, i)],
        "shape": [q for i in subjects for q in _shape_questions(scene, i)],
        "count": [_count_question(scene)],
        "count by colour": _color_count_questions(scene, rng),
        "location": _location_questions(scene),
        "relation": _relation_questions(scene),
        "existence": [q for i in subjects for q in _existence_questions(scene, i, rng)],
        "letter": [],
    }
    if scene.letter is not None:
        facts = frozenset({"letter"})
        question = Question("letter", "what letter is there ?", scene.letter.text, facts, facts)
        found["letter"].append(question)
    return {skill: questions for skill, questions in found.items() if questions}


def dialogue(scene: Scene, rng: random.Random) -> list[Question]:
    """Up to six different questions, none answered already by the turns before it."""
    candidates = candidate_questions(scene, rng)
    turns: list[Question] = []
    told: frozenset = frozenset()
    tickets = [_TICKETS[skill] for skill in candidates]
    for skill in rng.sample(tuple(candidates), sum(tickets), counts=tickets):
        said = {turn.text for turn in turns}
        open_questions = [q for q in candidates[skill] if not q.asks <= told and q.text not in said]
        if open_questions and len(turns) < MAX_TURNS:
            turns.append(rng.choice(open_questions))
            told |= turns[-1].tells
    return turns


def two_image_dialogue(
    first: Scene, second: Scene, rng: random.Random
) -> list[tuple[int, Question]]:
    """Turns about two images, each with the number of images that come before its question.

    Either one question about each image, behind it, or how many shapes there are on both.
    """
    if rng.random() < _BOTH:
        total = str(len(first.shapes) + len(second.shapes))
        return [(2, Question("count", "how many shapes are there ?", total))]
    return [(1, rng.choice(dialogue(scene, rng))) for scene in (first, second)]


def with_hint(turns: list[Question], rng: random.Random) -> list[tuple[str, str]]:
    """(question, answer) pairs; the short-answer hint, if drawn, follows the first question."""
    hint = rng.choice(_HINTS)
    return [(q.text + (hint if i == 0 else ""), q.answer) for i, q in enumerate(turns)]


def _name(scene: Scene, i: int) -> str | None:
    """Shortest name that only shape `i` bears, or None if another shape looks the same."""
    shape = scene.shapes[i]
    if sum(other.shape == shape.shape for other in scene.shapes) == 1:
        return shape.shape
    if sum(other.pair == shape.pair for other in scene.shapes) == 1:
        return f"{shape.color} {shape.shape}"
    return None


def _color_questions(scene: Scene, i: int) -> list[Question]:
    shape = scene.shapes[i]
    asks = frozenset({("color", i)})
    text = f"what color is the {POSITIONS[shape.cell]} one ?"
    questions = [Question("colour", text, shape.color, asks, asks)]
    if _name(scene, i) == shape.shape:
        text = f"what color is the {shape.shape} ?"
        questions.append(Question("colour", text, shape.color, asks, asks | {("shape", i)}))
    return questions


def _shape_questions(scene: Scene, i: int) -> list[Question]:
    shape = scene.shapes[i]
    asks = frozenset({("shape", i)})
    text = f"what shape is the {POSITIONS[shape.cell]} one ?"
    questions = [Question("shape", text, shape.shape, asks, asks)]
    if sum(other.color == shape.color for other in scene.shapes) == 1:
        text = f"what shape is the {shape.color} one ?"
        questions.append(Question("shape", text, shape.shape, asks, asks | {("color", i)}))
    return questions


def _count_question(scene: Scene) -> Question:
    number = frozenset({"count"})
    total = str(len(scene.shapes))
    return Question("count", "how many shapes are there ?", total, number, number)


def _color_count_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Questions for the number of shapes of a colour that is there and of one that is not."""
    questions = []
    present = [shape.color for shape in scene.shapes]
    absent = rng.choice([color for color in COLORS if color not in present])
    every_color = frozenset(("color", i) for i in range(len(present))) or frozenset({"count"})
    for color in (absent, *rng.sample(present, min(len(present), 1))):
        told = frozenset(("color", i) for i, other in enumerate(present) if other == color)
        text = f"how many {color} shapes are there ?"
        number = str(present.count(color))
        questions.append(Question("count by colour", text, number, every_color, told))
    return questions


def _location_questions(scene: Scene) -> list[Question]:
    questions = []
    for i, shape in enumerate(scene.shapes):
        if (name := _name(scene, i)) is not None:
            asks = frozenset({("location", i)})
            tells = asks | _told_by(name, i)
            text = f"where is the {name} ?"
            questions.append(Question("location", text, POSITIONS[shape.cell], asks, tells))
    if scene.letter is not None:
        asks = frozenset({("location", "letter")})
        answer = POSITIONS[scene.letter.cell]
        questions.append(Question("location", "where is the letter ?", answer, asks, asks))
    return questions


def _told_by(name: str, i: int) -> set:
    """Facts that the name of shape `i` gives away."""
    return {("shape", i), ("color", i)} if " " in name else {("shape", i)}


def _relation_questions(scene: Scene) -> list[Question]:
    """Questions where one thing is relative to another in its row or column; diagonals would be
    ambiguous."""
    named = []
    for i, shape in enumerate(scene.shapes):
        if (name := _name(scene, i)) is not None:
            named.append((shape.cell, name, _told_by(name, i)))
    if scene.letter is not None:
        named.append((scene.letter.cell, "letter", set()))
    questions = []
    for cell, name, told in named:
        for other_cell, other_name, other_told in named:
            step = cell - other_cell
            if cell // 2 == other_cell // 2 and step:
                answer = "right" if step > 0 else "left"
            elif abs(step) == 2:
                answer = "below" if step > 0 else "above"
            else:
                continue
            text = f"where is the {name} relative to the {other_name} ?"
            asks = frozenset({"relation"})
            tells = frozenset(told | other_told | asks)
            questions.append(Question("relation", text, answer, asks, tells))
    return questions


def _existence_questions(scene: Scene, i: int, rng: random.Random) -> list[Question]:
    """One question with the answer yes and one adversarial question with the answer no."""
    color, shape = scene.shapes[i].pair
    present = {other.pair for other in scene.shapes}
    pool = PAIRS if scene.held_out else TRAINING_PAIRS
    near = [p for p in pool if (p[0] == color) != (p[1] == shape) and p not in present]
    facts = frozenset({("color", i), ("shape", i)})
    wrong = " ".join(rng.choice(near))
    return [
        Question("existence", f"is there a {color} {shape} ?", "yes", facts, facts),
        Question("existence", f"is there a {wrong} ?", "no", facts),
    ]
