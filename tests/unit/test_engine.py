"""The step loop, run by hand on a very small real model."""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest
from mlx_lm.models.cache import RotatingKVCache

from inference.engine import Engine, EngineOptions
from inference.loading import LoadedModel
from inference.protocol import (
    Accepted,
    Configure,
    Delta,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    GrammarSpec,
    Load,
    Progress,
    SamplingParams,
)
from inference.running import PreparedRequest
from inference.scheduler import AdaptiveLimit, Limits
from inference.selfcheck import batches_correctly

EOS = 2


class Harness:
    """An engine with a list of everything that it emitted."""

    def __init__(self, loaded: LoadedModel, **limits: Any) -> None:
        defaults = {"max_rows": 32, "max_waiting": 64, "kv_budget_bytes": 1 << 30, "prefill_tokens_per_step": 64}
        features = limits.pop("features", Configure())
        runs_ahead = limits.pop("runs_ahead", True)
        prefix_cache_bytes = limits.pop("prefix_cache_bytes", 1 << 28)
        bounds = Limits(kv_bytes_per_token=loaded.info.kv_bytes_per_token, **{**defaults, **limits})
        self.engine = Engine(
            loaded, EngineOptions(bounds, prefix_cache_bytes, 10_000.0, runs_ahead, features), self._emit, "w"
        )
        self.events: list[Event] = []
        self.load = Load()

    def _emit(self, events: list[Event], load: Load) -> None:
        self.events.extend(events)
        self.load = load

    def step(self) -> None:
        # A command that does nothing keeps an idle engine from waiting for one.
        self.engine.cancel("nobody")
        self.engine._take_commands()
        self.engine.step()

    def run(self, requests: Sequence[PreparedRequest], steps: int = 2000) -> None:
        for request in requests:
            self.engine.submit(request)
        waiting = {request.request.request_id for request in requests}
        for _ in range(steps):
            self.step()
            waiting -= {e.request_id for e in self.events if isinstance(e, Finished | Failed)}
            if not waiting:
                return
        raise AssertionError(f"not finished: {waiting}")

    def tokens(self) -> dict[tuple[str, int], list[int]]:
        found: dict[tuple[str, int], list[int]] = defaultdict(list)
        for event in self.events:
            if isinstance(event, Delta):
                found[event.request_id, event.index].extend(event.token_ids)
        return dict(found)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def _prepared(name: str, prompt: Sequence[int], new: int, **fields: Any) -> PreparedRequest:
    sampling = fields.pop("sampling", SamplingParams(temperature=0))
    fields.setdefault("ignore_eos", True)
    request = GenerationRequest(request_id=name, model="tiny", prompt=tuple(prompt), sampling=sampling, **fields)
    return PreparedRequest(request, tuple(prompt), new)


def _mixed(count: int, vocab: int) -> list[PreparedRequest]:
    """Requests of unequal lengths: greedy ones, sampled ones, several choices."""
    rng = random.Random(3)
    requests = []
    for at in range(count):
        prompt = [rng.randrange(3, vocab) for _ in range(rng.choice([1, 2, 9, 30, 150]))]
        sampling = SamplingParams(temperature=0)
        if at % 2:
            sampling = SamplingParams(
                seed=at, temperature=0.9, top_p=0.9, top_k=at % 3 * 10, min_p=0.02, frequency_penalty=0.4,
                repetition_penalty=1.1,
            )  # fmt: skip
        requests.append(_prepared(f"r{at}", prompt, rng.randrange(1, 25), sampling=sampling, n=1 + (at % 5 == 3) * 2))
    return requests


@pytest.mark.parametrize("runs_ahead", [True, False])
def test_every_row_of_a_crowded_batch_gets_the_tokens_that_it_gets_alone(tiny: LoadedModel, runs_ahead: bool) -> None:
    requests = _mixed(24, tiny.info.vocab_size)
    together = Harness(tiny, max_rows=12, runs_ahead=runs_ahead)
    together.run(requests)
    alone: dict[tuple[str, int], list[int]] = {}
    for request in requests:
        single = Harness(tiny)
        single.run([request])
        alone |= single.tokens()

    assert together.tokens() == alone


