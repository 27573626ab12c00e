"""Repairs of models that mlx-lm computes rightly in one way of batching or chunking only, so that all ways agree.

`adapt` is called once, by `loading`, after the weights are there. It asks the model by experiment what it needs, never
by its name, and changes nothing else. What it cannot repair is found by the self-check, and runs one row at a time.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache

logger = logging.getLogger(__name__)

_TOKENS = 4
# Relative to the largest number. A mask that reaches the wrong row is off by tens of percent, rounding by a few.
_TOLERANCE = 0.1


def adapt(model: nn.Module) -> list[str]:
    """Repair a model in place and return what was changed: sizes of sliding windows, and classes of attention."""
    changed = _widen_windows(model)
    for kind, call in _attention_calls(model).items():
        if _needs_mask_axis(call):
            _give_mask_axis(model, kind)
            changed.append(f"{kind.__name__}: an axis of its mask for grouped heads")
    for what in changed:
        logger.info("%s", what)
    return changed


def sliding_windows(cache: Sequence[Any]) -> Iterator[Any]:
    """Yield the parts of one row's KV that keep the last `max_size` tokens alone."""
    for layer in cache:
        yield from (part for part in getattr(layer, "caches", (layer,)) if hasattr(part, "max_size"))


def _widen_windows(model: nn.Module) -> list[str]:
    """Let sliding windows keep as many tokens as their masks show.

    Where they keep fewer, what a token sees depends on how the prompt was cut into chunks and on its neighbours.
    """
    cache = make_prompt_cache(model)
    windows = list(sliding_windows(cache))
    if not windows:
        return []
    shown: dict[int, int] = {}
    for window in windows:
        _spy_on_mask(window, shown)
    mx.eval(model(mx.arange(_TOKENS, dtype=mx.uint32)[None], cache=cache))
    wider = {size: wanted for size, wanted in shown.items() if wanted > size}
    if not wider:
        return []
    make_cache = model.make_cache

    def make_wide_cache() -> list[Any]:
        made: list[Any] = make_cache()
        for window in sliding_windows(made):
            window.max_size = wider.get(window.max_size, window.max_size)
        return made

    model.make_cache = make_wide_cache
    return [f"sliding window: {wanted} tokens kept instead of {size}" for size, wanted in wider.items()]


def _spy_on_mask(window: Any, shown: dict[int, int]) -> None:
    """Note how many tokens the masks show that are made from this window."""
    make_mask = window.make_mask

    def spy(*args: Any, **kwargs: Any) -> Any:
        size = kwargs.get("window_size") or window.max_size
        shown[window.max_size] = max(shown.get(window.max_size, 0), size)
        return make_mask(*args, **kwargs)

    window.make_mask = spy


class _Call:
    """A call of an attention module, to be repeated with other inputs. Its KV is left out: none has been computed."""

    def __init__(self, module: nn.Module, arguments: inspect.BoundArguments) -> None:
        self._module = module
        self._arguments = arguments.arguments
        self._x = next(name for name, value in self._arguments.items() if isinstance(value, mx.array))
        self.x: mx.array = self._arguments[self._x]

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        arguments = self._arguments | {self._x: x, "mask": mask}
        if "cache" in arguments:
            arguments["cache"] = None
        return self._module(**arguments)


def _attention_calls(model: nn.Module) -> dict[type[nn.Module], _Call]:
    """Run a few tokens through the model and return a call of each class of module that takes a mask and no other does.

    Blocks that hand their mask on to a module within them are left out.
    """
    calls: dict[type[nn.Module], _Call] = {}
    spied: list[tuple[nn.Module, type[nn.Module]]] = []
    seen: set[type[nn.Module]] = set()
    for module in model.modules():
        kind = type(module)
        if kind in seen or not _takes_mask(kind):
            continue
        if any(_takes_mask(type(part)) for part in module.modules() if part is not module):
            continue
        seen.add(kind)
        spied.append((module, kind))
        _override_call(module, _spy(kind, calls))
    try:
        mx.eval(model(mx.arange(_TOKENS, dtype=mx.uint32)[None]))
    except Exception:
        logger.debug("the model does not run without KV; its attention is left as it is", exc_info=True)
    finally:
        for module, kind in spied:
            module.__class__ = kind
    return calls


def _takes_mask(kind: type[nn.Module]) -> bool:
    call = kind.__call__  # that of its metaclass where it has none
    return inspect.isfunction(call) and "mask" in inspect.signature(call).parameters


def _override_call(module: nn.Module, call: Any) -> None:
    """Give one module another `__call__`, by a subclass of its own class."""
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


def _spy(kind: type[nn.Module], calls: dict[type[nn.Module], _Call]) -> Any:
    signature = inspect.signature(kind.__call__)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.arguments.pop(next(iter(signature.parameters)))
        calls.setdefault(kind, _Call(self, bound))
        return kind.__call__(self, *args, **kwargs)

    return call


def _needs_mask_axis(call: _Call) -> bool:
    """Whether a mask for each row, shape [rows, 1, queries, keys], reaches the wrong rows, and one more axis helps."""
    length = call.x.shape[1]
    masks = [mx.tril(mx.ones((length, length), mx.bool_)), mx.eye(length, dtype=mx.bool_)]
    rows = mx.stack(masks)[:, None]
    x = mx.concatenate([call.x, call.x])
    try:
        expected = mx.concatenate([call(call.x, mask) for mask in masks])
        mx.eval(expected)
    except Exception:
        return False  # it does not run apart from its model
    return not _agrees(call, x, rows, expected) and _agrees(call, x, rows[:, :, None], expected)


def _agrees(call: _Call, x: mx.array, mask: mx.array, expected: mx.array) -> bool:
    try:
        found = call(x, mask)
        if found.shape != expected.shape:
            return False
        return bool(mx.abs(found - expected).max().item() <= _TOLERANCE * mx.abs(expected).max().item())
    except (ValueError, RuntimeError):
        return False  # shapes that do not broadcast


def _give_mask_axis(model: nn.Module, kind: type[nn.Module]) -> None:
    at = list(inspect.signature(kind.__call__).parameters).index("mask") - 1

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) > at:
            args = (*args[:at], _with_axis(args[at]), *args[at + 1 :])
        elif "mask" in kwargs:
            kwargs["mask"] = _with_axis(kwargs["mask"])
        return kind.__call__(self, *args, **kwargs)

    for module in model.modules():
        if type(module) is kind:
            _override_call(module, call)


def _with_axis(mask: Any) -> Any:
    """Return a mask of shape [rows, 1, queries, keys] as [rows, 1, 1, queries, keys], any other as it is."""
    return mask[:, :, None] if isinstance(mask, mx.array) and mask.ndim == 4 else mask
