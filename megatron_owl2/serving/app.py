"""Routes of the server: the API, health, metrics, and the page."""

import time
from importlib import resources

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from megatron_owl2.serving.api_error import ApiError
from megatron_owl2.serving.chat import ChatEndpoint, error_response
from megatron_owl2.serving.service import Service

# Nothing of the page comes from elsewhere, and nothing inline runs.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_PAGE = {
    "/": ("index.html", "text/html"),
    "/chat.js": ("chat.js", "text/javascript"),
    "/chat.css": ("chat.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


def build_app(service: Service) -> Starlette:
    """The ASGI application of a service."""
    started = int(time.time())
    limits = service.limits

    async def models(request: Request) -> Response:
        model = {"id": service.name, "object": "model", "created": started, "owned_by": "owl2"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(request: Request) -> Response:
        reason = service.why_unhealthy()
        return JSONResponse({"status": reason or "ok"}, 503 if reason else 200)

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def page_limits(request: Request) -> Response:
        told = {
            "max_images": limits.max_images,
            "max_image_bytes": limits.max_image_bytes,
            "max_tokens": limits.max_tokens,
        }
        return JSONResponse({"model": service.name, **told})

    routes = [
        Route("/v1/chat/completions", ChatEndpoint(service), methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/limits", page_limits),
        *(_file_route(path, *entry) for path, entry in _PAGE.items()),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _refuse, 500: _fail})


def _file_route(path: str, name: str, kind: str) -> Route:
    content = (resources.files("megatron_owl2.serving") / "page" / name).read_bytes()

    async def file(request: Request) -> Response:
        return Response(content, media_type=kind, headers=_PAGE_HEADERS)

    return Route(path, file)


async def _refuse(request: Request, error: Exception) -> Response:
    """Paths and methods that there are not, in the form of all errors."""
    assert isinstance(error, HTTPException)
    message = f"{request.method[:16]} {request.url.path[:200]}: {error.detail}"
    return error_response(ApiError(error.status_code, message, headers=error.headers))


async def _fail(request: Request, error: Exception) -> Response:
    return error_response(ApiError(500, "the server failed; see its log"))
