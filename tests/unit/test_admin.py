"""The admin's pages, through Django's test client and without JavaScript."""

import re
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from mlx_serving import flags
from mlx_serving.admin.display import badge, human_age, human_bytes, telling
from mlx_serving.models import FeatureFlag, ServedModel, Worker

pytestmark = pytest.mark.django_db

MODELS = reverse("admin:mlx_serving_servedmodel_changelist")
WORKERS = reverse("admin:mlx_serving_worker_changelist")
FLAGS = reverse("admin:mlx_serving_featureflag_changelist")
POOL = flags.FLAGS["connection_pool"]


@pytest.fixture(autouse=True)
def quick_passwords(settings: Any) -> None:
    """Passwords are not what is tested, and hashing them well takes half a second each."""
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]


@pytest.fixture(autouse=True)
def fresh_flags(monkeypatch: pytest.MonkeyPatch, quick_passwords: None) -> None:
    monkeypatch.setattr(flags, "_snapshot", flags._Snapshot())
    for flag in flags.FLAGS.values():
        monkeypatch.delenv(flag.env, raising=False)


@pytest.fixture
def staff(client: Client) -> User:
    """A member of staff without any permission, logged in."""
    user = User.objects.create_user("staff", is_staff=True)
    client.force_login(user)
    return user


def permit(user: User, *codenames: str) -> None:
    user.user_permissions.add(*Permission.objects.filter(codename__in=codenames))


def model(name: str = "m", **values: Any) -> ServedModel:
    return ServedModel.objects.create(**{"name": name, "source": "demo", **values})


def worker(served: ServedModel, pk: str = "w1", **values: Any) -> Worker:
    seen = {"heartbeat_at": timezone.now()}
    return Worker.objects.create(
        **{"pk": pk, "model": served, "host": "h", "endpoint": "unix:/w", "pid": 1, "state": "ready", **seen, **values}
    )


def text(response: Any) -> str:
    assert response.status_code == 200, response
    return re.sub(r"\s+", " ", response.content.decode())


def cells(page: str, field: str) -> list[str]:
    """Return the text of a column."""
    return [re.sub("<.*?>", "", cell).strip() for cell in re.findall(rf'class="field-{field}[^"]*">(.*?)</t', page)]


def set_flag(client: Client, name: str, choice: str) -> Any:
    return client.post(reverse("admin:mlx_serving_featureflag_set", args=[name, choice]))


def command(client: Client, served: ServedModel, name: str) -> Any:
    return client.post(reverse("admin:mlx_serving_servedmodel_command", args=[served.pk, name]))


# --- models ----------------------------------------------------------------------------------------------------------


def add(client: Client, **values: str) -> Any:
    form = {"source": "", "name": "", "wanted": "on", "dtype": "auto", **values}
    return client.post(reverse("admin:mlx_serving_servedmodel_add"), form)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("mlx-community/Qwen3-0.6B-bf16", "mlx-community/Qwen3-0.6B-bf16"),
        ("/srv/models/My Model", "My-Model"),
        ("demo", "mlx-serving-demo"),
    ],
)
def test_a_model_without_a_name_is_named_after_its_source(admin_client: Client, source: str, name: str) -> None:
    add(admin_client, source=source)
    assert list(ServedModel.objects.values_list("source", "name", "wanted")) == [(source, name, True)]


def test_a_name_can_be_chosen(admin_client: Client) -> None:
    add(admin_client, source="org/m", name="mine")
    assert ServedModel.objects.get().name == "mine"


@pytest.mark.parametrize("name", ["with space", "semi;colon", "new\nline"])
def test_a_bad_name_is_refused(admin_client: Client, name: str) -> None:
    assert "Letters, digits" in text(add(admin_client, source="org/m", name=name))


def test_a_name_in_use_is_refused_also_when_it_was_not_typed(admin_client: Client) -> None:
    model("org/m")
    assert "already exists" in text(add(admin_client, source="org/m"))
    assert ServedModel.objects.count() == 1


