"""The choice of a token: that of all scores that are near, against transformers' own warpers."""

import pytest
import torch
from theloom.answers.choice import Sampling

SETTINGS = [
    Sampling(),
    Sampling(1.0),
    Sampling(0.7, 0.9),
    Sampling(1.3, 0.999),
    Sampling(1.0, 1.0, 5),
    Sampling(0.8, 0.6, 300),
    Sampling(1.0, 1e-6),
    Sampling(1.0, 0.5, 10_000),
]


def scores_of(number, size):
    drawn = torch.randn(1, size, generator=torch.Generator().manual_seed(number))
    return drawn * (1 + number % 4)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_a_sure_token_is_the_exact_one_of_all_near_scores(sampling):
    generator, sure = torch.Generator().manual_seed(0), 0
    for number in range(60):
        scores = scores_of(number, (3, 200, 2000)[number % 3])
        if number % 5 == 0:
            scores = scores.round(decimals=1)  # ties
        noise = sampling.noise(generator, scores.shape[-1])
        token = sampling.sure(scores, noise, 1e-3)
        sure += token is not None
        if token is None:
            continue
        width = 1e-3 * float(scores.abs().max())
        for _ in range(8):
            near = scores + width * (2 * torch.rand(scores.shape, generator=generator) - 1)
            assert sampling.exact(near, noise) == token
    assert sure > 20


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_few_of_the_likeliest_tokens_give_the_same_as_all(sampling, monkeypatch):
    def found():
        generator = torch.Generator().manual_seed(1)
        tokens = []
        for number in range(40):
            noise = sampling.noise(generator, 1000)
            tokens.append(sampling.sure(scores_of(number, 1000), noise, 1e-5))
        return tokens

    few = found()
    monkeypatch.setattr("theloom.answers.choice._LIKELIEST", 1000)
    assert found() == few


def test_equal_scores_across_the_bound_of_top_p_are_not_sure():
    scores = torch.tensor([[0.4, 0.3, 0.3]]).log()  # one of two equal tokens is above 0.6
    noise = torch.tensor([[100.0, 1.0, 50.0]])
    assert Sampling(1.0, 0.6).sure(scores, noise, 1e-5) is None
    assert Sampling(1.0, 0.8).sure(scores, noise, 1e-5) == 1
