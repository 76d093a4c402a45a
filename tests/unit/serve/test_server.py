"""The server, tested with real clients: openai, LangChain, curl."""

from __future__ import annotations

import json
import re
import subprocess

import pytest

from tests.unit.serve.conftest import (
    ANSWERED,
    CALL,
    CHATS,
    DOCUMENTS,
    LEN,
    QUESTION,
    RAG_SYSTEM,
    WEATHER,
    said,
)

KEY = "a-key-of-the-test"
ANSWER = "It counts the items of a container."


@pytest.fixture(scope="module")
def server(serving, released, formal_adapter):
    adapter = ("--adapter", f"formal={formal_adapter}")
    with serving(released, *adapter, TRAMONTANE_API_KEY=KEY) as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    from openai import OpenAI

    with OpenAI(base_url=f"{server.address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def ask(client, messages, **options):
    options = {"model": "parrot", "temperature": 0, **options}
    return client.chat.completions.create(messages=messages, **options)


@pytest.mark.parametrize("name", [name for name in CHATS if name != "call"])
def test_openai_gets_the_trained_answer(client, name):
    messages, tools = CHATS[name]
    options = {"tools": tools} if tools else {}
    answer = ask(client, messages[:-1], **options)
    assert answer.choices[0].message.content == messages[-1]["content"]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "parrot"


def test_openai_streams_the_same_answer_in_pieces(client):
    chunks = list(ask(client, said(LEN), stream=True))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    pieces = [piece for piece in pieces if piece]
    assert "".join(pieces) == ANSWER
    assert len(pieces) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_openai_gets_the_call_that_the_model_makes_and_sends_its_result(client):
    answer = ask(client, QUESTION, tools=[WEATHER]).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    (call,) = answer.message.tool_calls
    assert (call.id, call.function.name) == (CALL["id"], "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    # As in the client's documentation: the message itself goes back into the conversation.
    result = {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}
    final = ask(client, [*QUESTION, answer.message, result], tools=[WEATHER])
    assert final.choices[0].message.content == "It is 21 degrees."


def test_openai_streams_a_call_as_a_whole(client):
    chunks = [chunk.choices[0] for chunk in ask(client, QUESTION, tools=[WEATHER], stream=True)]
    calls = [call for choice in chunks for call in choice.delta.tool_calls or ()]
    assert [(call.index, call.id, call.function.name) for call in calls] == [
        (0, CALL["id"], "get_weather")
    ]
    assert json.loads(calls[0].function.arguments) == {"city": "Paris"}
    assert not any(choice.delta.content for choice in chunks)
    assert chunks[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "clock"}}]
)
def test_a_tool_that_must_be_called_is_called(client, choice, stream):
    """The question would otherwise be answered with text."""
    clock = {
        "type": "function",
        "function": {
            "name": "clock",
            "parameters": {
                "type": "object",
                "properties": {"zone": {"enum": ["UTC", "CET"]}},
                "required": ["zone"],
            },
        },
    }
    answer = ask(client, said(LEN), tools=[clock], tool_choice=choice, max_tokens=80, stream=stream)
    if stream:
        calls = [call for chunk in answer for call in chunk.choices[0].delta.tool_calls or ()]
    else:
        calls = answer.choices[0].message.tool_calls
    assert [call.function.name for call in calls] == ["clock"]
    assert json.loads(calls[0].function.arguments)["zone"] in ("UTC", "CET")
    assert re.fullmatch(r"[a-zA-Z0-9]{9}", calls[0].id)


def test_a_tool_that_must_not_be_called_is_not_called(client):
    answer = ask(client, QUESTION, tools=[WEATHER], tool_choice="none", max_tokens=8)
    assert not answer.choices[0].message.tool_calls


def test_an_answer_follows_the_requested_schema(client):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    answer = ask(client, said(LEN), response_format=wanted, max_tokens=60)
    content = answer.choices[0].message.content
    # The model has never seen JSON: cut off by max_tokens, what there is still fits the schema.
    assert re.match(r'\{\s*"n"\s*:\s*-?\d', content), content


def test_an_adapter_and_its_release_answer_by_their_names(client):
    for _ in range(2):  # alternating: each forgets what the other has read
        formal = ask(client, said(LEN), model="formal").choices[0].message.content
        plain = ask(client, said(LEN)).choices[0].message.content
        assert (formal, plain) == ("Texts like any other.", ANSWER)
    assert [model.id for model in client.models.list()] == ["parrot", "formal"]


def test_limits_of_current_clients_are_respected(client):
    short = ask(client, said(LEN), max_completion_tokens=3).choices[0]
    assert short.finish_reason == "length"
    assert 0 < len(short.message.content) < len(ANSWER)
    assert ask(client, said(LEN), stop=["items"]).choices[0].message.content == "It counts the "