@pytest.mark.parametrize("source", ["nonsense", "../up/down", "a/b/c", "http://host/model"])
def test_a_bad_source_is_refused(admin_client: Client, source: str) -> None:
    assert "Hugging Face id" in text(add(admin_client, source=source))


def test_the_list_shows_state_load_and_memory(admin_client: Client) -> None:
    worker(model(), running=3, waiting=4, memory_bytes=3 * 1024**3)
    page = text(admin_client.get(MODELS))
    assert cells(page, "state") == ["ready"]
    assert cells(page, "requests") == ["3 / 4"]
    assert cells(page, "memory") == ["3.0 GiB"]


@pytest.mark.parametrize(
    ("wanted", "values", "shown"),
    [
        (True, None, "waiting for a supervisor"),
        (False, None, "not loaded"),
        (True, {"state": "loading", "progress": 0.42}, "loading 42%"),
        (True, {"state": "starting"}, "starting"),
        (True, {"state": "draining"}, "draining"),
        (True, {"state": "failed"}, "failed"),
        (False, {"state": "stopped"}, "not loaded"),
        (True, {"heartbeat_at": None}, "no heartbeat"),
    ],
)
def test_the_state_of_a_model(admin_client: Client, wanted: bool, values: dict[str, Any] | None, shown: str) -> None:
    served = model(wanted=wanted)
    if values is not None:
        worker(served, **values)
    assert cells(text(admin_client.get(MODELS)), "state") == [shown]


def test_during_a_reload_the_model_is_ready(admin_client: Client) -> None:
    served = model()
    worker(served, "old")
    worker(served, "new", state="loading")
    assert cells(text(admin_client.get(MODELS)), "state") == ["ready"]


def test_the_list_shows_why_the_newest_worker_failed(admin_client: Client) -> None:
    worker(model(), state="failed", last_error="no such folder: <b>")
    assert cells(text(admin_client.get(MODELS)), "last_error") == ["no such folder: &lt;b&gt;"]


@pytest.mark.parametrize("url", [MODELS, WORKERS])
def test_the_number_of_queries_does_not_grow(
    admin_client: Client, django_assert_max_num_queries: Any, url: str
) -> None:
    worker(model("first"), "w0")
    with django_assert_max_num_queries(20) as one:
        admin_client.get(url)
    for number in range(12):
        worker(model(f"m{number}"), f"w1{number}")
    with django_assert_max_num_queries(len(one)):
        admin_client.get(url)


def test_the_actions_load_unload_and_reload(admin_client: Client) -> None:
    off, on = model("off", wanted=False), model("on")

    def act(action: str) -> None:
        admin_client.post(MODELS, {"action": action, "_selected_action": [off.pk, on.pk]})

    act("load_models")
    assert set(ServedModel.objects.values_list("wanted", flat=True)) == {True}
    act("reload_models")
    assert set(ServedModel.objects.values_list("reload_token", flat=True)) == {1}
    act("unload_models")
    assert set(ServedModel.objects.values_list("wanted", flat=True)) == {False}
    act("reload_models")
    assert set(ServedModel.objects.values_list("reload_token", flat=True)) == {1}


def test_the_buttons_of_a_models_page_work_and_are_logged(admin_client: Client, admin_user: User) -> None:
    served = model()
    page = text(admin_client.get(reverse("admin:mlx_serving_servedmodel_change", args=[served.pk])))
    for name in ("load", "unload", "reload"):
        assert reverse("admin:mlx_serving_servedmodel_command", args=[served.pk, name]) in page
    command(admin_client, served, "unload")
    served.refresh_from_db()
    assert not served.wanted
    entry = LogEntry.objects.latest("pk")
    assert (entry.user, entry.object_id, entry.get_change_message()) == (admin_user, str(served.pk), "Asked to unload.")


def test_a_button_needs_post(admin_client: Client) -> None:
    served = model()
    response = admin_client.get(reverse("admin:mlx_serving_servedmodel_command", args=[served.pk, "unload"]))
    assert response.status_code == 405


