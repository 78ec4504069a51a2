"""Judged benchmarks through files and a server: requests, replies, attempts, runs and scores."""

import json
import re

import pytest
from benchmark_files import TASKS, dump
from judge_server import BODY, judge, lines, reply, rows_of

from megatron_owl2.cli.evaluate import main
from megatron_owl2.errors import JudgeError, ScoreError, TaskError
from megatron_owl2.evaluation import judge_files
from megatron_owl2.evaluation.judge_client import Server, ask_all
from megatron_owl2.evaluation.judge_files import Replies, read_replies, score_replies

VET = {
    "v1_0": {"imagename": "a.png", "question": "x?", "answer": "-1<AND>-5", "capability": ["math"]},
    "v1_1": {"imagename": "a.png", "question": "y?", "answer": "4", "capability": ["math", "ocr"]},
}


def ids_of(rows: list[dict]) -> list[str]:
    """Their custom_ids, all of which have a mark of the request, without it."""
    ids = [row["custom_id"] for row in rows]
    assert all(re.match(r"\d\.\d-[0-9a-f]{8}\.", i) for i in ids)
    return [judge_files.unmarked(i) for i in ids]


def requests_of(task: str, predictions: dict, gold: dict, replies=None, **options) -> list[dict]:
    judge = TASKS[task].judge
    given = {"prompt": judge.prompt, "model": judge.model} | options
    given_replies = replies or Replies({})
    return list(judge_files.requests(TASKS[task], predictions, gold, given_replies, **given))


def test_mmvet_from_predictions_to_a_mean_of_runs(tmp_path, monkeypatch, capsys):
    gold = dump(tmp_path / "mm-vet.json", VET)
    predictions = lines(
        tmp_path / "p.jsonl", [{"id": "v1_0", "answer": "{x}"}, {"id": "v1_1", "answer": "4"}]
    )
    requests, replies = tmp_path / "requests.jsonl", tmp_path / "replies.jsonl"
    make = ["requests", "--task", "mmvet", "--predictions", predictions, "--gold", gold]
    make += ["--output", requests, "--replies", replies, "--runs", "2"]
    assert main([*map(str, make)]) == 0
    assert capsys.readouterr().out == f"4 requests are in {requests}\n"
    first = rows_of(requests)[0]
    assert ids_of(rows_of(requests)) == ["1.1.v1_0", "1.1.v1_1", "2.1.v1_0", "2.1.v1_1"]
    assert (first["method"], first["url"]) == ("POST", "/v1/chat/completions")
    body = first["body"]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("gpt-4-0613", 0.0, 3)
    (message,) = body["messages"]
    assert message["role"] == "user"
    assert message["content"].endswith("\nx? | -1 <AND> -5 | {x} | ")

    def grades(body, number):
        """1.0 for the second question; for the first none at first, then 0.5."""
        last = body["messages"][0]["content"].splitlines()
        if "y? | 4" in last[-1]:
            return "1.0"
        return "0.5" if last[-1].startswith("The grade") else "I think"

    monkeypatch.setenv("KEY_OF_JUDGE", "secret")
    with judge(grades) as (url, asked):
        ask = ["judge", "--requests", requests, "--replies", replies, "--base-url", url]
        ask = [*map(str, ask), "--model", "other"]
        assert main([*ask, "--api-key-env", "KEY_OF_JUDGE", "--concurrency", "2"]) == 0
        assert capsys.readouterr().out == f"4 new replies are in {replies}\n"
        assert main([*ask]) == 0  # nothing is asked twice
        assert capsys.readouterr().out == f"0 new replies are in {replies}\n" and len(asked) == 4
        assert {(path, key) for path, _, key in asked} == {
            ("/v1/chat/completions", "Bearer secret")
        }
        assert {body["model"] for _, body, _ in asked} == {"other"}
        assert main([*map(str, make)]) == 0
        capsys.readouterr()
        assert ids_of(rows_of(requests)) == ["1.2.v1_0", "2.2.v1_0"]
        assert main([*ask]) == 0
    assert main([*map(str, make)]) == 0
    assert capsys.readouterr().out.endswith("no request is left\n")
    score = ["score", "--task", "mmvet", "--gold", gold, "--replies", replies]
    assert main([*map(str, score)]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "overall": {"score": 75.0, "unreadable": 0, "n": 2, "score_std": 0.0, "runs": 2},
        "skills": {
            "math": {"score": 75.0, "unreadable": 0, "n": 2},
            "ocr": {"score": 100.0, "unreadable": 0, "n": 1},
        },
    }
    for key, fault in (("", "is not set"), ("a\nb", "is no key of a server")):
        monkeypatch.setenv("KEY_OF_JUDGE", key)
        with pytest.raises(SystemExit):
            main([*ask, "--api-key-env", "KEY_OF_JUDGE"])
        assert f"the variable KEY_OF_JUDGE {fault}" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["answers", "model", "prompt"])
