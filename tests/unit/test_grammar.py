"""Constrained decoding: whatever is sampled under the masks is what the grammar describes."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import jsonschema
import msgspec
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

from inference.demo_model import MODEL_PATH
from inference.grammar import BadGrammar, Grammar, GrammarCompiler, Matcher, fill_masks
from inference.loading import LoadedModel
from inference.protocol import GrammarSpec
from inference.text import FastDetokenizer

LOGITS = 1350
"""More than any tokenizer here has, and not a multiple of 32."""

CLOSING = ('"', "}", "]")


class Sampler:
    """Takes any allowed token with the same chance; past the soft limit, one that brings the end nearer."""

    def __init__(self, tokenizer: object, eos: int, vocab_size: int = LOGITS) -> None:
        self.tokenizer = tokenizer.backend_tokenizer
        self.eos = eos
        self.compiler = GrammarCompiler(tokenizer, vocab_size, [eos])
        self.known = self.tokenizer.get_vocab_size(with_added_tokens=True)
        self.closing = np.array([token for token in map(self.tokenizer.token_to_id, CLOSING) if token is not None])

    def compile(self, kind: str, value: object = "") -> Grammar:
        return self.compiler.compile(GrammarSpec(kind, value if isinstance(value, str) else json.dumps(value)))

    def allowed(self, matcher: Matcher) -> np.ndarray:
        words = np.zeros(-(-self.compiler.vocab_size // 32), "<u4")
        matcher.mask(words)
        return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))

    def sample(self, grammar: Grammar, seed: int, soft_limit: int = 60, limit: int = 3000) -> str:
        rng = np.random.default_rng(seed)
        matcher = grammar.matcher()
        detokenizer = FastDetokenizer(self.tokenizer)
        text = ""
        for position in range(limit):
            tokens = self.allowed(matcher)
            assert len(tokens), text
            assert tokens.max() < min(self.known, self.compiler.vocab_size)
            if position >= soft_limit:
                if self.eos in tokens:
                    tokens = np.array([self.eos])
                elif rng.random() < 0.9:
                    tokens = next((np.array([token]) for token in self.closing if token in tokens), tokens)
            token = int(rng.choice(tokens))
            assert matcher.accept(token), text
            if token == self.eos:
                assert matcher.finished
                assert not matcher.error
                return text
            text += detokenizer.add(token)
        raise AssertionError(f"no end after {limit} tokens: {text[:500]}")


def sentencepiece_like() -> SimpleNamespace:
    """A vocabulary as in Llama 2: spaces as ▁, unknown characters as bytes, some added tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    text = ['{"name": "a value", "list": [1, 2, 30]}', "the quick brown fox: true, false, null é ü"] * 5
    tokenizer.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    # Byte pieces are part of the vocabulary there, not special tokens.
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = [token for token in plain["added_tokens"] if token["content"] in special[:3]]
    tokenizer = Tokenizer.from_str(json.dumps(plain))
    tokenizer.add_tokens([AddedToken("[TOOL]", special=False), AddedToken("  ", special=False)])
    tokenizer.add_special_tokens([AddedToken("<|turn|>", special=True)])
    return SimpleNamespace(backend_tokenizer=tokenizer)


@pytest.fixture(scope="module")
def demo() -> Sampler:
    tokenizer = load_tokenizer(MODEL_PATH)
    return Sampler(tokenizer, tokenizer.eos_token_id)


@pytest.fixture(scope="module", params=["demo", "tiny", "sentencepiece"])
def sampler(request: pytest.FixtureRequest, demo: Sampler, tiny: LoadedModel) -> Iterator[Sampler]:
    match request.param:
        case "demo":
            yield demo
        case "tiny":
            # As many logits as tokens, unlike the others.
            yield Sampler(tiny.tokenizer, tiny.tokenizer.eos_token_id, tiny.info.vocab_size)
        case _:
            yield Sampler(sentencepiece_like(), eos=2)