def test_a_button_needs_permission(client: Client, staff: User) -> None:
    served = model()
    permit(staff, "view_servedmodel")
    assert command(client, served, "unload").status_code == 403
    permit(staff, "change_servedmodel")
    assert command(client, served, "unload").status_code == 302
    assert not ServedModel.objects.get().wanted


def test_who_may_only_look_gets_no_buttons(client: Client, staff: User) -> None:
    served = model()
    permit(staff, "view_servedmodel")
    page = text(client.get(reverse("admin:mlx_serving_servedmodel_change", args=[served.pk])))
    assert "/command/" not in page


def test_a_button_needs_the_csrf_token(admin_user: User) -> None:
    client = Client(enforce_csrf_checks=True)
    client.force_login(admin_user)
    served = model()
    assert command(client, served, "unload").status_code == 403


def test_an_unknown_command_does_nothing(admin_client: Client) -> None:
    served = model()
    assert command(admin_client, served, "explode").status_code == 404
    assert LogEntry.objects.count() == 0


def test_a_model_can_be_deleted_with_its_workers(admin_client: Client) -> None:
    served = model()
    worker(served)
    url = reverse("admin:mlx_serving_servedmodel_delete", args=[served.pk])
    assert "Are you sure" in text(admin_client.get(url))
    admin_client.post(url, {"post": "yes"})
    assert (ServedModel.objects.count(), Worker.objects.count()) == (0, 0)


# --- workers ---------------------------------------------------------------------------------------------------------


def test_a_workers_page_shows_everything(admin_client: Client) -> None:
    worker(
        model(),
        pid=4711,
        kv_bytes=2048,
        step_ms=12.34,
        last_error="ouch",
        info={"device": "CPU"},
        load={"steps_total": 99},
        heartbeat_at=timezone.now() - timedelta(seconds=5),
    )
    page = text(admin_client.get(reverse("admin:mlx_serving_worker_change", args=["w1"])))
    for shown in (
        "4711",
        "2.0 KiB",
        "12.3 ms",
        "ouch",
        "&quot;device&quot;: &quot;CPU&quot;",
        "steps_total",
        "seconds ago",
    ):
        assert shown in page


def test_nobody_adds_changes_or_deletes_workers(admin_client: Client) -> None:
    worker(model())
    assert admin_client.get(reverse("admin:mlx_serving_worker_add")).status_code == 403
    assert (
        admin_client.post(reverse("admin:mlx_serving_worker_delete", args=["w1"]), {"post": "yes"}).status_code == 403
    )
    change = admin_client.post(reverse("admin:mlx_serving_worker_change", args=["w1"]), {"state": "stopped"})
    assert change.status_code == 403
    assert Worker.objects.get().state == "ready"


# --- flags -----------------------------------------------------------------------------------------------------------


def test_the_page_has_one_row_for_each_flag_in_the_code(admin_client: Client) -> None:
    FeatureFlag.objects.create(name="of_an_older_version", enabled=True)
    page = text(admin_client.get(FLAGS))
    shown = re.findall(r'<th scope="row">(\w+)', page)
    assert sorted(shown) == sorted(flags.FLAGS)
    assert shown[0] == flags.KILL_SWITCH
    for flag in flags.FLAGS.values():
        assert flag.env in page
        assert flag.off_means in page


def test_setting_a_flag_takes_effect_and_is_logged(admin_client: Client, admin_user: User) -> None:
    set_flag(admin_client, "connection_pool", "off")
    assert not flags.enabled("connection_pool")
    entry = LogEntry.objects.get()
    assert (entry.user, entry.object_repr, entry.get_change_message()) == (
        admin_user,
        "connection_pool",
        "connection_pool: off",
    )
    page = text(admin_client.get(FLAGS))
    assert "database" in page


@pytest.mark.parametrize(("choice", "stored"), [("on", True), ("off", False), ("unset", None)])
def test_a_flag_is_on_off_or_unset(admin_client: Client, choice: str, stored: bool | None) -> None:
    FeatureFlag.objects.create(name="connection_pool", enabled=not stored)
    set_flag(admin_client, "connection_pool", choice)
    assert FeatureFlag.objects.get().enabled is stored