@pytest.mark.parametrize("by", ["judge", "batch"])
def test_replies_to_other_answers_or_of_other_judges_are_refused(tmp_path, capsys, change, by):
    gold = dump(tmp_path / "mm-vet.json", VET)
    said, prompt = tmp_path / "p.jsonl", tmp_path / "prompt.txt"
    requests, replies = tmp_path / "requests.jsonl", tmp_path / "replies.jsonl"
    prompt.write_text("{question} {prediction}")
    lines(said, [{"id": i, "answer": "one"} for i in VET])
    make = ["requests", "--task", "mmvet", "--predictions", said, "--gold", gold]
    make = [*map(str, make), "--output", str(requests), "--replies", str(replies)]
    assert main(make) == 0
    if by == "batch":  # which gives back the custom_id and no other field
        lines(replies, [reply(row["custom_id"], "0.5") for row in rows_of(requests)])
    else:
        with judge(lambda body, number: "0.5") as (url, _):
            ask_all(judge_files.read_requests(requests), replies, Server(url))
    assert main(make) == 0 and "no request is left" in capsys.readouterr().out
    if change == "answers":
        lines(said, [{"id": i, "answer": "two"} for i in VET])
    changed = {"model": ["--judge-model", "other"], "prompt": ["--judge-prompt", str(prompt)]}
    make += changed.get(change, [])
    assert main(make) == 2
    told = capsys.readouterr().err
    assert re.search(r"the reply 1\.1-[0-9a-f]{8}\.v1_0 is to another answer, judge's model", told)
    assert "--replies" in told and told.count("\n") == 1
    assert main([*make, "--replies", str(tmp_path / "others.jsonl")]) == 0


def test_a_judge_does_not_mix_replies_to_different_requests(tmp_path):
    path, server = tmp_path / "replies.jsonl", Server("http://127.0.0.1:9", tries=1)
    lines(path, [reply("1.1-0123abcd.a", "0.5")])
    with pytest.raises(JudgeError, match="holds the reply 1.1-0123abcd.a, to another answer"):
        ask_all({"1.1-0123abce.a": BODY}, path, server)
    for replied, asked in (  # requests or replies of earlier versions have no mark
        ("1.1-0123abcd.a", "1.1-0123abcd.a"),
        ("1.1.a", "1.1-0123abcd.a"),
        ("1.1-0123abcd.a", "1.1.a"),
    ):
        lines(path, [reply(replied, "0.5")])
        assert ask_all({asked: BODY}, path, server) == 0
    lines(path, [reply("1.1-0123abcd.a", "0.5"), reply("1.1-0123abce.a", "1")])
    with pytest.raises(TaskError, match="holds replies to several requests 1.1.a"):
        read_replies(path)