def closed(properties: dict[str, object], **more: object) -> dict[str, object]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        **more,
    }


SCHEMAS = {
    "flat": closed(
        {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}, "ok": {"type": "boolean"}}
    ),
    "optional": {"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "number"}}, "required": ["b"]},
    "nested": closed({"a": closed({"b": closed({"c": {"type": "string"}})})}),
    "array": {
        "type": "array",
        "items": {"type": "integer", "minimum": -3, "maximum": 12},
        "minItems": 2,
        "maxItems": 4,
    },
    "tuple": {"type": "array", "prefixItems": [{"type": "string"}, {"type": "null"}], "items": False, "minItems": 2},
    "enum": {"enum": ["red", "green", 3, None, [1, 2], {"a": True}]},
    "const": closed({"version": {"const": 2}, "kind": {"const": 'a "quoted" \\ ü'}}),
    "any_of": {"anyOf": [{"type": "string", "minLength": 3}, closed({"x": {"type": "number"}}), {"type": "null"}]},
    "one_of": {
        "oneOf": [closed({"kind": {"const": "cat"}, "lives": {"type": "integer"}}), closed({"kind": {"const": "dog"}})]
    },
    "all_of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer", "minimum": 1}}, "required": ["a"]},
            {"properties": {"a": {"maximum": 5}, "b": {"type": "string"}}, "required": ["b"]},
        ]
    },
    "ref": {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": closed({"value": {"type": "integer"}, "next": {"$ref": "#/$defs/maybe"}}),
            "maybe": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]},
        },
    },
    "pattern": {"type": "string", "pattern": r"^[a-z]{2,4}-\d+$", "maxLength": 12},
    "unanchored": {"type": "string", "pattern": r"x\w", "maxLength": 9},
    "formats": closed(
        {
            "id": {"type": "string", "format": "uuid"},
            "host": {"type": "string", "format": "ipv4"},
            "mail": {"type": "string", "format": "email", "maxLength": 24},
        }
    ),
    "numbers": closed(
        {
            "a": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
            "b": {"type": "integer", "exclusiveMinimum": -1000, "maximum": -7},
            "c": {"type": "integer", "multipleOf": 5, "minimum": 0},
        }
    ),
    "map": {
        "type": "object",
        "patternProperties": {"^k[0-9]$": {"type": "integer"}},
        "additionalProperties": {"type": "boolean"},
        "minProperties": 1,
        "maxProperties": 3,
    },
    "counted": {
        "type": "object",
        "required": ["a", "b"],
        "additionalProperties": {"type": "null"},
        "minProperties": 3,
        "maxProperties": 4,
    },
    "unicode": closed({"naïve 日本": {"type": "string", "minLength": 1, "maxLength": 5}}),
    "anything": {},
    "open": {"type": "object"},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_sample_of_a_schema_is_valid(sampler: Sampler, name: str) -> None:
    schema = SCHEMAS[name]
    grammar = sampler.compile("json_schema", schema)
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    for seed in range(12):
        validator.validate(json.loads(sampler.sample(grammar, seed)))


def test_json_object_gives_objects(sampler: Sampler) -> None:
    grammar = sampler.compile("json_object")
    assert all(isinstance(json.loads(sampler.sample(grammar, seed)), dict) for seed in range(12))


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d{4}-\d{2}-\d{2}",
        r"(GET|POST) /[a-z/]{0,10}",
        r"^anchored$",
        r"[^\W\d]{3}",
        r"(?i)up|no",
        r"é{1,3}|日本?",
        r"a\\b\"?",
        r".{0,8}",
        r"(\n|x){2}",
        r"",
    ],
)
def test_every_sample_of_a_pattern_matches_it(sampler: Sampler, pattern: str) -> None:
    grammar = sampler.compile("regex", pattern)
    for seed in range(12):
        text = sampler.sample(grammar, seed)
        assert re.fullmatch(pattern, text, re.ASCII), text


