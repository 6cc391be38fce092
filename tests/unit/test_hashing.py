"""key -> shard -> queue: what every producer in every language must agree on."""

import re
from collections import Counter
from pathlib import Path

import pytest

import pool
from pool.sharding.hashing import jump_hash, key_hash, queue_name, shard_of

VECTORS = [
    ("user-1", 0xC6C289E49E9C05B2, 61, 61),
    ("user-2", 0xD92B69CFB82CECAB, 17, 236),
    ("alice", 0x2BD806C97F0E00AF, 18, 861),
    ("alice@example.com", 0xFF8D9819FC0E12BF, 14, 14),
    ("acme:42", 0x5F79AA4314F69FA5, 58, 897),
    ("chat:7f3a", 0x48EED85377B09031, 31, 306),
    ("0", 0x5FECEB66FFC86F38, 33, 701),
    ("Zo\u00eb", 0xC6A12698582FC110, 4, 670),
    ("\u65e5\u672c", 0xCF2ABF0C5BE326CB, 9, 928),
    ("\U0001f642", 0xD06F1525F7913978, 31, 684),
]


@pytest.mark.parametrize(("key", "value", "of_64", "of_1024"), VECTORS)
def test_the_vectors_hold(key, value, of_64, of_1024):
    """Computed once, independently; a change would strand every running system."""
    assert key_hash(key) == value
    assert (shard_of(key, 64), shard_of(key, 1024)) == (of_64, of_1024)


def test_the_documented_vectors_are_these():
    """docs/routing.md is what other languages test against."""
    text = (Path(pool.__file__).parents[1] / "docs" / "routing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.+?)` \| `([0-9a-f]{16})` \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    assert [(key, int(value, 16), int(a), int(b)) for key, value, a, b in rows] == VECTORS


def test_one_more_shard_moves_its_share_of_the_keys_and_no_others():
    """From n to n + 1 shards about 1/(n + 1) of the keys move, all of them to the new shard."""
    keys = [key_hash(f"key {number}") for number in range(20_000)]
    for shards in (1, 7, 64):
        moved = [(jump_hash(key, shards), jump_hash(key, shards + 1)) for key in keys]
        changed = [(old, new) for old, new in moved if old != new]
        assert all(new == shards for _, new in changed)
        assert len(changed) == pytest.approx(len(keys) / (shards + 1), rel=0.15)


def test_keys_spread_evenly():
    """64 shards, 64,000 keys: each within 20 % of 1000."""
    counts = Counter(shard_of(f"user-{number}", 64) for number in range(64_000))
    assert set(counts) == set(range(64))
    assert 800 < min(counts.values())
    assert max(counts.values()) < 1200


def test_a_shard_is_in_range_for_extreme_values():
    """The arithmetic never leaves the buckets."""
    for value in (0, 1, 2**32, 2**63, 2**64 - 1):
        for buckets in (1, 2, 64, 65_536):
            assert 0 <= jump_hash(value, buckets) < buckets


def test_one_shard_takes_everything():
    """The smallest system."""
    assert {shard_of(f"k{number}", 1) for number in range(100)} == {0}


@pytest.mark.parametrize(
    ("shard", "namespace", "name"),
    [(0, "pool", "pool.shard.000"), (17, "pool", "pool.shard.017"), (1023, "acme", "acme.shard.1023")],
)
def test_a_queue_is_named_after_its_shard(shard, namespace, name):
    """At least three digits."""
    assert queue_name(shard, namespace) == name
