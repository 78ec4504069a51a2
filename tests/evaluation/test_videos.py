"""Videos: which frames are shown, damage by the file's name, and the tasks that ask about them."""

import json
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_files import LETTER, TASKS, asked, draw, dump, marks

from megatron_owl2.config.schema import ModelConfig, ParallelConfig, VisionConfig
from megatron_owl2.config.templates import TEMPLATES
from megatron_owl2.data.conversation import prompt_ids
from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import benchmark, runner, video_qa
from megatron_owl2.evaluation.benchmark import Question
from megatron_owl2.evaluation.runner import Settings
from megatron_owl2.evaluation.video_files import Video, frame_numbers
from megatron_owl2.evaluation.video_frames import read_frames
from megatron_owl2.mcore import setup

av = pytest.importorskip("av")
SHORT = " Answer the question using a single word or phrase. ASSISTANT:"


def film(
    path: Path, count: int, codec: str = "mpeg4", rate: int = 5, start: int = 0, **options: str
) -> Path:
    """A video whose frame i is grey of level 10 i, its first time stamp that of frame `start`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = {"ffv1": "bgr0", "gif": "rgb8"}.get(codec, "yuv420p")
    with av.open(str(path), "w", options=options) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.width = stream.height = 32
        stream.pix_fmt = pixels
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * i, np.uint8), "rgb24")
            if start:
                frame.pts, frame.time_base = start + i, Fraction(1, rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def levels(video: Video) -> list[int]:
    """Which of `film`'s frames were read."""
    frames = read_frames(video)
    assert all(f.shape == (3, 32, 32) and f.dtype == torch.uint8 for f in frames)
    return [round(f.float().mean().item() / 10) for f in frames]


@pytest.mark.parametrize(
    ("count", "wanted", "numbers"),
    [
        (17, 4, [2, 6, 10, 14]),
        (10, 4, [1, 3, 5, 8]),
        (1, 4, [0, 0, 0, 0]),
        (2, 4, [0, 0, 0, 1]),
        (9, 1, [4]),
        (10, 1, [4]),
        (5400, 5, [539, 1619, 2699, 3778, 4858]),
    ],
)
def test_frames_are_at_equal_distances(count, wanted, numbers):
    assert frame_numbers(count, wanted) == numbers


def test_frame_numbers_are_inside_the_video():
    for count in range(1, 60):
        for wanted in range(1, 30):
            numbers = frame_numbers(count, wanted)
            assert len(numbers) == wanted and numbers == sorted(numbers)
            assert numbers[0] >= 0 and numbers[-1] < count


def test_frames_with_the_ends_are_those_of_linspace():
    for count in (*range(1, 60), 899, 5400, 5401):
        for wanted in range(1, 100):
            published = [int(place) for place in np.linspace(0, count - 1, num=wanted)]
            assert frame_numbers(count, wanted, ends=True) == published
    assert frame_numbers(5400, 5, ends=True) == [0, 1349, 2699, 4049, 5399]


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "mpeg4"), ("a.avi", "mpeg4"), ("a.mkv", "ffv1")],
)
def test_the_frames_of_a_file_are_read(tmp_path, name, codec):
    path = film(tmp_path / name, 17, codec)
    assert levels(Video(path, 4)) == [2, 6, 10, 14]
    assert levels(Video(path, 1)) == [8]
    assert levels(Video(path, 4, ends=True)) == [0, 5, 10, 16]
    assert levels(Video(path, 2, (4, 9), "frames")) == [5, 7]
    assert levels(Video(path, 5, (12, 99), "frames")) == [12, 13, 14, 14, 15]
    assert levels(Video(path, 1, (1.0, 2.0))) == [7]  # five frames, of which it is the middle one
    with pytest.raises(TaskError, match=r"has no frame in seconds \[8.0, 9.0\]"):
        read_frames(Video(path, 1, (8.0, 9.0)))


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [("a.mp4", "mpeg4", 5), ("a.mkv", "ffv1", 5), ("a.mpg", "mpeg2video", 25)],
)
@pytest.mark.parametrize("start", [1, 15])
def test_segments_are_counted_from_the_first_frame(tmp_path, name, codec, rate, start):
    """Time stamps of a video need not begin at 0: those of a part that was cut out often do not."""
    path = film(tmp_path / name, 17, codec, rate, start)
    with av.open(str(path)) as file:
        assert file.streams.video[0].start_time > 0
    for begin, end in ((0, 5), (5, 10), (12, 17)):
        found = levels(Video(path, 5, (begin / rate, end / rate)))
        assert found == [begin + n for n in frame_numbers(5, 5)]
        assert levels(Video(path, 5, (begin, end), "frames")) == found
    assert levels(Video(path, 4)) == [2, 6, 10, 14]