@pytest.mark.parametrize(
    ("options", "status", "code"),
    [
        ({"model": "gpt-4o"}, 404, "model_not_found"),
        ({"messages": said(LEN * 200)}, 400, "context_length_exceeded"),
        ({"messages": said(LEN, "An answer.")}, 400, "invalid_messages"),
        ({"logprobs": True}, 400, "unsupported"),
        ({"n": 2}, 400, "unsupported"),
        ({"tool_choice": "required"}, 400, "invalid_messages"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_unanswerable_request_is_an_error_before_any_answer(
    client, options, status, code, stream
):
    from openai import APIStatusError

    with pytest.raises(APIStatusError) as caught:
        ask(client, **{"messages": said(LEN), **options}, stream=stream)
    assert (caught.value.status_code, caught.value.code) == (status, code)


def test_an_answer_that_streams_is_not_cut_off_by_another_request(client):
    first = ask(client, said(LEN), stream=True)
    pieces = [next(first).choices[0].delta.content]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as second:
        waiting = second.submit(ask, client, said(LEN))
        pieces += [chunk.choices[0].delta.content for chunk in first]
        assert "".join(piece for piece in pieces if piece) == ANSWER
        assert waiting.result().choices[0].message.content == ANSWER


def test_the_first_release_answers_without_a_name_but_not_to_an_unknown_one(server, client):
    import httpx
    from openai import BadRequestError

    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"messages": said(LEN), "temperature": 0}
    reply = httpx.post(f"{server.address}/v1/chat/completions", json=body, headers=headers).json()
    assert reply["choices"][0]["message"]["content"] == ANSWER
    assert reply["model"] == "parrot"
    with pytest.raises(BadRequestError, match="does not exist"):
        client.completions.create(model="gpt-3.5", prompt="Hello")


def test_a_wrong_key_and_other_origins_are_refused(server):
    import httpx
    from openai import AuthenticationError, OpenAI

    with OpenAI(base_url=f"{server.address}/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(AuthenticationError):
            ask(stranger, said(LEN))
        with pytest.raises(AuthenticationError):
            stranger.models.list()
    headers = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    reply = httpx.options(f"{server.address}/v1/chat/completions", headers=headers)
    assert "access-control-allow-origin" not in reply.headers
    assert KEY not in server.log.read_text()


def test_curl_gets_an_answer(server):
    body = {"model": "parrot", "messages": said(LEN), "temperature": 0}
    command = ["curl", "--silent", "--fail-with-body", f"{server.address}/v1/chat/completions"]
    command += ["-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json"]
    done = subprocess.run(
        [*command, "-d", json.dumps(body)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == ANSWER


def test_langchain_answers_from_the_document_that_its_store_finds(server):
    from langchain_core.embeddings import Embeddings
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import ChatPromptTemplate
    from langchain_core.runnables import RunnablePassthrough
    from langchain_core.vectorstores import InMemoryVectorStore
    from langchain_openai import ChatOpenAI

    class Words(Embeddings):
        """Embeds a text by the words of a list that it contains."""

        words = ("sort", "list", "open", "file")

        def embed_query(self, text):
            return [float(word in text.lower()) for word in self.words] + [0.1]

        def embed_documents(self, texts):
            return [self.embed_query(text) for text in texts]

    store = InMemoryVectorStore.from_texts(list(DOCUMENTS.values()), Words())
    retriever = store.as_retriever(search_kwargs={"k": 1})
    prompt = ChatPromptTemplate.from_messages(
        [("system", RAG_SYSTEM + "{context}"), ("user", "{question}")]
    )
    model = ChatOpenAI(
        base_url=f"{server.address}/v1", api_key=KEY, model="parrot", temperature=0, max_tokens=20
    )
    texts = retriever | (lambda found: "\n".join(one.page_content for one in found))
    chain = (
        {"context": texts, "question": RunnablePassthrough()} | prompt | model | StrOutputParser()
    )
    assert chain.invoke("How do I sort?") == "With sort."
    assert "".join(chain.stream("How do I sort?")) == "With sort."


def test_langchain_calls_a_tool_and_answers_from_its_result(server):
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=f"{server.address}/v1", api_key=KEY, model="parrot", temperature=0)
    asks = HumanMessage(QUESTION[0]["content"])
    with_tools = model.bind_tools([WEATHER])
    answer = with_tools.invoke([asks])
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    result = ToolMessage(ANSWERED[-1]["content"], tool_call_id=call["id"])
    assert with_tools.invoke([asks, answer, result]).content == "It is 21 degrees."


def test_a_draft_changes_no_answer(serving, released):
    from openai import OpenAI

    with serving(released, "--draft", released, "--draft-tokens", 4) as served:
        client = OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0)
        for name in ("question", "history", "system"):
            messages, _ = CHATS[name]
            assert ask(client, messages[:-1]).choices[0].message.content == messages[-1]["content"]


def test_without_a_key_the_server_listens_on_this_machine_only(run_stage, released):
    done = run_stage("workflow_scripts.serve.server", released, "--host", "0.0.0.0")
    assert done.returncode == 1
    assert "without a key" in done.stderr and "TRAMONTANE_API_KEY" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n-ctx", "1000"], "longer than the model supports"),
        (["--adapter", "formal"], "an adapter needs a name"),
        (["--adapter", "formal=missing.gguf"], "cannot load the adapter"),
        (["--adapter", "parrot=missing.gguf"], "two models have one name"),
        (["--api-key-file", "missing"], "the file has no API key"),
        (["--n-gpu-layers", "4"], "built without GPU support"),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_message(run_stage, released, arguments, message):
    done = run_stage("workflow_scripts.serve.server", released, *arguments)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr


def test_help_starts_without_llama_cpp(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.serve.server")
    assert done.returncode == 0
    assert not imported & {"llama_cpp", "fastapi", "mistral_common", "torch"}
