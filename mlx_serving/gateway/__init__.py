"""A request's way to a worker. Public: `gateway`, `Call` and the types of what comes back."""

from .call import Call
from .gateway import Gateway, gateway

__all__ = ["Call", "Gateway", "gateway"]