def test_runs_have_a_mean_and_a_deviation():
    gold = {i: row | {"reference": row["answer"], "answer": None} for i, row in VET.items()}
    runs = {n: {"v1_0": {1: g}, "v1_1": {1: "1"}} for n, g in enumerate(["0", ".5", "1"], 1)}
    overall = score_replies(TASKS["mmvet"], Replies(runs), gold)["overall"]
    # 50, 75 and 100: the deviation of the whole population is 25 sqrt(2 / 3)
    assert overall == {"score": 75.0, "unreadable": 0, "n": 2, "score_std": 20.41, "runs": 3}
    del runs[2]["v1_1"]
    with pytest.raises(ScoreError, match="1 of 2 questions have no reply in run 2, such as 'v1_1'"):
        score_replies(TASKS["mmvet"], Replies(runs), gold)
    with pytest.raises(ScoreError, match="1 predictions have no gold, such as 'v9'"):
        replies = {1: {**runs[1], "v9": {1: "1"}}}
        score_replies(TASKS["mmvet"], Replies(replies), gold)
    with pytest.raises(ScoreError, match="there are no replies"):
        score_replies(TASKS["mmvet"], Replies({}), gold)


def test_a_reply_that_cannot_be_read_is_asked_for_again_five_times():
    gold = {"v1_0": VET["v1_0"] | {"reference": "-1", "answer": None}}
    attempts, heat = {}, []
    for _ in range(9):
        found = requests_of("mmvet", {"v1_0": "x"}, gold, Replies({1: {"v1_0": attempts}}))
        if not found:
            break
        (request,) = found
        assert ids_of([request]) == [f"1.{len(attempts) + 1}.v1_0"]
        heat.append(request["body"]["temperature"])
        attempts[len(attempts) + 1] = "well"
    assert heat == [0.0, 0.0, 0.5, 1.0, 1.5]
    table = score_replies(TASKS["mmvet"], Replies({1: {"v1_0": attempts}}), gold)
    assert table["overall"] == {"score": 0.0, "unreadable": 1, "n": 1}
    attempts[4] = "0.7"  # the first that can be read counts
    table = score_replies(TASKS["mmvet"], Replies({1: {"v1_0": attempts}}), gold)
    assert table["overall"] == {"score": 70.0, "unreadable": 0, "n": 1}


def test_each_judge_is_shown_what_it_needs():
    row = {
        "question_type": "relation",
        "question": "how many?",
        "gt_answer": "Two.",
        "answer": None,
    }
    gold = {0: row | {"image_content": ["chair", "cat"]}}
    (request,) = requests_of("mmhal_bench", {0: "Three {question}."}, gold)
    (message,) = request["body"]["messages"]
    assert ids_of([request]) == ["1.1.0"] and request["body"]["model"] == "gpt-4-0314"
    assert message["content"].endswith(
        "### Image Contents\nchair, cat\n\n### Question\nhow many?\n\n### Standard Human-Generated "
        "Answer\nTwo.\n\n### Response of the Model\nThree {question}.\n"
    )
    # A reply without a rating is a 0 at once, as the published script has it.
    assert requests_of("mmhal_bench", {0: "x"}, gold, Replies({1: {"0": {1: "cut"}}})) == []

    row = {"question": "is it?", "gt_answer_details": "It is not.", "answer": "0", "skill": "VD x"}
    (request,) = requests_of("hallusionbench", {"a": "yes"}, {"a": row})
    assert request["body"]["messages"][0]["content"].endswith(
        "Question: is it?\nAnswer key: It is not.\nStudent's answer: yes\nYour word: "
    )

    row = {"question": "who?", "answer": "man", "skill": "who"}
    (request,) = requests_of("msvd_qa", {3: "a guy"}, {3: row})
    system, user = request["body"]["messages"]
    assert (system["role"], user["role"]) == ("system", "user")
    assert "Correct answer: man\nPredicted answer: a guy\n" in user["content"]
    assert user["content"].endswith("{'pred': 'no', 'score': 1}.")  # braces that are no field
    replies = Replies({1: {"3": {1: "{'pred': 'yes', 'sc"}}})
    (request,) = requests_of("msvd_qa", {3: "a guy"}, {3: row}, replies)
    assert ids_of([request]) == ["1.2.3"] and request["body"]["temperature"] == 0.0
    replies = Replies({1: {"3": {1: "{'pred': 'yes', 'sc", 2: "{'pred': 'yes', 'score': 4}"}}})
    overall = score_replies(TASKS["msvd_qa"], replies, {3: row})["overall"]
    assert overall == {"accuracy": 100.0, "score": 4.0, "unreadable": 0, "n": 1}


