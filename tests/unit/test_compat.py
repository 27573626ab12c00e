"""Repairs of models that mlx-lm batches wrongly, and the self-check that finds those that stay wrong."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import msgspec
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import BatchRotatingKVCache, make_prompt_cache

from benchmarks.small_configs import VOCAB, WINDOW, build
from inference import compat
from inference.kv import SlotBatch
from inference.loading import LoadedModel
from inference.selfcheck import Verdict, check

RIGHT = Verdict(batches=True, pads=True)
PROMPTS_APART = Verdict(batches=True, pads=False)
ONE_AT_A_TIME = Verdict(batches=False, pads=False)


@pytest.fixture
def verdict_on(tiny: LoadedModel) -> Any:
    """The self-check as a function of the model."""
    info = msgspec.structs.replace(tiny.info, vocab_size=VOCAB)
    return lambda model: check(LoadedModel(model, tiny.tokenizer, info, tiny.eos_token_ids, None))


def test_gemma2_batches_after_its_masks_got_an_axis(verdict_on: Any) -> None:
    model = build("gemma2")
    before = verdict_on(model)
    changed = compat.adapt(model)

    assert (before, changed, verdict_on(model)) == (
        ONE_AT_A_TIME,
        ["Attention: an axis of its mask for grouped heads"],
        RIGHT,
    )


def test_repair_leaves_single_rows_and_weights_as_they_were() -> None:
    model = build("gemma2")
    tokens = mx.array([[5, 9, 7, 30, 2]])
    before = model(tokens)
    weights = [id(value) for value in _arrays(model)]
    compat.adapt(model)

    assert mx.array_equal(model(tokens), before).item()
    assert [id(value) for value in _arrays(model)] == weights


def test_window_keeps_as_many_tokens_as_its_mask_shows() -> None:
    model = build("plamo3")
    changed = compat.adapt(model)
    tokens = mx.array([[(7 * i) % VOCAB for i in range(3 * WINDOW)]])
    cache = make_prompt_cache(model)
    for start in range(0, 3 * WINDOW, 5):
        last = model(tokens[:, start : start + 5], cache=cache)[:, -1]

    assert changed == [f"sliding window: {WINDOW + 1} tokens kept instead of {WINDOW}"]
    assert mx.allclose(last, model(tokens)[:, -1], atol=1e-3).item()


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gpt_oss", "jamba"])
def test_nothing_is_changed_that_needs_no_repair(name: str) -> None:
    model = build(name)
    kinds = [type(module) for module in model.modules()]

    assert compat.adapt(model) == []
    assert [type(module) for module in model.modules()] == kinds


def test_second_adapt_finds_nothing_to_do() -> None:
    model = build("gemma2")
    compat.adapt(model)

    assert compat.adapt(model) == []


def test_attention_that_fails_apart_from_its_model_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    kind = type(model.layers[0].self_attn)
    attend = kind.__call__

    def fails(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if cache is None:
            raise RuntimeError("not without KV")
        return attend(self, x, mask, cache)

    monkeypatch.setattr(kind, "__call__", fails)

    assert compat.adapt(model) == []
    assert type(model.layers[0].self_attn) is kind


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gemma3_text", RIGHT),
        ("qwen3_5", RIGHT),
        ("jamba", PROMPTS_APART),  # its recurrent layers take padding for tokens
        ("baichuan_m1", PROMPTS_APART),  # its convolutions keep the last token, padding or not
        ("afm7", ONE_AT_A_TIME),  # layers that share KV count padding as positions
        ("gpt_bigcode", ONE_AT_A_TIME),  # raises: one position for all rows
        ("recurrent_gemma", ONE_AT_A_TIME),  # a row that joins without KV counts as one that goes on
        ("llama4", ONE_AT_A_TIME),  # its caches cannot be merged
    ],
)
def test_self_check_tells_the_ways_in_which_architectures_batch(verdict_on: Any, name: str, expected: Verdict) -> None:
    assert verdict_on(build(name)) == expected


def test_self_check_sees_a_sliding_window_that_rotates_wrongly(
    verdict_on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_mask = BatchRotatingKVCache.make_mask

    def forgets_padding(self: Any, *args: Any, **kwargs: Any) -> mx.array:
        mask = make_mask(self, *args, **kwargs)
        return mx.ones_like(mask) if self.rotated or self._idx >= self.max_size else mask

    monkeypatch.setattr(BatchRotatingKVCache, "make_mask", forgets_padding)

    assert verdict_on(build("gemma3_text")) == ONE_AT_A_TIME


@pytest.mark.parametrize("method", ["join", "keep"])
def test_self_check_sees_rows_that_are_mixed_up_when_one_joins_or_leaves(
    verdict_on: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    original = getattr(SlotBatch, method)

    def mixes_up(self: SlotBatch, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for layer in self.layers:
            layer.keys = layer.keys[::-1]

    monkeypatch.setattr(SlotBatch, method, mixes_up)

    assert verdict_on(build("qwen3")) == ONE_AT_A_TIME


def test_self_check_forgives_one_step_but_not_two(verdict_on: Any) -> None:
    def off_at(steps: set[int]) -> Any:
        model = build("qwen3")
        calls = iter(range(1000))

        class OffAtTimes:
            layers = model.layers

            def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
                logits = model(tokens, cache=cache)
                batched = tokens.shape[0] > 1 and tokens.shape[1] == 1
                return logits * -1 if batched and next(calls) in steps else logits

        return OffAtTimes()

    assert verdict_on(off_at({3})) == RIGHT
    assert verdict_on(off_at(set(range(3, 1000)))) == ONE_AT_A_TIME


def _arrays(model: nn.Module) -> list[mx.array]:
    return [value for _, value in tree_flatten(model.parameters())]
