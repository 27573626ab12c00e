"""Constrained decoding: which tokens a row may take next, so that its output is what a grammar allows.

The server's preparation thread turns a `GrammarSpec` into a `Grammar` with the model's `GrammarCompiler`; the engine
thread has a `Matcher` for each row, tells it every token and asks for a bitmask of the tokens allowed next. llguidance
does the work: in Rust, without the interpreter's lock, and with no automaton to build over the vocabulary in advance.
Nothing here knows of mlx: masks are numpy arrays that the sampler hands to the device.

What is promised is about text: decoded without special tokens, the output matches. A schema keyword that would not be
enforced is refused, never ignored. Properties come in the order of the schema, and a `date` may be 29 February of any
year.
"""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from typing import Any, TypeAlias

import llguidance
import msgspec
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from .protocol import GrammarSpec

Mask: TypeAlias = npt.NDArray[np.uint32]

WHITESPACE = r" |\n {0,24}|\n\t{0,12}"
"""What may stand, once, wherever JSON allows white space: nothing, a space, or a new line and its indentation.

Compact, one-line and indented JSON all fit, and no sample can go on with white space for ever.
"""

_JSON_OPTIONS = {"whitespace_pattern": WHITESPACE, "lenient": False, "coerce_one_of": False}
_LIMITS = llguidance.LLParserLimits(verbose_errors=False)
_REGEX_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$&~#-]")
_MAX_VALUE = 256 * 1024
_MAX_REASON = 300
_MAX_THREADS = 8
_NOT_THIS_MODEL = "grammars do not work with this model"


class BadGrammar(Exception):
    """The grammar cannot be used; the message is meant for the client."""


class Matcher:
    """Follows the output of one row. Belongs to the engine thread."""

    __slots__ = ("_compiler", "_inner")

    def __init__(self, inner: llguidance.LLMatcher, compiler: GrammarCompiler) -> None:
        self._inner = inner
        self._compiler = compiler

    @property
    def finished(self) -> bool:
        """Whether no token but an end of sequence is possible, because the text is complete or because of an error."""
        return self._inner.is_stopped()

    @property
    def error(self) -> str:
        """Why the matcher had to give up, such as a limit on its work; empty while it works."""
        return self._inner.get_error() if self._inner.is_error() else ""

    def mask(self, out: Mask) -> None:
        """Write which tokens are allowed next.

        Args:
            out: shape [ceil(vocab_size / 32)]; bit `i % 32` of word `i // 32` is set if token `i` is allowed. End of
                sequence is allowed exactly when the text may end here; after an error, nothing else is.
        """
        fill_masks((self,), out[None, :])

    def accept(self, token: int) -> bool:
        """Take the row's next token. Return False, and change nothing, if it is not allowed or there is an error."""
        if self._inner.is_stopped():
            return token in self._compiler.eos_token_ids and not self._inner.is_error()
        return self._inner.try_consume_tokens([token]) == 1

    def rollback(self, tokens: int) -> None:
        """Forget the last `tokens` accepted tokens, an end of sequence after the finished text not counted."""
        self._inner.rollback(tokens)

    def forced(self) -> list[int]:
        """Return tokens that the text must go on with, as the tokenizer writes them; often none. Accepts nothing."""
        text = self._inner.compute_ff_bytes().decode(errors="ignore")
        # The last token could be written differently together with what follows.
        tokens = self._compiler.encode(text)[:-1]
        return tokens[: self._inner.validate_tokens(tokens)]


class Grammar:
    """A compiled grammar, shared by all rows that use it."""

    __slots__ = ("_compiler", "_inner")

    def __init__(self, inner: llguidance.LLMatcher, compiler: GrammarCompiler) -> None:
        self._inner = inner
        self._compiler = compiler

    def matcher(self) -> Matcher:
        """Return a matcher at the beginning of the output."""
        return Matcher(self._inner.deep_copy(), self._compiler)