def test_an_animated_gif_is_a_video(tmp_path, caplog):
    shown = read_frames(Video(film(tmp_path / "a.gif", 17, "gif"), 4))
    assert [round(f.float().mean().item() / 50) for f in shown] == [0, 1, 2, 3]
    levels(Video(film(tmp_path / "b.gif", 2, "gif", rate=1), 4))
    assert not caplog.records


def test_what_a_file_says_of_its_duration_is_not_believed(tmp_path, caplog):
    path = film(tmp_path / "a.mkv", 9, "ffv1")
    data = path.read_bytes()
    place = data.index(b"\x44\x89\x88")  # the duration in milliseconds, a number of 8 bytes
    for wrong in (3.0, 1e9, 0.0, float("nan")):
        number = np.array(wrong, ">f8").tobytes()
        path.write_bytes(data[: place + 3] + number + data[place + 11 :])
        assert levels(Video(path, 3)) == [1, 4, 6]
    assert f"{path} states a duration of 1000000.0 s and ends after 1.8 s" in caplog.text
    path.write_bytes(data[:place] + b"\xec\x89" + data[place + 2 :])  # none: a void element
    assert levels(Video(path, 3)) == [1, 4, 6]


def test_damaged_videos_are_named(tmp_path):
    whole = film(tmp_path / "a.mp4", 17, movflags="faststart").read_bytes()
    path = tmp_path / "cut.mp4"
    for data, reason in (
        (b"", "cannot be decoded"),
        (b"<html>404</html>" * 40, "cannot be decoded"),
        (whole[:100], "cannot be decoded|holds no video"),
        (whole[:-40], "is cut: it holds 1[67] of 17 frames"),
        (whole[:-40] + bytes(40), None),  # a body that is noise is an error or a frame
    ):
        path.write_bytes(data)
        if reason:
            with pytest.raises(TaskError, match=f"{path} ({reason})"):
                read_frames(Video(path, 4))
    (tmp_path / "words.txt").write_text("no video")
    with pytest.raises(TaskError, match=r"words.txt (cannot be decoded|holds no video)"):
        read_frames(Video(tmp_path / "words.txt", 4))
    with pytest.raises(TaskError, match="gone.mp4 cannot be decoded: No such file"):
        read_frames(Video(tmp_path / "gone.mp4", 4))


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(TaskError, match=r"videos need PyAV: pip install 'megatron-owl2\[video\]'"):
        read_frames(Video(tmp_path / "a.mp4", 4))


class Spelled:
    """A tokenizer whose ids are characters."""

    bos_id = 1

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def test_all_frames_stand_in_the_place_of_one_placeholder(tmp_path):
    video, image = Video(tmp_path / "a.mp4", 3), tmp_path / "b.png"
    question = Question(1, "what?", (video,), "x", None)
    assert question.prompt("") == "USER: <|image|><|image|><|image|>what? ASSISTANT:"
    ids = prompt_ids(question.prompt(""), Spelled())
    assert ids[:8] == [1, *map(ord, "USER: "), -200] and ids[8:10] == [-200, -200]
    assert "\n" not in "".join(chr(i) for i in ids if i > 0)
    joined = replace(video, joined=True)
    assert replace(question, images=(joined,)).prompt("") == "USER: <|image|>what? ASSISTANT:"
    placed = Question(1, "<|image|>then<|image|>?", (image, video), "x", None, placed=True)
    assert placed.prompt("", TEMPLATES["vicuna_v1"]).endswith(
        " USER: <|image|>\nthen<|image|><|image|><|image|>? ASSISTANT:"
    )


