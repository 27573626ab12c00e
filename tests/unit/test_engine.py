"""The step loop, run by hand on a very small real model."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from inference.engine import Engine, PreparedRequest
from inference.loading import LoadedModel
from inference.protocol import Accepted, Delta, Event, Failed, Finished, GenerationRequest, Load, SamplingParams
from inference.scheduler import Limits
from inference.selfcheck import batches_correctly

EOS = 2


class Harness:
    """An engine with a list of everything that it emitted."""

    def __init__(self, loaded: LoadedModel, **limits: Any) -> None:
        defaults = {"max_rows": 32, "max_waiting": 64, "kv_budget_bytes": 1 << 30, "prefill_tokens_per_step": 64}
        self.engine = Engine(
            loaded,
            Limits(kv_bytes_per_token=loaded.info.kv_bytes_per_token, **{**defaults, **limits}),
            self._emit,
            "w",
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


def test_every_row_of_a_crowded_batch_gets_the_tokens_that_it_gets_alone(tiny: LoadedModel) -> None:
    requests = _mixed(24, tiny.info.vocab_size)
    together = Harness(tiny, max_rows=12)
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

    assert harness.engine.steps == 9


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


def test_failing_step_fails_its_rows_and_the_engine_goes_on(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
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
