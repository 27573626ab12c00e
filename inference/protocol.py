"""The messages between the app and a worker process, and how they are framed on a socket.

The only module that both `mlx_serving` and `inference` import. It knows neither Django nor mlx: plain frozen structs,
encoded as MessagePack arrays by msgspec, behind a four-byte length. One outgoing frame carries everything that a step
produced for one peer, so the cost of a frame is paid per step and not per token.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Any, Literal, TypeAlias

import msgspec

PROTOCOL_VERSION = 1
"""Sent in the handshake; a worker refuses a peer that speaks another version."""

MAX_FRAME_BYTES = 64 * 1024 * 1024
"""A longer frame is a protocol error and closes the connection."""

INITIAL_CREDIT = 64
"""Delta events a worker may send for a request before the peer returns credit."""

BATCH_ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Upper bounds of the histogram of rows in a decode step."""

UNLIMITED_CREDIT = 1 << 30
"""For a peer that wants every delta by itself; the length of a completion is the bound then."""

RESERVED_TEMPLATE_VARIABLES = frozenset(
    (
        "self",
        "conversation",
        "messages",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    )
)
"""What Transformers' `apply_chat_template` takes for itself. A client must not replace the template, which is a
program, nor what is made of its output."""

_LENGTH = struct.Struct("!I")

FinishReason: TypeAlias = Literal["stop", "length", "tool_calls"]
WorkerState: TypeAlias = Literal["starting", "loading", "ready", "draining", "stopped", "failed"]
GrammarKind: TypeAlias = Literal["json_object", "json_schema", "regex", "choice", "lark"]
FailureCode: TypeAlias = Literal[
    "invalid_request",
    "context_length_exceeded",
    "overloaded",
    "worker_draining",
    "worker_lost",
    "worker_not_ready",
    "slow_reader",
    "request_timeout",
    "engine_error",
]


class Message(msgspec.Struct, frozen=True, array_like=True, kw_only=False):
    """Base of every message: immutable, encoded as an array whose first item is the tag."""


# --- what a request is -----------------------------------------------------------------------------------------------


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen. Defaults are neutral: plain sampling at temperature 1 with nothing filtered.

    The filters apply in this order: logit_bias, penalties, temperature, top_k, top_p, min_p.
    """

    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities sum to at least this; 1 keeps all."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest one."""
    seed: int | None = None
    """With a seed, the token at a position depends on the seed, the position and the model's output alone."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or output (arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token that the output holds already."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time that the output holds it."""
    logit_bias: dict[int, float] = {}
    """Token id to a value added to its logit."""


class GrammarSpec(msgspec.Struct, frozen=True):
    """What an output has to look like."""

    kind: GrammarKind
    value: str = ""
    """By kind: empty; a JSON schema as JSON text; a regular expression that the whole output matches; a JSON list of
    strings; a grammar in llguidance's dialect of Lark.

    Regular expressions, here and in a schema's `pattern`, have the syntax of Rust's `regex` crate, with no look-around
    and no back references; `\\d` and `\\w` are ASCII, as in JSON schema.
    """
    param: str = "response_format"
    """The request's field that asked for it, for error messages."""


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The canonical request, whichever API it came through. `messages` or `prompt` is set, never both."""

    request_id: str
    model: str
    messages: tuple[dict[str, Any], ...] | None = None
    """Chat turns in OpenAI's form with text contents; the worker applies the model's chat template."""
    prompt: str | tuple[int, ...] | None = None
    """Raw text or token ids, used without a template."""
    tools: tuple[dict[str, Any], ...] = ()
    """Function tools in OpenAI's form, given to the chat template."""
    chat_template_kwargs: dict[str, Any] = {}
    """Extra variables for the chat template, such as `enable_thinking`."""
    sampling: SamplingParams = SamplingParams()
    priority: int = 0
    """Higher runs earlier: each step counts like ten seconds of waiting."""
    timeout_s: float | None = None
    """Seconds after which a request that still waits is failed instead of started."""
    logprobs: int | None = None
    """With a number, each token comes with its log probability and those of this many likeliest alternatives."""
    echo: bool = False
    """Return the prompt's text in Accepted."""
    n: int = 1
    """Completions to generate; each is a choice with its own index."""
    max_tokens: int | None = None
    """Limit on generated tokens of each choice; None means up to the context length."""
    min_tokens: int = 0
    """No end-of-sequence token and no stop id ends a choice before this many tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end a choice; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    grammar: GrammarSpec | None = None
    """What the output has to look like."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence token; used to measure with a fixed number of tokens."""