def test_exclusive_model_gives_the_same_tokens_one_at_a_time(tiny: LoadedModel) -> None:
    requests = [r for r in _mixed(8, tiny.info.vocab_size) if r.request.n == 1]
    batched = Harness(tiny)
    batched.run(requests)
    exclusive = LoadedModel(
        tiny.model,
        tiny.tokenizer,
        msgspec.structs.replace(tiny.info, batched=False),
        tiny.eos_token_ids,
        tiny.tool_syntax,
    )
    one_by_one = Harness(exclusive, max_rows=1)
    one_by_one.run(requests)

    assert one_by_one.tokens() == batched.tokens()


def test_deltas_are_numbered_and_usage_counts_every_token(tiny: LoadedModel) -> None:
    harness = Harness(tiny)
    harness.run([_prepared("a", [5, 6, 7], 9, n=2)])

    assert isinstance(harness.events[0], Accepted)
    assert harness.events[0].prompt_tokens == 3
    seqs = [event.seq for event in harness.events if isinstance(event, Delta | Finished)]
    assert seqs == list(range(len(seqs)))
    (finished,) = harness.of(Finished)
    assert finished is harness.events[-1]
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (3, 18)
    reasons = [event.finish_reason for event in harness.of(Delta)]
    assert reasons.count("length") == 2


def test_no_token_is_computed_beyond_the_limit(tiny: LoadedModel) -> None:
    harness = Harness(tiny)
    harness.run([_prepared("a", [5, 6, 7], 9)])

    assert harness.engine._accounts.steps == 9


def test_end_of_sequence_ends_a_choice_and_is_counted_but_not_shown(tiny: LoadedModel) -> None:
    force_end = SamplingParams(temperature=0, logit_bias={EOS: 100.0})
    harness = Harness(tiny)
    harness.run([_prepared("a", [5], 9, sampling=force_end, ignore_eos=False)])

    (delta,) = harness.of(Delta)
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("", (EOS,), "stop")
    assert harness.of(Finished)[0].usage.completion_tokens == 1


def test_end_of_sequence_waits_for_min_tokens(tiny: LoadedModel) -> None:
    force_end = SamplingParams(temperature=0, logit_bias={EOS: 100.0})
    harness = Harness(tiny)
    harness.run([_prepared("a", [5], 9, sampling=force_end, ignore_eos=False, min_tokens=4)])

    tokens = harness.tokens()["a", 0]
    assert len(tokens) == 5
    assert EOS not in tokens[:4]


def test_stop_token_id_ends_a_choice(tiny: LoadedModel) -> None:
    free = Harness(tiny)
    free.run([_prepared("a", [5, 9], 12)])
    tokens = free.tokens()["a", 0]
    stopped = Harness(tiny)
    stopped.run([_prepared("a", [5, 9], 12, stop_token_ids=(tokens[3],))])

    end = tokens.index(tokens[3])
    assert stopped.tokens()["a", 0] == tokens[: end + 1]
    assert stopped.of(Delta)[-1].finish_reason == "stop"


def test_stop_string_cuts_the_text_and_frees_the_row(tiny: LoadedModel) -> None:
    force = SamplingParams(temperature=0, logit_bias={tiny.tokenizer.encode("a")[0]: 100.0})
    harness = Harness(tiny)
    harness.run([_prepared("a", [5], 50, sampling=force, stop=("aaaa",))])

    assert "".join(delta.text for delta in harness.of(Delta)) == ""
    assert harness.of(Delta)[-1].finish_reason == "stop"
    assert harness.of(Finished)[0].usage.completion_tokens == 4
    assert harness.load.running == 0