def test_msrvtt_and_msvd_ask_about_numbered_videos(tmp_path):
    rows = [
        {"id": 7, "video_id": 7010, "question": "what is it?", "answer": "Car", "category_id": 1},
        {"id": 8, "video_id": 7010, "question": "is it red?", "answer": "yes", "category_id": 1},
    ]
    dump(tmp_path / "test_qa.json", rows)
    with pytest.raises(TaskError, match="videos does not exist; the videos of .* go there"):
        asked("msrvtt_qa", tmp_path)
    (tmp_path / "videos").mkdir()
    with pytest.raises(TaskError, match=r"1 images .* do not exist, such as .*video7010.mp4"):
        asked("msrvtt_qa", tmp_path)
    path = film(tmp_path / "videos/video7010.avi", 3)
    questions, gold, prompts = asked("msrvtt_qa", tmp_path)
    assert questions[7].images == (Video(path, 4),)
    assert prompts[7] == f"USER: {'<|image|>' * 4}what is it?{SHORT}"
    said = {7: " car ", 8: "Yes."}
    assert marks("msrvtt_qa", said, gold) == {
        "other": (0.0, 1),
        "what": (100.0, 1),
        "all": (50.0, 2),
    }
    _, content = TASKS["msrvtt_qa"].submission(said, gold)
    assert json.loads(content)[0] == {
        "id": 7, "question": "what is it?", "answer": "Car", "pred": " car "
    }  # fmt: skip
    shown, _ = benchmark.read(TASKS["msrvtt_qa"], tmp_path, frames=2)
    assert shown[0].images == (Video(path, 2),) and shown[0].prompt("").count("<|image|>") == 2
    film(tmp_path / "videos/video7010.mp4", 3)
    with pytest.raises(TaskError, match="'video7010' may be .*avi or .*mp4; leave one"):
        asked("msrvtt_qa", tmp_path)

    named = film(tmp_path / "videos/-4wsuPCjDBc_5_15.avi", 3)
    (tmp_path / "youtube_mapping.txt").write_text("-4wsuPCjDBc_5_15 vid7010\n")
    assert asked("msvd_qa", tmp_path)[0][7].images == (Video(named, 4),)
    (tmp_path / "youtube_mapping.txt").write_text("-4wsuPCjDBc_5_15\n")
    with pytest.raises(TaskError, match="youtube_mapping.txt: line 1 must be a name and a number"):
        asked("msvd_qa", tmp_path)


def test_tgif_asks_about_gifs(tmp_path):
    path = film(tmp_path / "videos/tumblr_1.gif", 3, "gif")
    table = "gif_name\tquestion\tanswer\ttype\tvid_id\ntumblr_1\thow many?\ttwo\t1\tFRAMEQA1\n"
    table += 'tumblr_1\twhat does it say ,"hi" now\thi\t1\tFRAMEQA2\n'
    (tmp_path / "Test_frameqa_question.csv").write_text(table)
    questions, gold, _ = asked("tgif_qa", tmp_path)
    assert questions[0].images == (Video(path, 4),)
    assert questions[1].text == 'what does it say ,"hi" now'
    right = {"how": (100.0, 1), "what": (100.0, 1), "all": (100.0, 2)}
    assert marks("tgif_qa", {0: "TWO", 1: "hi"}, gold) == right


class Joined:
    """A generator that answers with the grey levels of the frames of every input."""

    def __init__(self, loaded):
        pass

    def generate(self, prompts, images, max_new_tokens, min_new_tokens):
        assert [p.count("<|image|>") for p in prompts] == [1] * len(images)
        assert all(len(row) == 1 and row[0].shape[-3:] == (3, 28, 28) for row in images)
        means = [row[0].float().mean(dim=(-3, -2, -1)) for row in images]
        return [" ".join(str(round(m / 10)) for m in mean.reshape(-1).tolist()) for mean in means]


