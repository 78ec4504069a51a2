"""Captions of Karpathy's splits: their files, and CIDEr-D against its formula and by hand."""

import json
import math
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import benchmark, tables
from megatron_owl2.evaluation.cider import approximate_ptb, cider_d
from megatron_owl2.evaluation.registry import find_benchmarks

TASKS = find_benchmarks()
REFERENCES = {
    1: ["a man rides a horse on a beach", "a man on a horse", "someone rides along the sea"],
    2: ["two dogs play in the snow", "dogs in snow"],
    3: ["a red bus on a street", "a bus on a street in the city", "a bus"],
}
CANDIDATES = {1: "a man rides a horse", 2: "two dogs dogs dogs in snow", 3: "a cat"}


def tokens(texts: dict) -> dict:
    return {
        i: t.split() if isinstance(t, str) else [s.split() for s in t] for i, t in texts.items()
    }


def by_formula(candidates: dict, references: dict, i: int) -> float:
    """CIDEr-D of an image, one n-gram at a time."""
    total = 0.0
    for n in range(1, 5):

        def grams(words: list[str], n: int = n) -> Counter:
            return Counter(zip(*(words[k:] for k in range(n)), strict=False))

        def weight(gram, count: int, grams=grams) -> float:
            documents = sum(
                any(gram in grams(text) for text in texts) for texts in references.values()
            )
            return count * math.log(len(references) / max(1, documents))

        ours = {g: weight(g, c) for g, c in grams(candidates[i]).items()}
        for text in references[i]:
            theirs = {g: weight(g, c) for g, c in grams(text).items()}
            dot = sum(min(w, theirs.get(g, 0)) * theirs.get(g, 0) for g, w in ours.items())
            norms = math.sqrt(sum(w * w for w in ours.values()))
            norms *= math.sqrt(sum(w * w for w in theirs.values()))
            longer = max(len(candidates[i]) - 1, 0) - max(len(text) - 1, 0)
            penalty = math.exp(-(longer**2) / 72)
            total += penalty * (dot / norms if norms else 0) / len(references[i])
    return 10 * total / 4


def test_cider_d_is_its_formula():
    candidates, references = tokens(CANDIDATES), tokens(REFERENCES)
    values = cider_d(candidates, references)
    assert list(values) == [1, 2, 3] and values[1] > 1 and values[2] > 0
    for i, value in values.items():
        assert value == pytest.approx(by_formula(candidates, references, i), rel=1e-12)


def test_cider_d_by_hand():
    references = {1: [["a", "b"]], 2: [["c", "d"]]}
    values = cider_d({1: ["a", "b"], 2: ["c", "x"]}, references)
    # 1: cosine 1 for n = 1 and 2, and nothing to compare for 3 and 4: 10 * 2 / 4.
    # 2: of c and x, both of weight log 2, one is right: cosine 1/2 for n = 1 and 0 for n = 2.
    assert values == {1: pytest.approx(5.0), 2: pytest.approx(1.25)}
    # Three words more: the penalty is exp(-9 / 72); "a" repeated counts as once.
    values = cider_d({1: ["a", "a", "a", "a", "b"], 2: []}, references)
    cosines = (1 + 1) / (math.sqrt(17) * math.sqrt(2)), 1 / (math.sqrt(9 + 1) * 1)
    assert values == {1: pytest.approx(10 * math.exp(-9 / 72) * sum(cosines) / 4), 2: 0.0}
    assert cider_d({1: ["a", "b"]}, {1: [["a", "b"]]}) == {1: 0.0}  # one image weighs nothing


@pytest.mark.parametrize(
    ("text", "expected"),
    [  # as Stanford's tokeniser and pycocoevalcap's list of marks leave them
        ("A man's dog doesn't like the t-shirt.", "a man 's dog does n't like the t-shirt"),
        ("Two men (one in black/white) play", "two men -lrb- one in black/white -rrb- play"),
        ("at 10:30 a.m. in St. Louis.", "at 10:30 a.m. in st. louis"),
        ("says \"STOP!\" -- don't go... they're", "says stop do n't go they 're"),
        ("She can't hold the $5.00, or 1,000", "she ca n't hold the $ 5.00 or 1,000"),
        ("kids' toys: red, blue; 50% off!", "kids toys red blue 50 % off"),
        ("a dog near it ,right here", "a dog near it right here"),
        ("he'd've a 5 o'clock café", "he 'd 've a 5 o'clock café"),
        ("it cannot", "it can not"),
        ("", ""),
    ],
)
def test_the_approximate_tokeniser(text, expected):
    assert approximate_ptb(text) == expected.split()


