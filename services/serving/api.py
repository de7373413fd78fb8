"""The HTTP interface: routes, the bodies of their answers, their OpenAPI description, and the page /docs."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.routing import Route

from defuse_core.report.evidence_schema import WatchFigures
from services.serving.deployment import ClassifierDeployment
from services.serving.inputs import FORM_TYPE, IMAGE_TYPES, JSON_TYPE, content_type, uploaded_files
from services.serving.limits import HEALTH_ROUTES, BearerAuthMiddleware, Unavailable
from services.serving.model import LoadedModel, PredictionResponse
from services.serving.monitoring import metrics_page
from services.serving.registry_state import RegistryState

# The page /docs loads nothing, so that no script sees the token; FastAPI's own asks for the token, and loads a script
# from another server.
DOCS_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}


class ErrorResponse(BaseModel):
    """The body of every 4xx and 5xx answer of the application."""

    error: str = Field(description="one sentence: what was expected and what was found")


class HealthResponse(BaseModel):
    """The body of /healthz and /readyz."""

    status: str


class ScenarioInfo(BaseModel):
    """A failure scenario of the run, as GET /v1/model shows it."""

    scenario: int
    name: str
    fixed: bool = Field(description="whether accuracy_after reaches check.min_scenario_accuracy")
    judged: bool = Field(
        description="whether both accuracies are by the judges' labels; else they are by the scenario's label"
    )
    accuracy_before: float = Field(description="on images of the scenario that were not tuned on")
    accuracy_after: float
    watched_share: float = Field(
        description="share of the training images that the watch puts inside the scenario"
    )
    watched_recall: float = Field(
        description="share of the scenario's own held-out images that the watch finds"
    )


class ModelInfo(BaseModel):
    """The answer to GET /v1/model."""

    version: str
    run: str
    by: str = Field(description="who put it into production; empty if it was not promoted")
    when: str = Field(description="when it went into production; if it was not promoted, when it was checked")
    why: str
    lam: float | None = Field(description="weight of the failure scenarios in the fine-tuning")
    annotators: str = Field(description="who labelled its scenarios: people, or reference models")
    clean_split: str = Field(description="the images that clean accuracy was measured on")
    clean_accuracy_before: float
    clean_accuracy_after: float
    scenario_accuracy_before: float = Field(description="mean over the scenarios, by the scenario's label")
    scenario_accuracy_after: float
    classes: list[str]
    channels: int
    image_size: int
    resize: bool = Field(description="whether images of other sizes and colours are converted")
    watch: bool = Field(description="whether answers name the failure scenarios that contain an image")
    failures: WatchFigures = Field(description="how well failing inputs are found")
    scenarios: list[ScenarioInfo]
    failed_checks: list[str] = Field(
        description="checks that this version failed: those that its promotion was forced over; if it was not "
        "promoted, or came back by a rollback, those of `defuse check`"
    )
    canary: str | None
    canary_share: float
    shadow: str | None
    device: str
    precision: str

    @classmethod
    def of(
        cls, model: LoadedModel, state: RegistryState, canary: str | None, shadow: str | None
    ) -> ModelInfo:
        """Return the page of the version in production, with the names of the versions beside it."""
        summary, section = model.candidate.summary, model.section
        since = state.since if model.number is not None and model.number == state.production else None
        failed = None if since is None else since.failed_checks
        return cls(
            version=model.name,
            run=model.candidate.run,
            by=since.by if since else "",
            when=since.when if since else summary.made,
            why=since.why if since else "",
            lam=summary.lam,
            annotators=summary.annotators,
            clean_split=summary.clean_split,
            clean_accuracy_before=summary.clean_before,
            clean_accuracy_after=summary.clean_after,
            scenario_accuracy_before=summary.scenario_before,
            scenario_accuracy_after=summary.scenario_after,
            classes=list(model.candidate.classes),
            channels=model.input_spec.channels,
            image_size=model.input_spec.size,
            resize=model.input_spec.resize,
            watch=model.section.watch and bool(len(model.candidate.scenario)),
            failures=model.watch_figures,
            scenarios=_scenario_infos(model, section.watch_share),
            failed_checks=model.candidate.failed_checks() if failed is None else list(failed),
            canary=canary,
            canary_share=state.share if canary else 0.0,
            shadow=shadow,
            device=model.device.type,
            precision=section.precision,
        )


def _scenario_infos(model: LoadedModel, share: float) -> list[ScenarioInfo]:
    candidate = model.candidate
    return [
        ScenarioInfo(
            scenario=int(candidate.scenario[j]),
            name=name,
            fixed=bool(model.fixed[j]),
            judged=bool(candidate.judged[j]),
            accuracy_before=float(candidate.before[j]),
            accuracy_after=float(candidate.after[j]),
            watched_share=share,
            watched_recall=float(np.interp(share, candidate.levels, candidate.recall[j])),
        )
        for j, name in enumerate(model.scenario_names)
    ]


def _error_responses(descriptions: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": ErrorResponse, "description": text} for code, text in descriptions.items()}


_BUSY = _error_responses(
    {503: "Overloaded, or no version in production; Retry-After gives the seconds to wait"}
)
_BUSY[503]["content"] = {"text/plain": {"schema": {"type": "string"}}}  # an answer of Serve's
_UNAUTHORIZED = _error_responses({401: "The bearer token is missing or wrong"})
_REJECTED = _error_responses(
    {
        400: "The body is broken",
        408: "The body did not arrive in time",
        413: "The body, an image or the number of images is too large",
        415: "Unsupported content type or encoding",
        422: "Well-formed, but not an image that the classifier accepts",
        500: "The classifier failed on this input",
    }
)


def _pixel_schema(depth: int) -> dict[str, Any]:
    """Return the schema of numbers from 0 to 1 in `depth` nested lists."""
    if not depth:
        return {"type": "number", "minimum": 0, "maximum": 1}
    return {"type": "array", "minItems": 1, "items": _pixel_schema(depth - 1)}


_JSON_SCHEMA: Any = {
    "type": "object",
    "required": ["pixels"],
    "additionalProperties": False,
    "properties": {
        "pixels": {
            "anyOf": [_pixel_schema(2), _pixel_schema(3), _pixel_schema(4)],
            "description": "a grey image as height x width numbers from 0 to 1, any image as channels x height x "
            "width, or a list of images as the latter",
        }
    },
}
_FORM_SCHEMA: Any = {
    "type": "object",
    "required": ["image"],
    "additionalProperties": False,
    "properties": {
        "image": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}
    },
}
_PREDICT_SCHEMA: Any = {
    "requestBody": {
        "required": True,
        "content": {
            JSON_TYPE: {"schema": _JSON_SCHEMA},
            FORM_TYPE: {"schema": _FORM_SCHEMA},
            **{kind: {"schema": {"type": "string", "format": "binary"}} for kind in IMAGE_TYPES},
        },
    },
    "parameters": [
        {
            "name": "X-Request-Key",
            "in": "header",
            "required": False,
            "schema": {"type": "string"},
            "description": "requests with the same key are answered by the same side of a canary",
        }
    ],
}


def build_api(deployment: ClassifierDeployment) -> FastAPI:
    """Return the ASGI application of one replica."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with deployment.following_registry():
            yield

    api = FastAPI(
        title="Defuse",
        summary="A corrected image classifier.",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    _add_error_handlers(api, deployment)
    count_rejected = deployment.metrics.count_rejected
    api.add_middleware(BearerAuthMiddleware, token=deployment.token, count_rejected=count_rejected)

    async def predict(request: Request) -> Response:
        return await _answer(deployment, request)

    async def model() -> ModelInfo:
        active = deployment.current()
        names = active.names()
        return ModelInfo.of(active.in_production, active.state, names.get("canary"), names.get("shadow"))

    async def healthz() -> HealthResponse:
        return HealthResponse(status="ok")

    async def readyz() -> HealthResponse:
        deployment.current()
        return HealthResponse(status="ready")

    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(await metrics_page(), media_type="text/plain; version=0.0.4")

    async def docs(request: Request) -> HTMLResponse:
        address = request.base_url
        if request.headers.get("x-forwarded-proto") == "https":  # of a proxy that speaks TLS
            address = address.replace(scheme="https")
        return HTMLResponse(docs_page(api.openapi(), str(address)), headers=DOCS_HEADERS)

    # This route answers, without the cost of FastAPI's validation of arguments; the one below describes it.
    api.router.routes.insert(0, Route("/v1/predict", predict, methods=["POST"]))
    api.post(
        "/v1/predict",
        response_model=PredictionResponse,
        openapi_extra=_PREDICT_SCHEMA,
        responses={**_UNAUTHORIZED, **_REJECTED, **_BUSY},
        summary="Classify one image or several",
    )(predict)
    api.get("/v1/model", responses={**_UNAUTHORIZED, **_BUSY}, summary="The model in production")(model)
    api.get("/healthz", summary="Liveness: this process answers")(healthz)
    api.get("/readyz", responses=_BUSY, summary="Readiness: a version is loaded and warm")(readyz)
    for path, answer in zip(HEALTH_ROUTES, (healthz, readyz), strict=True):  # as load balancers ask
        api.head(path, include_in_schema=False)(answer)
    api.get(
        "/metrics",
        response_class=PlainTextResponse,
        responses=_UNAUTHORIZED,
        summary="Metrics for Prometheus",
    )(metrics)
    api.get("/docs", include_in_schema=False)(docs)
    if deployment.token:
        _describe_authentication(api)
    return api


def _describe_authentication(api: FastAPI) -> None:
    """Add the bearer token to the OpenAPI description, and so to the commands of its page."""
    schema = api.openapi()
    schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    schema["security"] = [{"token": []}]


def docs_page(schema: dict[str, Any], address: str) -> str:
    """Return the page /docs, the routes with a command for each, for an OpenAPI description.

    `address` is that of the server, as in http://127.0.0.1:8000.
    """
    # a replica that nobody asks for the page need not import it
    from jinja2 import Environment, PackageLoader

    made = Environment(loader=PackageLoader("services.serving"), autoescape=True, trim_blocks=True)
    page = made.get_template("docs.html.j2")
    return page.render(
        info=schema["info"],
        paths=schema["paths"],
        security=schema.get("security"),
        address=address.rstrip("/"),
    )


async def _answer(deployment: ClassifierDeployment, request: Request) -> Response:
    """Return the predictions for the images of a request. Raises HTTPException."""
    media_type = content_type(request)
    with contextlib.ExitStack() as held:  # the memory of the body, and a slot
        body = await deployment.uploads.receive(request, held)
        await deployment.slots.acquire(held)
        active = deployment.current()
        input_spec = active.in_production.input_spec
        given = request.headers.get("x-request-key")
        key = given.encode() if given is not None else hashlib.sha256(body).digest()
        files = [body]
        if media_type == FORM_TYPE:  # one after the other: the parser holds copies of the body
            async with deployment.form_parser:
                files = await uploaded_files(request, body, input_spec.max_images)
        del body  # from here on the parts are all that is held of it
        pixels = await deployment.decode(media_type, files, input_spec, held)
        del files
        answer = await deployment.predict(active, pixels, key)
    return Response(answer.model_dump_json(by_alias=True), media_type=JSON_TYPE)


def _add_error_handlers(api: FastAPI, deployment: ClassifierDeployment) -> None:
    async def handle_http_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        deployment.metrics.count_rejected(error.status_code)
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    async def handle_memory_error(request: Request, error: Exception) -> JSONResponse:
        deployment.failure_log.add("a request was not answered: out of memory", error)
        unavailable = Unavailable("this replica is out of memory")
        return await handle_http_error(request, unavailable)

    async def handle_internal_error(request: Request, error: Exception) -> JSONResponse:
        """Answer an error that nobody expected; Starlette raises it again afterwards, for the log."""
        text = f"the server failed ({type(error).__name__}); its log has the details"
        return await handle_http_error(request, HTTPException(500, text))

    api.add_exception_handler(HTTPException, handle_http_error)
    api.add_exception_handler(MemoryError, handle_memory_error)
    api.add_exception_handler(Exception, handle_internal_error)
