"""Random damage: every sample is seen unchanged, or bad, or unreadable, and the counts add up.

2,400 damages of finished data sets, 600 of foreign shards before they are indexed, and 120 read
through the training stream. `python tests/data_loading/test_fuzz.py` prints the counts by kind.
"""

import io
import random
import shutil
import tarfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from streams import config, loader
from tiny_data import encoded, make_image, record, write

from data_prep.check import check, check_shard
from data_prep.index import index_shard
from megatron_owl2.config.schema import StorageConfig
from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.data.shards.tar import unpack_sample
from megatron_owl2.data.storage import StorageOptions
from megatron_owl2.errors import BadSampleError, DataError, ShardError, StorageError

pytestmark = pytest.mark.slow

SHARDS, PER_SHARD = 3, 8
RECORDS = [record(i) for i in range(SHARDS * PER_SHARD)]
ONCE = StorageOptions(attempts=1)
TIMES = 200  # damages of every kind


def files(folder: Path, random: random.Random) -> Path:
    """Any file of the data set, shards more often than the small ones."""
    tars, others = sorted(folder.glob("*.tar")), sorted(folder.iterdir())
    return random.choice(tars if random.random() < 0.5 else others)


def flip(folder, random):
    path = files(folder, random)
    data = bytearray(path.read_bytes())
    for _ in range(random.choice((1, 1, 1, 5, 50))):
        data[random.randrange(len(data))] ^= random.randrange(1, 256)
    path.write_bytes(data)


def flip_in_header(folder, random):
    path = random.choice(sorted(folder.glob("*.tar")))
    with tarfile.open(path) as tar:
        start = random.choice(tar.getmembers()).offset
    data = bytearray(path.read_bytes())
    data[start + random.randrange(512)] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def remove(folder, random):
    path = files(folder, random)
    data = path.read_bytes()
    start = random.randrange(len(data))
    path.write_bytes(data[:start] + data[start + random.choice((1, 8, 100, 512, 1024, 5000)) :])


def insert(folder, random):
    path = files(folder, random)
    data = path.read_bytes()
    start = random.randrange(len(data) + 1)
    more = random.choice((bytes(512), bytes(1024), random.randbytes(random.randrange(1, 2000))))
    path.write_bytes(data[:start] + more + data[start:])


def truncate(folder, random):
    """At every kind of boundary: in and after headers, data, padding, members, samples, the end."""
    path = random.choice(sorted(folder.glob("*.tar")))
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    data = path.read_bytes()
    member = random.choice(members)
    end = member.offset_data + member.size
    places = (
        member.offset,
        member.offset + random.randrange(1, 512),
        member.offset_data,
        member.offset_data + random.randrange(member.size),
        end,
        end + -end % 512,
        len(data) - 1024,
        len(data) - 512,
        len(data) - 1,
        0,
    )
    path.write_bytes(data[: random.choice(places)])


def wrong_sidecar(folder, random):
    """The index or the checksums of another shard, or of another length, or zeros."""
    suffix = random.choice((".idx", ".sums"))
    one, other = random.sample(sorted(folder.glob(f"*{suffix}")), 2)
    data = one.read_bytes()
    replacement = (other.read_bytes(), data[8:], data + data[-8:], bytes(len(data)), data[::-1])
    one.write_bytes(random.choice(replacement))


def wrong_manifest(folder, random):
    path = folder / "manifest.json"
    text = path.read_text()
    edits = (
        text.replace('"samples": 8', f'"samples": {random.choice((7, 9, 0, -8, 800))}', 1),
        text.replace("shard-000001.tar", random.choice(("shard-000000.tar", "../x.tar", "x"))),
        text.replace('"bytes": ', '"bytes": 1'),
        text.replace('"index_sha256": "', '"index_sha256": "0'),
        "".join(random.sample(text, len(text))),
        text[: random.randrange(len(text))],
        "null",
        '{"format": "megatron_owl2 shards 2", "shards": [{}]}',
    )
    path.write_text(random.choice(edits))


def swap(folder, random):
    one, other = random.sample(sorted(folder.iterdir()), 2)
    a, b = one.read_bytes(), other.read_bytes()
    one.write_bytes(b)
    other.write_bytes(a)


def vanish(folder, random):
    random.choice(sorted(folder.iterdir())).unlink()


def zero_a_range(folder, random):
    """As a file system leaves it after a crash."""
    path = files(folder, random)
    data = bytearray(path.read_bytes())
    start = random.randrange(len(data)) // 512 * 512
    length = min(random.choice((512, 4096)), len(data) - start)
    data[start : start + length] = bytes(length)
    path.write_bytes(data)


