"""The app's settings: defaults, the site's values, the environment."""

from pathlib import Path
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured

from mlx_serving.conf import Settings, build, default_runtime_dir, settings


def test_without_values_the_defaults_hold() -> None:
    assert build({}, {}) == Settings()


def test_the_site_sets_values() -> None:
    built = build({"MAX_ROWS": 4, "FLAGS": {"connection_pool": False}}, {})
    assert (built.MAX_ROWS, built.FLAGS) == (4, {"connection_pool": False})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("MAX_ROWS", "7", 7),
        ("HEARTBEAT_S", "0.5", 0.5),
        ("ALLOW_ANONYMOUS", "true", True),
        ("ALLOW_ANONYMOUS", "0", False),
        ("HOST", "a", "a"),
        ("FLAGS", '{"connection_pool": false}', {"connection_pool": False}),
    ],
)
def test_the_environment_wins_over_the_site(name: str, text: str, value: Any) -> None:
    site = {name: getattr(Settings(), name)}
    assert getattr(build(site, {f"MLX_SERVING_{name}": text}), name) == value


@pytest.mark.parametrize(
    ("values", "environ", "named"),
    [
        ({"MAX_ROW": 1}, {}, "MAX_ROW"),
        ({"MAX_ROWS": "4"}, {}, "MAX_ROWS"),
        ({"MAX_ROWS": 1.5}, {}, "MAX_ROWS"),
        ({"ALLOW_ANONYMOUS": 1}, {}, "ALLOW_ANONYMOUS"),
        ({"FLAGS": {"connection_pool": "yes"}}, {}, "FLAGS"),
        ({}, {"MLX_SERVING_MAX_ROWS": "many"}, "MAX_ROWS"),
        ({}, {"MLX_SERVING_FLAGS": "not json"}, "FLAGS"),
    ],
)
def test_what_cannot_be_used_is_named(values: dict[str, Any], environ: dict[str, str], named: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=named):
        build(values, environ)


def test_override_settings_gives_new_values(settings: Any) -> None:
    settings.MLX_SERVING = {"MAX_ROWS": 3}
    assert current().MAX_ROWS == 3
    settings.MLX_SERVING = {"MAX_ROWS": 5}
    assert current().MAX_ROWS == 5


def current() -> Settings:
    return settings()


@pytest.mark.parametrize("base", ["/run/user/1000", "/private/var/folders/zz/zyxvpxvq6csfxvn_n0000000000000/T/deep"])
def test_the_default_folder_leaves_room_for_a_sockets_name(monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", base)
    path = Path(default_runtime_dir())
    assert path.is_absolute()
    assert len(str(path)) < 80
