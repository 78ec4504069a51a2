"""`owl2 serve` as it is started, under torchrun: all ranks make the same calls, and end with 0."""

import contextlib
import json
import re
import signal
import sys
import time

import psutil
import pytest
from hf_dirs import export
from processes import killed_by_errors, start, torchrun, wait_until
from serving import Running, asked, image_url, offline, tiny_model

from megatron_owl2 import serving
from megatron_owl2.cli.main import main
from megatron_owl2.inference.scheduler import Scheduler
from megatron_owl2.serving import engine_loop
from megatron_owl2.serving.engine_loop import Admit, Inbox, Stop


def listening_on(port: int, processes: list[psutil.Process]) -> psutil.Process:
    (found,) = (
        process
        for process in processes
        if any(c.status == "LISTEN" and c.laddr.port == port for c in process.net_connections())
    )
    return found


@pytest.mark.distributed
def test_two_ranks_serve_as_one(tmp_path):
    loaded = tiny_model(tmp_path)
    folder = tmp_path / "export"
    export(loaded.model, folder, tokenizer=loaded.tokenizer.path)
    options = ["--checkpoint", folder, "--port", 0, "--max-tokens", 300, "--grace", 30]
    program = torchrun(2, "-m", "megatron_owl2.cli", "serve", *options)[1:]
    with start(program, 2) as job, killed_by_errors(job):
        found = wait_until(
            lambda: (
                job.poll() is not None
                or re.search(r"export is served at http://(\S+):(\d+)\n", job.output())
            ),
            100,
        )
        assert job.returncode is None, job.communicate(1)
        server = Running(None, found[1], int(found[2]), None, [])
        conversations = [asked(f"badal {n}", *[image_url(n)] * (n % 3)) for n in range(4)]
        for messages in conversations:
            wanted = offline(loaded, messages, max_new_tokens=12, min_new_tokens=4)
            reply = server.chat(messages, max_tokens=12, min_tokens=4)
            assert reply.status == 200, reply.data
            assert (reply.text, reply.json["model"]) == (wanted.text, "export")
        assert server.chat("x" * 600).status == 400

        def leave() -> bool:
            with contextlib.closing(server.connection()) as connection:
                body = {"messages": conversations[1], "min_tokens": 300}
                headers = {"Content-Type": "application/json"}
                connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
                time.sleep(0.1)  # so that all ranks have begun
            return server.metric('owl2_requests_total{status="499"}') > 0

        wait_until(leave)
        wait_until(lambda: server.metric("owl2_requests_active") == 0)

        ranks = psutil.Process(job.pid).children(recursive=True)
        first = listening_on(server.port, ranks)
        others = [rank for rank in ranks if rank != first]
        before = sum(sum(rank.cpu_times()[:2]) for rank in others)
        time.sleep(0.5)
        assert sum(sum(rank.cpu_times()[:2]) for rank in others) - before < 0.25  # they wait
        for rank in others:
            rank.send_signal(signal.SIGTERM)  # rank 0 says when they end
        assert server.chat(conversations[0], max_tokens=2).status == 200
        first.send_signal(signal.SIGTERM)
        out, err = job.communicate(60)
    assert job.returncode == 0, err
    assert "Traceback" not in err and "error" not in err


def test_idle_ranks_hear_of_each_other(tmp_path, monkeypatch):
    """Well before the timeout of their group."""
    assert engine_loop._GROUP_TIMEOUT.total_seconds() > 10 * engine_loop.HEARTBEAT_SECONDS
    monkeypatch.setattr(engine_loop, "HEARTBEAT_SECONDS", 0.01)
    inbox, waits = Inbox(), []

    class Source:
        def next(self, busy):
            waits.append(busy)
            if len(waits) == 3:
                inbox.put(Stop())
            return inbox.next(busy)

    engine_loop.run(Scheduler(tiny_model(tmp_path)), Source())
    assert waits == [False, False, False]


def test_commands_keep_their_order():
    inbox = Inbox()
    for number in range(3):
        inbox.put(Admit(number, None))
    inbox.put(Stop())
    assert inbox.next(busy=True) == [*(Admit(number, None) for number in range(3)), Stop()]
    assert inbox.next(busy=True) == []


def test_options_that_do_not_fit(tmp_path, capsys):
    for options, message in (
        (["--checkpoint", str(tmp_path / "no"), "--port", "0"], "no is not a directory"),
        (["--checkpoint", str(tmp_path), "--port", "1000000"], "choose another --host or --port"),
    ):
        assert main(["serve", *options]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["serve", "--checkpoint", "x", "--image-url-port", "8080"])
    assert "needs --allow-image-urls" in capsys.readouterr().err


def test_a_missing_extra_is_refused_with_the_fix(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "megatron_owl2.serving.server")
    monkeypatch.delattr(serving, "server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # as if not installed
    assert main(["serve", "--checkpoint", "x"]) == 2
    said = capsys.readouterr().err
    assert said == "error: owl2 serve needs uvicorn: pip install 'megatron-owl2[serve]'\n"
