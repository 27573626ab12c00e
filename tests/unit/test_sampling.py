"""How tokens are chosen."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from inference.protocol import SamplingParams
from inference.sampling import BatchSampler, RowSampling, choice_seed, noise_keys

VOCAB = 50


def _row(seed: int = 0, **params: Any) -> RowSampling:
    return RowSampling(SamplingParams(**params), seed, prompt=(1, 2, 3))


def _logits(rows: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, 2, (rows, VOCAB)).astype(np.float32))


def _draw(row: RowSampling, logits: mx.array, times: int) -> list[int]:
    sampler = BatchSampler(VOCAB)
    sampler.join([row])
    return [int(sampler(logits).tokens.item()) for _ in range(times)]


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = _logits(3)
    sampler = BatchSampler(VOCAB)
    sampler.join([_row(temperature=0) for _ in range(3)])

    assert sampler(logits).tokens.tolist() == mx.argmax(logits, axis=-1).tolist()


def test_samples_follow_the_softmax() -> None:
    logits = mx.log(mx.array([[0.5, 0.3, 0.2] + [1e-9] * (VOCAB - 3)]))
    counts = Counter(_draw(_row(seed=11), logits, 3000))

    for token, share in ((0, 0.5), (1, 0.3), (2, 0.2)):
        assert abs(counts[token] / 3000 - share) < 0.04


def test_temperature_sharpens() -> None:
    logits = mx.log(mx.array([[0.6, 0.4] + [1e-9] * (VOCAB - 2)]))
    # p^(1/T) with T = 0.5 squares the probabilities: 0.36 / (0.36 + 0.16).
    counts = Counter(_draw(_row(seed=5, temperature=0.5), logits, 3000))

    assert abs(counts[0] / 3000 - 0.36 / 0.52) < 0.04


def test_top_k_leaves_only_the_k_likeliest() -> None:
    logits = _logits(1)
    best = set(np.argsort(np.array(logits[0]))[-3:].tolist())

    assert set(_draw(_row(temperature=2, top_k=3), logits, 300)) == best


def test_top_p_leaves_the_smallest_set_that_reaches_it() -> None:
    logits = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05] + [1e-9] * (VOCAB - 4)]))

    assert set(_draw(_row(temperature=1, top_p=0.6), logits, 300)) == {0, 1}
    assert set(_draw(_row(temperature=1, top_p=0.5), logits, 100)) == {0}
    assert set(_draw(_row(temperature=1, top_p=0.0), logits, 100)) == {0}


def test_top_p_applies_to_what_top_k_left() -> None:
    logits = mx.log(mx.array([[0.4, 0.3, 0.2, 0.1] + [1e-9] * (VOCAB - 4)]))
    # Among the two likeliest the first has 4/7 of the mass, which reaches 0.5 alone.
    assert set(_draw(_row(temperature=1, top_k=2, top_p=0.5), logits, 200)) == {0}


def test_min_p_is_relative_to_the_likeliest() -> None:
    logits = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05] + [1e-9] * (VOCAB - 4)]))

    assert set(_draw(_row(temperature=1, min_p=0.5), logits, 300)) == {0, 1}


def test_seeded_row_gets_the_same_tokens_whoever_else_is_in_the_batch() -> None:
    steps = [_logits(1, seed) for seed in range(12)]
    params = {"temperature": 1.2, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "frequency_penalty": 0.3}
    alone = BatchSampler(VOCAB)
    alone.join([_row(seed=42, **params)])
    expected = [alone(logits).tokens.item() for logits in steps]

    crowd = BatchSampler(VOCAB)
    crowd.join([_row(temperature=0), _row(seed=1, top_k=5), _row(seed=42, **params)])
    got = []
    for at, logits in enumerate(steps):
        if at == 4:
            crowd.join([_row(seed=9, presence_penalty=1, logit_bias={3: 5.0})])
        if at == 8:
            crowd.keep([2, 3])
        others = _logits(len(crowd), 100 + at)
        place = 2 if at < 8 else 0
        others[place] = logits[0]
        got.append(int(crowd(others).tokens[place].item()))

    assert got == expected


def test_noise_depends_on_seed_and_position() -> None:
    seeds = np.array([1, 1, 2], np.uint64)
    keys = noise_keys(seeds, np.array([0, 1, 0], np.uint64))

    assert len({tuple(key) for key in keys.tolist()}) == 3
    assert keys.tolist() == noise_keys(seeds, np.array([0, 1, 0], np.uint64)).tolist()


def test_choices_have_seeds_of_their_own() -> None:
    assert choice_seed(5, 0) == 5
    assert len({choice_seed(5, index) for index in range(20)}) == 20
    assert choice_seed(-1, 0) == 2**64 - 1
    assert choice_seed(None, 0) != choice_seed(None, 0)


def test_logit_bias_forces_and_forbids() -> None:
    logits = _logits(2)
    best = int(mx.argmax(logits[1]).item())
    sampler = BatchSampler(VOCAB)
    sampler.join([_row(temperature=0, logit_bias={7: 100.0}), _row(temperature=0, logit_bias={best: -100.0})])

    forced, other = sampler(logits).tokens.tolist()

    assert forced == 7
    assert other != best


def test_frequency_penalty_counts_each_time() -> None:
    logits = mx.zeros((1, VOCAB)).at[0, 4].add(1.0).at[0, 9].add(0.45)
    # 4 falls by 0.3 each time: 1.0, 0.7, 0.4, so 9 comes third.
    assert _draw(_row(temperature=0, frequency_penalty=0.3), logits, 3) == [4, 4, 9]


def test_presence_penalty_counts_once() -> None:
    logits = mx.zeros((1, VOCAB)).at[0, 4].add(1.0).at[0, 9].add(0.5)

    assert _draw(_row(temperature=0, presence_penalty=0.3), logits, 3) == [4, 4, 4]


def test_repetition_penalty_sees_the_prompt_and_both_signs() -> None:
    # Token 2 is in the prompt: 1.0 / 2 falls below the 0.6 of token 9, which then is in the output: 0.6 / 2.
    positive = mx.full((1, VOCAB), -5.0).at[0, 2].add(6.0).at[0, 9].add(5.6)
    assert _draw(_row(temperature=0, repetition_penalty=2), positive, 2) == [9, 2]
    # Negative logits are multiplied: -1.0 * 2 falls below -1.5.
    negative = mx.full((1, VOCAB), -9.0).at[0, 2].add(8.0).at[0, 9].add(7.5)
    assert _draw(_row(temperature=0, repetition_penalty=2), negative, 1) == [9]


def test_presence_penalty_ignores_the_prompt() -> None:
    logits = mx.zeros((1, VOCAB)).at[0, 2].add(1.0).at[0, 9].add(0.9)

    assert _draw(_row(temperature=0, presence_penalty=0.5), logits, 2) == [2, 9]


def test_penalties_stay_with_their_row_when_others_leave() -> None:
    logits = mx.zeros((3, VOCAB)).at[:, 4].add(1.0).at[:, 9].add(0.9)
    sampler = BatchSampler(VOCAB)
    sampler.join([_row(temperature=0), _row(temperature=0, presence_penalty=0.5), _row(temperature=0)])
    assert sampler(logits).tokens.tolist() == [4, 4, 4]

    sampler.keep([1, 2])

    assert sampler(logits[:2]).tokens.tolist() == [9, 4]


def test_suppressed_tokens_come_only_after_their_position() -> None:
    logits = mx.zeros((1, VOCAB)).at[0, 4].add(1.0).at[0, 9].add(0.5)
    row = RowSampling(SamplingParams(temperature=0), 0, suppressed=(4,), suppress_until=2)

    assert _draw(row, logits, 3) == [9, 9, 4]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_logits_are_sampled_in_single(dtype: mx.Dtype) -> None:
    logits = _logits(1)

    assert _draw(_row(seed=3, top_p=0.8), logits.astype(dtype), 5)