class Usage(Message, frozen=True):
    """Tokens of a request. `completion_tokens` counts every token generated, the end-of-sequence token included."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


# --- commands: app to worker -----------------------------------------------------------------------------------------


class Hello(Message, frozen=True, tag="hello"):
    """First message on a connection."""

    version: int
    peer: str
    """A name for logs, such as `web:1234`."""


class Submit(Message, frozen=True, tag="submit"):
    """Start a request. Answered by Accepted or Failed."""

    request: GenerationRequest
    credit: int = INITIAL_CREDIT


class Cancel(Message, frozen=True, tag="cancel"):
    """Stop a request; unknown ids are ignored. No further event of it is sent."""

    request_id: str


class Credit(Message, frozen=True, tag="credit"):
    """The peer has consumed this many delta events of a request and can take as many more."""

    request_id: str
    events: int


class Drain(Message, frozen=True, tag="drain"):
    """Finish what runs and what waits, refuse what is new, then exit."""

    deadline_s: float
    """Seconds after which requests that still run are failed and the process exits."""


class Configure(Message, frozen=True, tag="configure"):
    """Switch the worker's features on or off, from the next step on."""

    prefix_cache: bool = True
    adaptive_batching: bool = True


class Ping(Message, frozen=True, tag="ping"):
    """Answered by Status."""


Command: TypeAlias = Hello | Submit | Cancel | Credit | Drain | Configure | Ping


# --- events: worker to app -------------------------------------------------------------------------------------------


class Accepted(Message, frozen=True, tag="accepted"):
    """The request is valid and queued. Always the first event of a request that does not fail."""

    request_id: str
    prompt_tokens: int
    worker_id: str
    prompt_text: str = ""
    """The prompt as text, when the request asked for an echo."""


class Progress(Message, frozen=True, tag="progress"):
    """Something long goes on before the first token. May be skipped by any hop."""

    request_id: str
    phase: Literal["loading", "prefill"]
    done: int
    total: int


class ToolCall(Message, frozen=True):
    """A complete call of a tool that the model asked for. `arguments` is JSON text."""

    index: int
    id: str
    name: str
    arguments: str


class TokenLogprob(Message, frozen=True):
    """The log probability of a token, by the model alone: before temperature, penalties and filters."""

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()
    """The likeliest tokens of the position: id, text, log probability."""


class Delta(Message, frozen=True, tag="delta"):
    """New output of one choice. `finish_reason` is set on the last delta of the choice.

    A reader that lags gets several steps in one delta; `seq` then is that of the last of them.
    """

    request_id: str
    seq: int
    """Counts the deltas of the request from 0, over all choices."""
    index: int
    """Which choice."""
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each token, when they were asked for."""


def merge_deltas(first: Delta, second: Delta) -> Delta:
    """Return one delta for two consecutive ones of the same choice."""
    return Delta(
        second.request_id,
        second.seq,
        second.index,
        first.text + second.text,
        first.token_ids + second.token_ids,
        second.finish_reason,
        first.tool_calls + second.tool_calls,
        first.logprobs + second.logprobs,
    )


class Finished(Message, frozen=True, tag="finished"):
    """Every choice has ended. The last event of a request that succeeds."""

    request_id: str
    seq: int
    usage: Usage


class Failed(Message, frozen=True, tag="failed"):
    """The request has ended without its result. The last event of a request that does not succeed."""

    request_id: str
    code: FailureCode
    message: str
    param: str | None = None
    """The request's field that is at fault, in the API's spelling."""
    retryable: bool = False
    """Whether the same request may succeed on another worker or a moment later."""


class Load(Message, frozen=True):
    """What a worker is busy with. Counters never decrease while the process lives; they end in `_total`."""

    running: int = 0
    """Rows in the batch."""
    waiting: int = 0
    """Requests that have been accepted and are not in the batch yet, prefill included."""
    kv_bytes: int = 0
    memory_bytes: int = 0
    """Memory that mlx holds: weights, KV and scratch."""
    step_ms: float = 0.0
    """Exponential moving average of a decode step's time."""
    steps_total: int = 0
    prompt_tokens_total: int = 0
    """Prompt tokens prefilled."""
    generated_tokens_total: int = 0
    requests_total: int = 0
    """Requests that have ended, in whichever way."""
    cancelled_total: int = 0
    cancel_steps_max: int = 0
    """Most decode steps that a row stayed in the batch after its cancel arrived."""
    frames_total: int = 0
    deltas_total: int = 0
    merged_deltas_total: int = 0
    """Deltas that were merged into another because their reader lagged."""
    row_limit: int = 0
    """Rows that may run now."""
    preempted_total: int = 0
    """Rows that left the batch for lack of memory and were resumed later."""
    batch_rows: tuple[int, ...] = ()
    """Decode steps by their number of rows: one count for each of `BATCH_ROW_BUCKETS`, and one for more."""
    batch_rows_sum: int = 0
    prefix_hits_total: int = 0
    prefix_misses_total: int = 0
    prefix_hit_tokens_total: int = 0
    prefix_evictions_total: int = 0
    prefix_bytes: int = 0


