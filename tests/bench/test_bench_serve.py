"""The soak test of a server, for a second: it finds what is wrong and nothing else."""

import psutil
import pytest
import tool
from serving import offline, running, tiny_model

from megatron_owl2.serving.limits import Limits

pytestmark = pytest.mark.slow


def test_a_mixed_load(tmp_path):
    bench = tool.load("bench/serve_load.py")
    loaded = tiny_model(tmp_path)
    cases = [
        bench.Case(messages, offline(loaded, messages, max_new_tokens=6).text)
        for messages in bench.conversations()[:4]
    ]
    kinds = ["text", "images", "streamed", "left", "bad", "oversized"]
    with running(loaded, Limits(max_queue=64, max_body=32 << 20)) as server:

        def load(cases) -> bench.Load:
            process = psutil.Process()
            made = bench.Load((server.host, server.port), process, cases, max_tokens=6, long=200)
            return made

        made = load(cases)
        figures = made.run(clients=8, seconds=1.5)
        bench.Client(0, (server.host, server.port), made)._leave()
        assert figures.wrong == [] and figures.different == 0
        assert figures.left or figures.unseen
        rows = bench.table(figures, 1.5).splitlines()
        assert [row.split()[1] for row in rows[2:] if row.startswith("|")] == [
            kind for kind in kinds if figures.seconds[kind]
        ]
        assert figures.tokens > 0 and set(figures.statuses["bad"]) <= {400, 404}
        others = [bench.Case(case.messages, "another answer") for case in cases]
        found = load(others).run(clients=2, seconds=0.3)
        assert found.different
        assert any("are not the offline engine's" in text for text in found.failures())