def dump(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def image(folder: Path, name: str) -> Path:
    path = folder / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)
    return path


def karpathy(i: int, name: str, split: str, *captions: str, **more) -> dict:
    sentences = [
        {"raw": raw, "tokens": raw.split(), "sentid": 10 * i + k, "imgid": i}
        for k, raw in enumerate(captions)
    ]
    row = {"filename": name, "imgid": i, "split": split, "sentences": sentences}
    return row | {"sentids": [10 * i + k for k in range(len(captions))]} | more


def test_karpathys_coco(tmp_path):
    names = [f"COCO_val2014_{i:012d}.jpg" for i in (391895, 7)]
    paths = [image(tmp_path, f"val2014/{names[0]}"), image(tmp_path, names[1])]
    rows = [
        karpathy(0, names[0], "test", "A man.", "Men", filepath="val2014", cocoid=391895),
        karpathy(1, "x.jpg", "restval", "A dog", filepath="val2014", cocoid=9),
        karpathy(2, names[1], "test", "A bus", filepath="val2014", cocoid=7),
    ]
    dump(tmp_path / "dataset_coco.json", {"dataset": "coco", "images": rows})
    questions, gold = benchmark.read(TASKS["coco_caption"], tmp_path)
    assert [(q.id, q.images, q.gold) for q in questions] == [
        (391895, (paths[0],), "A man."),
        (7, (paths[1],), "A bus"),
    ]
    assert gold[391895]["answers"] == ["A man.", "Men"]
    assert questions[0].prompt(TASKS["coco_caption"].suffix) == (
        "USER: <|image|>Provide a one-sentence caption for the provided image. ASSISTANT:"
    )
    name, content = TASKS["coco_caption"].submission({391895: "a\r man", 7: "b"}, gold)
    assert name == "coco_captions.json"
    assert json.loads(content) == [
        {"image_id": 391895, "caption": "a man"},
        {"image_id": 7, "caption": "b"},
    ]


@pytest.mark.parametrize("made_by", ["Karpathy", "Qwen"])
def test_flickr30k(tmp_path, made_by):
    path = image(tmp_path, "1007129816.jpg")
    if made_by == "Karpathy":
        rows = [karpathy(67, path.name, "test", "The man", "A man")]
        rows.append(karpathy(68, "2.jpg", "train", "A dog"))
        dump(tmp_path / "dataset_flickr30k.json", {"dataset": "flickr30k", "images": rows})
    else:
        images = [{"id": 67, "image": f"data/flickr30k/images/{path.name}"}]
        rows = [{"id": k, "image_id": 67, "caption": c} for k, c in enumerate(["The man", "A man"])]
        content = {"type": "captions", "info": {}, "images": images, "annotations": rows}
        dump(tmp_path / "flickr30k_karpathy_test.json", content)
    (question,), gold = benchmark.read(TASKS["flickr30k"], tmp_path)
    assert (question.id, question.images, question.gold) == (67, (path,), "The man")
    assert gold[67]["answers"] == ["The man", "A man"]


def test_captions_that_cannot_be_used_are_refused(tmp_path):
    file = tmp_path / "flickr30k.json"
    row = karpathy(67, "1.jpg", "test", "The man")
    dump(file, {"dataset": "flickr30k", "images": [row, row]})
    with pytest.raises(TaskError, match="1 rows repeat a id, such as 67"):
        benchmark.read(TASKS["flickr30k"], file)
    dump(file, {"dataset": "flickr30k", "images": [row | {"split": "val"}]})
    with pytest.raises(TaskError, match="holds no question"):
        benchmark.read(TASKS["flickr30k"], file)
    content = {"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a"}]}
    with pytest.raises(TaskError, match="image 1 has neither 'file_name' nor 'image'"):
        benchmark.read(TASKS["flickr30k"], dump(file, content))


