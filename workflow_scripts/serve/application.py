"""llama-cpp-python's server, with our models and prompts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from llama_cpp.server import app as library
from llama_cpp.server.settings import ServerSettings
from starlette.concurrency import run_in_threadpool

from workflow_scripts.serve.loaded_models import Models
from workflow_scripts.serve.requests import ChatRequest, refusal

CHATS = "/v1/chat/completions"


def application(served: Models, api_key: str | None) -> FastAPI:
    """The library's server, with changes where it would answer unlike the trained model:

    - `prompts` checks and renders chats; answers use the model's own tool format;
    - it accepts what current clients send: `max_completion_tokens`, a null `content` next to tool
      calls, the role `developer`, a `json_schema`;
    - sampling defaults to the release's (no repetition penalty, which OpenAI clients cannot turn
      off);
    - an unknown model name is an error and does not select another model;
    - a new request waits for its turn and does not cut off an answer that streams;
    - pages of other origins are refused (CORS).

    The models are closed when the server ends.
    """
    library.set_server_settings(ServerSettings(api_key=api_key, interrupt_requests=False))
    # The library's proxy holds one model at a time; ours has the same methods, not its class.
    library._llama_proxy = served  # type: ignore[assignment]
    chats = APIRouter()

    @chats.post(
        CHATS,
        dependencies=[Depends(library.authenticate)],
        response_model=None,
    )
    async def create_chat_completion(request: Request, body: ChatRequest) -> Any:
        refused = await run_in_threadpool(refusal, body, served)
        if refused is not None:
            return refused
        body.model = body.model or served.default  # otherwise the answer would name a path
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
