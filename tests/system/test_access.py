"""Who may use the API: anonymous clients where the site is open, logged-in users with Django's CSRF check."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.system.api_fixtures import COMPLETIONS, ON_DAPHNE, exactly, logged_in, metrics
from tests.system.deployments import (
    DEMO_MODEL,
    PATIENCE_S,
    TINY_MODEL,
    Deployment,
    Site,
    answers,
    free_port,
    serve,
    server_command,
)

MADE_UP = {"Cookie": "sessionid=0123456789abcdefghijklmnopqrstuv"}
FORM = "application/x-www-form-urlencoded"


@pytest.fixture(scope="module")
def closed_site(demo_deployment: Deployment) -> Iterator[str]:
    """The address of a server that is closed to anonymous clients."""
    with serve(demo_deployment, "daphne", MLX_SERVING_ALLOW_ANONYMOUS="false") as (base_url, _):
        yield base_url


@pytest.fixture
def anonymous(closed_site: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=closed_site, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture
def user(closed_site: str, demo_deployment: Deployment) -> Iterator[httpx.Client]:
    with logged_in(closed_site, demo_deployment) as client:
        yield client


def token(client: httpx.Client) -> dict[str, str]:
    return {"X-CSRFToken": client.cookies["csrftoken"]}


def refused(response: httpx.Response, status: int, code: str, kind: str) -> None:
    assert (response.status_code, response.headers["Content-Type"]) == (status, "application/json"), response.text
    error = response.json()["error"]
    assert (error["code"], error["type"]) == (code, kind)


# --- a closed site ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{}, MADE_UP, {"Authorization": "Bearer made-up"}], ids=["none", "session", "key"])
def test_a_closed_site_refuses_whoever_is_not_logged_in(anonymous: httpx.Client, headers: dict[str, str]) -> None:
    for response in (
        anonymous.post(COMPLETIONS, json=exactly(1), headers=headers),
        anonymous.post(COMPLETIONS, json=exactly(1, stream=True), headers=headers),
        anonymous.post(COMPLETIONS, content=b"not even JSON", headers=headers),
        anonymous.get("/v1/models", headers=headers),
        anonymous.get(f"/v1/models/{DEMO_MODEL}", headers=headers),
        anonymous.get("/v1/models/no-such-model", headers=headers),
    ):
        refused(response, 401, "authentication_required", "authentication_error")
        assert "WWW-Authenticate" in response.headers


def test_a_closed_site_serves_a_logged_in_user(user: httpx.Client) -> None:
    assert user.post(COMPLETIONS, json=exactly(1), headers=token(user)).status_code == 200
    streamed = user.post(COMPLETIONS, json=exactly(1, stream=True), headers=token(user))
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert [model["id"] for model in user.get("/v1/models").json()["data"]] == [DEMO_MODEL]
    assert user.get(f"/v1/models/{DEMO_MODEL}").status_code == 200


def test_a_session_needs_its_csrf_token(user: httpx.Client) -> None:
    for headers in ({}, {"X-CSRFToken": ""}, {"X-CSRFToken": "x" * 32}):
        response = user.post(COMPLETIONS, json=exactly(1), headers=headers)
        refused(response, 403, "permission_denied", "permission_error")


def test_a_session_does_not_help_another_sites_page(user: httpx.Client) -> None:
    headers = {**token(user), "Origin": "https://evil.example"}
    refused(user.post(COMPLETIONS, json=exactly(1), headers=headers), 403, "permission_denied", "permission_error")


def test_a_session_ends_with_the_logout(user: httpx.Client) -> None:
    left = {"Cookie": f"sessionid={user.cookies['sessionid']}"}
    assert user.post("/admin/logout/", headers=token(user)).status_code == 200
    with httpx.Client(base_url=user.base_url, timeout=PATIENCE_S) as thief:
        response = thief.get("/v1/models", headers=left)
    refused(response, 401, "authentication_required", "authentication_error")


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (FORM, b"a=" + b"x" * 3_000_000),
        (FORM, b"a=1&" * 2000),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb'),
    ],
    ids=["long form", "form of many fields", "cut off multipart"],
)
def test_a_form_that_django_refuses_is_a_bad_request(user: httpx.Client, kind: str, body: bytes) -> None:
    response = user.post(COMPLETIONS, content=body, headers={**token(user), "Content-Type": kind})
    refused(response, 400, "invalid_request", "invalid_request_error")


# --- health, readiness, metrics ---------------------------------------------------------------------------------------


def test_probes_need_no_login(anonymous: httpx.Client) -> None:
    health = anonymous.get("/health")
    assert (health.status_code, health.json()) == (200, {"status": "ok"})
    ready = anonymous.get("/ready")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready", "models": {DEMO_MODEL: "ready"}})
    assert anonymous.get("/metrics").status_code == 200


def test_a_site_without_a_worker_is_healthy_but_not_ready(deployment: Deployment, tiny_model: Path) -> None:
    deployment.add_model(TINY_MODEL, tiny_model)
    port = free_port()
    base_url = f"http://127.0.0.1:{port}"
    deployment.start("daphne", *server_command("daphne", port))
    deployment.wait_for(lambda: answers(f"{base_url}/health"), "the server")
    with httpx.Client(base_url=base_url, timeout=PATIENCE_S) as client:
        ready = client.get("/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "not ready", "models": {TINY_MODEL: "no worker"}})
        response = client.post(COMPLETIONS, json={**exactly(1), "model": TINY_MODEL})
        refused(response, 503, "model_not_ready", "server_error")
        assert int(response.headers["Retry-After"]) > 0
        (model,) = client.get("/v1/models").json()["data"]
        assert (model["id"], model["ready"]) == (TINY_MODEL, False)


# --- an open site -----------------------------------------------------------------------------------------------------


@ON_DAPHNE
def test_on_an_open_site_only_sessions_need_a_token(site: Site) -> None:
    with httpx.Client(base_url=site.base_url, timeout=PATIENCE_S) as client:
        assert client.post(COMPLETIONS, json=exactly(1)).status_code == 200
        assert client.post(COMPLETIONS, json=exactly(1), headers=MADE_UP).status_code == 200
    with logged_in(site.base_url, site.deployment) as client:
        response = client.post(COMPLETIONS, json=exactly(1))
        refused(response, 403, "permission_denied", "permission_error")
        assert client.post(COMPLETIONS, json=exactly(1), headers=token(client)).status_code == 200


@ON_DAPHNE
def test_metrics_count_requests_and_tokens(site: Site) -> None:
    before = metrics(site.base_url)
    usage = httpx.post(f"{site.base_url}{COMPLETIONS}", json=exactly(7), timeout=PATIENCE_S).json()["usage"]
    after = metrics(site.base_url)

    def moved(name: str, **labels: str) -> float:
        key = name, frozenset({"model": DEMO_MODEL, **labels}.items())
        return after[key] - before.get(key, 0)

    assert moved("mlx_requests_total", outcome="ok") == 1
    assert moved("mlx_prompt_tokens_total") == usage["prompt_tokens"]
    assert moved("mlx_completion_tokens_total") == usage["completion_tokens"] == 7
    assert moved("mlx_ttft_seconds_count") == 1
    assert moved("mlx_request_seconds_count") == 1
    assert after["mlx_worker_active", frozenset({("model", DEMO_MODEL), ("state", "ready")})] == 1
