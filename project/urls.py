"""URLs of the demo site."""

from django.contrib import admin
from django.urls import include, path

from .views import ChatPage

urlpatterns = [
    path("", ChatPage.as_view(), name="chat"),
    path("admin/", admin.site.urls),
    path("", include("mlx_serving.urls")),
]
