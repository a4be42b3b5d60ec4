"""What the cache gives back is what was put in, for that pair and no other, or nothing."""

import subprocess
import sys

import numpy as np
import pytest

from dpo.data.stream import TokenizedPair
from dpo.model import logp_cache
from dpo.model.logp_cache import LogpCache


def a_pair(number):
    return TokenizedPair([1, number], [2, 3, number], [4])


def its_logps(number):
    """Four scored tokens; exact in fp32."""
    return np.array([-0.5, -1.25, -number, -1 / 3], np.float32)


def filled(folder, numbers):
    cache = LogpCache(folder)
    for number in numbers:
        cache.put(a_pair(number), its_logps(number))
    cache.flush()
    return cache


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def found(cache, numbers):
    return [n for n in numbers if cache.get(a_pair(n)) is not None]


def test_what_was_put_is_found_bit_for_bit_before_and_after_it_is_on_disk(tmp_path):
    cache = LogpCache(tmp_path)
    cache.put(a_pair(7), its_logps(7))
    assert np.array_equal(cache.get(a_pair(7)), its_logps(7))
    assert not shards(tmp_path)
    cache.flush()
    again = LogpCache(tmp_path)
    for one in (cache, again):
        assert np.array_equal(one.get(a_pair(7)), its_logps(7))
        assert one.get(a_pair(8)) is None


def test_a_pair_that_differs_in_anything_is_another(tmp_path):
    pair = TokenizedPair([1, 2], [3, 4], [5])
    cache = LogpCache(tmp_path)
    cache.put(pair, np.zeros(3, np.float32))
    assert cache.get(TokenizedPair([1], [2, 3, 4], [5])) is None
    assert cache.get(TokenizedPair([1, 2], [3, 4], [5], chosen_scored=[False, True])) is None
    assert cache.get(TokenizedPair([1, 2], [3, 4], [5])) is not None


def test_a_full_shard_is_written_without_being_asked(tmp_path, monkeypatch):
    """Of five pairs in shards of two, four are on disk: a killed process loses one."""
    monkeypatch.setattr(logp_cache, "PAIRS_PER_SHARD", 2)
    cache = LogpCache(tmp_path)
    for number in range(5):
        cache.put(a_pair(number), its_logps(number))
    assert len(shards(tmp_path)) == 2
    assert found(LogpCache(tmp_path), range(5)) == [0, 1, 2, 3]
    assert found(cache, range(5)) == [0, 1, 2, 3, 4]


def test_nothing_new_writes_nothing(tmp_path):
    LogpCache(tmp_path).flush()
    assert not list(tmp_path.iterdir())


def test_another_process_is_seen_after_a_refresh(tmp_path):
    mine = filled(tmp_path, [1])
    filled(tmp_path, [2, 3])
    assert found(mine, range(5)) == [1]
    mine.refresh()
    assert found(mine, range(5)) == [1, 2, 3]


@pytest.mark.slow
def test_two_processes_that_write_at_once_lose_nothing(tmp_path):
    """Each writes twenty shards of one pair, half of them the same pairs."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.model.test_logp_cache import filled\n"
        "for n in range(int(sys.argv[2]), int(sys.argv[2]) + 20): filled(Path(sys.argv[1]), [n])"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path, str(start)]) for start in (0, 10)
    ]
    assert [process.wait() for process in running] == [0, 0]
    cache = LogpCache(tmp_path)
    assert len(shards(tmp_path)) == 40
    assert found(cache, range(40)) == [*range(30)]
    assert all(np.array_equal(cache.get(a_pair(n)), its_logps(n)) for n in range(30))
    assert cache.num_damaged == 0


def test_a_shard_that_is_not_finished_is_not_read(tmp_path):
    """What a process leaves that is killed while it writes."""
    filled(tmp_path, [1])
    (shard,) = shards(tmp_path)
    shard.rename(tmp_path / f".{shard.name}")
    cache = LogpCache(tmp_path)
    assert found(cache, [1]) == []
    assert cache.num_damaged == 0


def test_a_flipped_bit_anywhere_is_noticed_and_what_is_put_again_is_found(tmp_path):
    """Every byte of a shard of two pairs, one after the other: never a wrong number."""
    filled(tmp_path, [1, 2])
    (shard,) = shards(tmp_path)
    whole = shard.read_bytes()
    lost = 0
    for at in range(len(whole)):
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        cache = LogpCache(tmp_path)
        for number in (1, 2):
            logps = cache.get(a_pair(number))
            lost += logps is None
            assert logps is None or np.array_equal(logps, its_logps(number)), f"byte {at}"
    assert lost > len(whole) / 2
    cache.put(a_pair(2), its_logps(2))
    cache.flush()
    assert found(LogpCache(tmp_path), [2]) == [2]


def test_without_the_check_a_flipped_bit_would_be_used(tmp_path, monkeypatch):
    """The negative control: it is the check that notices."""
    filled(tmp_path, [1])
    (shard,) = shards(tmp_path)
    whole = bytearray(shard.read_bytes())
    whole[-2] ^= 0x40
    shard.write_bytes(whole)
    cache = LogpCache(tmp_path)
    assert cache.get(a_pair(1)) is None
    assert cache.num_damaged == 1
    checks = LogpCache(tmp_path)._shards[0].checks
    monkeypatch.setattr(logp_cache, "_check", lambda digest, logps: checks[0])
    assert not np.array_equal(LogpCache(tmp_path).get(a_pair(1)), its_logps(1))


@pytest.mark.parametrize("content", [b"", b"not a shard", None])
def test_a_file_that_is_no_shard_is_passed_over_and_counted(tmp_path, content):
    filled(tmp_path, [1])
    filled(tmp_path, [2])
    first, _ = shards(tmp_path)
    first.write_bytes(first.read_bytes()[:100] if content is None else content)
    cache = LogpCache(tmp_path)
    assert found(cache, [1, 2]) == [2]
    assert cache.num_damaged == 1


@pytest.mark.slow
def test_the_log_probs_of_a_large_cache_are_not_in_memory(tmp_path):
    """100 MB of log-probs, opened and asked for three pairs: the process grows by far less."""
    code = """
import sys, psutil
from pathlib import Path
import numpy as np
from dpo.data.stream import TokenizedPair
from dpo.model.logp_cache import LogpCache
pairs = [TokenizedPair([1, n], [2] * 24_999, [3]) for n in range(1000)]
resident = lambda: psutil.Process().memory_info().rss
if sys.argv[2] == "write":
    cache = LogpCache(Path(sys.argv[1]))
    for n, pair in enumerate(pairs):
        cache.put(pair, np.full(25_000, -n, np.float32))
    cache.flush()
else:
    before = resident()
    cache = LogpCache(Path(sys.argv[1]))
    assert [cache.get(pairs[n])[0] for n in (0, 500, 999)] == [0, -500, -999]
    print(resident() - before)
"""
    arguments = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run([*arguments, "write"], check=True)
    read = subprocess.run([*arguments, "read"], check=True, capture_output=True, text=True)
    assert sum(f.stat().st_size for f in shards(tmp_path)) > 99e6
    assert int(read.stdout) < 10e6
