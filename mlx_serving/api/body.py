"""From the bytes of a request body to a typed value, with errors that name the field.

msgspec says where a value has the wrong type. What it refuses before that (numbers that JSON does not have, text that
is not UTF-8) is looked for a second time, slowly, only to find the field's name.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, TypeVar

import msgspec
from django.http import HttpRequest
from django.http.request import RawPostDataException

from ..errors import BodyTooLarge, InvalidRequest

T = TypeVar("T")

_AT_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_MISSING = re.compile(r"missing required field `(?P<name>[^`]*)`")
_UNKNOWN = re.compile(r"contains unknown field `(?P<name>[^`]*)`")
_MAX_DEPTH = 64
_MAX_NAME = 100
_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1


def read_body(request: HttpRequest, limit_bytes: int) -> bytes:
    """Return the request's body.

    Raises:
        BodyTooLarge: it is longer than `limit_bytes`.
        InvalidRequest: it could not be read.
    """
    too_large = BodyTooLarge(f"the request body is longer than {limit_bytes} bytes", param="body")
    try:
        if int(request.META.get("CONTENT_LENGTH") or 0) > limit_bytes:
            raise too_large
        # Not `request.body`: that would go by the limit meant for the site's forms.
        body: bytes = request.read(limit_bytes + 1)
    except (ValueError, OSError, RawPostDataException) as error:
        raise InvalidRequest("the request body could not be read", param="body") from error
    if len(body) > limit_bytes:
        raise too_large
    return body


def parse(body: bytes | str, decoder: msgspec.json.Decoder[T]) -> T:
    """Return the value of a JSON text.

    Raises:
        InvalidRequest: it is not JSON, or not of the decoder's type; `param` names the field.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(error) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(body, error) from error


def check_free_form(value: Any, path: str) -> None:
    """Check a value that the schema leaves open: JSON can spell what a worker or a chat template cannot take.

    Raises:
        InvalidRequest: it holds an integer of more than 64 bits, or is nested too deeply.
    """
    level = [(path, value)]
    for _ in range(_MAX_DEPTH):
        below: list[tuple[str, Any]] = []
        for where, item in level:
            if isinstance(item, int) and not _INT_MIN <= item <= _INT_MAX:
                raise InvalidRequest(f"{where} must be an integer of 64 bits", param=where)
            below.extend(_items(item, where))
        if not below:
            return
        level = below
    raise InvalidRequest(f"{path} is nested more than {_MAX_DEPTH} levels deep", param=path)


def parse_arguments(text: str, path: str) -> None:
    """Check the arguments of an earlier tool call, which are JSON inside a string of JSON.

    Raises:
        InvalidRequest: they are not JSON, or see `check_free_form`.
    """
    try:
        value = msgspec.json.decode(text or "{}")
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"{path} is not valid JSON: {error}", param=path) from error
    check_free_form(value, path)


def _invalid(error: msgspec.ValidationError) -> InvalidRequest:
    text = str(error)
    at = _AT_PATH.search(text)
    param = at.group("path") if at else ""
    if (named := _MISSING.search(text) or _UNKNOWN.search(text)) is not None:
        name = named.group("name")[:_MAX_NAME]
        param = f"{param}.{name}" if param else name
        if named.re is _UNKNOWN:
            return InvalidRequest(f"unrecognized request argument supplied: {param}", param=param)
        return InvalidRequest(f"missing required parameter: {param}", param=param)
    message = text[: at.start()] if at else text
    return InvalidRequest(f"invalid value for {param or 'the body'}: {message}", param=param or "body")


def _malformed(body: bytes | str, error: Exception) -> InvalidRequest:
    raw = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
    text = raw.decode("utf-8", "surrogateescape")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    path = _find(value, _has_stray_bytes)
    if path is not None:
        return InvalidRequest(f"{path} is not valid UTF-8", param=path)
    path = _find(value, lambda item: isinstance(item, float) and not math.isfinite(item))
    if path is not None:
        return InvalidRequest(f"{path} must be a finite number", param=path)
    return InvalidRequest(f"the request body is not valid JSON: {error}", param="body")


def _has_stray_bytes(item: Any) -> bool:
    return isinstance(item, str) and any("\udc80" <= character <= "\udcff" for character in item)


def _find(value: Any, wanted: Any, path: str = "", depth: int = 0) -> str | None:
    """Return the path of the first item that is wanted, depth first."""
    if wanted(value):
        return path or "body"
    if depth >= _MAX_DEPTH:
        return None
    for name, item in _items(value, path):
        found = _find(item, wanted, name, depth + 1)
        if found is not None:
            return found
    return None


def _items(value: Any, path: str) -> list[tuple[str, Any]]:
    """Return what an object or an array holds, each with its path."""
    if isinstance(value, dict):
        names = ((str(key)[:_MAX_NAME], item) for key, item in value.items())
        return [(f"{path}.{name}" if path else name, item) for name, item in names]
    if isinstance(value, list | tuple):
        return [(f"{path}[{at}]", item) for at, item in enumerate(value)]
    return []