def test_a_prompt_can_be_given(tmp_path, capsys):
    gold = dump(tmp_path / "mm-vet.json", VET)
    rows = [{"id": i, "answer": "no"} for i in VET]
    predictions, prompt = lines(tmp_path / "p.jsonl", rows), tmp_path / "prompt.txt"
    make = ["requests", "--task", "mmvet", "--predictions", predictions, "--gold", gold]
    make = [*map(str, make), "--output", str(tmp_path / "r.jsonl"), "--judge-prompt", str(prompt)]
    braces = r'{"grade": 1} {\'pred\': 2} {} {0} {{x}} \frac{a}{b} x^{n} {not a field} {"a"}'
    prompt.write_text(f"Grade {{question}} | {{reference}} | {{prediction}} | {braces}")
    assert main([*make, "--judge-model", "mine"]) == 0
    body = rows_of(tmp_path / "r.jsonl")[1]["body"]
    assert body["messages"] == [{"role": "user", "content": f"Grade y? | 4 | no | {braces}"}]
    assert body["model"] == "mine"
    capsys.readouterr()
    for content, message in (
        (b"Grade {question}", "prompt.txt has no {prediction}; fields of this task are {question}"),
        (
            b"{question} {ground_truth} {prediction}",
            "prompt.txt has {ground_truth}, which is no field; fields of this task are {question}, "
            "{reference}, {prediction}\n",
        ),
        (b"{question}\n{Reference}, {prediction}", "prompt.txt has {Reference}, which is no"),
        (b"{question}:{ reference } {prediction}", "prompt.txt has { reference }, which is"),
        (b"\xff", "prompt.txt is not text in UTF-8"),
    ):
        prompt.write_bytes(content)
        assert main(make) == 2 and message in capsys.readouterr().err
    lines(predictions, rows[:1])
    prompt.write_text("{question}{prediction}")
    assert main(make) == 2
    refused = capsys.readouterr().err
    assert "1 of 2 gold questions have no prediction" in refused
    assert "--missing" not in refused  # which this mode does not have


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "r.jsonl"
    for row, message in (
        ({"custom_id": "1.1.a"}, r"'text' is missing; .* \(line 1\)"),
        (reply("a", "x"), "custom_id 'a' is not RUN.ATTEMPT-MARK.ID"),
        (reply("x.1.a", "x"), "custom_id 'x.1.a' is not RUN.ATTEMPT-MARK.ID"),
    ):
        lines(path, [row])
        with pytest.raises(TaskError, match=message):
            read_replies(path)
    lines(path, [reply("1.1.a", "x")] * 2)
    with pytest.raises(TaskError, match="1 rows repeat a custom_id, such as '1.1.a'"):
        read_replies(path)
    path.write_text(json.dumps(reply("1.1.a.b", "x")) + '\n{"custom')
    with pytest.raises(TaskError, match="r.jsonl cannot be read: it is not JSON: line 2"):
        read_replies(path)
    lines(path, [reply("1.2.a.b", "x")])
    assert read_replies(path) == Replies({1: {"a.b": {2: "x"}}})
    lines(path, [{"custom_id": "1.1.a", "body": {}}])
    with pytest.raises(TaskError, match="'body.messages' is missing"):
        judge_files.read_requests(path)