@pytest.mark.parametrize(
    "choices",
    [
        ["yes", "no"],
        ["a", "ab", "abc"],
        ["ünïcode", "日本", "日本語", "🙂"],
        ["a.b*", "(x", "[y]", "/path/", "back\\slash", "c\\", "# -&~", "two words", "line\nbreak", '{"k": 1}', "^$"],
    ],
)
def test_every_choice_is_reached_and_nothing_else(sampler: Sampler, choices: list[str]) -> None:
    grammar = sampler.compile("choice", choices)
    assert {sampler.sample(grammar, seed) for seed in range(40 * len(choices))} == set(choices)


def test_a_lark_grammar_is_followed(sampler: Sampler) -> None:
    grammar = sampler.compile("lark", 'start: sum\nsum: NUMBER | sum "+" NUMBER\nNUMBER: /[1-9][0-9]?/')
    for seed in range(12):
        assert re.fullmatch(r"[1-9][0-9]?(\+[1-9][0-9]?)*", sampler.sample(grammar, seed))


def test_white_space_in_json_is_bounded(demo: Sampler) -> None:
    def reads(text: str) -> bool:
        matcher = grammar.matcher()
        tokens = demo.tokenizer.encode(text, add_special_tokens=False).ids
        return all(map(matcher.accept, [*tokens, demo.eos]))

    grammar = demo.compile("json_object")
    value = {"a": [1, {"b": [True, {"c": []}]}], "d": {}}
    for layout in ({"separators": (",", ":")}, {}, {"indent": 2}, {"indent": 4}, {"indent": "\t"}):
        assert reads(json.dumps(value, **layout)), layout
    assert not any(map(reads, ('{  "a":1}', '{\n\n"a":1}', " {}", "{} ", '{"a":1' + "\n" + " " * 25 + "}")))


def test_the_text_may_end_only_where_it_is_complete(demo: Sampler) -> None:
    matcher = demo.compile("choice", ["a", "ab"]).matcher()
    a, b = map(demo.tokenizer.token_to_id, "ab")
    assert demo.eos not in demo.allowed(matcher)
    assert not matcher.accept(demo.eos)
    assert not matcher.accept(b)
    assert matcher.accept(a)
    assert set(demo.allowed(matcher)) == {b, demo.eos}
    assert not matcher.finished
    assert matcher.accept(b)
    assert list(demo.allowed(matcher)) == [demo.eos]
    assert matcher.finished
    assert not matcher.accept(a)
    assert matcher.accept(demo.eos)
    assert not matcher.error


def test_special_and_unknown_tokens_are_never_text(sampler: Sampler) -> None:
    allowed = sampler.allowed(sampler.compile("regex", r"(?s).{1,20}").matcher())
    texts = [sampler.tokenizer.id_to_token(int(token)) for token in allowed]
    assert not {"<|im_end|>", "<|im_start|>", "<|turn|>", "</s>", None} & set(texts)


@pytest.mark.parametrize("text", ["<|im_end|>", "a <|im_start|> b", "<tools>", "</s>[TOOL]  <|turn|><0x0A>"])
def test_text_that_looks_like_a_special_token_is_spelt_out(sampler: Sampler, text: str) -> None:
    for seed in range(3):
        assert sampler.sample(sampler.compile("choice", [text]), seed) == text
        assert json.loads(sampler.sample(sampler.compile("json_schema", {"const": text}), seed)) == text


def test_a_lark_grammar_may_ask_for_special_tokens(demo: Sampler) -> None:
    matcher = demo.compile("lark", '%llguidance {}\nstart: <tool_call> "a" </tool_call>').matcher()
    for token in map(demo.tokenizer.token_to_id, ("<tool_call>", "a", "</tool_call>")):
        assert list(demo.allowed(matcher)) == [token]
        assert matcher.accept(token)
    assert matcher.accept(demo.eos)


