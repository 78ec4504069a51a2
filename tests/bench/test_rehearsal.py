"""The rehearsal of data loading: its simulation is right by numbers, and its figures agree with
what the order says."""

import json

import pytest
import tool


@pytest.fixture
def rehearsal(monkeypatch):
    monkeypatch.syspath_prepend(tool.TOOLS / "bench")
    import rehearsal.simulation

    return rehearsal


@pytest.fixture
def simulation(rehearsal):
    with rehearsal.simulation.Simulation() as simulation:
        yield simulation


def test_threads_take_turns_by_the_simulated_clock(simulation):
    queue, seen = simulation.queue(), []

    def work(name, pause):
        for number in range(3):
            simulation.sleep(pause)
            seen.append((round(simulation.monotonic(), 6), name, number))
        queue.put(name)

    simulation.start_thread("a", work, "a", 1.0)
    simulation.start_thread("b", work, "b", 0.4)
    assert [queue.get(), queue.get()] == ["b", "a"] and simulation.monotonic() == 3.0
    assert seen == sorted(seen) and len(seen) == 6
    with pytest.raises(RuntimeError, match="every thread waits"):
        queue.get()


def test_a_failure_in_a_thread_ends_the_simulation(simulation):
    def fail():
        simulation.sleep(1.0)
        raise ValueError("lost")

    simulation.start_thread("a", fail)
    with pytest.raises(RuntimeError, match="lost"):
        simulation.sleep(2.0)


def test_transfers_share_a_link_and_none_is_faster_than_its_connection(rehearsal, simulation):
    link = rehearsal.simulation.Link(simulation, bandwidth=100.0, connection=80.0)
    ends = {}

    def transfer(name, size):
        simulation_task = simulation.current
        link.start(size, lambda: simulation.resume_at(simulation.monotonic(), simulation_task))
        simulation.block()
        ends[name] = simulation.monotonic()

    simulation.start_thread("a", transfer, "a", 160.0)
    simulation.sleep(1.0)  # a has 80 of its bytes
    simulation.start_thread("b", transfer, "b", 30.0)
    given_up = link.start(1e6, lambda: ends.update(c=0.0))
    simulation.sleep(0.3)  # a, b and c have had 10 each
    link.cancel(given_up)
    simulation.sleep(10.0)
    assert ends == pytest.approx({"b": 1.3 + 20 / 50, "a": 1.7 + 50 / 80})


SCALE = ["--nodes", 4, "--ranks-per-node", 4, "--workers", 2, "--simulated-nodes", 2]
SCALE += ["--shards", 64, "--samples", 65536, "--sample-bytes", 4000, "--steps", 6]
SCALE += ["--cache-gib", 0.5, "--processes", 1]


def test_a_rehearsal_counts_what_the_order_says(rehearsal, tmp_path, capfd):
    from megatron_owl2.data.sampling.shuffle import ShuffleOrder

    figures, plot = tmp_path / "figures.json", tmp_path / "plot.png"
    options = [*SCALE, "--errors", 0, "--stragglers", 0, "--json", figures, "--plot", plot]
    options += ["--scenarios", "baseline", "slow store", "nodes replaced", "cache 1/4"]
    done = tool.load("bench/rehearsal.py").main([*map(str, options)])
    assert done == 0 and plot.stat().st_size > 10_000
    found = json.loads(figures.read_text())
    assert found["order"]["handed_out"] == found["order"]["distinct"] == 65536

    order = ShuffleOrder([[1024] * 64], [1.0], seed=1234)
    assert order.streams == 16
    # Nodes 0 and 2 read 4 streams each: of all, the only shuffle block and that of the next epoch.
    fetched = shards = 0
    for node in (0, 2):
        streams = [order.residue(rank, 16) for rank in range(4 * node, 4 * node + 4)]
        ahead = [order.next_shuffle_block(stream) for stream in streams]
        blocks = {block for first in streams + ahead for block in order.blocks(first)}
        fetched += len(blocks)
        shards += len({shard for _, shard, _ in blocks})
    baseline, slow = found["scenarios"]["baseline"], found["scenarios"]["slow store"]
    assert baseline["requests"] == {"block": fetched, "sidecar": 2 * shards, "size": shards}
    assert baseline["retries"] == 0 and 0 < baseline["waits"][0] < slow["waits"][0]
    assert sum(baseline["waits"][1:]) == pytest.approx(0, abs=1e-9)
    # What is in the cache of one of two nodes is not fetched again.
    assert 0 < found["scenarios"]["nodes replaced"]["requests"]["block"] < fetched
    tight = found["scenarios"]["cache 1/4"]
    assert tight["requests"]["block"] > fetched and tight["cached_bytes"] <= found["working_set"]
    assert "65,536 different ones: each once" in capfd.readouterr().out
