"""The page and the few addresses behind it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.learned import needs_training
from ..core.mixins import Companion
from ..core.registry import list_methods, method_class
from .models import Shelf
from .showing import Wanted, show
from .uploads import MOST_BYTES, Refused, decode, read_body

PAGE = Path(__file__).with_name("page")
MOST_METHODS = 2
HOSTS = ("127.0.0.1", "localhost", "[::1]", "testserver")


def create_app(shelf: Shelf, samples: Mapping[str, bytes] | None = None, hosts: tuple[str, ...] = HOSTS) -> Any:
    """The application; run it with uvicorn, or mount it into one of your own.

    Args:
        shelf: the models.
        samples: images to choose from, by name, as encoded bytes.
        hosts: names by which the page may be asked for; others are turned away, so that no foreign page reaches it.

    Returns:
        A FastAPI application.

    Raises:
        ImportError: fastapi is missing.
    """
    try:
        from fastapi import FastAPI, Request
        from fastapi.concurrency import run_in_threadpool
        from fastapi.responses import JSONResponse, Response
        from fastapi.staticfiles import StaticFiles
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    except ImportError as error:
        raise ImportError("the page needs fastapi and uvicorn: pip install 'tokenzoo[serve]'") from error
    samples = dict(samples or {})
    app = FastAPI(title="tokenzoo", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    async def refused(request: Request, error: Refused) -> JSONResponse:
        return JSONResponse({"error": str(error)}, status_code=error.status)

    async def about() -> dict[str, Any]:
        return {
            "methods": methods_shown(), "models": list(shelf.given), "samples": list(samples), "most_bytes": MOST_BYTES,
        }  # fmt: skip

    async def sample(name: str) -> Response:
        if name not in samples:
            raise Refused(404, f"There is no sample called {name[:80]!r}.")
        return Response(samples[name], media_type="image/jpeg")

    async def run(request: Request) -> JSONResponse:
        data = await read_body(request.stream(), request.headers.get("content-length"))
        query = request.query_params
        wanted = read_wanted(query.getlist("method"), query.getlist("share"))

        def work() -> dict[str, Any]:
            image = decode(data)
            return show(shelf.get(query.get("model") or next(iter(shelf.given), "")), image, wanted)

        return JSONResponse(await run_in_threadpool(work))

    app.add_exception_handler(Refused, refused)
    app.add_api_route("/api/about", about, methods=["GET"], response_model=None)
    app.add_api_route("/api/sample/{name}", sample, methods=["GET"], response_model=None)
    app.add_api_route("/api/run", run, methods=["POST"], response_model=None)
    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app


def methods_shown() -> list[dict[str, str]]:
    """Registered methods that stand alone and need no training."""
    classes = [method_class(name) for name in list_methods()]
    alone = [cls for cls in classes if not needs_training(cls) and not issubclass(cls, Companion)]
    return [{"name": cls.name, "kind": cls.kind, "source": cls.source, "summary": _summary(cls)} for cls in alone]


def read_wanted(names: list[str], shares: list[str]) -> list[Wanted]:
    """Methods and shares of a request, paired in order.

    Raises:
        Refused: 422 for none or too many, a name that is unknown, or a share outside of 0.05 to 1.
    """
    if not 1 <= len(names) == len(shares) <= MOST_METHODS:
        raise Refused(422, f"Give one or {MOST_METHODS} methods, each with a share of the multiply-adds.")
    wanted = []
    for name, text in zip(names, shares):
        if name not in list_methods():
            raise Refused(422, f"There is no method called {name[:80]!r}.")
        try:
            share = float(text)
        except ValueError:
            share = math.nan
        if not 0.05 <= share <= 1:
            raise Refused(422, f"The share {text[:20]!r} is not a number from 0.05 to 1.")
        wanted.append(Wanted(name, share))
    return wanted


def _summary(cls: type) -> str:
    return " ".join((cls.__doc__ or "").split("\n\n")[0].split())
