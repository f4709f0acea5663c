"""The HTTP engine against a real local server that fails in every way a server can."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from owlrec.errors import EngineError
from owlrec.generation import engines
from owlrec.generation.engines import (
    HttpEngine,
    HttpEngineConfig,
    PromptTooLong,
    RequestFailed,
    RequestRefused,
    RequestTimedOut,
    SamplingConfig,
)

NO_ANSWER = 202  # the server falls asleep first


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    replies: list[tuple[int, dict[str, str], object]]
    bodies: list[dict]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client may stop waiting; its traceback would only clutter a green run."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        status, headers, body = self.server.replies.pop(0) if self.server.replies else (200, {}, answer("hello"))
        if status == NO_ANSWER:
            time.sleep(0.5)
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def answer(text: str) -> dict:
    return {
        "choices": [{"message": {"content": text}, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 4},
    }


@pytest.fixture
def server() -> Iterator[_Server]:
    server = _Server(("127.0.0.1", 0), _Handler)
    server.replies, server.bodies = [], []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_BACKOFF_S", 0.01)


def ask(port: int, prompt: str = "hi", **options: object) -> object:
    config = HttpEngineConfig(
        type="http", base_url=f"http://127.0.0.1:{port}/v1/", model="m", max_attempts=3, **options
    )
    sampling = SamplingConfig(max_tokens=9, options={"top_p": 0.8})
    return asyncio.run(HttpEngine(config).complete("be brief", prompt, sampling))


def test_answer_and_request(server: _Server) -> None:
    done = ask(server.server_port)
    assert (done.text, done.prompt_tokens, done.output_tokens, done.finish_reason) == ("hello", 11, 4, "length")
    body = server.bodies[0]
    assert body["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert (body["max_tokens"], body["temperature"], body["top_p"]) == (9, 0.0, 0.8)


def test_cached_tokens_are_those_that_the_server_names(server: _Server) -> None:
    for details, cached in (({"cached_tokens": 8}, 8), ({}, 0), (None, 0)):
        reply = answer("hello")
        server.replies = [(200, {}, {**reply, "usage": {**reply["usage"], "prompt_tokens_details": details}})]
        assert ask(server.server_port).cached_tokens == cached


@pytest.mark.parametrize("status", [429, 500, 503])
def test_transient_statuses_are_retried(server: _Server, status: int) -> None:
    server.replies = [(status, {"Retry-After": "0"}, {}), (status, {}, {})]
    assert ask(server.server_port).text == "hello"
    assert len(server.bodies) == 3


def test_gives_up_after_the_last_attempt_and_counts_them(server: _Server) -> None:
    server.replies = [(500, {}, {"error": "boom"})] * 5
    with pytest.raises(RequestFailed, match=r"HTTP 500.*boom.*gave up after 3 attempts") as error:
        ask(server.server_port)
    assert error.value.attempts == 3
    assert len(server.bodies) == 3


def test_no_answer_in_time_is_told_from_other_failures(server: _Server) -> None:
    server.replies = [(NO_ANSWER, {}, {})] * 3
    with pytest.raises(RequestTimedOut, match=r"ReadTimeout.*gave up after 3 attempts"):
        ask(server.server_port, timeout_s=0.1)


def test_client_errors_are_final(server: _Server) -> None:
    server.replies = [(401, {}, {"error": "no key"})]
    with pytest.raises(RequestRefused, match="401"):
        ask(server.server_port)
    assert len(server.bodies) == 1


def test_server_down_is_a_failed_request() -> None:
    with pytest.raises(RequestFailed, match=r"ConnectError.*gave up after 3 attempts"):
        ask(1)


def test_answer_of_another_shape_is_a_failed_request(server: _Server) -> None:
    server.replies = [(200, {}, {"choices": []})]
    with pytest.raises(RequestFailed, match="chat completion"):
        ask(server.server_port)


def test_first_tokens_are_asked_for_with_their_log_probabilities(server: _Server) -> None:
    likeliest = [{"token": "Yes", "logprob": -0.25}, {"token": " no", "logprob": -1.5}]
    choice = {"message": {"content": "Yes"}, "logprobs": {"content": [{"token": "Yes", "top_logprobs": likeliest}]}}
    server.replies = [(503, {}, {}), (200, {}, {"choices": [choice]}), (200, {}, answer("Yes"))]
    config = HttpEngineConfig(type="http", base_url=f"http://127.0.0.1:{server.server_port}/v1", model="m")

    async def twice() -> None:
        engine = HttpEngine(config)
        assert await engine.first_tokens("be brief", "hi") == [("Yes", -0.25), (" no", -1.5)]
        with pytest.raises(RequestFailed, match="log-probabilities"):
            await engine.first_tokens("be brief", "hi")

    asyncio.run(twice())
    body = server.bodies[1]
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"], body["temperature"]) == (1, True, 20, 0.0)


def test_too_long_a_prompt_is_never_sent(server: _Server) -> None:
    with pytest.raises(PromptTooLong, match="context of 50"):
        ask(server.server_port, "word " * 200, max_model_len=50)
    assert not server.bodies


def test_api_key_travels_and_its_absence_is_an_error(server: _Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OWL_TEST_KEY", raising=False)
    with pytest.raises(EngineError, match="OWL_TEST_KEY is not set"):
        ask(server.server_port, api_key_env="OWL_TEST_KEY")
    monkeypatch.setenv("OWL_TEST_KEY", "secret")
    assert ask(server.server_port, api_key_env="OWL_TEST_KEY").text == "hello"
