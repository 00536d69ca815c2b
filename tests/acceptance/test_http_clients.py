"""The packages that programs use: `openai`, `langchain-openai` and `llm`, as they are, against the running agent.

They are in an environment of their own, which `./build.sh http-test` makes: what they need is not ours. Each program
here prints one JSON document.
"""

from __future__ import annotations

import json
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import openai_schema
from tests.support.gateway import QUESTION, Gateway, running_gateway
from tests.support.processes import Daemon, clean_environment, short_folder, wait_until

pytestmark = pytest.mark.http_clients

CLIENTS = Path(__file__).parents[2] / ".tools" / "http-clients" / "bin"
MADRID = "The capital of Spain is Madrid."


@pytest.fixture(scope="module")
def gateway(agent: Daemon) -> Iterator[Gateway]:
    assert (CLIENTS / "python").exists(), "start this with ./build.sh http-test"
    with short_folder() as folder, running_gateway(agent.control_socket, folder) as running:
        yield running


def run(gateway: Gateway, program: str, **more: str) -> Any:
    """What a program prints."""
    environment = clean_environment(
        {
            "OPENAI_BASE_URL": f"http://127.0.0.1:{gateway.port}/v1",
            "OPENAI_API_KEY": "none",
            "HOME": str(gateway.socket_path.parent),
            "QUESTION": QUESTION,
            **more,
        }
    )
    command = [str(CLIENTS / "python"), "-c", textwrap.dedent(program)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


OPENAI = """
import asyncio, json, os
import openai

ASKED = dict(model="assistant", messages=[{"role": "user", "content": os.environ["QUESTION"]}])
client, other = openai.OpenAI(max_retries=0), openai.AsyncOpenAI(max_retries=0)
"""


def test_openai_whole_and_in_a_stream_synchronous_and_not(gateway: Gateway) -> None:
    found = run(
        gateway,
        OPENAI
        + textwrap.dedent("""
        def text(chunks):
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

        async def asynchronous():
            whole = await other.chat.completions.create(**ASKED)
            stream = await other.chat.completions.create(**ASKED, stream=True)
            return whole.choices[0].message.content, text([chunk async for chunk in stream])

        whole = client.chat.completions.create(**ASKED, max_completion_tokens=64, user="somebody")
        chunks = list(client.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True}))
        with client.chat.completions.stream(**ASKED) as helper:
            final = helper.get_final_completion()
        print(json.dumps({
            "texts": [whole.choices[0].message.content, text(chunks), final.choices[0].message.content,
                      *asyncio.run(asynchronous())],
            "usage": [whole.usage.completion_tokens, chunks[-1].usage.completion_tokens],
            "reasons": [whole.choices[0].finish_reason, chunks[-2].choices[0].finish_reason],
            "ids": len({chunk.id for chunk in chunks}),
        }))
        """),
    )
    assert found["texts"] == [MADRID] * 5
    assert found["usage"][0] == found["usage"][1] > 0
    assert (found["reasons"], found["ids"]) == (["stop", "stop"], 1)


def test_openais_other_calls_and_errors(gateway: Gateway) -> None:
    found = run(
        gateway,
        OPENAI
        + textwrap.dedent("""
        from pydantic import BaseModel, ConfigDict

        class City(BaseModel):
            model_config = ConfigDict(extra="forbid")
            capital: bool

        def refused(**fields):
            try:
                client.chat.completions.create(**{**ASKED, **fields})
            except openai.APIStatusError as error:
                return [type(error).__name__, error.status_code, error.code, error.param]

        key = {"Idempotency-Key": "from-openai"}
        again = [client.chat.completions.create(**ASKED, extra_headers=key).id for _ in range(2)]
        stream = client.completions.create(model="assistant", prompt="Hello", max_tokens=4, stream=True)
        parsed = client.chat.completions.parse(**ASKED, response_format=City).choices[0].message.parsed
        print(json.dumps({
            "models": [model.id for model in client.models.list()],
            "model": client.models.retrieve("assistant").object,
            "completion": client.completions.create(model="assistant", prompt="Hello", max_tokens=4).object,
            "streamed": "".join(chunk.choices[0].text for chunk in stream) != "",
            "parsed": type(parsed.capital).__name__,
            "again": len(set(again)),
            "errors": [refused(model="other"), refused(n=2), refused(logit_bias={"1": 5}),
                       refused(logprobs=True), refused(extra_headers=key, seed=1)],
        }))
        """),
    )
    assert found["models"] == ["assistant"]
    assert (found["model"], found["completion"], found["streamed"]) == ("model", "text_completion", True)
    assert (found["parsed"], found["again"]) == ("bool", 1)
    assert found["errors"] == [
        ["NotFoundError", 404, "unknown_model", None],
        ["BadRequestError", 400, "bad_request", "n"],
        ["BadRequestError", 400, "bad_request", "logit_bias"],
        ["BadRequestError", 400, "bad_request", "logprobs"],
        ["ConflictError", 409, "id_reused", None],
    ]


def test_a_stream_that_openai_closes_cancels_its_prompt(gateway: Gateway, agent: Daemon) -> None:
    before = agent.log.count("prompt ended code=cancelled")
    run(
        gateway,
        OPENAI
        + textwrap.dedent("""
        form = {"response_format": {"type": "regex", "regex": "(0|1){1900}"}}
        stream = client.chat.completions.create(**ASKED, max_tokens=1950, stream=True, extra_body=form)
        next(stream)
        stream.close()
        print("null")
        """),
    )
    wait_until(lambda: agent.log.count("prompt ended code=cancelled") == before + 1, 60, "its cancel")


def test_langchain_whole_and_in_a_stream_synchronous_and_not(gateway: Gateway) -> None:
    found = run(
        gateway,
        """
        import asyncio, json, os
        from langchain_openai import ChatOpenAI

        model = ChatOpenAI(model="assistant", temperature=0, max_tokens=64)
        question = os.environ["QUESTION"]

        async def asynchronous():
            whole = (await model.ainvoke(question)).content
            return whole, "".join([chunk.content async for chunk in model.astream(question)])

        print(json.dumps({
            "texts": [
                model.invoke([("system", "Be brief."), ("human", question)]).content and
                model.invoke(question).content,
                "".join(chunk.content for chunk in model.stream(question)),
                *[answer.content for answer in model.batch([question] * 3)],
                *asyncio.run(asynchronous()),
            ],
            "usage": model.invoke(question).usage_metadata["output_tokens"],
        }))
        """,
    )
    assert found["texts"] == [MADRID] * 7
    assert found["usage"] > 0


def test_llm_whole_and_in_a_stream_synchronous_and_not(gateway: Gateway, short_dir: Path) -> None:
    (short_dir / "extra-openai-models.yaml").write_text(
        f"- model_id: edge\n  model_name: assistant\n  api_base: http://127.0.0.1:{gateway.port}/v1\n"
    )
    found = run(
        gateway,
        """
        import asyncio, json, os, subprocess, sys
        import llm

        question = os.environ["QUESTION"]
        command = [sys.executable, "-m", "llm", "-m", "edge", question]
        async def asynchronous():
            return await llm.get_async_model("edge").prompt(question).text()

        print(json.dumps([
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(),
            subprocess.run([*command, "--no-stream"], check=True, capture_output=True, text=True).stdout.strip(),
            "".join(llm.get_model("edge").prompt(question)),
            asyncio.run(asynchronous()),
        ]))
        """,
        LLM_USER_PATH=str(short_dir),
    )
    assert found == [MADRID] * 4


def test_the_tables_of_the_sweep_name_every_field_of_the_package(gateway: Gateway) -> None:
    found = run(
        gateway,
        """
        import json
        from openai.types import completion_create_params as text
        from openai.types.chat import completion_create_params as chat

        def fields(module):
            kinds = module.CompletionCreateParamsBase, module.CompletionCreateParamsStreaming
            return sorted(set().union(*(kind.__annotations__ for kind in kinds)))

        print(json.dumps([fields(chat), fields(text)]))
        """,
    )
    assert found == [sorted(openai_schema.CHAT), sorted(openai_schema.COMPLETION)]