def test_every_end_of_sequence_token_is_an_end(demo: Sampler) -> None:
    compiler = GrammarCompiler(SimpleNamespace(backend_tokenizer=demo.tokenizer), 1280, [2, 0, 5000])
    matcher = compiler.compile(GrammarSpec("regex", "a?")).matcher()
    words = np.zeros(40, np.uint32)
    matcher.mask(words)
    assert words[0] & 0b111 == 0b101
    assert matcher.accept(0)
    assert matcher.accept(2)


def test_an_end_of_sequence_token_that_is_text_still_only_ends() -> None:
    tokenizer = Tokenizer.from_file(str(MODEL_PATH / "tokenizer.json"))
    a = tokenizer.token_to_id("a")
    compiler = GrammarCompiler(SimpleNamespace(backend_tokenizer=tokenizer), 1280, [a, 2])
    matcher = compiler.compile(GrammarSpec("regex", "[ab]{2}")).matcher()
    words = np.zeros(40, np.uint32)
    matcher.mask(words)
    assert not words[a // 32] >> a % 32 & 1
    for _ in range(2):
        assert matcher.accept(tokenizer.token_to_id("b"))
    matcher.mask(words)
    assert words[a // 32] >> a % 32 & 1
    assert matcher.accept(a)


def test_tokens_without_a_logit_are_never_allowed(demo: Sampler) -> None:
    few = Sampler(SimpleNamespace(backend_tokenizer=demo.tokenizer), demo.eos, vocab_size=1276)
    grammar = few.compile("json_schema", SCHEMAS["flat"])
    for seed in range(5):
        jsonschema.validate(json.loads(few.sample(grammar, seed)), SCHEMAS["flat"])


def test_a_batch_gets_the_masks_of_its_rows(sampler: Sampler) -> None:
    specs = [("json_object", ""), ("regex", "[ab]+"), ("choice", '["x"]')] * 3
    matchers = [sampler.compile(*spec).matcher() for spec in specs]
    words = -(-sampler.compiler.vocab_size // 32)
    wide = np.zeros((len(matchers) + 1, words + 1), np.uint32)
    batch = wide[:, :words]  # its rows are not next to each other
    fill_masks([*matchers, None], batch)
    single = np.zeros((len(matchers), words), np.uint32)
    for matcher, row in zip(matchers, single, strict=True):
        matcher.mask(row)
    assert np.array_equal(batch[:-1], single)
    assert (batch[-1] == 0xFFFFFFFF).all()
    assert not wide[:, words].any()


@pytest.mark.parametrize("out", [np.zeros((1, 42), np.uint32), np.zeros((2, 43), np.uint32), np.zeros((1, 43))])
def test_a_buffer_of_the_wrong_form_is_refused(demo: Sampler, out: np.ndarray) -> None:
    matcher = demo.compile("json_object").matcher()
    with pytest.raises(ValueError, match="out must"):
        fill_masks([matcher], out)


def test_rows_of_one_grammar_do_not_meet(demo: Sampler) -> None:
    grammar = demo.compile("json_schema", SCHEMAS["nested"])
    alone = [demo.sample(grammar, seed) for seed in range(4)]
    together: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: together.__setitem__(seed, demo.sample(grammar, seed)))
        for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[seed] for seed in range(4)] == alone


def test_rollback_restores_the_masks(demo: Sampler) -> None:
    matcher = demo.compile("json_object").matcher()
    before = demo.allowed(matcher)
    tokens = demo.tokenizer.encode('{"a": [1', add_special_tokens=False).ids
    assert all(map(matcher.accept, tokens))
    matcher.rollback(len(tokens))
    assert np.array_equal(demo.allowed(matcher), before)


def test_forced_tokens_begin_the_only_way_on(demo: Sampler) -> None:
    matcher = demo.compile("json_schema", closed({"temperature_in_degrees": {"const": 1}})).matcher()
    assert matcher.forced() == []  # white space may follow the first brace
    assert matcher.accept(demo.tokenizer.token_to_id("{"))
    assert matcher.accept(demo.tokenizer.token_to_id('"'))
    before = demo.allowed(matcher)
    forced = matcher.forced()
    assert forced
    assert "temperature_in_degrees".startswith(demo.tokenizer.decode(forced))
    assert np.array_equal(demo.allowed(matcher), before)
    assert all(map(matcher.accept, forced))
    assert demo.compile("choice", ["<|im_end|><|im_end|>x"]).matcher().forced() == []


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        ("json_schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
        ("json_schema", closed({"a": {"not": {"type": "string"}}}), '"not"'),
        ("json_schema", {"if": {"type": "string"}, "then": {"maxLength": 3}}, '"if", "then"'),
        ("json_schema", {"type": "string", "format": "iri"}, "iri"),
        ("json_schema", {"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
        ("json_schema", {"type": "object", "minProperties": 2}, "minProperties"),
        (
            "json_schema",
            closed({"const": {"type": "object", "minProperties": 3, "required": ["a", "a"]}}),
            "minProperties",
        ),
        ("json_schema", {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}, "x-guidance"),
        ("json_schema", {"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ("json_schema", {"type": "strnig"}, "strnig"),
        ("json_schema", {"type": "integer", "minimum": 5, "maximum": 2}, "minimum"),
        ("json_schema", {"enum": []}, "empty"),
        ("json_schema", {"$ref": "#/$defs/missing"}, "missing"),
        ("json_schema", "true", "must be an object"),
        ("json_schema", "{", "not JSON"),
        ("json_schema", "[" * 100_000, "not JSON"),
        ("json_schema", '{"items":' * 300 + "{}" + "}" * 300, "recursion"),
        ("regex", "(", "unclosed group"),
        ("regex", "a)(b", "unopened group"),
        ("regex", "a\\", "backslash"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", r"[^\s\S]", "no output"),
        ("regex", "a" * 300_000, "longer than"),
        ("choice", [], "at least one"),
        ("choice", ["a", ""], "empty"),
        ("choice", ["a", 1], "list of strings"),
        ("lark", "start: missing", "missing"),
        ("lark", "", "no start rule"),
    ],
)
def test_what_cannot_be_kept_is_refused(demo: Sampler, kind: str, value: object, reason: str) -> None:
    with pytest.raises(BadGrammar, match=re.escape(reason)) as caught:
        demo.compile(kind, value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("vocab", "eos", "reason"),
    [
        ({}, 0, "not a fast one"),
        ({"a": 0}, 0, "decoder"),
        ({"a": 0}, 5, "no end-of-sequence"),
        ({str(number): number for number in range(40)}, 0, "40 tokens but only 32 logits"),
    ],
)
def test_a_tokenizer_that_does_not_work_is_named(vocab: dict[str, int], eos: int, reason: str) -> None:
    tokenizer = SimpleNamespace(backend_tokenizer=Tokenizer(models.WordLevel(vocab, "a")) if vocab else None)
    with pytest.raises(BadGrammar, match=reason):
        GrammarCompiler(tokenizer, 32, [eos]).compile(GrammarSpec("json_object"))


def test_grammars_are_kept_up_to_a_number(demo: Sampler) -> None:
    compiler = GrammarCompiler(SimpleNamespace(backend_tokenizer=demo.tokenizer), 1280, [2], max_entries=2)
    first, second, third = (GrammarSpec("regex", letter) for letter in "abc")
    kept = compiler.compile(first)
    dropped = compiler.compile(second)
    assert compiler.compile(first) is kept
    compiler.compile(third)
    assert compiler.compile(first) is kept
    assert compiler.compile(second) is not dropped


def test_a_description_travels() -> None:
    spec = GrammarSpec("json_schema", "{}")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=GrammarSpec) == spec
