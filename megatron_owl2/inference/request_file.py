"""Files of requests and of their answers, JSON lines, and what of the requests is answered.

A request is {"id", "prompt" or "messages", "images", "system"} and any field of
`GenerationOptions`. Answers are appended as they come, so a process may be killed at any moment: a
last line that it has torn is cut off, and the request is asked again.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_owl2.errors import InferenceError
from megatron_owl2.inference.messages import Conversation, check_texts, from_messages, from_question
from megatron_owl2.inference.options import GenerationOptions
from megatron_owl2.utils.files import locked, write_atomically
from megatron_owl2.utils.json_text import json_lines, parse_json
from megatron_owl2.utils.suggest import did_you_mean

_DEFAULTS = {option.name: option.default for option in fields(GenerationOptions)}
_ASKED = ("prompt", "messages", "images", "system")
_FIELDS = ("id", *_ASKED, *_DEFAULTS)
_ANEW = "name another output or remove it"

Answers = dict[str | int, Mapping[str, Any]]  # rows of the file of answers by their ids


@dataclass(frozen=True)
class FileRequest:
    """A request of a file. Its images are paths, a list of paths for the frames of a video.

    `place` is what errors call it, `mark` depends on all that its answer depends on.
    """

    id: str | int
    conversation: Conversation
    options: GenerationOptions
    place: str
    mark: str


def read_requests(
    path: Path, options: Mapping[str, Any], system: str = "", about: str = ""
) -> list[FileRequest]:
    """The requests of a file, whose images lie relative to it.

    `options` and `system` are for requests without their own; `about` marks the model. Raises
    InferenceError naming file and line for a request that is not as it must be, an id that comes
    twice and an image that is not there, OSError if the file cannot be read.
    """
    requests: dict[str | int, FileRequest] = {}
    for where, row in _rows(path):
        with naming(where):
            request = _request(path, where, row, options, system, about)
            if earlier := requests.get(request.id):
                raise InferenceError(f"the id {request.id!r} is also that of {earlier.place}")
            requests[request.id] = request
    if not requests:
        raise InferenceError(f"{path} holds no requests")
    return [*requests.values()]


def read_answers(path: Path, requests: Sequence[FileRequest]) -> Answers:
    """The answers that a file holds, {} if there is none; a torn last line is passed over.

    Raises InferenceError naming file and line for answers to other requests, under other options or
    of another model, twice to one, and damaged ones.
    """
    if not path.exists():
        return {}
    marks = {request.id: request.mark for request in requests}
    found: Answers = {}
    for where, row in _rows(path, whole=True):
        answered = row.get("id")
        if not isinstance(answered, str | int) or not isinstance(row.get("answer"), str):
            raise InferenceError(f"{where} is no answer; {_ANEW}")
        if answered not in marks:
            raise InferenceError(f"{where} answers {answered!r}, which is no request; {_ANEW}")
        if answered in found:
            raise InferenceError(f"{where} answers {answered!r} again; {_ANEW}")
        if row.get("request") != marks[answered]:
            raise InferenceError(
                f"{where} answers {answered!r} as it was asked before, with another text, other "
                f"options or another model; {_ANEW}"
            )
        found[answered] = row
    return found


@contextmanager
def answer_file(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A file of answers, locked: what puts a row behind those that are there, on the disk.

    A torn last line is cut off. Raises InferenceError while another process writes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    try:
        with locked(path), path.open("r+b") as file:
            file.truncate(_whole_length(file.read()))
            file.seek(0, os.SEEK_END)

            def write(row: Mapping[str, Any]) -> None:
                file.write(_line(row))
                file.flush()
                os.fsync(file.fileno())

            yield write
    except BlockingIOError:
        raise InferenceError(
            f"another process writes {path}; wait for it, or name another output"
        ) from None


def put_in_order(path: Path, requests: Sequence[FileRequest]) -> None:
    """Rewrite of a file that answers all requests in their order."""
    answers = read_answers(path, requests)
    lines = b"".join(_line(answers[request.id]) for request in requests)
    if lines != path.read_bytes():
        write_atomically(path.resolve(), lines)  # what a link stands for, as the answers did


def _request(
    path: Path, where: str, row: Mapping[str, Any], options: Mapping, system: str, about: str
) -> FileRequest:
    for name in row:
        if name not in _FIELDS:
            raise InferenceError(f"there is no field {name!r}; {did_you_mean(name, _FIELDS)}")
    number = row.get("id")
    if not isinstance(number, str | int) or isinstance(number, bool):
        raise InferenceError(f"'id' is {number!r}; it must be a text or a whole number")
    own = {name: _option(name, row[name]) for name in _DEFAULTS if name in row}
    chosen = GenerationOptions(**{**options, **own})
    conversation = _conversation(row, path.parent)
    conversation.system = conversation.system or system
    asked = {name: row[name] for name in _ASKED if name in row}
    content = json.dumps([asked, conversation.system, asdict(chosen), about], sort_keys=True)
    mark = hashlib.sha256(content.encode(errors="backslashreplace")).hexdigest()[:16]
    return FileRequest(number, conversation, chosen, where, mark)


def _conversation(row: Mapping[str, Any], folder: Path) -> Conversation:
    images = row.get("images", [])
    if not isinstance(images, list):
        raise InferenceError("'images' must be a list of paths, or of lists of a video's frames")
    system = row.get("system", "")
    if not isinstance(system, str):
        raise InferenceError(f"'system' is {system!r}; it must be a text")
    if ("prompt" in row) == ("messages" in row):
        raise InferenceError("give either 'prompt' or 'messages'")
    if "messages" in row:
        if images or system:
            raise InferenceError("'messages' have their images and their system text in them")
        if not isinstance(row["messages"], list):
            raise InferenceError("'messages' must be a list")
        conversation = from_messages(row["messages"])
    else:
        if not isinstance(row["prompt"], str):
            raise InferenceError(f"'prompt' is {row['prompt']!r}; it must be a text")
        conversation = from_question(row["prompt"], images)
        conversation.system = system
    check_texts(conversation)
    conversation.images = [_file(image, folder) for image in conversation.images]
    return conversation


def _file(image: Any, folder: Path) -> Path | list:
    """The file of an image, or those of the frames of a video."""
    if isinstance(image, list):
        if not image:
            raise InferenceError("a video is a list of frames, and this one has none")
        return [_file(frame, folder) for frame in image]
    if not isinstance(image, str) or not image or "\0" in image:
        raise InferenceError(f"an image is {image!r}; it must be a path")
    if not (folder / image).is_file():
        raise InferenceError(f"there is no image {folder / image}")
    return folder / image


def _option(name: str, value: Any) -> Any:
    """The value of a generation option, of the type of its default."""
    default = _DEFAULTS[name]
    if name == "stop":
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list):
            return texts  # GenerationOptions checks what is in it
        raise InferenceError(f"'stop' is {value!r}; it must be a text or a list of texts")
    wanted = int | float if isinstance(default, float) else type(default)
    if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool):
        kinds = {bool: "true or false", int: "a whole number", float: "a number"}
        raise InferenceError(f"{name!r} is {value!r}; it must be {kinds[type(default)]}")
    return value


def _rows(path: Path, *, whole: bool = False) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The place and the object of every line; `whole` ends at the last line that has an end."""
    data = path.read_bytes()
    data = data[: _whole_length(data)] if whole else data
    with naming(str(path)):
        lines = [*json_lines(data)]
    for number, line in lines:
        where = f"{path}, line {number}"
        with naming(where):
            row = parse_json(line)
        if not isinstance(row, dict):
            raise InferenceError(f"{where}: it is no object")
        yield where, row


def _whole_length(data: bytes) -> int:
    return data.rfind(b"\n") + 1


def _line(row: Mapping[str, Any]) -> bytes:
    # Texts from files may hold half a surrogate pair, which escaped is JSON as well.
    return json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Context in which errors of a value say where it stands."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise InferenceError(f"{where}: {error}") from None
