"""`hf-paged serve` when something goes wrong: what the `openai` client raises, and what is computed for nobody."""

import json
import time

import pytest
from real import save_tiny_chat_model
from transformers.models.llama.modeling_llama import LlamaMLP
from versions import skip_if_older

# Behind the skips, as it imports what the extra `serve` brings.
openai = pytest.importorskip("openai")
pytest.importorskip("prometheus_client")
pytest.importorskip("uvicorn")

from service import Service, app_of, asked, serving  # noqa: E402 (behind the skips)

from hf_paged import patch_model  # noqa: E402 (behind the skips)
from hf_paged.cli import main  # noqa: E402 (behind the skips)

pytestmark = pytest.mark.real
FLOATS = 256  # bytes of a token in the tiny model: 2 layers, K and V, 2 heads of 8 numbers
ROOM = 256  # tokens that fit
LONG = "word " * 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_chat_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def service(folder):
    with serving(app_of(folder, "--block-size", "8", "--max-memory", f"cpu={ROOM * FLOATS}")) as port:
        yield Service(port, folder)


@pytest.fixture(autouse=True)
def nothing_stays(request):
    yield
    if "service" in request.fixturenames:
        service = request.getfixturevalue("service")
        assert service.chat(asked("Well?")).choices[0].message.content == service.right_answer(asked("Well?"))
        assert service.metric("blocks_in_use") == 0
        assert service.metric("fallbacks_total") == 0


def calls(service, text, stream, tokens=8, **more):
    """The same question at every endpoint."""
    given = {"model": service.model, "temperature": 0, "stream": stream, **more}
    return {
        "chat": lambda: service.chat(asked(text), max_tokens=tokens, stream=stream, **more),
        "completions": lambda: service.api.completions.create(prompt=text, max_tokens=tokens, **given),
        "responses": lambda: service.api.responses.create(input=text, max_output_tokens=tokens, **given),
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", ["chat", "completions", "responses"])
def test_what_does_not_fit_is_507_before_a_stream_begins(service, endpoint, stream):
    with pytest.raises(openai.InternalServerError, match="max_memory") as caught:
        calls(service, LONG, stream)[endpoint]()
    assert (caught.value.status_code, caught.value.type) == (507, "server_error")
    assert caught.value.response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("endpoint", ["chat", "completions", "responses"])
def test_what_generate_refuses_is_a_bad_request_before_a_stream_begins(service, endpoint):
    settings = {"generation_config": json.dumps({"num_beams": 2, "max_new_tokens": 4})}
    with pytest.raises(openai.BadRequestError, match="streamer") as caught:
        calls(service, "Hello", stream=True, extra_body=settings)[endpoint]()
    assert caught.value.type == "invalid_request_error"


def text_and_error(stream, text_of):
    """What a stream says, and the error that ends it."""
    pieces = []
    try:
        for chunk in stream:
            pieces.append(text_of(chunk))
    except openai.APIError as error:
        return "".join(pieces), error
    pytest.fail("the stream ended as if nothing had happened")


def test_an_error_in_a_stream_is_raised_by_the_client_after_what_was_said(service):
    """Memory ends in the middle of an answer."""
    ways = calls(service, "Go on.", stream=True, tokens=2 * ROOM)
    said, error = text_and_error(ways["chat"](), lambda chunk: chunk.choices[0].delta.content or "")
    assert error.code == "507"
    assert "max_memory" in error.message
    right = service.right_answer(asked("Go on."), ROOM)
    assert len(said) > len(right) / 2
    assert right.startswith(said)
    said, error = text_and_error(ways["completions"](), lambda chunk: chunk.choices[0].text)
    assert error.code == "507"
    assert said


def test_an_error_in_a_stream_of_responses_is_an_event(service):
    try:
        events = list(calls(service, "Go on.", stream=True, tokens=2 * ROOM)["responses"]())
    except openai.APIError:
        skip_if_older("its server does not know all that the newest openai wants in a response")
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]
    assert "max_memory" in events[-2].message
    assert any(event.type == "response.output_text.delta" for event in events)


