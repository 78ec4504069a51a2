"""Atomic writes and locks, on which finished files and shared folders rely."""

import json
import threading

import pytest

from megatron_owl2.utils.files import (
    locked,
    replaced_atomically,
    truncate_jsonl,
    write_atomically,
)


def test_a_written_file_replaces_the_old_one_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "file"
    for data in (b"old", b"new"):
        write_atomically(path, data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replaced_atomically(path) as temporary:
        temporary.write_bytes(b"half")
        assert temporary.parent == tmp_path and path.read_bytes() == b"old"
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError), replaced_atomically(path):
        pass  # nothing was written
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_lock_has_one_holder(tmp_path, kind):
    path = tmp_path / "lock"
    path.touch() if kind == "file" else path.mkdir()
    with locked(path), pytest.raises(BlockingIOError), locked(path):
        pass
    with locked(path):  # it was given back
        pass
    with pytest.raises(FileNotFoundError), locked(tmp_path / "missing"):
        pass


def test_a_lock_can_be_waited_for(tmp_path):
    path = tmp_path / "lock"
    path.touch()
    order = []

    def wait() -> None:
        with locked(path, wait=True):
            order.append("second")

    with locked(path):
        thread = threading.Thread(target=wait)
        thread.start()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_only_a_line_feed_ends_a_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"step": n, "text": "a\u2028b\x85c\u2029"} for n in range(3)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines + '{"step": 3, "te', encoding="utf-8")
    truncate_jsonl(path, lambda row: row["step"] != 1)
    kept = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert kept == [rows[0], rows[2]]
