"""llama-cpp-python's server over our models."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from llama_cpp.server import app as library
from llama_cpp.server.settings import ServerSettings
from starlette.concurrency import run_in_threadpool

from workflow_scripts.serve.loaded_models import Models
from workflow_scripts.serve.requests import ChatRequest, refusal, refused

CHATS = "/v1/chat/completions"


def application(served: Models, api_key: str | None) -> FastAPI:
    """The library's server, changed where it would answer otherwise than the model was trained to:

    - chats are checked and rendered by `prompts`, and answered in the model's own tool format;
    - what current clients send is understood: `max_completion_tokens`, a null `content` beside
      tool calls, the role `developer`, a `json_schema`;
    - sampling is the release's unless the request says otherwise (no repetition penalty, which
      OpenAI clients cannot turn off);
    - a name that is not served is an error, not another model;
    - a new request waits for its turn and does not cut off an answer that streams;
    - no page of another origin may ask (CORS).

    The models are closed when it ends.
    """
    library.set_server_settings(ServerSettings(api_key=api_key, interrupt_requests=False))
    # Its own proxy holds one model at a time.
    # In place of the library's own: it has the same methods, and is of no class of its.
    library._llama_proxy = served  # type: ignore[assignment]
    chats = APIRouter()

    @chats.post(
        CHATS,
        dependencies=[Depends(library.authenticate)],
        response_model=None,
    )
    async def create_chat_completion(request: Request, body: ChatRequest) -> Any:
        reason = await run_in_threadpool(refusal, body, served)
        if reason:
            return refused(reason)
        body.model = body.model or served.default  # else the answer would name a path
        return await library.create_chat_completion(request, body)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        served.close()

    program = FastAPI(title="Tramontane", lifespan=lifespan)
    program.include_router(chats)
    others = APIRouter(route_class=library.router.route_class)
    others.routes = [
        route for route in library.router.routes if getattr(route, "path", None) != CHATS
    ]
    program.include_router(others)
    return program