def test_a_model_with_temporal_adapters_sees_a_video_as_one_input(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "Generator", Joined)
    setup.initialize(ParallelConfig())
    row = {"id": 1, "video_id": 1, "question": "which?", "answer": "2 6 10 14"}
    dump(tmp_path / "test_qa.json", [row])
    film(tmp_path / "videos/video1.mp4", 17)
    task = TASKS["msrvtt_qa"]

    def evaluate(temporal: bool, frames: int | None = None, blind: bool = False) -> dict:
        config = ModelConfig(vision=VisionConfig(image_size=28, temporal=temporal))
        questions, gold = benchmark.read(task, tmp_path, frames=frames)
        loaded, out = type("Loaded", (), {"config": config}), tmp_path / "out"
        settings = Settings(blind=blind)
        result = runner.evaluate(loaded, "msrvtt_qa", questions, gold, out, settings, {})
        said = json.loads((out / "predictions.jsonl").read_text())["answer"]
        return {"said": said, "frames": result["frames"], "right": result["overall"]["accuracy"]}

    assert evaluate(True) == {"said": "2 6 10 14", "frames": 4, "right": 100.0}
    assert evaluate(True, 3)["said"] == "2 7 13"
    assert evaluate(True, 1)["said"] == "8"  # as an image, without the adapters
    assert evaluate(True, blind=True)["said"] == "0 0 0 0"
    with pytest.raises(AssertionError):
        evaluate(False)  # of other models every frame is an image


class Counts:
    """A generator that answers with the grey levels of what it is shown."""

    def __init__(self, loaded):
        pass

    def generate(self, prompts, images, max_new_tokens, min_new_tokens):
        assert [p.count("<|image|>") for p in prompts] == [len(row) for row in images]
        assert all(i.shape == (3, 28, 28) and i.dtype == torch.uint8 for r in images for i in r)
        return [" ".join(str(round(i.float().mean().item() / 10)) for i in row) for row in images]


def test_the_evaluation_shows_frames_to_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "Generator", Counts)
    setup.initialize(ParallelConfig())
    rows = [
        {"id": n, "video_id": n, "question": "which?", "answer": answer}
        for n, answer in ((1, "2 6 10 14"), (2, "0 0 0 1"))
    ]
    dump(tmp_path / "test_qa.json", rows)
    film(tmp_path / "videos/video1.mp4", 17)
    path = film(tmp_path / "videos/video2.mp4", 2)
    config = ModelConfig(vision=VisionConfig(image_size=28))
    loaded, task = type("Loaded", (), {"config": config}), TASKS["msrvtt_qa"]

    def evaluate(frames: int | None, blind: bool) -> dict:
        questions, gold = benchmark.read(task, tmp_path, frames=frames)
        settings = Settings(blind=blind, batch_size=2)
        out = tmp_path / "out"
        return runner.evaluate(loaded, "msrvtt_qa", questions, gold, out, settings, {})

    result = evaluate(None, False)
    assert result["overall"]["accuracy"] == 100.0 and result["frames"] == 4
    row = json.loads((tmp_path / "out/predictions.jsonl").read_text().splitlines()[1])
    assert row["images"] == [str(path)] and row["answer"] == "0 0 0 1"
    assert evaluate(1, True)["frames"] == 1
    row = json.loads((tmp_path / "out/predictions.jsonl").read_text().splitlines()[0])
    assert row["answer"] == "0"
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(TaskError, match=r"video2.mp4 (cannot be decoded|holds no video)"):
        evaluate(None, False)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("{'pred': 'yes', 'score': 4.8}", ("yes", 4)),
        ('{"pred": "No", "score": "3"}', ("no", 3)),
        ("{'pred': 'maybe', 'score': 2}", ("", 2)),
        ("{'pred': 'yes", None),  # cut
        ("Here it is: {'pred': 'yes', 'score': 4}", None),
        ("{'pred': 'yes', 'score': 'high'}", None),
        ("{'score': 4}", None),
        ("__import__('os').getcwd()", None),
        ("(" * 500, None),
        ("", None),
    ],
)
def test_a_verdict_on_an_answer_is_a_dictionary(reply, verdict):
    assert video_qa.verdict(reply) == verdict