class ModelInfo(Message, frozen=True):
    """What the worker knows of its model once it is loaded."""

    context_length: int
    vocab_size: int
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    dtype: str
    device: str
    """`Metal`, `CUDA` or `CPU`, with the chip's name where it is known."""
    blas: str
    """On Linux CPU the BLAS library that float32 matrix products use, else empty."""
    batched: bool
    """Whether several rows run in one batch; False after a failed self-check."""
    max_rows: int
    load_s: float


class Status(Message, frozen=True, tag="status"):
    """The worker as a whole: first message after Hello, then on every change of state and in answer to Ping."""

    worker_id: str
    state: WorkerState
    load: Load
    model: ModelInfo | None = None
    error: str = ""
    progress: float = 0.0
    """Fraction of the load that is done, 0 to 1."""


RequestEvent: TypeAlias = Accepted | Progress | Delta | Finished | Failed
Event: TypeAlias = RequestEvent | Status


class CommandFrame(Message, frozen=True):
    """What the app sends: some commands."""

    commands: list[Command]


class EventFrame(Message, frozen=True):
    """What a worker sends: some events, and its load."""

    events: list[Event]
    load: Load


# --- how a worker process is started ---------------------------------------------------------------------------------


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Sent to a new worker process as one line of JSON on its standard input, which then stays open.

    The end of that stream means that the supervisor has gone, and the worker exits at once.
    """

    worker_id: str
    model: str
    """The name that clients use."""
    source: str
    """A local folder or a Hugging Face id."""
    revision: str = ""
    socket_path: str = ""
    """Unix socket to listen on, in a folder that only this user can enter."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto` keeps the weights' own type, but float32 on CPU where only that type is fast."""
    context_length: int | None = None
    """Overrides the limit in the model's configuration."""
    max_rows: int = 32
    max_waiting: int = 512
    prefill_tokens_per_step: int = 0
    """Prompt tokens computed between two decode steps; 0 chooses by device."""
    kv_budget_bytes: int = 0
    """Memory for KV; 0 chooses by the host's memory."""
    prefix_cache_bytes: int = 0
    """Most memory for the KV of finished requests, out of the KV budget; 0 takes half of it."""
    prefix_cache: bool = True
    adaptive_batching: bool = True
    target_itl_ms: float = 400.0
    """Step time above which adaptive batching starts no further rows."""
    max_stream_buffer_bytes: int = 1024 * 1024
    """Text that may wait for one slow reader before its stream fails."""
    self_check: bool = True
    """Compare a batched forward pass with single ones at load time."""
    log_level: str = "INFO"


# --- framing ---------------------------------------------------------------------------------------------------------


class ProtocolError(Exception):
    """The peer sent something that is not this protocol; the connection cannot go on."""


class FrameReader:
    """Reads length-prefixed frames of one type from a stream."""

    def __init__(self, reader: asyncio.StreamReader, frame_type: type[CommandFrame] | type[EventFrame]) -> None:
        self._reader = reader
        self._decoder = msgspec.msgpack.Decoder(frame_type)

    async def read(self) -> Any:
        """Return the next frame, or None at the end of the stream.

        Raises:
            ProtocolError: the frame is too long, cut off or not valid.
        """
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if length > MAX_FRAME_BYTES:
                raise ProtocolError(f"frame of {length} bytes is longer than {MAX_FRAME_BYTES}")
            body = await self._reader.readexactly(length)
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise ProtocolError("connection ended inside a frame") from error
            return None
        except ConnectionError:
            return None
        try:
            return self._decoder.decode(body)
        except msgspec.DecodeError as error:
            raise ProtocolError(f"undecodable frame: {error}") from error


_encoder = msgspec.msgpack.Encoder()


def encode_frame(frame: CommandFrame | EventFrame) -> bytearray:
    """Return a frame's bytes, its length in front."""
    buffer = bytearray(_LENGTH.size)
    _encoder.encode_into(frame, buffer, _LENGTH.size)
    _LENGTH.pack_into(buffer, 0, len(buffer) - _LENGTH.size)
    return buffer
