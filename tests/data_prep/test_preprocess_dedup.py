"""Duplicates and samples: decisions that need the whole corpus."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preprocess_run import as_splits, job, keys, pair, pairs, records, report
from tiny_data import encoded, make_image

from data_prep import dedup
from data_prep.filters import Filters
from data_prep.reencode import Reencoding
from megatron_owl2.data.shards.records import Record, Turn

pytestmark = pytest.mark.slow

A, B = (encoded(make_image(seed)) for seed in (1, 2))


@pytest.fixture(scope="module")
def doubled():
    """Images and texts that occur again, in the same split and in others."""
    return [
        [
            pair("first", A, "one"),
            pair("same", A, "one"),
            pair("other-text", A, "two"),
            Record("text", caption="one"),
        ],
        [
            pair("later", A, "one"),
            pair("b", B, "one"),
            pair("as-png", encoded(make_image(1), "PNG"), "one"),
            Record("talk", images=(B,), turns=(Turn("q", "a"),)),
        ],
        [
            Record("text-again", caption="one"),
            Record("talk-again", images=(B,), turns=(Turn("q", "a"),)),
            Record("other-talk", images=(B,), turns=(Turn("q", "b"),)),
        ],
    ]


def test_duplicate_images_keep_the_first(doubled, tmp_path):
    job(doubled, tmp_path, deduplicate="image")
    assert keys(tmp_path) == ["first", "text", "b", "as-png", "text-again"]
    assert report(tmp_path)["skipped"] == {"duplicate image": 6}
    assert report(tmp_path)["examples"]["duplicate image"][:2] == [
        "input0, key same",
        "input0, key other-text",
    ]


def test_duplicate_pairs_need_the_same_text_too(doubled, tmp_path):
    job(doubled, tmp_path, deduplicate="pair")
    expected = ["first", "other-text", "text", "b", "as-png", "talk", "other-talk"]
    assert keys(tmp_path) == expected
    assert report(tmp_path)["skipped"] == {"duplicate image and text": 4}


def test_what_a_filter_removes_is_nobodys_original(doubled, tmp_path):
    doubled = [[pair("short", B, "a"), *doubled[0]], *doubled[1:]]
    job(doubled, tmp_path, deduplicate="image", filters=Filters(min_caption=2))
    assert "b" in keys(tmp_path) and "short" not in keys(tmp_path)


def test_duplicates_are_found_before_images_change(tmp_path):
    content = [[pair("a", A)], [pair("b", B)], [pair("again", A)]]
    job(content, tmp_path, deduplicate="image", reencoding=Reencoding(max_side=10))
    assert keys(tmp_path) == ["a", "b"]
    assert all(not {A, B} & {*record.images} for record in records(tmp_path))


@pytest.mark.parametrize("number", [1, 17, 60])
def test_a_sample_of_n_is_exact_and_deterministic(tmp_path, number):
    corpus = pairs(splits=6, size=10)
    job(corpus, tmp_path / "a", sample=number)
    chosen = keys(tmp_path / "a")
    assert len(chosen) == number == report(tmp_path / "a")["kept"]
    assert chosen == [key for key in (r.key for split in corpus for r in split) if key in chosen]
    job(corpus, tmp_path / "b", sample=number, samples_per_shard=3, workers=2)
    assert keys(tmp_path / "b") == chosen
    job(corpus, tmp_path / "c", sample=number, seed=1)
    assert (keys(tmp_path / "c") == chosen) == (number == 60)


def test_a_larger_sample_contains_a_smaller_one(tmp_path):
    corpus = pairs(splits=4, size=10)
    sizes = (5, 20, 0.2, 0.7)
    chosen = {}
    for size in sizes:
        job(corpus, tmp_path / str(size), sample=size)
        chosen[size] = set(keys(tmp_path / str(size)))
    assert chosen[5] < chosen[20] and chosen[0.2] < chosen[0.7]
    assert len(chosen[0.2]) < 16 and len(chosen[0.7]) > 20


def test_a_fraction_keeps_its_share():
    split = as_splits([[]])[0]
    numbers = [dedup.priority(pair(str(i), A), split, seed=4) for i in range(4000)]
    for fraction in (0.01, 0.3, 0.9):
        kept = sum(dedup.below_fraction(number, fraction) for number in numbers)
        deviation = (4000 * fraction * (1 - fraction)) ** 0.5
        assert abs(kept - 4000 * fraction) < 4 * deviation


def test_a_fraction_of_what_is_left_without_duplicates(tmp_path):
    corpus = pairs(splits=4, size=10)
    job(corpus, tmp_path / "once", sample=0.5)
    twice = [[*split, *(replace(r, key=f"{r.key}-again") for r in split)] for split in corpus]
    job(twice, tmp_path / "twice", sample=0.5, deduplicate="pair")
    assert keys(tmp_path / "twice") == keys(tmp_path / "once")
    assert report(tmp_path / "twice")["skipped"]["duplicate image and text"] == 40


def test_fewer_than_asked_for_is_said(tmp_path):
    outcome = job(pairs(splits=2, size=3), tmp_path, sample=100)
    assert report(tmp_path)["kept"] == 6
    assert "fewer than the 100 that were asked for" in str(outcome.report)


def test_what_is_held_out_is_in_no_sample_of_the_rest(tmp_path):
    corpus = pairs(splits=4, size=10)
    everything = {record.key for split in corpus for record in split}
    held = {"hold_out": 7, "only_held_out": True}
    job(corpus, tmp_path / "rest", hold_out=7)
    job(corpus, tmp_path / "held", **held)
    job(corpus, tmp_path / "sample", hold_out=7, sample=20)
    rest, out = set(keys(tmp_path / "rest")), set(keys(tmp_path / "held"))
    assert len(out) == 7
    assert rest | out == everything and not rest & out
    assert len(keys(tmp_path / "sample")) == 20 and set(keys(tmp_path / "sample")) < rest
    assert report(tmp_path / "rest")["skipped"] == {"held out": 7}
    assert report(tmp_path / "held")["skipped"] == {"not held out": 33}
    assert report(tmp_path / "sample")["skipped"] == {"not in the sample": 13, "held out": 7}
    description = json.loads((tmp_path / "rest/preprocess/job.json").read_text())
    assert (description["hold_out"], description["only_held_out"]) == (7, False)
    job(pairs(splits=1, size=1), tmp_path / "none")  # as an earlier version describes it
    assert "hold_out" not in json.loads((tmp_path / "none/preprocess/job.json").read_text())


@pytest.mark.parametrize("sample", [3, 20, 0.1, 0.9])
def test_a_sample_of_the_rest_takes_nothing_from_what_is_held_out(tmp_path, sample):
    """The commands for the two differ in --only-held-out alone."""
    corpus = pairs(splits=4, size=10)
    job(corpus, tmp_path / "all", hold_out=7, only_held_out=True)
    outcome = job(corpus, tmp_path / "held", hold_out=7, only_held_out=True, sample=sample)
    assert keys(tmp_path / "held") == keys(tmp_path / "all")
    assert report(tmp_path / "held")["skipped"] == {"not held out": 33}
    assert "asked for" not in str(outcome.report)


def test_records_about_one_image_are_held_out_together(tmp_path):
    images = [encoded(make_image(seed)) for seed in range(10)]
    # Three records about each image, in other splits and under other keys, and ten without one.
    corpus = [[pair(f"{turn}-{i}", image) for i, image in enumerate(images)] for turn in range(3)]
    corpus.append([Record(f"text-{i}", caption="one") for i in range(10)])
    for seed in range(3):
        job(corpus, tmp_path / f"rest{seed}", hold_out=8, seed=seed)
        job(corpus, tmp_path / f"held{seed}", hold_out=8, seed=seed, only_held_out=True)
        rest, out = keys(tmp_path / f"rest{seed}"), keys(tmp_path / f"held{seed}")
        assert 8 <= len(out) <= 10 and len(rest) + len(out) == 40
        about = [{key.split("-")[1] for key in found if "text" not in key} for found in (rest, out)]
        assert not about[0] & about[1] and about[1]


def test_records_of_several_images_are_held_out_with_those_of_the_same_in_their_order():
    split, turns = as_splits([[]])[0], (Turn("q", "a"),)

    def drawn(key, *images):
        return dedup.priority(Record(key, images, turns=turns), split, seed=3, by_images=True)

    assert drawn("one", A, B) == drawn("two", A, B)
    assert len({drawn("one", *images) for images in ((A,), (B,), (A, B), (B, A))}) == 4


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_equal_priorities_are_held_out_together(count):
    table = np.zeros(4, dtype=dedup.ROW)
    table["priority"] = [7, 2**64 - 1, 3, 7]
    rest, out = (
        next(dedup.select([lambda: table], False, None, hold_out=count, only_held_out=only))
        for only in (False, True)
    )
    expected = {1: [1], 2: [0, 1, 3], 3: [0, 1, 3]}.get(count, [0, 1, 2, 3])
    assert np.flatnonzero(out == dedup.KEEP).tolist() == expected
    assert ((rest == dedup.KEEP) == (out == dedup.NOT_HELD_OUT)).all()
    assert ((rest == dedup.HELD_OUT) == (out == dedup.KEEP)).all()


def brute_force(tables, deduplicate, sample):
    """The definition: one loop over all rows."""
    rows = np.concatenate(tables)
    seen, keep_decisions = set(), []
    for row in rows:
        again = deduplicate and tuple(row["identity"]) in seen
        seen.add(tuple(row["identity"]))
        keep_decisions.append(dedup.DUPLICATE if again else dedup.KEEP)
    left = [i for i, fate in enumerate(keep_decisions) if fate == dedup.KEEP]
    if isinstance(sample, int):
        chosen = set(sorted(left, key=lambda i: (int(rows["priority"][i]), i))[:sample])
    elif sample is not None:
        chosen = {i for i in left if int(rows["priority"][i]) < sample * 2**64}
    else:
        chosen = set(left)
    return [
        dedup.NOT_SAMPLED if fate == dedup.KEEP and i not in chosen else fate
        for i, fate in enumerate(keep_decisions)
    ]


@settings(max_examples=500)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    identities=st.integers(1, 40),
    classes=st.sampled_from([1, 4, 1 << 16]),
    members=st.sampled_from([2, 1 << 48]),
    deduplicate=st.booleans(),
    sample=st.one_of(st.none(), st.integers(1, 60), st.floats(0.01, 0.99)),
    rows_at_once=st.integers(1, 80),
    seed=st.integers(0, 2**32),
)
def test_selection_is_what_it_is_defined_to_be(
    sizes, identities, classes, members, deduplicate, sample, rows_at_once, seed
):
    random = np.random.default_rng(seed)
    tables = []
    for size in sizes:
        table = np.zeros(size, dtype=dedup.ROW)
        values = random.integers(0, identities, size).astype(np.uint64)
        # Equal first halves with other second ones, and the other way round.
        table["identity"] = np.stack([values // 3, values % 5], axis=1)
        # Many or few share the upper bits, and all of them.
        upper, lower = (random.integers(0, n, size, dtype=np.uint64) for n in (classes, members))
        table["priority"] = (upper << np.uint64(48)) + lower
        tables.append(table)
    loaders = [lambda table=table: table for table in tables]
    keep_decisions = list(dedup.select(loaders, deduplicate, sample, rows_at_once))
    assert [len(fate) for fate in keep_decisions] == sizes
    assert np.concatenate(keep_decisions).tolist() == brute_force(tables, deduplicate, sample)
