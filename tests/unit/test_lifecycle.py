"""What a person can ask of models."""

import pytest

from mlx_serving.fleet import lifecycle
from mlx_serving.models import ServedModel


@pytest.mark.parametrize("source", ["demo", "org/model", "Org-1/Model.v2_x", "/srv/models/a b"])
def test_sources(source: str) -> None:
    assert lifecycle.source_problem(source) == ""


@pytest.mark.parametrize(
    "source", ["", "model", "a/b/c", "../x", "./x", "-a/b", "org/", "/".join("ab\n"), "org/model\n"]
)
def test_what_is_no_source(source: str) -> None:
    assert lifecycle.source_problem(source)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("demo", "mlx-serving-demo"),
        ("org/model", "org/model"),
        ("/srv/models/llama", "llama"),
        ("/srv/models/llama/", "llama"),
        ("/srv/my (best) model", "my-best-model"),
    ],
)
def test_names(source: str, name: str) -> None:
    assert lifecycle.suggest_name(source) == name
    ServedModel(name=name, source=source).clean_fields()


@pytest.mark.django_db
def test_commands_say_how_many_models_they_changed() -> None:
    ServedModel.objects.create(name="on", source="demo")
    ServedModel.objects.create(name="off", source="demo", wanted=False)
    models = ServedModel.objects.all()
    assert [lifecycle.reload(models), lifecycle.load(models), lifecycle.load(models)] == [1, 1, 0]
    assert [lifecycle.unload(models), lifecycle.unload(models), lifecycle.reload(models)] == [2, 0, 0]
    assert dict(models.values_list("name", "reload_token")) == {"on": 1, "off": 0}


@pytest.mark.django_db
def test_a_command_leaves_other_columns_alone() -> None:
    model = ServedModel.objects.create(name="m", source="demo", max_rows=3)
    before = model.updated_at
    lifecycle.unload(ServedModel.objects.filter(pk=model.pk))
    model.refresh_from_db()
    assert (model.max_rows, model.source, model.updated_at > before) == (3, "demo", True)