def test_cancelled_row_leaves_before_the_next_step(tiny: LoadedModel) -> None:
    harness = Harness(tiny)
    harness.engine.submit(_prepared("gone", [5, 6], 500))
    harness.engine.submit(_prepared("stays", [7], 40))
    for _ in range(6):
        harness.step()
    seen = len(harness.tokens()["gone", 0])
    harness.engine.cancel("gone")
    for _ in range(50):
        harness.step()

    assert len(harness.tokens()["gone", 0]) == seen
    assert len(harness.tokens()["stays", 0]) == 40
    assert (harness.load.cancelled_total, harness.load.cancel_steps_max, harness.load.running) == (1, 0, 0)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_cancel_while_waiting_or_in_prefill_leaves_nothing_behind(tiny: LoadedModel, steps: int) -> None:
    harness = Harness(tiny, prefill_tokens_per_step=16)
    harness.engine.submit(_prepared("long", [5] * 200, 10))
    harness.engine.submit(_prepared("b", [6] * 5, 3))
    harness.engine.submit(_prepared("c", [7] * 5, 3))
    for _ in range(steps):
        harness.step()
    for name in ("long", "b"):
        harness.engine.cancel(name)
    for _ in range(40):
        harness.step()

    assert {key[0] for key in harness.tokens()} == {"c"}
    assert (harness.load.running, harness.load.waiting) == (0, 0)
    assert harness.engine._scheduler.projected_kv_bytes == 0


def test_long_prompt_is_prefilled_in_chunks_between_steps(tiny: LoadedModel) -> None:
    harness = Harness(tiny, prefill_tokens_per_step=32)
    harness.engine._accounts.prefill_s_per_token = 1.0  # so slow that more than a chunk would be felt
    harness.engine.submit(_prepared("running", [5], 60))
    for _ in range(3):
        harness.step()
    harness.engine.submit(_prepared("long", [6] * 321, 2))
    before = len(harness.tokens()["running", 0])
    while ("long", 0) not in harness.tokens():
        harness.step()

    assert len(harness.tokens()["running", 0]) - before >= 10


def test_full_queue_and_impossible_requests_are_refused(tiny: LoadedModel) -> None:
    harness = Harness(tiny, max_rows=2, max_waiting=1)
    harness.run([_prepared("a", [5], 3), _prepared("b", [5], 3), _prepared("c", [5], 3, n=3)])

    failures = {event.request_id: (event.code, event.param) for event in harness.of(Failed)}
    assert failures == {"b": ("overloaded", None), "c": ("invalid_request", "n")}


