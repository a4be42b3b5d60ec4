"""A cached reference gives what the live one gives, and asks it only for what is not kept."""

import pytest
import torch

from dpo.data.stream import TokenizedPair, build_stream
from dpo.errors import UserError
from dpo.model.load import Policy
from dpo.model.logp_cache import LogpCache
from dpo.model.reference import AdapterOff, Reference, open_cache
from dpo.model.scorer import Scorer
from tests.models import tiny, with_lora

PAIRS = [
    TokenizedPair([5, 6, 7], [8, 9, 10], [8, 11]),
    TokenizedPair([5, 6], [12], [13, 14, 15], rejected_scored=[True, False, True]),
    TokenizedPair([20, 21, 22, 23], [24, 25], [26, 27, 28]),
    TokenizedPair([30], [31, 32, 33, 34], [35]),
]


class Counted:
    """A reference that remembers which pairs it was asked for."""

    def __init__(self, live):
        self.live, self.asked = live, []

    def __call__(self, stream):
        self.asked += stream.pairs
        return self.live(stream)


@pytest.fixture(scope="module")
def live():
    model = with_lora(tiny())
    return AdapterOff(Scorer(model), Policy(model))


def cached(live, folder):
    return Reference("adapter", Counted(live), LogpCache(folder))


def test_the_first_time_it_is_the_live_reference_and_the_second_time_nobody_is_asked(
    live, tmp_path
):
    stream = build_stream(PAIRS)
    first = cached(live, tmp_path)
    assert torch.equal(first(stream), live(stream))
    first.flush()
    second = cached(live, tmp_path)
    assert torch.equal(second(stream), live(stream))
    assert first.live.asked == PAIRS
    assert second.live.asked == []
    assert (second.num_found, second.num_computed, second.share_known) == (4, 0, 1.0)


@pytest.mark.parametrize("known", [[0], [3], [1, 2], [0, 3], [0, 1, 3]])
def test_of_a_micro_batch_only_the_pairs_that_are_missing_are_computed(live, tmp_path, known):
    """Found and computed log-probs come out in the order of the stream: 1e-6 nats, since the
    computed ones stood in a shorter one."""
    first = cached(live, tmp_path)
    first(build_stream([PAIRS[i] for i in known]))
    first.flush()
    second = cached(live, tmp_path)
    stream = build_stream(PAIRS)
    torch.testing.assert_close(second(stream), live(stream), rtol=0, atol=1e-6)
    assert second.live.asked == [pair for i, pair in enumerate(PAIRS) if i not in known]
    second.flush()
    third = cached(live, tmp_path)
    torch.testing.assert_close(third(stream), live(stream), rtol=0, atol=1e-6)
    assert third.live.asked == []


def test_a_changed_token_is_the_only_thing_computed_again(live, tmp_path):
    first = cached(live, tmp_path)
    first(build_stream(PAIRS))
    first.flush()
    changed = TokenizedPair([5, 6, 7], [8, 9, 10], [8, 12])
    second = cached(live, tmp_path)
    second(build_stream([changed, *PAIRS[1:]]))
    assert second.live.asked == [changed]


def test_several_micro_batches_are_settled_at_once_and_a_peek_is_not_kept(live, tmp_path):
    reference = cached(live, tmp_path)
    for pair in PAIRS[:2]:
        reference(build_stream([pair]))
    stream = build_stream(PAIRS[2:])
    assert torch.equal(reference.peek(stream), live(stream))
    reference.flush()
    again = cached(live, tmp_path)
    again(build_stream(PAIRS))
    assert again.live.asked == PAIRS[2:]
    assert reference.num_computed == 2


def test_an_empty_stream_keeps_nothing(live, tmp_path):
    reference = cached(live, tmp_path)
    assert reference(build_stream([])).shape == (0,)
    reference.flush()
    assert not list(tmp_path.iterdir())


def test_a_damaged_entry_is_computed_again_and_counted_in_the_summary(live, tmp_path):
    first = cached(live, tmp_path)
    stream = build_stream(PAIRS)
    first(stream)
    first.flush()
    (shard,) = tmp_path.glob("*.safetensors")
    whole = bytearray(shard.read_bytes())
    whole[-1] ^= 0x01  # the last log-prob of the last pair
    shard.write_bytes(whole)
    second = cached(live, tmp_path)
    torch.testing.assert_close(second(stream), live(stream), rtol=0, atol=1e-6)
    assert second.live.asked == PAIRS[3:]
    second.flush()
    assert "1 pairs computed, 3 found, 1 damaged" in second.summary()
    third = cached(live, tmp_path)
    third(stream)
    assert third.live.asked == []


def test_a_folder_that_cannot_be_written_to_is_refused_with_the_key(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"reference\.cache: got .*file.*cannot be written"):
        open_cache(str(tmp_path / "file"), "0" * 64)


def test_auto_is_beside_the_tokenised_pairs_and_every_reference_has_its_folder(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    assert open_cache("auto", "a" * 64).folder.parent == tmp_path / "dpo_reference"
    one, two = (open_cache(str(tmp_path / "mine"), digest * 64).folder for digest in "ab")
    assert one.parent == two.parent == tmp_path / "mine"
    assert one != two
