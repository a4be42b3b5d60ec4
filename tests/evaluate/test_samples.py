"""What is drawn: from which distribution, and what it depends on."""

from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.errors import UserError
from dpo.evaluate.samples import Draw, generate
from dpo.evaluate.sampling import Sampling
from tests.models import QUICKSTART_MODEL


@pytest.fixture(scope="module")
def packaged():
    folder = QUICKSTART_MODEL
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def prompt_ids(tokenizer, *questions):
    return [
        tokenizer(f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        for said in questions
    ]


QUESTIONS = [
    "Hi",
    "Which number is larger, 7 or 9?",
    "Count.",
    "What is the last of these words: hat, bell?",
    "Name a month.",
    "Is the sky blue? Give a short answer.",
    "bread, flower, garden, forest, hammer",
    "The wedding is a month later. When is the wedding?",
]


def chi_square(drawn, probabilities):
    """(statistic, degrees of freedom) of draws against probabilities; rare tokens are pooled."""
    counts = torch.bincount(torch.tensor(drawn), minlength=len(probabilities)).double()
    expected = probabilities.double() * len(drawn)
    common = expected >= 5
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    counts, expected = counts[expected > 0.5], expected[expected > 0.5]
    return float(((counts - expected) ** 2 / expected).sum()), len(expected) - 1


def is_plausible(drawn, probabilities):
    """Within five standard deviations of the mean of the chi-square distribution."""
    statistic, freedom = chi_square(drawn, probabilities)
    return statistic < freedom + 5 * (2 * freedom) ** 0.5


def first_tokens(packaged, count, **how):
    model, tokenizer = packaged
    ids = prompt_ids(tokenizer, "Count.") * count
    answers = generate(
        model,
        tokenizer,
        ids,
        stop_ids=[tokenizer.eos_token_id],
        max_new_tokens=1,
        seed=range(count),
        batch_size=500,
        **how,
    )
    return [ids[0] for ids in answers]


def first_distribution(packaged, temperature, top_p=1.0):
    """Softmax of the logits over temperature; of it the likeliest tokens that make up top_p."""
    model, tokenizer = packaged
    with torch.no_grad():
        logits = model(torch.tensor(prompt_ids(tokenizer, "Count."))).logits[0, -1]
    probabilities = (logits.double() / temperature).softmax(-1)
    ordered, tokens = probabilities.sort(descending=True)
    inside = tokens[ordered.cumsum(-1) - ordered < top_p]  # what comes before it is less than top_p
    kept = torch.zeros_like(probabilities)
    kept[inside] = probabilities[inside]
    return kept / kept.sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(5.0, 1.0), (3.0, 0.9), (4.0, 0.5)])
def test_tokens_are_drawn_as_often_as_their_probability_says(packaged, temperature, top_p):
    drawn = first_tokens(packaged, 2000, temperature=temperature, top_p=top_p)
    expected = first_distribution(packaged, temperature, top_p)
    assert int((expected > 0).sum()) > 5
    assert is_plausible(drawn, expected)
    assert not is_plausible(drawn, first_distribution(packaged, temperature * 1.2, top_p))
    assert (expected[drawn] > 0).all()  # nothing outside of the nucleus
    if top_p < 1:
        outside = first_tokens(packaged, 2000, temperature=temperature)
        assert not (expected[outside] > 0).all()


def test_draws_at_different_positions_are_independent():
    """Two positions over (0.5, 0.3, 0.2): each of the nine pairs as often as its product says."""
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    prompts = [[row, 7] for row in range(3000)]
    scores = probabilities.log().repeat(len(prompts), 1)
    draw = Draw(prompts, [0] * len(prompts), 2)
    first, second = (
        draw(torch.zeros(len(prompts), 2 + position, dtype=torch.long), scores).argmax(-1)
        for position in (0, 1)
    )
    pairs = (3 * first + second).tolist()
    assert is_plausible(pairs, torch.outer(probabilities, probabilities).flatten())
    assert not is_plausible((3 * first + first).tolist(), torch.full((9,), 1 / 9))


def test_a_token_without_probability_is_never_drawn():
    """Masked tokens stand at both ends and in between."""
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(500, 1)
    draw = Draw([[row] for row in range(500)], [0] * 500, 1)
    drawn = draw(torch.zeros(500, 1, dtype=torch.long), scores).argmax(-1)
    assert set(drawn.tolist()) == {1, 3}


