"""The demo site's one page."""

from typing import Any

from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.views.generic import TemplateView

from mlx_serving.conf import settings


class ChatPage(TemplateView):
    """A chat that streams over the app's WebSocket."""

    template_name = "chat.html"

    def get_context_data(self, **kwargs: Any) -> dict[str, Any]:
        """Add where the page's script finds things, and questions that the demo model can answer."""
        return super().get_context_data(
            config={
                "socket": "/ws/chat/",
                "models": "/v1/models",
                "defaultModel": settings().DEFAULT_MODEL,
            },
            suggestions=[
                "How do I install mlx-serving?",
                "What is 17 + 25?",
                "Reverse the words: river stone apple",
                "Write a long guide to operating mlx-serving",
            ],
            **kwargs,
        )

    def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        """Return the page with a policy that lets it load and contact this site alone."""
        response = super().dispatch(request, *args, **kwargs)
        response.headers["Content-Security-Policy"] = (
            "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
        )
        return response