class GrammarCompiler:
    """Compiles grammars for one model. Building one is cheap; the first `compile` takes in the vocabulary.

    Args:
        tokenizer: mlx-lm's tokenizer wrapper.
        vocab_size: number of logits. Tokens that the tokenizer does not have are never allowed.
        eos_token_ids: tokens that end the output.
        max_entries: compiled grammars that are kept, least recently used first to go.
    """

    def __init__(
        self, tokenizer: Any, vocab_size: int, eos_token_ids: Collection[int], *, max_entries: int = 128
    ) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = frozenset(eos_token_ids)
        self.wordy_eos_ids: tuple[int, ...] = ()
        """Ends of sequence that are also text to the tokenizer, so that a grammar could want them as text."""
        self._tokenizer = tokenizer
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._max_entries = max_entries
        self._grammars: OrderedDict[GrammarSpec, Grammar] = OrderedDict()

    def compile(self, spec: GrammarSpec) -> Grammar:
        """Return the grammar of a description. Calls may not overlap.

        Raises:
            BadGrammar: the description is not valid, asks for what is not supported, or allows no output at all; or
                grammars do not work with this model's tokenizer.
        """
        if spec in self._grammars:
            self._grammars.move_to_end(spec)
            return self._grammars[spec]
        if len(spec.value) > _MAX_VALUE:
            raise BadGrammar(f"it is longer than {_MAX_VALUE} characters")
        vocabulary = self.load_vocabulary()
        inner = llguidance.LLMatcher(vocabulary, _library_grammar(spec), log_level=0, limits=_LIMITS)
        if inner.is_error():
            raise BadGrammar(_reason(inner.get_error()))
        if spec.kind in {"json_object", "json_schema"} and (warnings := inner.get_grammar_warnings()):
            raise BadGrammar(_reason(warnings[0]))
        inner.compute_bitmask()  # Copies of `inner` inherit what this costs.
        if inner.is_stopped() and not inner.is_accepting():
            raise BadGrammar("no output can match it")
        grammar = self._grammars[spec] = Grammar(inner, self)
        if len(self._grammars) > self._max_entries:
            self._grammars.popitem(last=False)
        return grammar

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        tokens: list[int] = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return tokens

    def load_vocabulary(self) -> llguidance.LLTokenizer:
        """Return the vocabulary as llguidance keeps it, built by the first call (two seconds for 150,000 tokens).

        Raises:
            BadGrammar: this tokenizer is not supported.
        """
        if self._vocabulary is None:
            self._vocabulary = self._read_vocabulary()
            ends = self._vocabulary.eos_tokens
            self.wordy_eos_ids = tuple(token for token in ends if not self._vocabulary.is_special_token(token))
        return self._vocabulary

    def _read_vocabulary(self) -> llguidance.LLTokenizer:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise BadGrammar(f"{_NOT_THIS_MODEL}: its tokenizer is not a fast one")
        text = backend.to_str()
        known = backend.get_vocab_size(with_added_tokens=True)
        if known > self.vocab_size:
            # Tokens that were added to the tokenizer alone: the model cannot choose them.
            parsed = msgspec.json.decode(text)
            parsed["added_tokens"] = [token for token in parsed["added_tokens"] if token["id"] < self.vocab_size]
            text = msgspec.json.encode(parsed).decode()
            known = Tokenizer.from_str(text).get_vocab_size(with_added_tokens=True)
            if known > self.vocab_size:
                raise BadGrammar(f"{_NOT_THIS_MODEL}: it has {known} tokens but only {self.vocab_size} logits")
        if max(backend.get_added_tokens_decoder(), default=0) >= backend.get_vocab_size(with_added_tokens=True):
            raise BadGrammar(f"{_NOT_THIS_MODEL}: its token ids have gaps")
        ends = sorted(token for token in self.eos_token_ids if 0 <= token < known)
        if not ends:
            raise BadGrammar(f"{_NOT_THIS_MODEL}: it has no end-of-sequence token")
        try:
            return llguidance.LLTokenizer(text, n_vocab=self.vocab_size, eos_token=ends)
        except ValueError as error:
            raise BadGrammar(f"{_NOT_THIS_MODEL}: {_reason(str(error))}") from error