@pytest.fixture
def break_after(monkeypatch):
    """The model raises an error after so many passes."""
    forward = LlamaMLP.forward

    def broken(passes, error):
        left = iter(range(2 * passes))  # of two layers

        def fail(self, *args):
            if next(left, None) is None:
                raise error
            return forward(self, *args)

        monkeypatch.setattr(LlamaMLP, "forward", fail)

    return broken


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("secret"), 500),
        (RuntimeError("secret"), 500),
        (MemoryError("secret"), 503),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: secret"), 503),
    ],
)
def test_a_fault_of_the_server_is_no_bad_request(service, break_after, monkeypatch, error, status, stream):
    break_after(0, error)
    with pytest.raises(openai.InternalServerError) as caught:
        service.chat(asked("Hello"), stream=stream)
    assert (caught.value.status_code, caught.value.type) == (status, "server_error")
    assert "secret" not in str(caught.value)
    monkeypatch.undo()


def test_a_fault_in_a_stream(service, break_after, monkeypatch, caplog):
    break_after(4, ValueError("secret"))
    said, error = text_and_error(
        service.chat(asked("Hello"), stream=True), lambda chunk: chunk.choices[0].delta.content or ""
    )
    monkeypatch.undo()
    assert said
    assert service.right_answer(asked("Hello")).startswith(said)
    assert error.code == "500"
    assert "secret" not in str(error)
    assert "secret" in caplog.text, "the log says where"


@pytest.fixture(scope="module")
def roomy(folder):
    with serving(app_of(folder, "--block-size", "8", "--max-memory", "cpu=64MiB")) as port:
        yield Service(port, folder)


def impatient(service, text, tokens):
    """Ask without a stream, and hang up soon after."""
    with pytest.raises(openai.APITimeoutError):
        service.chat(asked(text), api=service.api.with_options(timeout=0.3), max_tokens=tokens)


def test_nothing_more_is_computed_for_a_client_that_hangs_up_without_a_stream(roomy):
    begin = roomy.metric("generated_tokens_total")
    impatient(roomy, "Go on for ever.", 3000)
    answer = roomy.chat(asked("Well?"))
    assert answer.choices[0].message.content == roomy.right_answer(asked("Well?"))
    assert 0 < roomy.metric("generated_tokens_total") - begin < 2000
    assert roomy.metric("blocks_in_use") == 0


def test_a_client_that_hangs_up_before_its_turn_is_not_computed_at_all(roomy):
    first = roomy.chat(asked("Take your time."), max_tokens=3000, stream=True)
    next(first)
    before = roomy.metric("computed_tokens_total")
    impatient(roomy, "I am gone before my turn. " * 20, 8)
    first.close()
    deadline = time.monotonic() + 5
    while roomy.metric("blocks_in_use") and time.monotonic() < deadline:
        time.sleep(0.02)
    roomy.chat(asked("And me?"))
    assert roomy.metric("computed_tokens_total") - before <= roomy.num_tokens(asked("And me?"))


def test_int8_holds_more_and_answers_as_generate_does(folder):
    """A prompt for which `test_what_does_not_fit...` finds no room: 12 bytes where there were 32."""
    messages = asked("word " * 500)
    with serving(
        app_of(folder, "--block-size", "8", "--max-memory", f"cpu={ROOM * FLOATS}", "--kv-cache-dtype", "int8")
    ) as port:
        service = Service(port, folder)
        answers = [service.computed_by(lambda: service.chat(messages)) for _ in range(2)]
    model = patch_model(service.stock, kv_cache_dtype="int8", block_size=8)
    right = service.right_answer(messages)
    assert [answer.choices[0].message.content for answer, _ in answers] == [right, right]
    assert answers[0][1] == service.num_tokens(messages) > ROOM
    assert answers[1][1] <= 8
    assert model.paged.stats().fallbacks == {}


def test_a_model_that_int8_would_ruin_is_refused_at_the_start(folder, monkeypatch, capsys):
    monkeypatch.setattr("hf_paged.quality.MAX_MEAN_KL", -1)
    with pytest.raises(SystemExit) as caught:
        main(["serve", folder, "--kv-cache-dtype", "int8"])
    assert caught.value.code == 2
    assert "KL" in capsys.readouterr().err.splitlines()[-1]
