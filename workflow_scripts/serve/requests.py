"""A chat request as current OpenAI clients send it, and the reasons to refuse one."""

from __future__ import annotations

from typing import Annotated, Any

from llama_cpp.llama_types import (
    ChatCompletionNamedToolChoice,
    ChatCompletionRequestResponseFormat,
    ChatCompletionTool,
)
from llama_cpp.server.types import CreateChatCompletionRequest
from pydantic import GetPydanticSchema, model_validator
from starlette.responses import JSONResponse

from workflow_scripts.chats.messages import Message
from workflow_scripts.release.modelfile import SAMPLING
from workflow_scripts.serve.completions import forced_tools
from workflow_scripts.serve.loaded_models import Models
from workflow_scripts.serve.prompts import UnusableChat

# A JSON object with any keys: mistral-common checks it when the prompt is rendered.
AsSent = GetPydanticSchema(lambda _, handler: handler(dict[str, Any]))


class ChatRequest(CreateChatCompletionRequest):
    """llama-cpp-python's request, extended to what current clients send."""

    # The library's types refuse what clients send (a null `content` next to tool calls).
    messages: list[Annotated[Message, AsSent]]  # type: ignore[assignment]
    tools: list[Annotated[ChatCompletionTool, AsSent]] | None = None
    tool_choice: str | Annotated[ChatCompletionNamedToolChoice, AsSent] | None = None  # type: ignore[assignment]
    response_format: Annotated[ChatCompletionRequestResponseFormat, AsSent] | None = None
    temperature: float = SAMPLING["temperature"]
    top_p: float = SAMPLING["top_p"]
    min_p: float = SAMPLING["min_p"]
    top_k: int = int(SAMPLING["top_k"])
    repeat_penalty: float = SAMPLING["repeat_penalty"]

    @model_validator(mode="before")
    @classmethod
    def _as_the_library_knows_it(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        # A client may send null for what it leaves to the server.
        body = {key: value for key, value in body.items() if value is not None}
        if "max_completion_tokens" in body:
            body["max_tokens"] = body.pop("max_completion_tokens")
        response_format = body.get("response_format")
        if isinstance(response_format, dict) and response_format.get("type") == "json_schema":
            schema = (response_format.get("json_schema") or {}).get("schema")
            body["response_format"] = {"type": "json_object", "schema": schema}
        return body


def refusal(body: ChatRequest, served: Models) -> JSONResponse | None:
    """The error for a request that cannot be answered, before a stream begins; None if it can."""
    if body.model is not None and body.model not in served:
        return _error(
            404,
            f"The model `{body.model}` is not served here; available: {', '.join(served)}",
            "model_not_found",
            "model",
        )
    if body.logprobs:
        return _error(400, "this server does not keep logprobs", "unsupported", "logprobs")
    if body.n not in (None, 1):
        return _error(400, "one answer per request (n=1)", "unsupported", "n")
    tools = None if body.tool_choice == "none" else body.tools
    try:
        n_tokens = len(served.prompts(body.model).render(body.messages, tools))
        forced_tools(tools, body.tool_choice)
    except UnusableChat as error:
        return _error(400, str(error), "invalid_messages", "messages")
    n_ctx = served.n_ctx(body.model)
    if n_tokens >= n_ctx:
        return _error(
            400,
            f"The prompt has {n_tokens} tokens; the context, answer included, is {n_ctx}",
            "context_length_exceeded",
            "messages",
        )
    return None


def _error(status: int, message: str, code: str, param: str) -> JSONResponse:
    """An error in OpenAI's shape."""
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return JSONResponse({"error": error}, status_code=status)