def fill_masks(matchers: Sequence[Matcher | None], out: Mask) -> None:
    """Write the masks of a batch, on several threads and without the interpreter's lock.

    Args:
        matchers: one for each row, all of one compiler; None allows every token.
        out: shape [rows, ceil(vocab_size / 32)]; see `Matcher.mask`.

    Raises:
        ValueError: `out` has another shape or type.
    """
    constrained = [(matcher, row) for row, matcher in enumerate(matchers) if matcher is not None]
    if out.dtype != np.uint32 or out.ndim != 2 or len(out) != len(matchers):
        raise ValueError("out must be uint32 with one row for each matcher")
    if len(constrained) < len(matchers):
        out[[row for row, matcher in enumerate(matchers) if matcher is None]] = 0xFFFFFFFF
    if not constrained:
        return
    compiler = constrained[0][0]._compiler
    rows, words = out.shape
    if words != -(-compiler.vocab_size // 32):
        raise ValueError(f"out must have one bit for each of {compiler.vocab_size} tokens")
    # The library writes through a bare pointer, one row after the other.
    target = out if out.flags.c_contiguous else np.empty_like(out, order="C")
    _executor().unsafe_compute_mask_ptr(
        [(matcher._inner, row) for matcher, row in constrained], target.ctypes.data, 4 * words, rows
    )
    for matcher, row in constrained if target is not out or compiler.wordy_eos_ids else ():
        out[row] = target[row]
        if not (matcher._inner.is_accepting() or matcher.finished):
            for token in compiler.wordy_eos_ids:
                out[row, token // 32] &= ~np.uint32(1 << token % 32)


@cache
def _executor() -> llguidance.LLExecutor:
    return llguidance.LLExecutor(num_threads=max(1, min(_MAX_THREADS, (os.cpu_count() or 1) - 1)))


def _library_grammar(spec: GrammarSpec) -> str:
    """Return a description as llguidance's Lark.

    Raises:
        BadGrammar: the value is not what the kind asks for.
    """
    match spec.kind:
        case "json_object":
            lark = _from_schema({"type": "object"})
        case "json_schema":
            lark = _from_schema(_read_schema(spec.value))
        case "regex":
            lark = _from_regex(spec.value)
        case "choice":
            try:
                choices = msgspec.json.decode(spec.value, type=list[str])
            except msgspec.DecodeError as error:
                raise BadGrammar(f"the choices are not a JSON list of strings: {error}") from error
            if not choices or "" in choices:
                raise BadGrammar("there must be at least one choice, and none may be empty")
            lark = _from_regex("|".join(_REGEX_SPECIAL.sub(r"\\\g<0>", choice) for choice in dict.fromkeys(choices)))
        case "lark":
            lark = spec.value
        case _:
            raise BadGrammar(f"there is no grammar of kind {spec.kind}")
    # Without this, text that only one string can continue is tokenized by llguidance, and a string that looks like a
    # special token becomes that token. With it, every spelling in ordinary tokens is allowed.
    return lark + '\n%llguidance {"no_forcing": true}\n'


def _from_schema(schema: dict[str, Any]) -> str:
    return f"start: %json {json.dumps({**schema, 'x-guidance': _JSON_OPTIONS})}"


def _from_regex(pattern: str) -> str:
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        raise BadGrammar("invalid regular expression: it ends with a single backslash")
    return f"start: /{llguidance.regex_to_lark(pattern, 'dw') or '(?:)'}/"


def _read_schema(text: str) -> dict[str, Any]:
    """Return a schema, in which nothing is left that llguidance would take and not enforce.

    Raises:
        BadGrammar: with the keyword's name.
    """
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadGrammar(f"the schema is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise BadGrammar("the schema must be an object")
    if "x-guidance" in schema:
        raise BadGrammar("the keyword x-guidance is not supported")
    for part in _objects(schema):
        least, required = part.get("minProperties"), part.get("required")
        # llguidance counts a key that `properties` does not name once more each time it comes; JSON keeps one of them.
        if isinstance(least, int) and least > 1 + (len({*map(str, required)}) if isinstance(required, list) else 0):
            raise BadGrammar("minProperties is supported up to one more than there are required properties")
    return schema


def _objects(node: Any) -> Iterator[dict[str, Any]]:
    """Yield every object in a JSON value: all that may be schemas, and some that are names or constants."""
    pending = [node]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            yield node
            pending.extend(node.values())
        elif isinstance(node, list):
            pending.extend(node)


def _reason(message: str) -> str:
    """Return a message of llguidance as one line in the client's terms."""
    if found := re.search(r"^error: (.+)$", message, re.MULTILINE):
        return f"invalid regular expression: {found[1]}"
    line = (message.splitlines() or ["unknown"])[0].replace("Unimplemented keys:", "these keywords are not supported:")
    line = line.rpartition("failed to compile JSON schema: ")[2]
    if line.startswith("oneOf constraints"):
        return "oneOf is supported only where it is certain that its options exclude each other"
    return line if len(line) <= _MAX_REASON else f"{line[:_MAX_REASON]}..."
