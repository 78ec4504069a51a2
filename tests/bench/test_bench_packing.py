"""The benchmark of packing: the paper's mixture, full rows, steps on the same samples."""

from collections import Counter

import pytest
import tool

from megatron_owl2.config.load import load_config

TABLE_14 = {  # samples, in thousands
    **{"ShareGPT": 40, "SlimOrca": 518, "LLaVA-Instruct": 158, "COCO captions": 82},
    **{"TextCaps": 22, "VQAv2": 83, "GQA": 72, "OK-VQA": 9, "OCR-VQA": 80, "A-OKVQA": 50},
    **{"RefCOCO": 30, "Visual Genome": 86},
}


@pytest.fixture(scope="module")
def bench():
    return tool.load("bench/packing.py")


def test_the_mixture_is_table_14_and_every_figure_has_a_source(bench):
    mixture = bench.instruction_mixture
    counts = Counter()
    for source in mixture.SOURCES:
        counts[source.corpus] += source.samples
        assert source.figures
    assert counts == {name: 1000 * count for name, count in TABLE_14.items()}
    assert mixture.SAMPLES == 1_230_000


def test_lengths_are_drawn_once_and_have_the_means_that_they_should(bench):
    mixture = bench.instruction_mixture
    drawn, again = mixture.draw(60_000), mixture.draw(60_000)
    for source, lengths, same in zip(mixture.SOURCES, drawn, again, strict=True):
        assert len(lengths.text) == pytest.approx(60_000 * source.samples / 1_230_000, abs=0.5)
        assert lengths.text.tolist() == same.text.tolist()
        assert set(lengths.images.tolist()) == {source.images}
        turn = source.question.mean + source.answer.mean + mixture.TEMPLATE
        expected = 1 + source.turns * turn
        heavy = source.corpus == "ShareGPT"  # a few questions are as long as all others
        assert lengths.text.mean() == pytest.approx(expected, rel=0.25 if heavy else 0.05)


def test_the_tool_fills_rows_and_prints_its_figures(bench, capsys):
    bench.main(["--tiny"])
    rows, steps = capsys.readouterr().out.split("\n\n")
    found = dict(map(str.strip, (line[:24], line[24:])) for line in rows.splitlines())
    assert list(found) == [
        *("samples", "positions of a sample", "rows", "fill", "samples a row", "images a row"),
        *("positions to an image", "rows of 256 samples", "samples in 64 rows"),
        *("seconds to plan", "MiB of the plan", "spread over 8 ranks", "spread over 32 ranks"),
    ]
    assert float(found["fill"].rstrip("%")) >= 95
    per_row = float(found["samples a row"])
    assert float(found["rows of 256 samples"]) == pytest.approx(256 / per_row, rel=0.01)
    most = load_config(bench.RECIPE).data.images_per_row
    assert found["images a row"].endswith(f"at most {most}")
    names = [line[:24].strip() for line in steps.splitlines()]
    assert names == [
        "2 rows a micro-batch",
        "packed",
        "padded to the longest",
        "padded to full rows",
    ]


def test_all_ways_train_on_the_same_samples(bench):
    config = bench.small_config(rows=2, tiny=True)
    batches = bench.step_batches(config, 2)
    packed, longest, full = batches.values()
    tokens = [sum(int(batch.lengths.sum()) for batch in way) for way in batches.values()]
    targets = [sum(int(batch.loss_mask.sum()) for batch in way) for way in batches.values()]
    images = [sum(int(batch.modality.sum()) for batch in way) for way in batches.values()]
    assert len(set(tokens)) == len(set(targets)) == len(set(images)) == 1 and images[0] > 0
    assert len(packed) == 2 and all(batch.packed for batch in packed)
    assert {batch.length for batch in full} == {512} >= {batch.length for batch in packed}
    assert any(batch.length < 512 for batch in longest)
    assert not any(batch.packed for batch in [*longest, *full])


def test_balanced_rows_spread_their_images_less(bench):
    config = load_config(bench.RECIPE)
    lengths = bench.instruction_mixture.draw(10_000)
    found = []
    for group in (64, 1):
        order = bench.packed_order(config, lengths, group)
        rows = [order.row(index) for index in range(order.rows_before(1) // 64 * 64)]
        table = bench.np.array([(row.images, row.positions) for row in rows])
        found.append(bench.spreads(table.reshape(-1, 64, 2), 8)[0])
    assert found[0] < found[1] / 2