def test_a_sampled_answer_does_not_depend_on_the_batch(packaged):
    model, tokenizer = packaged
    ids = prompt_ids(tokenizer, *QUESTIONS)
    options = {"stop_ids": [tokenizer.eos_token_id], "max_new_tokens": 12, "temperature": 1.5}
    options |= {"top_p": 0.95, "seed": 3}
    together = generate(model, tokenizer, ids, batch_size=8, **options)
    alone = [generate(model, tokenizer, [prompt], **options)[0] for prompt in ids]
    backwards = generate(model, tokenizer, ids[::-1], batch_size=3, **options)
    assert together == alone == backwards[::-1]
    greedy = generate(model, tokenizer, ids, **(options | {"temperature": 0.0}))
    assert sum(a != b for a, b in zip(greedy, together, strict=True)) >= 4  # it did sample
    other = generate(model, tokenizer, ids, **(options | {"seed": 4}))
    assert sum(a != b for a, b in zip(other, together, strict=True)) >= 4


def test_each_prompt_may_have_its_own_seed(packaged):
    model, tokenizer = packaged
    ids = prompt_ids(tokenizer, "Name a month.") * 6
    options = {"stop_ids": [tokenizer.eos_token_id], "max_new_tokens": 8, "temperature": 2.0}
    seeds = [0, 1, 2, 3, 0, 1]
    answers = generate(model, tokenizer, ids, seed=seeds, batch_size=4, **options)
    assert answers[:2] == answers[4:]
    assert len(set(map(tuple, answers))) > 2


def test_a_longer_limit_only_continues_the_answer(packaged):
    model, tokenizer = packaged
    ids = prompt_ids(tokenizer, *QUESTIONS[:4])
    options = {"stop_ids": [tokenizer.eos_token_id], "temperature": 1.5}
    short, long = (
        generate(model, tokenizer, ids, max_new_tokens=limit, **options) for limit in (3, 20)
    )
    assert [answer[:3] for answer in long] == short
    assert Counter(map(len, short)) == {3: 4}


def test_sampling_leaves_the_global_random_state_alone(packaged):
    model, tokenizer = packaged
    before = torch.random.get_rng_state()
    ids = prompt_ids(tokenizer, "Hi")
    generate(model, tokenizer, ids, stop_ids=[2], max_new_tokens=2, temperature=1.0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_models_own_generation_settings_do_not_bend_the_answers(packaged):
    """A repetition penalty, as some checkpoints ship, would: transformers itself applies it."""
    model, tokenizer = packaged
    ids = prompt_ids(tokenizer, "Hi")
    options = {"stop_ids": [tokenizer.eos_token_id], "max_new_tokens": 8}
    expected = generate(model, tokenizer, ids, **options)
    own = model.generation_config.repetition_penalty
    try:
        model.generation_config.repetition_penalty = 5.0
        assert generate(model, tokenizer, ids, **options) == expected
        assert model.generation_config.repetition_penalty == 5.0
        theirs = model.generate(torch.tensor(ids), max_new_tokens=8, do_sample=False)
        assert theirs[0, len(ids[0]) :].tolist() != expected[0]
    finally:
        model.generation_config.repetition_penalty = own


def test_the_model_is_left_as_it_was_even_where_generation_fails(packaged, monkeypatch):
    model, tokenizer = packaged
    settings = model.generation_config
    model.train()
    monkeypatch.setattr(model, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, tokenizer, [[5]], stop_ids=[2], max_new_tokens=1)
    assert model.training
    assert model.generation_config is settings
    model.eval()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"temperature": -0.1}, "--temperature: got -0.1, wanted 0"),
        ({"temperature": float("nan")}, "--temperature: got nan"),
        ({"top_p": 0.0}, "--top_p: got 0.0, wanted above 0"),
        ({"top_p": 1.1}, "--top_p: got 1.1"),
        ({"max_new_tokens": 0}, "--max_new_tokens: got 0, wanted 1"),
    ],
)
def test_sampling_options_out_of_range_are_refused(option, said):
    with pytest.raises(UserError, match=said):
        Sampling(**option)


def test_the_defaults_are_the_articles():
    assert (Sampling().temperature, Sampling().top_p) == (0.7, 0.9)