def test_captions_are_scored_over_the_set_and_not_alone():
    gold = {i: {"answers": texts, "skill": "caption"} for i, texts in REFERENCES.items()}
    values = cider_d(tokens(CANDIDATES), tokens(REFERENCES))
    expected = round(100 * sum(values.values()) / 3, 2)
    scores = benchmark.score(TASKS["coco_caption"], CANDIDATES, gold, "split_at_spaces")
    row = {"cider_d": expected, "n": 3}
    assert scores == {"overall": row, "skills": {"caption": row}}
    loud = {i: text.upper() + "." for i, text in CANDIDATES.items()}
    near = benchmark.score(TASKS["coco_caption"], loud, gold)
    assert near["overall"]["cider_d"] == expected and "not exactly" in near["overall"]["note"]
    printed = tables.table(near, TASKS["coco_caption"].columns).splitlines()
    assert printed[0].split() == ["skill", "cider_d", "n"]
    assert printed[-2].split() == ["all", f"{expected:.2f}", "3"]
    assert printed[-1] == near["overall"]["note"]


def caption_gold() -> dict:
    return {i: {"answers": texts, "skill": "caption"} for i, texts in REFERENCES.items()}


def test_pycocoevalcap_and_own_cider_agree_on_tokens_that_are_words():
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("needs a Java runtime")
    gold, task = caption_gold(), TASKS["coco_caption"]
    ours = benchmark.score(task, CANDIDATES, gold)
    theirs = benchmark.score(task, CANDIDATES, gold, "pycocoevalcap")
    assert theirs["overall"]["cider_d"] == ours["overall"]["cider_d"] > 100
    assert theirs["skills"] == ours["skills"]
    assert set(theirs["overall"]) == {"cider_d", "n", "bleu_4", "rouge_l"}
    assert all(0 < theirs["overall"][name] < 100 for name in ("bleu_4", "rouge_l"))


class TokenisesLines:
    """A stand-in for PTBTokenizer, which hands Java a line per caption and gets lines back."""

    def tokenize(self, captions):
        owners = [i for i, texts in captions.items() for _ in texts]
        texts = [row["caption"].replace("\n", " ") for rows in captions.values() for row in rows]
        lines = re.split("\r\n|[\n\r\v\f\u2028\u2029]", "\n".join(texts))  # as Java ends them
        found = {i: [] for i in captions}
        for i, line in zip(owners, lines, strict=False):
            found[i].append(" ".join(line.lower().split()))
        return found


class CountsRight:
    """A stand-in for the scorers: the mean of 1 for each image with one of its references."""

    def __init__(self, *arguments):
        pass

    def compute_score(self, theirs, ours, **options):
        values = [float(ours[i][0] in texts) for i, texts in theirs.items()]
        return [sum(values) / len(values)] * 4, values


class Rouge(CountsRight):
    def compute_score(self, theirs, ours, **options):
        (mean, *_), values = super().compute_score(theirs, ours)
        return mean, values


@pytest.fixture
def stand_in(monkeypatch):
    """pycocoevalcap with no Java, so that tests need neither."""
    for name, kind, found in (
        ("bleu.bleu", "Bleu", CountsRight),
        ("cider.cider", "Cider", CountsRight),
        ("rouge.rouge", "Rouge", Rouge),
        ("tokenizer.ptbtokenizer", "PTBTokenizer", TokenisesLines),
    ):
        monkeypatch.setitem(sys.modules, f"pycocoevalcap.{name}", SimpleNamespace(**{kind: found}))
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\v", "\f", "\u2028", "\u2029", "\x85", " \r"])
@pytest.mark.parametrize("side", ["prediction", "reference"])
def test_a_caption_of_several_lines_is_its_own_images(stand_in, end, side):
    """Java's tokeniser ends a line at more than pycocoevalcap takes out of a caption."""
    said, gold = {i: texts[0] for i, texts in REFERENCES.items()}, caption_gold()
    if side == "prediction":
        said[1] = said[1].replace(" on ", f"{end}on ") + end
    else:
        texts = gold[1]["answers"]
        gold[1]["answers"] = [texts[0].replace(" on ", f"{end}on ") + end, *texts[1:]]
    overall = benchmark.score(TASKS["coco_caption"], said, gold, "pycocoevalcap")["overall"]
    assert overall == {"cider_d": 100.0, "n": 3, "bleu_4": 100.0, "rouge_l": 100.0}


def test_what_pycocoevalcap_needs_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(TaskError, match=r"pip install 'megatron-owl2\[captions\]'"):
        benchmark.score(TASKS["flickr30k"], CANDIDATES, caption_gold(), "pycocoevalcap")
    pytest.importorskip("pycocoevalcap")
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(TaskError, match="needs a Java runtime"):
        benchmark.score(TASKS["flickr30k"], CANDIDATES, caption_gold(), "pycocoevalcap")
