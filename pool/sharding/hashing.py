"""key -> shard -> queue. Any language can compute it: see ``docs/routing.md`` for the steps and test vectors."""

from functools import lru_cache
from hashlib import sha256


def key_hash(key: str) -> int:
    """Return the first 8 bytes of SHA-256 over the key's UTF-8 form, as an unsigned big-endian number."""
    return int.from_bytes(sha256(key.encode()).digest()[:8], "big")


def jump_hash(value: int, buckets: int) -> int:
    """Return the bucket of a 64-bit *value* among *buckets*; from n to n + 1 buckets only 1/(n + 1) of the values move.

    Jump consistent hash, Lamping and Veach, 2014 (arXiv:1406.2294), figure 1.
    """
    bucket, candidate = -1, 0
    while candidate < buckets:
        bucket = candidate
        value = (value * 2862933555777941757 + 1) & 0xFFFFFFFFFFFFFFFF
        candidate = int((bucket + 1) * ((1 << 31) / ((value >> 33) + 1)))
    return bucket


@lru_cache(maxsize=4096)  # a task asks several times, and its key is mostly one of the last
def shard_of(key: str, shards: int) -> int:
    """Return the shard of *key*, from 0 to *shards* - 1."""
    return jump_hash(key_hash(key), shards)


def queue_name(shard: int, namespace: str = "pool") -> str:
    """Return the name of a shard's queue: ``pool.shard.017``."""
    return f"{namespace}.shard.{shard:03d}"
