"""The demo site's ASGI application: HTTP by Django, WebSocket by Channels."""

import os

from channels.routing import ProtocolTypeRouter
from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler
from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
django_application = get_asgi_application()

from mlx_serving.routing import websocket_application  # noqa: E402 - needs the apps that the line above loads

application = ProtocolTypeRouter(
    {
        # Serves static files without a web server in front; a site behind one passes `django_application` itself.
        "http": ASGIStaticFilesHandler(django_application),
        "websocket": websocket_application,
    }
)