def test_failing_prefill_fails_its_request_alone(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(tiny)
    harness.engine.submit(_prepared("fine", [5], 20))
    for _ in range(3):
        harness.step()

    class Broken:
        layers = tiny.model.layers

        def __call__(self, tokens: Any, cache: Any) -> Any:
            if tokens.shape[1] > 1:
                raise RuntimeError("out of memory\nsecret details")
            return tiny.model(tokens, cache=cache)

    monkeypatch.setattr(harness.engine._loaded, "model", Broken())
    harness.run([_prepared("poison", [6] * 30, 5)])
    for _ in range(30):
        harness.step()

    (failed,) = harness.of(Failed)
    assert (failed.request_id, failed.code, failed.retryable) == ("poison", "engine_error", True)
    assert "secret" not in failed.message
    assert len(harness.tokens()["fine", 0]) == 20


def test_failing_step_fails_its_rows_and_the_engine_goes_on(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(tiny)
    for name in ("a", "b"):
        harness.engine.submit(_prepared(name, [5], 20))
    for _ in range(3):
        harness.step()
    with monkeypatch.context() as patch:
        patch.setattr(harness.engine._batch, "_model", lambda *_args, **_kwargs: 1 / 0)
        harness.step()
    harness.run([_prepared("after", [5, 6], 4)])

    assert {event.request_id for event in harness.of(Failed)} == {"a", "b"}
    assert len(harness.tokens()["after", 0]) == 4


def test_self_check_accepts_a_model_that_batches_and_refuses_one_that_does_not(tiny: LoadedModel) -> None:
    assert batches_correctly(tiny)

    class IgnoresPadding:
        layers = tiny.model.layers

        def __call__(self, tokens: Any, cache: Any) -> Any:
            for layer in cache:
                if hasattr(layer, "left_padding"):
                    layer.left_padding = layer.left_padding * 0
            return tiny.model(tokens, cache=cache)

    class Raises:
        layers = tiny.model.layers

        def __call__(self, tokens: Any, cache: Any) -> Any:
            if tokens.shape[0] > 1:
                raise ValueError("cannot broadcast")
            return tiny.model(tokens, cache=cache)

    for model in (IgnoresPadding(), Raises()):
        broken = LoadedModel(model, tiny.tokenizer, tiny.info, tiny.eos_token_ids, None)
        assert not batches_correctly(broken)


# --- prefix cache ----------------------------------------------------------------------------------------------------


class SlidingWindow:
    """The tiny model with a window of 24 tokens: its caches rotate and cannot be cut."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers = model.layers

    def __call__(self, tokens: Any, cache: Any) -> Any:
        return self.model(tokens, cache=cache)

    def make_cache(self) -> list[Any]:
        return [RotatingKVCache(max_size=24) for _ in self.layers]


@pytest.fixture(params=["full attention", "sliding window"])
def model(request: pytest.FixtureRequest, tiny: LoadedModel) -> LoadedModel:
    if request.param == "full attention":
        return tiny
    return LoadedModel(SlidingWindow(tiny.model), tiny.tokenizer, tiny.info, tiny.eos_token_ids, tiny.tool_syntax)


def _alone(model: LoadedModel, requests: Sequence[PreparedRequest]) -> dict[tuple[str, int], list[int]]:
    """The tokens of each request run by itself, with nothing cached."""
    tokens: dict[tuple[str, int], list[int]] = {}
    for request in requests:
        single = Harness(model, features=Configure(prefix_cache=False))
        single.run([request])
        tokens |= single.tokens()
    return tokens


def _sharing(count: int, shared: int, vocab: int) -> list[PreparedRequest]:
    rng = random.Random(5)
    prefix = [rng.randrange(3, vocab) for _ in range(shared)]
    return [
        _prepared(f"r{at}", [*prefix, *(rng.randrange(3, vocab) for _ in range(1 + at % 7))], 6) for at in range(count)
    ]


def test_requests_that_arrive_together_compute_their_shared_prefix_once(model: LoadedModel) -> None:
    requests = _sharing(16, 300, model.info.vocab_size)
    harness = Harness(model)
    harness.run(requests)

    suffixes = sum(len(request.prompt) for request in requests) - 16 * 300
    assert harness.load.prompt_tokens_total <= 300 + suffixes
    assert sum(finished.usage.cached_tokens for finished in harness.of(Finished)) >= 15 * 299
    assert harness.tokens() == _alone(model, requests)


def test_switched_off_every_prompt_is_computed_with_the_same_result(model: LoadedModel) -> None:
    requests = _sharing(6, 100, model.info.vocab_size)
    off = Harness(model, features=Configure(prefix_cache=False))
    off.run(requests)

    assert off.load.prompt_tokens_total == sum(len(request.prompt) - 1 for request in requests)
    assert (off.load.prefix_hits_total, off.load.prefix_bytes) == (0, 0)
    assert off.tokens() == _alone(model, requests)


def test_switching_off_gives_the_memory_back_and_on_again_works(tiny: LoadedModel) -> None:
    requests = _sharing(2, 100, tiny.info.vocab_size)
    harness = Harness(tiny)
    harness.run(requests[:1])
    assert harness.load.prefix_bytes > 0
    harness.engine.configure(Configure(prefix_cache=False))
    harness.step()
    assert harness.load.prefix_bytes == 0
    harness.engine.configure(Configure(prefix_cache=True))
    harness.run([_renamed(requests[0], "again")])
    harness.run(requests[1:])

    assert harness.load.prefix_hits_total == 1


def _renamed(prepared: PreparedRequest, name: str) -> PreparedRequest:
    request = msgspec.structs.replace(prepared.request, request_id=name)
    return PreparedRequest(request, prepared.prompt, prepared.max_new_tokens)


def test_next_turn_of_a_conversation_reuses_prompt_and_answer(model: LoadedModel) -> None:
    first = _sharing(1, 60, model.info.vocab_size)[0]
    harness = Harness(model)
    harness.run([first])
    history = [*first.prompt, *harness.tokens()["r0", 0]]
    second = _prepared("second", [*history, 9, 8, 7], 8)
    harness.run([second])

    # The answer's last token was never an input, so its KV does not exist.
    assert harness.of(Finished)[-1].usage.cached_tokens == len(history) - 1
    assert harness.tokens()["second", 0] == _alone(model, [second])["second", 0]


def test_identical_prompt_needs_no_prefill(tiny: LoadedModel) -> None:
    first = _sharing(1, 60, tiny.info.vocab_size)[0]
    harness = Harness(tiny)
    harness.run([first])
    before = harness.load.prompt_tokens_total
    harness.run([_renamed(first, "again")])

    assert harness.load.prompt_tokens_total == before
    assert harness.tokens()["again", 0] == harness.tokens()["r0", 0]


def test_known_prefixes_stay_within_their_bytes(model: LoadedModel) -> None:
    harness = Harness(model, prefix_cache_bytes=200_000)
    rng = random.Random(2)
    for at in range(12):
        prompt = [rng.randrange(3, model.info.vocab_size) for _ in range(90)]
        harness.run([_prepared(f"r{at}", prompt, 4)])
        assert harness.load.prefix_bytes <= 200_000

    assert harness.load.prefix_evictions_total > 0


def test_crowd_with_overlapping_prompts_gets_the_tokens_of_each_alone(model: LoadedModel) -> None:
    rng = random.Random(8)
    stems = [[rng.randrange(3, 200) for _ in range(size)] for size in (5, 40, 90)]
    requests = []
    for at in range(30):
        stem = rng.choice(stems)
        prompt = stem[: rng.randrange(1, len(stem) + 1)] + [
            rng.randrange(3, 200) for _ in range(rng.choice([0, 1, 20]))
        ]
        requests.append(_prepared(f"r{at}", prompt, rng.randrange(1, 12), n=1 + (at % 9 == 4)))
    harness = Harness(model, max_rows=8, prefill_tokens_per_step=32)
    harness.run(requests)

    assert harness.load.prefix_hits_total > 5
    assert harness.tokens() == _alone(model, requests)


# --- memory, priority, deadlines -------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs_ahead", [True, False])
def test_rows_that_outgrow_the_memory_are_preempted_and_resumed_with_the_same_tokens(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, runs_ahead: bool
) -> None:
    monkeypatch.setattr("inference.scheduler.PROJECTED_NEW_TOKENS", 10)
    sampled = SamplingParams(temperature=1.0, frequency_penalty=0.5)
    requests = [
        _prepared(
            f"r{at}",
            [5 + at] * 20,
            150,
            sampling=msgspec.structs.replace(sampled, seed=at) if at % 2 else SamplingParams(temperature=0),
        )
        for at in range(4)
    ]
    budget = 300 * tiny.info.kv_bytes_per_token
    harness = Harness(tiny, kv_budget_bytes=budget, runs_ahead=runs_ahead)
    harness.run(requests)

    assert harness.load.preempted_total > 0
    assert not harness.of(Failed)
    assert harness.tokens() == _alone(tiny, requests)
    assert [finished.usage.completion_tokens for finished in harness.of(Finished)] == [150] * 4


def test_waiting_request_past_its_timeout_is_failed(tiny: LoadedModel) -> None:
    harness = Harness(tiny, max_rows=1)
    harness.engine.submit(_prepared("runs", [5], 30))
    harness.step()
    harness.run([_prepared("late", [6], 3, timeout_s=0.0)])

    (failed,) = harness.of(Failed)
    assert (failed.request_id, failed.code) == ("late", "request_timeout")


def test_short_prompt_does_not_wait_for_a_long_one_to_be_prefilled(tiny: LoadedModel) -> None:
    harness = Harness(tiny, prefill_tokens_per_step=16)
    harness.engine.submit(_prepared("long", list(range(3, 250)) * 2, 2))
    for _ in range(3):
        harness.step()
    harness.engine.submit(_prepared("short", [7] * 10, 2))
    while ("short", 0) not in harness.tokens():
        harness.step()

    assert ("long", 0) not in harness.tokens()
    assert harness.of(Progress)


def test_steps_are_counted_by_their_rows(tiny: LoadedModel) -> None:
    harness = Harness(tiny)
    harness.run([_prepared(f"r{at}", [5 + at], 10) for at in range(3)])

    assert sum(harness.load.batch_rows) == harness.load.steps_total
    assert harness.load.batch_rows_sum == 30
    assert harness.load.batch_rows[2] >= 9


def test_adaptive_batching_lowers_the_rows_when_steps_are_slow(tiny: LoadedModel) -> None:
    slow = Harness(tiny)
    slow.engine._adaptive = AdaptiveLimit(32, target_ms=0.001)
    slow.run([_prepared(f"r{at}", [5 + at], 30) for at in range(12)])
    assert slow.load.row_limit < 12
    slow.engine.configure(Configure(adaptive_batching=False))
    slow.step()

    assert slow.load.row_limit == 32


# --- log probabilities -----------------------------------------------------------------------------------------------


def test_log_probabilities_equal_those_of_a_forward_pass(tiny: LoadedModel) -> None:
    harness = Harness(tiny)
    sampling = SamplingParams(temperature=0.7, seed=4, presence_penalty=1.0)
    harness.run(
        [
            _prepared("with", [5, 6, 7], 6, sampling=sampling, logprobs=3),
            _prepared("without", [8, 9], 6),
        ]
    )
    tokens = harness.tokens()["with", 0]
    logits = tiny.model(mx.array([[5, 6, 7, *tokens]]), cache=tiny.make_cache())[0, 2:-1]
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    reported = [event.logprobs[0] for event in harness.of(Delta) if event.request_id == "with"]
    assert [entry.token_id for entry in reported] == tokens
    for at, entry in enumerate(reported):
        row = np.array(expected[at])
        assert entry.logprob == pytest.approx(row[entry.token_id], abs=1e-3)
        assert [top[0] for top in entry.top] == np.argsort(-row)[:3].tolist()
        assert [top[2] for top in entry.top] == pytest.approx(np.sort(row)[::-1][:3].tolist(), abs=1e-3)
    assert all(event.logprobs == () for event in harness.of(Delta) if event.request_id == "without")


# --- grammars --------------------------------------------------------------------------------------------------------


def _with_grammar(loaded: LoadedModel, name: str, spec: GrammarSpec, *, new: int = 60, n: int = 1) -> PreparedRequest:
    request = GenerationRequest(
        request_id=name, model="tiny", prompt="x", grammar=spec, n=n, sampling=SamplingParams(temperature=1.0, seed=3)
    )
    grammar = loaded.grammars.compile(spec)
    return PreparedRequest(request, (5, 6, 7), new, "", tuple(grammar.matcher() for _ in range(n)))


@pytest.mark.parametrize("runs_ahead", [True, False])
def test_constrained_rows_follow_their_grammar_and_leave_the_others_alone(tiny: LoadedModel, runs_ahead: bool) -> None:
    free = _mixed(6, tiny.info.vocab_size)
    numbers = GrammarSpec(kind="json_schema", value='{"type": "array", "items": {"type": "integer"}, "maxItems": 3}')
    harness = Harness(tiny, runs_ahead=runs_ahead)
    harness.run(
        [
            *free,
            _with_grammar(tiny, "choice", GrammarSpec(kind="choice", value='["yes", "no", "perhaps"]'), n=4),
            _with_grammar(tiny, "array", numbers, new=200),
            _with_grammar(tiny, "regex", GrammarSpec(kind="regex", value="[a-f]{3}-[0-9]{2}")),
        ]
    )
    texts: dict[tuple[str, int], str] = defaultdict(str)
    for event in harness.of(Delta):
        texts[event.request_id, event.index] += event.text

    assert not harness.of(Failed)
    assert {texts["choice", index] for index in range(4)} <= {"yes", "no", "perhaps"}
    assert re.fullmatch("[a-f]{3}-[0-9]{2}", texts["regex", 0])
    assert len(json.loads(texts["array", 0])) <= 3
    expected = _alone(tiny, free)
    assert {key: tokens for key, tokens in harness.tokens().items() if key in expected} == expected
