"""The HTTP interface: routes, their OpenAPI page, and the door that every request passes."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from defuse_core.artifacts import F32
from services.serving.body import (
    FORM_TYPE,
    IMAGE_TYPES,
    JSON_TYPE,
    content_type,
    decoded,
    read_body,
    uploaded,
)
from services.serving.inputs import Expected, Refused
from services.serving.metrics import metrics_page
from services.serving.model_page import ModelPage, model_page

if TYPE_CHECKING:
    from services.serving.server import Server

OPEN_ROUTES = ("/healthz", "/readyz")
INLINE_BYTES, INLINE_PIXELS = 32_768, 65_536  # up to here decoding costs less than handing it to a thread


class ScenarioHit(BaseModel):
    scenario: int = Field(description="index among the components that the run found")
    name: str
    fixed: bool = Field(description="whether this version is right there")
    distance: float = Field(description="Mahalanobis distance from the codes of the scenario's own pictures")
    nearer_share: float = Field(description="share of the training images that are nearer still")


class Prediction(BaseModel):
    label: int = Field(alias="class", description="index of the most probable class")
    name: str = Field(description="its name")
    probabilities: list[float] = Field(description="one per class")
    scenarios: list[ScenarioHit] | None = Field(
        description="known failure scenarios that the image lies in, deepest first; null without the watch"
    )


class Predictions(BaseModel):
    version: str = Field(description="the model version that answered")
    predictions: list[Prediction] = Field(description="one per image, in the order sent")


class Trouble(BaseModel):
    error: str = Field(description="one sentence: what was expected and what was found")


class State(BaseModel):
    status: str


_ANSWER: Any = {"schema": {"$ref": "#/components/schemas/Trouble"}}
_TROUBLE: Any = {"application/json": _ANSWER}
_BUSY: Any = {
    "description": "Too busy, or no version in production; Retry-After tells when to come again",
    "content": {**_TROUBLE, "text/plain": {"schema": {"type": "string"}}},
}


def _refusals(**sentences: str) -> dict[int | str, dict[str, Any]]:
    return {int(code[1:]): {"model": Trouble, "description": text} for code, text in sentences.items()}


_AUTH = _refusals(_401="The bearer token is missing or wrong")
_BAD = _refusals(
    _400="The body is broken",
    _408="The body took too long to arrive",
    _413="The body, a picture or the number of images is too large",
    _415="A content type that is not taken",
    _422="Well-formed, but not an image that the classifier takes",
    _500="The classifier failed on this input",
)


def _nested(depth: int) -> dict[str, Any]:
    """Return the schema of numbers from 0 to 1 in so many lists."""
    if not depth:
        return {"type": "number", "minimum": 0, "maximum": 1}
    return {"type": "array", "minItems": 1, "items": _nested(depth - 1)}


_PIXELS: Any = {
    "type": "object",
    "required": ["pixels"],
    "additionalProperties": False,
    "properties": {
        "pixels": {
            "anyOf": [_nested(2), _nested(3), _nested(4)],
            "description": "a grey image as height x width numbers from 0 to 1, any image as channels x height x "
            "width, or a list of images as the latter",
        }
    },
}
_FORM: Any = {
    "type": "object",
    "required": ["image"],
    "additionalProperties": False,
    "properties": {
        "image": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}
    },
}
_BODY: Any = {
    "requestBody": {
        "required": True,
        "content": {
            JSON_TYPE: {"schema": _PIXELS},
            FORM_TYPE: {"schema": _FORM},
            **{kind: {"schema": {"type": "string", "format": "binary"}} for kind in IMAGE_TYPES},
        },
    },
    "parameters": [
        {
            "name": "X-Request-Key",
            "in": "header",
            "required": False,
            "schema": {"type": "string", "maxLength": 200},
            "description": "requests with the same key are answered by the same side of a canary",
        }
    ],
}


def build_api(server: Server) -> FastAPI:
    """Return the application of one replica."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with server.following():
            yield

    api = FastAPI(title="Defuse", summary="A corrected image classifier.", version="1", lifespan=lifespan)
    api.add_exception_handler(Refused, _refused_handler(server))
    api.add_exception_handler(HTTPException, _no_such_route)
    api.add_middleware(Door, token=server.token)
    limit = int(server.settings.max_body_mb * 1e6)

    async def predict(request: Request) -> Response:
        kind = content_type(request)
        body = await read_body(request, limit, server.settings.timeout_s)
        expected = server.expected()
        files = await uploaded(request, body, expected.max_images) if kind == FORM_TYPE else [body]
        pixels = await decoded_soon(server, kind, files, expected)
        key = request.headers.get("x-request-key")
        answer = await server.predict(
            pixels, key.encode() if key is not None else hashlib.sha256(body).digest()
        )
        return Response(json.dumps(answer, separators=(",", ":"), ensure_ascii=False), media_type=JSON_TYPE)

    async def model() -> ModelPage:
        return model_page(server)

    async def healthz() -> State:
        return State(status="ok")

    async def readyz() -> State:
        server.expected()
        return State(status="ready")

    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(await metrics_page(), media_type="text/plain; version=0.0.4")

    busy: dict[int | str, dict[str, Any]] = {503: _BUSY}
    api.post(
        "/v1/predict",
        response_model=Predictions,
        openapi_extra=_BODY,
        responses={**_AUTH, **_BAD, **busy},
        summary="Classify one image or several",
    )(predict)
    api.get("/v1/model", responses={**_AUTH, **busy}, summary="What answers, and what is known of it")(model)
    api.get("/healthz", summary="Is this process alive?")(healthz)
    api.get("/readyz", responses=busy, summary="Is a version loaded and warm?")(readyz)
    api.get("/metrics", response_class=PlainTextResponse, responses=_AUTH, summary="Metrics for Prometheus")(
        metrics
    )
    return api


async def decoded_soon(server: Server, kind: str, files: list[bytes], expected: Expected) -> F32:
    """Return the pixels: at once where that is quick, otherwise from the thread that decodes. Raises Refused."""
    quick = replace(expected, max_pixels=min(expected.max_pixels, INLINE_PIXELS))
    if sum(map(len, files)) <= INLINE_BYTES:
        try:
            return decoded(kind, files, quick)
        except Refused as refused:
            if refused.status != 413 or quick == expected:
                raise
    return await server.decode(kind, files, expected)


def _refused_handler(server: Server) -> Any:
    async def answer(_: Request, refused: Exception) -> JSONResponse:
        assert isinstance(refused, Refused)
        server.meters.refused.inc(1, {"status": str(refused.status)})
        wait = refused.retry_after_s
        headers = {"Retry-After": str(wait)} if wait is not None else None
        return JSONResponse({"error": refused.sentence}, refused.status, headers)

    return answer


async def _no_such_route(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


class Door:
    """Lets nobody in without the token, if there is one, except to ask for health."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self.app = app
        self.expected = f"Bearer {token}".encode() if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._may_enter(scope):
            await self.app(scope, receive, send)
            return
        sentence = "send the header Authorization: Bearer TOKEN with the token of this server"
        refusal = JSONResponse({"error": sentence}, 401, {"WWW-Authenticate": "Bearer"})
        await refusal(scope, receive, send)

    def _may_enter(self, scope: Scope) -> bool:
        if self.expected is None or scope["path"].removeprefix(scope.get("root_path", "")) in OPEN_ROUTES:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(hashlib.sha256(given).digest(), hashlib.sha256(self.expected).digest())