def move_samples(folder, random):
    """Whole samples in another order, so that every header is sound."""
    path = random.choice(sorted(folder.glob("*.tar")))
    offsets = Path(f"{path}.idx").read_bytes()
    places = [int.from_bytes(offsets[i : i + 8], "little") for i in range(0, len(offsets), 8)]
    data = path.read_bytes()
    samples = [data[a:b] for a, b in zip(places, places[1:], strict=False)]
    random.shuffle(samples)
    path.write_bytes(b"".join(samples) + data[places[-1] :])


def repeat_a_sample(folder, random):
    """A key that comes twice, in place of another sample or beside it."""
    path = random.choice(sorted(folder.glob("*.tar")))
    offsets = Path(f"{path}.idx").read_bytes()
    places = [int.from_bytes(offsets[i : i + 8], "little") for i in range(0, len(offsets), 8)]
    data = path.read_bytes()
    a, b = random.randrange(PER_SHARD), random.randrange(PER_SHARD)
    skipped = places[b + 1] if random.random() < 0.5 else places[b]
    sample = data[places[a] : places[a + 1]]
    path.write_bytes(data[: places[b]] + sample + data[skipped:])


DAMAGES = [
    flip,
    flip_in_header,
    remove,
    insert,
    truncate,
    wrong_sidecar,
    wrong_manifest,
    swap,
    vanish,
    zero_a_range,
    move_samples,
    repeat_a_sample,
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(tmp_path_factory.mktemp("whole") / "set", RECORDS, samples_per_shard=PER_SHARD)


def judge(folder: Path, damage) -> Counter:
    """Read every sample; anything but a right record or an error with the file's name fails."""
    counts = Counter(dict.fromkeys(("seen", "bad", "unreadable"), 0))
    try:
        dataset = ShardedDataset(folder, ONCE)
    except (ShardError, StorageError) as error:
        assert "manifest.json" in str(error), error
        counts["unreadable"] = len(RECORDS)
        return counts
    for shard in range(SHARDS):
        for index in range(PER_SHARD):
            try:
                assert dataset.read(shard, index) == RECORDS[shard * PER_SHARD + index]
                counts["seen"] += 1
            except BadSampleError as error:
                assert f"shard-{shard:06d}.tar at byte" in str(error)
                counts["bad"] += 1
            except (ShardError, StorageError) as error:
                assert f"shard-{shard:06d}.tar" in str(error)
                counts["unreadable"] += 1
    return counts


def damage_and_judge(whole: Path, folder: Path, damage, seed: int) -> tuple[Counter, bool]:
    """The counts, and whether check_data finds anything."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    damage(folder, random.Random(f"{damage.__name__} {seed}"))
    counts = judge(folder, damage)
    try:
        dataset = ShardedDataset(folder, ONCE)
    except (ShardError, StorageError):
        return counts, True
    results = [check_shard(dataset, 0.0, index) for index in range(SHARDS)]
    for result in results:
        assert result.good + len(result.bad) + result.unreadable == PER_SHARD
    assert sum(result.good for result in results) <= counts["seen"]
    return counts, any(r.bad or r.unreadable or r.faults for r in results)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_nothing_is_silent(whole, tmp_path, damage):
    total: Counter = Counter()
    for seed in range(TIMES):
        counts, found = damage_and_judge(whole, tmp_path / "set", damage, seed)
        assert sum(counts.values()) == len(RECORDS), seed
        assert found or counts["seen"] == len(RECORDS), seed
        total += counts
    assert total["seen"] < TIMES * len(RECORDS)  # the damage did something
    assert total["bad"] + total["unreadable"] > TIMES / 4


Sample = tuple[str, dict[str, bytes]]  # key, and extension to bytes


def foreign(path: Path, random: random.Random) -> list[Sample]:
    """A tar as others write it, with odd names, folders, a key that comes again and empty files."""
    names = ["a/b", "../../up", "/abs", "snö", "猫" * 40, "x" * 150, "with space", "-", "#%?", "-"]
    random.shuffle(names)
    samples = []
    tar_format = random.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name in names:
            parts = {}
            for extension in ("jpg", "txt"):
                if random.random() < 0.1:
                    folder = tarfile.TarInfo(random.choice(("./", "a/", "y" * 120 + "/")))
                    folder.type = tarfile.DIRTYPE
                    tar.addfile(folder)
                data = b"" if random.random() < 0.1 else random.randbytes(random.randrange(1500))
                member = tarfile.TarInfo(f"{name}.{extension}")
                member.size, member.mtime = len(data), random.choice((0, 1.25))
                tar.addfile(member, io.BytesIO(data))
                parts[extension] = data
            samples.append((name, parts))
    return samples


def indexed(path: Path) -> tuple[list[Sample], int]:
    """The samples where the index has them, and how many of them it says lack a member."""
    _, unusable = index_shard(path)
    data, index = path.read_bytes(), Path(f"{path}.idx").read_bytes()
    offsets = [int.from_bytes(index[i : i + 8], "little") for i in range(0, len(index), 8)]
    return [unpack_sample(data[a:b]) for a, b in pairwise(offsets)], sum(
        unusable[reason] for reason in ("no txt or json", "no image (jpg, jpeg, png or webp)")
    )


def contents(samples: list[Sample]) -> bytes:
    return b"".join(data for _, parts in samples for data in parts.values())


def changed_bits(one: bytes, other: bytes) -> int:
    assert len(one) == len(other)
    return (int.from_bytes(one) ^ int.from_bytes(other)).bit_count()


def test_foreign_shards_are_indexed_whole_or_refused(tmp_path):
    """What no checksum of a tar covers may come changed, but nothing comes in another's place."""
    accepted = Counter()
    for seed in range(600):
        chance = random.Random(seed)
        path = tmp_path / "f.tar"
        expected = foreign(path, chance)
        data = bytearray(path.read_bytes())
        damage = ("cut", "bit", "gap", "none")[seed % 4]
        if damage == "cut":
            blocks = chance.choice((1, 512))
            del data[chance.randrange(len(data)) // blocks * blocks :]
        elif damage == "bit":
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        elif damage == "gap":
            start = chance.randrange(len(data) - 512)
            data[start : start + chance.randrange(1, 512)] = b""
        path.write_bytes(data)
        try:
            found, lacking = indexed(path)
        except ShardError as error:
            assert "f.tar" in str(error)
            assert damage != "none"
            continue
        accepted[damage] += 1
        if damage == "bit":
            # In a file, or in a long name, which is data: then its sample came asunder.
            assert changed_bits(contents(found), contents(expected)) <= 1, seed
            assert sum(sample in found for sample in expected) >= len(expected) - 1, seed
            assert len(found) == len(expected) or (len(found), lacking) == (len(expected) + 1, 2)
        else:
            assert found == expected, seed
    assert accepted["none"] == 150 and accepted["gap"] == 0
    assert 5 < accepted["cut"] < 50 < accepted["bit"] < 150


def test_the_stream_sees_or_lists_every_sample(tmp_path):
    """One epoch: a sample index holds its own sample, or a line says why not; or the run stops."""

    def images():
        for i, item in enumerate(RECORDS):
            yield item.__class__(item.key, images=(encoded(make_image(i)),), caption=item.key)

    whole = write(tmp_path / "whole", images(), samples_per_shard=PER_SHARD)
    stopped = finished = 0
    for seed in range(120):
        damage = DAMAGES[seed % len(DAMAGES)]
        folder = tmp_path / "set"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        damage(folder, random.Random(seed))
        seen, bad = set(), set()
        try:
            data = config(folder, max_bad_fraction=1.0, storage=StorageConfig(attempts=1))
            for batch in loader(data, limit_samples=len(RECORDS), micro=4):
                listed = {sample.sample_index for sample in batch.bad_samples}
                bad |= listed
                seen |= set(batch.sample_indices.tolist()) - listed
        except (ShardError, StorageError, DataError) as error:
            assert ".tar" in str(error) or "manifest.json" in str(error)
            stopped += 1
        else:
            assert sorted(seen | bad) == list(range(len(RECORDS)))
            finished += 1
    assert stopped > 20 and finished > 20


def main() -> None:
    import tempfile

    root = Path(tempfile.mkdtemp())
    whole = write(root / "whole", RECORDS, samples_per_shard=PER_SHARD)
    assert not any(r.bad or r.unreadable or r.faults for r in check(str(whole)))
    print(f"{'damage':18}{'times':>7}{'seen':>8}{'bad':>7}{'unreadable':>12}{'expected':>10}")
    for damage in DAMAGES:
        total: Counter = Counter()
        for seed in range(TIMES):
            total += damage_and_judge(whole, root / "set", damage, seed)[0]
        figures = f"{total['seen']:8}{total['bad']:7}{total['unreadable']:12}"
        print(f"{damage.__name__:18}{TIMES:7}{figures}{TIMES * len(RECORDS):10}")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
