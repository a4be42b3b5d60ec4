"""Token rewards: they add up to the answer's reward, and their texts to the answer."""

import pytest
import torch

from dpo.data.stream import TokenizedPair, build_stream
from dpo.evaluate.token_rewards import pairs_to_show, text_pieces, token_rewards
from dpo.logps import pair_logps
from dpo.losses import PairLogps, implicit_rewards
from dpo.model.scorer import Scorer
from tests.models import QUICKSTART_MODEL, tiny

TEXTS = ["Two  spaces, a\ttab,\n a line.", "naïve café 🙂 日本語", "<|im_start|>user\nHi", " x"]


@pytest.fixture(scope="module")
def tokenizer():
    import transformers

    return transformers.AutoTokenizer.from_pretrained(QUICKSTART_MODEL)


@pytest.fixture(scope="module")
def models():
    policy, reference = Scorer(tiny("llama")), Scorer(tiny("llama", hidden_size=16))
    return policy, lambda stream: reference(stream).detach()


PAIR = TokenizedPair(
    [1, 2, 3], [5, 6, 7, 8], [5, 6, 9], chosen_scored=[True, False, True, True]
)  # the answers open alike; a token in between is not scored


def test_token_rewards_add_up_to_the_reward_of_the_answer(models, tokenizer):
    shown = token_rewards(PAIR, *models, tokenizer, beta=0.3, device=torch.device("cpu"))
    stream = build_stream([PAIR])
    with torch.no_grad():
        logps = pair_logps(
            models[0](stream), models[1](stream), stream.sequence_ids, stream.num_pairs
        )
    rewards = implicit_rewards(logps, beta=0.3)
    for name, reward in zip(("chosen", "rejected"), rewards, strict=True):
        total = sum(value for value in shown[name]["rewards"] if value is not None)
        assert total == pytest.approx(reward.item(), abs=1e-5)
        assert abs(total) > 1e-3


def test_a_token_that_is_not_scored_has_no_reward_and_keeps_its_place(models, tokenizer):
    shown = token_rewards(PAIR, *models, tokenizer, beta=0.3, device=torch.device("cpu"))
    assert len(shown["chosen"]["tokens"]) == 4
    assert [value is None for value in shown["chosen"]["rewards"]] == [False, True, False, False]
    assert len(shown["rejected"]["rewards"]) == 3
    # Both answers open with token 5 after the same prompt: one log-prob, one reward.
    assert shown["chosen"]["rewards"][0] == pytest.approx(shown["rejected"]["rewards"][0])


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_of_a_text_joined_are_the_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = text_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def test_the_pieces_of_a_long_text_do_not_depend_on_how_far_they_look_back(tokenizer):
    ids = tokenizer("The race is in April, not in May. " * 5)["input_ids"]
    assert text_pieces(tokenizer, ids) == text_pieces(tokenizer, ids, context=1000)


def test_sentencepiece_keeps_its_leading_spaces_and_whole_characters(sentencepiece):
    """The Old Italic letter is four byte tokens: it stands with the last of them."""
    ids = sentencepiece("The race is in April 𐌀.", add_special_tokens=False)["input_ids"]
    pieces = text_pieces(sentencepiece, ids)
    assert "".join(pieces) == sentencepiece.decode(ids)
    assert " race" in pieces
    assert pieces.count("") == 3


def test_the_pairs_to_show_are_spread_and_the_worst():
    """Margins 0, 1, 2, ...: the lowest are the first three, which are shown as such, once."""
    margins = torch.arange(20.0)
    zeros = torch.zeros(20)
    logps = PairLogps(margins, zeros, zeros, zeros, zeros, zeros)
    shown = pairs_to_show(logps, beta=1.0)
    assert [i for i, why in shown if why == "lowest margin"] == [0, 1, 2]
    assert [i for i, why in shown if why != "lowest margin"] == [4, 8, 11, 15, 19]
