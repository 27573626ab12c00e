"""Who asks: the logged-in user by Django's session, else an anonymous client where the site allows those."""

from __future__ import annotations

from typing import Any

from asgiref.sync import sync_to_async
from django.conf import settings as django_settings
from django.core.exceptions import BadRequest, SuspiciousOperation
from django.db import connections
from django.http import HttpRequest, HttpResponse
from django.http.multipartparser import MultiPartParserError
from django.middleware.csrf import CsrfViewMiddleware

from ..conf import settings
from ..errors import AuthenticationRequired, InvalidRequest, PermissionRefused


class _CsrfCheck(CsrfViewMiddleware):
    """Django's CSRF check, returning the reason instead of a page."""

    def _reject(self, request: HttpRequest, reason: str) -> str:
        return reason


def _unused(_request: HttpRequest) -> HttpResponse:
    return HttpResponse()


def _session_client(request: HttpRequest) -> str | None:
    """Return the client of a valid session, or None. Runs in a thread, since it reads the database.

    Raises:
        PermissionRefused: the session is valid, but the request may come from another site's page.
        InvalidRequest: the body says that it is a form, and is not one that Django reads.
    """
    try:
        user = getattr(request, "user", None)
        if user is None or not user.is_authenticated:
            return None
        client = f"user:{user.pk}"
    finally:
        # A stream may live for minutes; it must not keep a database connection.
        connections.close_all()
    check = _CsrfCheck(_unused)
    check.process_request(request)
    try:
        reason = check.process_view(request, _unused, (), {})
    except (SuspiciousOperation, BadRequest, MultiPartParserError) as error:
        # Django looks for the token in a form before it looks at the header.
        raise InvalidRequest("send the body as application/json", param="body") from error
    if reason:
        raise PermissionRefused(f"CSRF check failed: {reason}")
    return client


async def client_of(request: HttpRequest) -> str:
    """Return the name by which the request's sender is counted.

    Raises:
        AuthenticationRequired: nobody is logged in, and the site is closed to anonymous clients.
        PermissionRefused: the CSRF check failed.
    """
    if django_settings.SESSION_COOKIE_NAME in request.COOKIES:
        client = await sync_to_async(_session_client)(request)
        if client is not None:
            return client
    return anonymous_client(request.META.get("REMOTE_ADDR") or "unknown")


def client_of_scope(scope: dict[str, Any]) -> str:
    """Return the same for a WebSocket; the session's user was resolved by `AuthMiddlewareStack`.

    Raises:
        AuthenticationRequired: nobody is logged in, and the site is closed to anonymous clients.
    """
    user = scope.get("user")
    if user is not None and user.is_authenticated:
        return f"user:{user.pk}"
    return anonymous_client((scope.get("client") or ["unknown"])[0])


def anonymous_client(address: str) -> str:
    """Return the name of an anonymous client.

    Raises:
        AuthenticationRequired: the site is closed to anonymous clients.
    """
    if not settings().ALLOW_ANONYMOUS:
        raise AuthenticationRequired("log in first; this site does not serve anonymous requests")
    return f"anonymous:{address}"
