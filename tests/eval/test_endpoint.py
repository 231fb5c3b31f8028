import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from sse_eval import EvaluationError, SampleRequest, evaluate
from sse_eval.endpoint import Endpoint

SETTINGS = {"samples": 2, "temperature": 1.0, "top_p": 1.0, "max_tokens": 100, "seed": 3}


class Server:
    """An endpoint in a thread: `replies` are given first, then the right answer to everything."""

    def __init__(self) -> None:
        self.replies: list[tuple[int, object]] = []
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.models: list[dict] | None = [{"id": "tiny", "max_model_len": 4096}]
        self.message = {"role": "assistant", "content": r"\boxed{204}"}
        self.lock = threading.Lock()

    def reply(self, path: str, body: dict | None, key: str | None) -> tuple[int, object]:
        if path == "/v1/models":
            return (404, {}) if self.models is None else (200, {"data": self.models})
        with self.lock:
            self.bodies.append(body or {})
            self.keys.append(key)
            if self.replies:
                return self.replies.pop(0)
        choice = {"message": self.message, "finish_reason": "stop"}
        return 200, {"choices": [choice], "usage": {"completion_tokens": 5}}


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.serve(None)

        def do_POST(self) -> None:
            self.serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def serve(self, body: dict | None) -> None:
            status, answer = state.reply(self.path, body, self.headers.get("Authorization"))
            content = json.dumps(answer).encode() if not isinstance(answer, bytes) else answer
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", "0.01")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}"
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def request(sample: int = 0) -> SampleRequest:
    messages = ({"role": "user", "content": "Find $x$."},)
    return SampleRequest("p", sample, messages, 17, 0.6, 0.95, 100)


def test_an_evaluation_of_a_served_model(tmp_path, server, problems, pool, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    endpoint = Endpoint(server.url, concurrency=4)
    assert (endpoint.model, endpoint.max_context) == ("tiny", 4096)
    summary = evaluate(problems, endpoint, tmp_path / "e", pool=pool, **SETTINGS)
    assert summary["finished"] == 12 and summary["avg"] == pytest.approx(1 / 6)
    assert set(server.keys) == {"Bearer secret"}
    assert server.bodies[0].keys() == {
        "model", "messages", "seed", "temperature", "top_p", "max_tokens",
    }  # fmt: skip
    for file in (tmp_path / "e").iterdir():
        assert b"secret" not in file.read_bytes()


def test_later_means_later(server):
    server.replies = [(429, {}), (503, {"error": "busy"}), (200, b"not json")]
    endpoint = Endpoint(server.url)
    (answer,) = endpoint.generate([request()])
    assert answer.completion == r"\boxed{204}" and len(server.bodies) == 4


def test_a_server_that_stays_busy_is_an_error_that_names_the_sample(server):
    server.replies = [(429, {})] * 3
    with pytest.raises(EvaluationError, match="did not answer sample 0 of 'p' in 3 attempts"):
        list(Endpoint(server.url, retries=2).generate([request()]))


def test_a_request_the_server_refuses_is_not_repeated(server):
    server.replies = [(400, {"error": "maximum context length is 64"})]
    with pytest.raises(EvaluationError, match=r"refuses sample 0 of 'p'.*context length is 64"):
        list(Endpoint(server.url).generate([request()]))
    assert len(server.bodies) == 1


def test_a_wrong_key_says_which_variable_to_set(server):
    server.replies = [(401, {"error": "bad key"})]
    with pytest.raises(EvaluationError, match="OPENAI_API_KEY"):
        list(Endpoint(server.url).generate([request()]))


def test_an_answer_of_another_shape_is_shown(server):
    server.replies = [(200, {"choices": []})]
    with pytest.raises(EvaluationError, match=r"usage.completion_tokens: \{\"choices\": \[\]\}"):
        list(Endpoint(server.url).generate([request()]))


def test_thinking_that_the_server_parted_is_put_back(server):
    server.message = {"reasoning_content": "hm", "content": r"\boxed{7}"}
    (answer,) = Endpoint(server.url).generate([request()])
    assert answer.completion == r"<think>hm</think>\boxed{7}"
    server.message = {"reasoning_content": r"hm \boxed{7}", "content": None}
    (answer,) = Endpoint(server.url).generate([request()])
    assert answer.completion == r"<think>hm \boxed{7}"


def test_a_model_that_is_not_served_is_an_error(server):
    with pytest.raises(EvaluationError, match=r"does not serve 'huge' but \['tiny'\]"):
        Endpoint(server.url, "huge")
    server.models = [{"id": "tiny"}, {"id": "small"}]
    with pytest.raises(EvaluationError, match="name the model"):
        Endpoint(server.url)


def test_a_server_without_a_list_takes_the_named_model(server):
    server.models = None
    assert Endpoint(server.url + "/v1/", "huge").max_context is None
    with pytest.raises(EvaluationError, match="name the model"):
        Endpoint(server.url)


def test_no_server_and_no_address_are_errors():
    with pytest.raises(EvaluationError, match="did not answer the list of models"):
        Endpoint("http://127.0.0.1:9", retries=0)
    with pytest.raises(EvaluationError, match="http:// or https://"):
        Endpoint("localhost:8000")


def test_closing_the_iterator_stops_asking(server):
    samples = Endpoint(server.url, concurrency=2).generate([request(i) for i in range(200)])
    next(samples)
    samples.close()
    assert len(server.bodies) < 200
