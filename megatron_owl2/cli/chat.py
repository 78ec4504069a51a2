"""Chat with a model in the terminal, about images that are shown in between."""

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from megatron_owl2.errors import InferenceError
from megatron_owl2.inference.api import InferenceModel, read_image
from megatron_owl2.inference.messages import Message

HELP = """\
/image PATH  shows an image with the next question; several in order
/reset       forgets the conversation and its images
/quit        ends, as Ctrl-D does; Ctrl-C stops an answer"""


class Chat:
    """A conversation with a model, line by line.

    `read(prompt)` gives a line and raises EOFError at the end, `write(text)` shows text at once.
    `options` are fields of `GenerationOptions`.
    """

    def __init__(
        self,
        model: InferenceModel,
        read: Callable[[str], str],
        write: Callable[[str], Any],
        *,
        system: str = "",
        options: dict[str, Any],
    ):
        self.model, self.read, self.write = model, read, write
        self.options = options
        self._opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self._reset()

    def run(self) -> None:
        """Answers until the end of the input or `/quit`."""
        self.write(HELP + "\n")
        while True:
            try:
                line = self.read("> ").strip()
            except EOFError:
                self.write("\n")
                return
            except KeyboardInterrupt:  # throws a line away, as shells do
                self.write("\n")
                continue
            if line == "/quit":
                return
            if line:
                try:
                    self._obey(line)
                except KeyboardInterrupt:  # while an image is read
                    self.write("\n")
                except (InferenceError, OSError) as error:
                    self.write(f"error: {error}\n")

    def _obey(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if command == "/image" and argument.strip():
            image = read_image(os.path.expanduser(argument.strip()))  # leaves unknown users' ~
            self._images.append({"type": "image", "image": image})
        elif line == "/reset":
            self._reset()
        elif command.startswith("/") and command.count("/") == 1:
            self.write(f"there is no command {line!r}\n{HELP}\n")
        else:
            self._answer(line)

    def _reset(self) -> None:
        self._messages, self._images = [*self._opening], []

    def _answer(self, question: str) -> None:
        """Stream the answer and keep it; one that was stopped as far as it came."""
        content = [*self._images, {"type": "text", "text": question}]
        asked = [*self._messages, {"role": "user", "content": content}]
        pieces: list[str] = []
        with suppress(KeyboardInterrupt):
            for piece in self.model.stream(asked, **self.options):
                piece = piece if pieces else piece.lstrip()
                if piece:
                    pieces.append(piece)
                    self.write(piece)
        self.write("\n")
        if answer := "".join(pieces).strip():
            self._messages = [*asked, {"role": "assistant", "content": answer}]
            self._images = []