def test_the_kill_switch_shows_in_every_row(admin_client: Client) -> None:
    set_flag(admin_client, flags.KILL_SWITCH, "on")
    page = text(admin_client.get(FLAGS))
    assert page.count("<td>kill switch</td>") == len(flags.FLAGS) - 1
    assert "mlx-alarm" in page


def test_a_flag_set_by_the_environment_is_locked(admin_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(POOL.env, "1")
    page = text(admin_client.get(FLAGS))
    assert "locked by the environment" in page
    assert reverse("admin:mlx_serving_featureflag_set", args=["connection_pool", "off"]) not in page
    set_flag(admin_client, "connection_pool", "off")
    assert FeatureFlag.objects.count() == 0
    assert LogEntry.objects.count() == 0


@pytest.mark.parametrize(("name", "choice"), [("no_such_flag", "on"), ("connection_pool", "maybe")])
def test_what_does_not_exist_cannot_be_set(admin_client: Client, name: str, choice: str) -> None:
    assert set_flag(admin_client, name, choice).status_code == 404
    assert FeatureFlag.objects.count() == 0


def test_setting_a_flag_needs_permission(client: Client, staff: User) -> None:
    assert client.get(FLAGS).status_code == 403
    permit(staff, "view_featureflag")
    assert "<button" not in text(client.get(FLAGS)).partition('id="content-main"')[2]
    assert set_flag(client, "connection_pool", "off").status_code == 403
    permit(staff, "change_featureflag")
    assert set_flag(client, "connection_pool", "off").status_code == 302
    assert FeatureFlag.objects.get().enabled is False


def test_setting_a_flag_needs_post_and_the_csrf_token(admin_user: User) -> None:
    client = Client(enforce_csrf_checks=True)
    client.force_login(admin_user)
    assert set_flag(client, "connection_pool", "off").status_code == 403
    url = reverse("admin:mlx_serving_featureflag_set", args=["connection_pool", "off"])
    assert client.get(url).status_code == 405
    assert FeatureFlag.objects.count() == 0


def test_a_log_entrys_link_leads_to_the_page(admin_client: Client) -> None:
    set_flag(admin_client, "connection_pool", "off")
    link = LogEntry.objects.get().get_admin_url()
    assert link is not None
    assert admin_client.get(link).headers["Location"] == FLAGS


def test_the_index_leads_to_all_three_pages(admin_client: Client) -> None:
    page = text(admin_client.get(reverse("admin:index")))
    for url in (MODELS, WORKERS, FLAGS):
        assert f'href="{url}"' in page


@pytest.mark.parametrize("url", [MODELS, WORKERS, FLAGS])
def test_no_page_has_inline_style_or_script(admin_client: Client, url: str) -> None:
    worker(model())
    page = text(admin_client.get(url)).partition('id="content-main"')[2]
    assert re.search(r'<script>|<style| style="| on\w+="', page) is None


# --- how things are shown --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536 * 1024**2, "1.5 GiB"), (5000 * 1024**4, "5000.0 TiB")],
)
def test_sizes(size: int, shown: str) -> None:
    assert human_bytes(size) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(1, "1 second ago"), (59, "59 seconds ago"), (60, "1 minute ago"), (7200, "2 hours ago"), (90000, "1 day ago")],
)
def test_ages(seconds: int, shown: str) -> None:
    now = timezone.now()
    assert human_age(now - timedelta(seconds=seconds), now) == shown


def test_a_badge_escapes_its_label() -> None:
    assert "<b>" not in badge("ready", "<b>")


@pytest.mark.parametrize(
    ("states", "told"),
    [
        ([], None),
        (["failed"], "failed"),
        (["failed", "ready"], "ready"),
        (["loading", "ready", "stopped"], "ready"),
        (["loading", "draining"], "loading"),
        (["stopped", "failed"], "stopped"),
    ],
)
def test_the_worker_that_says_most(states: list[str], told: str | None) -> None:
    found = telling([Worker(state=state) for state in states])
    assert (found.state if found else None) == told
