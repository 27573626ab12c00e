"""From a model's name to a model that can run: resolve the source, read weights, tokenizer and limits.

Called once by the engine thread at start. What is loaded here is used by that thread alone, except the tokenizer's
encoding side, which only the server's preparation thread uses.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
from huggingface_hub import snapshot_download
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm import utils as lm_utils
from mlx_lm.models.cache import make_prompt_cache

from . import compat, hardware
from .blas import blas_name
from .grammar import GrammarCompiler
from .protocol import ModelInfo, WorkerConfig
from .text import Detokenizer, FastDetokenizer, SegmentDetokenizer, TextStream, ToolCallSplitter, ToolSyntax

logger = logging.getLogger(__name__)

DEMO_SOURCE = "demo"
FALLBACK_CONTEXT_LENGTH = 4096
_CONTEXT_KEYS = (
    "max_position_embeddings",
    "max_sequence_length",
    "model_max_length",
    "n_positions",
    "max_seq_len",
    "seq_length",
)
_EVAL_GROUP = 64


class LoadError(Exception):
    """The model cannot be loaded; the message is meant for the site's operator."""


@dataclass
class LoadedModel:
    """A model in memory with all that the engine and the server need to know of it."""

    model: nn.Module
    tokenizer: Any
    """mlx-lm's tokenizer wrapper."""
    info: ModelInfo
    eos_token_ids: frozenset[int]
    tool_syntax: ToolSyntax | None
    _token_texts: dict[int, str] = field(default_factory=dict)

    def make_cache(self) -> list[Any]:
        """Return empty KV caches for one row, one for each layer."""
        return list(make_prompt_cache(self.model))

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Return the compiler of grammars over this model's vocabulary."""
        return GrammarCompiler(self.tokenizer, self.info.vocab_size, self.eos_token_ids)

    @cached_property
    def longest_token(self) -> int:
        """Return how many characters of text one token stands for at most."""
        return max(map(len, self.tokenizer.get_vocab()), default=1)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: what to encode.
            special: add the tokens that the model begins a text with; a chat template writes them itself.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return list(self.tokenizer.encode(text, add_special_tokens=special))
        # The batched call is the one that releases the interpreter's lock while it works.
        ids: list[int] = backend.encode_batch([text], add_special_tokens=special)[0].ids
        return ids

    def token_text(self, token: int) -> str:
        """Return the text of one token by itself; a part of a character shows as the replacement character."""
        text = self._token_texts.get(token)
        if text is None:
            text = self._token_texts[token] = str(self.tokenizer.decode([token]))
        return text

    def text_stream(self, stops: tuple[str, ...], tools: tuple[dict[str, Any], ...]) -> TextStream:
        """Return a decoder for the output of one choice."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        detokenizer: Detokenizer = (
            FastDetokenizer(backend) if backend is not None else SegmentDetokenizer(self.tokenizer.detokenizer)
        )
        splitter = None
        if tools and self.tool_syntax is not None:
            splitter = ToolCallSplitter(self.tool_syntax, tools, lambda: f"call_{secrets.token_hex(12)}")
        return TextStream(detokenizer, stops, splitter)


def resolve_source(config: WorkerConfig) -> Path:
    """Return the local folder of the model, downloaded from the Hugging Face hub where it is not local.

    Raises:
        LoadError: there is no such folder or model, or the hub cannot be reached.
    """
    if config.source == DEMO_SOURCE:
        from .demo_model import MODEL_PATH

        return MODEL_PATH
    path = Path(config.source).expanduser()
    if path.exists():
        return path
    if path.is_absolute() or config.source.startswith((".", "~")) or config.source.count("/") != 1:
        raise LoadError(f"there is no folder {config.source}, and a Hugging Face id has the form owner/name")
    options = {"revision": config.revision or None, "allow_patterns": lm_utils.DEFAULT_ALLOW_PATTERNS}
    try:
        return Path(snapshot_download(config.source, local_files_only=True, **options))
    except (OSError, ValueError):
        logger.info("%s is not on this machine yet, fetching it", config.source)
    try:
        return Path(snapshot_download(config.source, **options))
    except (OSError, ValueError) as error:
        raise LoadError(f"{config.source} could not be fetched from Hugging Face: {_brief(error)}") from error


def load(config: WorkerConfig, report: Callable[[float], None]) -> LoadedModel:
    """Load a model.

    Args:
        config: which model, and how.
        report: called with the fraction that is done.

    Raises:
        LoadError: it cannot be loaded.
    """
    started = time.monotonic()
    path = resolve_source(config)
    report(0.2)
    try:
        model, model_config = lm_utils.load_model(path, lazy=True)
        tokenizer = lm_utils.load_tokenizer(path, eos_token_ids=model_config.get("eos_token_id"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{config.source} cannot be loaded: {_brief(error)}") from error
    report(0.4)
    dtype = _choose_dtype(config.dtype)
    if dtype is not None:
        model.set_dtype(dtype)
    arrays = [value for _, value in tree_flatten(model.parameters())]
    for done in range(0, len(arrays), _EVAL_GROUP):
        mx.eval(*arrays[done : done + _EVAL_GROUP])
        report(0.4 + 0.5 * min(1.0, (done + _EVAL_GROUP) / len(arrays)))
    compat.adapt(model)
    vocab_size, kv_bytes, dtype_name = _probe(model)
    info = ModelInfo(
        context_length=config.context_length or _context_length(model_config),
        vocab_size=vocab_size,
        parameters=int(lm_utils.get_total_parameters(model)),
        weight_bytes=sum(array.nbytes for array in arrays),
        kv_bytes_per_token=kv_bytes,
        dtype=dtype_name,
        device=hardware.device_name(),
        blas=blas_name() if hardware.device_kind() == "CPU" else "",
        batched=True,
        max_rows=config.max_rows,
        load_s=time.monotonic() - started,
    )
    return LoadedModel(model, tokenizer, info, frozenset(tokenizer.eos_token_ids), _tool_syntax(tokenizer))


def kv_budget_bytes(config: WorkerConfig) -> int:
    """Return the memory for KV: the configured one, or 80 % of what the device has left beside the weights."""
    left = hardware.memory_limit_bytes() - mx.get_active_memory()
    return config.kv_budget_bytes or max(int(left * 0.8), 64 * 1024 * 1024)


def _brief(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


def _choose_dtype(wanted: str) -> mx.Dtype | None:
    if wanted != "auto":
        return {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}[wanted]
    return mx.float32 if hardware.device_defaults().float32_only else None


def _context_length(model_config: dict[str, Any]) -> int:
    for source in (model_config, model_config.get("text_config") or {}):
        for key in _CONTEXT_KEYS:
            if isinstance(source.get(key), int) and source[key] > 0:
                return int(source[key])
    return FALLBACK_CONTEXT_LENGTH


def _probe(model: nn.Module) -> tuple[int, int, str]:
    """Run one token through the model; return vocabulary size, KV bytes per token, and the type of its numbers."""
    cache = make_prompt_cache(model)
    logits = model(mx.zeros((1, 2), mx.uint32), cache=cache)
    mx.eval(logits)
    per_token = 0
    for layer in cache:
        for array in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(array, mx.array):
                per_token += array.shape[1] * array.shape[3] * array.dtype.size
    return int(logits.shape[-1]), per_token, str(logits.dtype).removeprefix("mlx.core.")


def _tool_syntax(tokenizer: Any) -> ToolSyntax | None:
    if not tokenizer.has_tool_calling:
        return None
    return ToolSyntax(tokenizer.tool_call_start, tokenizer.tool_call_end or "", tokenizer.tool_parser)