def test_verdicts_are_counted_as_video_chatgpt_counts_them():
    gold = {i: {"skill": "what", "answer": "x"} for i in range(5)}
    replies = [
        "{'pred': 'yes', 'score': 4.9}",
        "{'pred': 'no', 'score': 1}",
        "{'pred': 'maybe', 'score': 3}",
        "{'pred': 'yes', 'score': 5}",
        "none",
    ]
    table = benchmark.score(TASKS["msvd_qa"], dict(enumerate(replies)), gold, "judged")
    assert table["overall"] == {"accuracy": 66.67, "score": 3.25, "unreadable": 1, "n": 5}
    assert table["skills"] == {"what": table["overall"]}


def test_egoschema_shows_videos_where_there_are_no_frames(tmp_path):
    options = {f"option {n}": "abcde"[n] for n in range(5)}
    rows = [{"q_uid": uid, "question": "what?", **options} for uid in ("u1", "u2")]
    dump(tmp_path / "questions.json", rows)
    frame = draw(tmp_path / "images/u1/1.png")
    path = film(tmp_path / "videos/u2.mp4", 6)
    questions, _, prompts = asked("egoschema", tmp_path)
    assert questions["u1"].images == (frame,) and questions["u2"].images == (Video(path, 5),)
    assert prompts["u2"].startswith("USER: " + "<|image|>" * 5 + "what?\nA. a")
    with pytest.raises(TaskError, match="frames are of videos, and no question"):
        benchmark.read(TASKS["egoschema"], tmp_path, limit=1, frames=3)
    compared, _ = benchmark.read(TASKS["egoschema"], tmp_path, variant="yes", frames=3)
    assert compared[1].images == (Video(path, 3, ends=True),)
    (official, *_) = TASKS["egoschema"].prompts_of(compared[1], "official", "", TEMPLATES["owl2"])
    assert official.count("Human: <|image|>\n") == 3


def test_seed_bench_asks_about_videos_and_their_segments(tmp_path):
    row = {"question": "which?", "answer": "B", "data_type": "video", "question_type_id": 10}
    row |= dict(zip(["choice_a", "choice_b", "choice_c", "choice_d"], "wxyz", strict=True))
    rows = [
        row | {"question_id": "v1", "data_id": "1.mkv"},
        row | {"question_id": "v2", "data_id": "P03/P03_24.MP4", "segment": [648.0, 658.0]},
        row | {"question_id": "v3", "data_id": "P06/P06.avi", "segment": [18, 166]},
        row | {"question_id": "1", "data_id": "a", "data_type": "image", "question_type_id": 1},
    ]
    file = dump(tmp_path / "SEED-Bench.json", {"questions": rows})
    draw(tmp_path / "images/a")
    one = film(tmp_path / "videos/1.mkv", 9, "ffv1")
    two, three = draw(tmp_path / "videos/P03/P03_24.MP4"), draw(tmp_path / "videos/P06.avi")
    questions, gold, prompts = asked("seed_bench", tmp_path)
    assert questions["v1"].images == (Video(one, 1),) and levels(Video(one, 1)) == [4]
    assert questions["v2"].images == (Video(two, 1, (648.0, 658.0)),)
    assert questions["v3"].images == (Video(three, 1, (18, 166), "frames"),)
    assert prompts["v1"] == f"USER: <|image|>which?\nA. w\nB. x\nC. y\nD. z{LETTER}"
    found = marks("seed_bench", {"v1": "B", "v2": "B", "v3": "A", "1": "A"}, gold)
    assert found["all videos"] == (66.67, 3) and found["all images"] == (0.0, 1)
    assert found["all"] == (50.0, 4)
    dump(file, {"questions": [row | {"question_id": "v1", "data_id": "1", "segment": [5, 2]}]})
    with pytest.raises(TaskError, match=r"'segment' is \[5, 2\], wanted a start and an end"):
        asked("seed_bench", tmp_path)
