"""Chat: what the model is asked line by line, commands, and answers that are stopped."""

import io
import os
import sys
from pathlib import Path

import pytest
from exported import export, grouped_model
from hf_dirs import small_tokenizer
from tiny_data import make_image

import megatron_owl2
from megatron_owl2.cli import generate
from megatron_owl2.cli.chat import Chat
from megatron_owl2.errors import InferenceError


class Echo:
    """A model that says of a conversation what it was asked; `interrupt` stops after two pieces."""

    def __init__(self):
        self.asked, self.interrupt = [], False

    def stream(self, messages, **options):
        self.asked.append((list(messages), options))
        yield from (" ", "you said ")
        if self.interrupt:
            raise KeyboardInterrupt
        if messages[-1]["content"][-1]["text"] == "too long":
            raise InferenceError("the prompt takes 99 positions")
        yield messages[-1]["content"][-1]["text"]


def talk(model, *lines, **options) -> str:
    """What a chat writes for these lines; exceptions among them are raised by the keyboard."""
    given, written = iter(lines), []

    def read(prompt):
        line = next(given, EOFError())
        if isinstance(line, BaseException):
            raise line
        if callable(line):
            line = line()
        return line

    Chat(model, read, written.append, **{"options": {}, **options}).run()
    return "".join(written)


def test_a_conversation_is_continued_and_forgotten():
    model = Echo()
    said = talk(model, "one", "", "two", "/reset", "three", system="be kind", options={"seed": 3})
    assert said.count("you said one\n") == said.count("you said two\n") == 1
    (first, options), (second, _), (third, _) = model.asked
    system = {"role": "system", "content": "be kind"}
    assert options == {"seed": 3}
    assert [m["role"] for m in second] == ["system", "user", "assistant", "user"]
    assert second[2]["content"] == "you said one"
    assert first[0] == third[0] == system and len(first) == len(third) == 2


def test_an_image_is_shown_once_with_the_next_question(tmp_path):
    (tmp_path / "no.png").write_text("no image")
    make_image(0).save(tmp_path / "an owl.png")
    model = Echo()
    said = talk(
        model,
        f"/image {tmp_path}/an owl.png",
        f"/image {tmp_path}/no.png",
        f"/image {tmp_path}/gone.png",
        "what?",
        "and?",
    )
    assert said.count("error: ") == 2 and "no.png: image cannot" in said and "gone.png" in said
    kinds = [[part["type"] for part in asked[-1]["content"]] for asked, _ in model.asked]
    assert kinds == [["image", "text"], ["text"]]
    assert model.asked[0][0][-1]["content"][0]["image"].shape == (3, 30, 40)


def test_a_path_that_can_be_none_is_an_error_and_not_the_end():
    model = Echo()
    said = talk(model, "one", "/image ~nosuchuser/x.png", "/image a\0b.png", "two")
    assert said.count("error: ") == 2
    assert len(model.asked[1][0]) == 3  # with the question and the answer before


def test_ctrl_c_while_an_image_is_read_is_not_the_end(monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_owl2.cli.chat.read_image", interrupted)
    model = Echo()
    assert talk(model, "/image x.png", "one").endswith("\nyou said one\n\n")
    assert [part["type"] for part in model.asked[0][0][-1]["content"]] == ["text"]


def test_ctrl_c_stops_the_answer_and_not_the_chat():
    model = Echo()

    def stopping(stop, line):
        model.interrupt = stop
        return line

    said = talk(
        model, KeyboardInterrupt(), lambda: stopping(True, "one"), lambda: stopping(False, "two")
    )
    assert said.endswith("you said \nyou said two\n\n")
    assert [m["content"] for m in model.asked[1][0] if m["role"] == "assistant"] == ["you said"]


def test_a_question_that_fails_leaves_the_conversation_as_it_was():
    model = Echo()
    said = talk(model, "one", "too long", "two")
    assert "error: the prompt takes 99 positions\n" in said
    assert [m["role"] for m in model.asked[2][0]] == ["user", "assistant", "user"]


def test_commands_end_the_chat_or_are_told():
    model = Echo()
    said = talk(model, "/imag x", "/image", "/quit", "never asked")
    assert said.count("there is no command '/ima") == 2 and said.count("/reset ") == 3
    assert not model.asked
    talk(model, "/usr/bin is a folder?")
    assert len(model.asked) == 1


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    return export(grouped_model(), folder / "hf", tokenizer=small_tokenizer(folder))


def test_the_command_chats_with_a_model(directory, tmp_path, monkeypatch, capsys):
    make_image(0).save(tmp_path / "0.png")
    lines = iter([f"/image {tmp_path}/0.png", "badal", "bamer"])

    def read(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    command = ["--checkpoint", str(directory), "--chat", "--max-new-tokens", "8"]
    assert generate.main([*command, "--min-new-tokens", "4"], "owl2 generate") == 0
    first, second = capsys.readouterr().out.strip().splitlines()[-2:]
    model = megatron_owl2.load(directory)
    limits = {"max_new_tokens": 8, "min_new_tokens": 4}
    assert first == model.generate("badal", [tmp_path / "0.png"], **limits)
    shown = {"type": "image", "image": tmp_path / "0.png"}
    messages = [
        {"role": "user", "content": [shown, {"type": "text", "text": "badal"}]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "bamer"},
    ]
    assert second == model.generate([messages], **limits)[0]


def test_bytes_that_are_no_text_are_told_and_those_of_a_file_name_are_kept(
    directory, tmp_path, monkeypatch, capsys
):
    shown = os.fsencode(tmp_path) + b"/\xe4.png"
    Path(os.fsdecode(shown)).write_bytes(b"no image")
    given = io.BytesIO(b"b\xe4dal\n/image " + shown + b"\nbadal\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(given, encoding="utf-8"))
    command = ["--checkpoint", str(directory), "--chat", "--min-new-tokens", "4"]
    assert generate.main(command, "owl2 generate") == 0
    first, second, answer = capsys.readouterr().out.split("> ")[1:4]
    assert first.startswith("error: a text holds '\\udce4', half of a character")
    assert second.startswith("error: ") and "image cannot be" in second
    assert answer.strip() and not answer.startswith("error")


def test_a_chat_is_of_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        generate.main(["--checkpoint", "x", "--chat"], "owl2 generate")
    assert "--chat is of one process; start it without torchrun" in capsys.readouterr().err


def test_a_terminal_sees_the_answer_as_it_comes(directory, monkeypatch, capsys):
    command = ["--checkpoint", str(directory), "--prompt", "badal", "--min-new-tokens", "12"]
    assert generate.main(command, "owl2 generate") == 0
    whole = capsys.readouterr().out
    pieces = []
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "write", pieces.append)
    assert generate.main(command, "owl2 generate") == 0
    assert "".join(pieces).rstrip() == whole.rstrip() and len([p for p in pieces if p]) > 3
