"""`hf-paged serve`: the `openai` client over loopback, on a tiny model with SmolLM2's tokenizer."""

import dataclasses
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from real import save_tiny_chat_model
from versions import skip_if_older

# Behind the skips, as it imports what the extra `serve` brings.
openai = pytest.importorskip("openai")
CollectorRegistry = pytest.importorskip("prometheus_client").CollectorRegistry
pytest.importorskip("uvicorn")

from service import Service, app_of, asked, serving  # noqa: E402 (behind the skips)

from hf_paged.metrics import COUNTERS, GAUGES, PagedCollector  # noqa: E402 (behind the skips)
from hf_paged.stats import PagedStats  # noqa: E402 (behind the skips)

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_chat_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def service(folder):
    with serving(app_of(folder, "--block-size", "8", "--max-memory", "cpu=64MiB")) as port:
        yield Service(port, folder)


@pytest.fixture(autouse=True)
def nothing_stays(request):
    yield
    if "service" in request.fixturenames:
        service = request.getfixturevalue("service")
        deadline = time.monotonic() + 10
        while service.metric("blocks_in_use") and time.monotonic() < deadline:
            time.sleep(0.02)
        assert service.metric("blocks_in_use") == 0
        text = urllib.request.urlopen(f"{service.url}/metrics").read().decode()
        assert service.metric("fallbacks_total") == 0, text
        assert service.chat(asked("Well?")).choices[0].message.content == service.right_answer(asked("Well?"))


def test_every_turn_of_a_chat_is_stocks_and_computes_what_is_new(service):
    turns = []
    for question in ("What is a cache?", "And a page?", "Thanks, who are you?"):
        before = len(turns) and service.num_tokens(asked(*turns[:-1])) // 8 * 8
        turns.append(question)
        reply, computed = service.computed_by(lambda: service.chat(asked(*turns)))
        text = reply.choices[0].message.content
        assert text == service.right_answer(asked(*turns))
        length = service.num_tokens(asked(*turns))
        assert reply.usage.prompt_tokens == length
        assert 0 < computed <= length - before
        turns.append(text)


def test_a_stream_is_the_same_text_in_pieces(service):
    messages = asked("Tell me a story.")
    pieces = [chunk.choices[0].delta.content or "" for chunk in service.chat(messages, max_tokens=12, stream=True)]
    assert sum(map(bool, pieces)) > 3
    assert "".join(pieces) == service.right_answer(messages, 12)


def test_completions_reuse_prefixes_too(service):
    prompt = "The cat sat on the mat, and the dog lay beside the stove, where it was warm and dry, until"
    inputs = service.tokenizer(prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]

    def complete():
        return service.api.completions.create(model=service.model, prompt=prompt, max_tokens=6, temperature=0)

    answers = [service.computed_by(complete) for _ in range(2)]
    assert {answer.choices[0].text for answer, _ in answers} == {service.continued(inputs, 6)}
    assert [computed for _, computed in answers] == [length, 1]


def test_responses_reuse_prefixes_too(service):
    question = "Where do the cat and the dog lie when it is cold outside, and the stove in the kitchen is warm?"

    def respond(stream=False):
        return service.api.responses.create(
            model=service.model, input=question, max_output_tokens=6, temperature=0, stream=stream
        )

    right = service.right_answer([{"role": "user", "content": question}], 6)
    try:
        first, computed_first = service.computed_by(respond)
    except openai.InternalServerError:
        skip_if_older("its server does not know all that the newest openai wants in a response")
    events, computed_again = service.computed_by(lambda: list(respond(stream=True)))
    assert first.output_text == right
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == right
    assert computed_again <= 8 < computed_first


def test_clients_at_once(service):
    chats = [asked(f"Question {i}: what is {i} times {i + 1}?") for i in range(8)]
    right = [service.right_answer(chat) for chat in chats]

    def ask(chat):
        return service.chat(chat).choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, chats)) == right


def test_a_client_that_hangs_up(service):
    generated = service.metric("generated_tokens_total")
    stream = service.chat(asked("Go on for ever."), max_tokens=3000, stream=True)
    for _, _chunk in zip(range(4), stream, strict=False):
        assert service.metric("blocks_in_use") > 0
    stream.close()
    deadline = time.monotonic() + 5  # 3,000 tokens take longer
    while service.metric("blocks_in_use") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert service.metric("blocks_in_use") == 0
    assert service.metric("generated_tokens_total") < generated + 2000


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("messages", [], "messages"),
        ("messages", "hello", "messages"),
        ("messages", [{"content": "no role"}], "no role"),
        ("messages", [{"role": "user"}], "no content"),
        ("temperature", -1, "temperature"),
        ("top_p", "high", "top_p"),
        ("max_tokens", 0, "max_tokens"),
        ("max_tokens", True, "max_tokens"),
        ("stop", [1], "stop"),
        ("model", "another", "pinned"),
        ("extra_body", {"cache_salt": 7}, "cache_salt"),
        ("extra_body", {"generation_config": "{"}, "generation_config"),
        ("extra_body", {"nonsense": 1}, "nonsense"),
        ("extra_body", {"generation_config": "[]"}, "generation_config"),
        ("logit_bias", {"one": 1}, "logit_bias"),
        ("logit_bias", {"49152": 1.0}, "vocabulary"),
        ("messages", [{"role": "user", "content": [{"text": "of no type"}]}], "list of parts"),
        ("messages", [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}], "arguments"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_the_clients_fault(service, field, value, said, stream):
    with pytest.raises(openai.APIStatusError, match=said) as caught:
        service.chat(**{"messages": asked("Hello"), field: value, "stream": stream})
    assert caught.value.status_code in (400, 422)
    assert caught.value.type == "invalid_request_error"


def test_bad_completions_and_responses(service):
    for call in (
        lambda: service.api.completions.create(model=service.model, prompt=""),
        lambda: service.api.completions.create(model=service.model, prompt=[1, 2]),
        lambda: service.api.responses.create(model=service.model, input=[]),
        lambda: service.api.post("/completions", body="no object", cast_to=object),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            call()
        assert caught.value.type == "invalid_request_error"


def test_users_do_not_see_each_others_prefixes(service):
    messages = asked("What does the secret project of department seven do?")
    length = service.num_tokens(messages)

    def computed(key, **more):
        answer, tokens = service.computed_by(lambda: service.chat(messages, service.client(key), **more))
        assert answer.choices[0].message.content == service.right_answer(messages)
        return tokens

    shared = {"extra_body": {"cache_salt": "all"}}
    first = computed("anna", user="a")
    assert first == length
    assert computed("anna", user="a") < 9
    assert computed("anna", user="b") == length
    assert computed("bert", user="a") == length
    assert computed("anna", **shared) == length
    assert computed("bert", user="b", **shared) < 9


def test_the_list_of_models_is_what_is_served(service):
    assert [model.id for model in service.api.models.list()] == [service.model]


def test_other_models_are_not_loaded(service, folder):
    body = b'{"model": "' + folder.encode() + b'/"}'
    request = urllib.request.Request(
        f"{service.url}/load_model", data=body, headers={"content-type": "application/json"}
    )
    assert b"pinned" in urllib.request.urlopen(request).read()


def test_a_model_that_is_loaded_again_is_patched_again(service):
    urllib.request.urlopen(urllib.request.Request(f"{service.url}/reset", method="POST"))
    messages = asked("Are you still there?")
    assert service.chat(messages).choices[0].message.content == service.right_answer(messages)
    assert service.metric("computed_tokens_total") == service.num_tokens(messages)


def test_the_command(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hf_paged.cli", "serve", folder, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert f"http://127.0.0.1:{port}/v1" in process.stdout.readline()
        for _ in range(200):
            try:
                assert urllib.request.urlopen(f"http://127.0.0.1:{port}/health").status == 200
                break
            except urllib.error.URLError:
                time.sleep(0.05)
        else:
            pytest.fail("the server does not answer")
        with pytest.raises(OSError), socket.create_connection((_other_address(), port), timeout=2):
            pass
    finally:
        process.terminate()
        process.wait(timeout=20)


def _other_address():
    """An address of this machine that is not 127.0.0.1: all of 127/8 is its own on Linux."""
    return "127.0.0.2"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere/"], "MODEL"),
        (["."], "no config.json"),
        (["{folder}", "--max-memory", "disk=1GiB"], "no device"),
        (["{folder}", "--chat-template-kwargs", "[]"], "JSON object"),
        (["{folder}", "--block-size", "7"], "block_size"),
    ],
)
def test_bad_arguments(folder, capsys, arguments, said):
    from hf_paged.cli import main

    with pytest.raises(SystemExit) as caught:
        main(["serve", *(argument.format(folder=folder) for argument in arguments)])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_every_statistic_is_a_metric():
    fields = {field.name for field in dataclasses.fields(PagedStats)}
    assert COUNTERS.keys() | GAUGES.keys() | {"fallbacks"} == fields
    counts = {name: place for place, name in enumerate([*COUNTERS, *GAUGES], start=2)}
    stats = PagedStats(**counts, fallbacks={"one": 1, "two": 2})
    model = SimpleNamespace(paged=SimpleNamespace(stats=lambda: stats))
    registry = CollectorRegistry()
    registry.register(PagedCollector(lambda: {"m": model}))
    for name, value in counts.items():
        sample = f"hf_paged_{name}" + "_total" * (name in COUNTERS)
        assert registry.get_sample_value(sample, {"model": "m"}) == value
    assert registry.get_sample_value("hf_paged_fallbacks_total", {"model": "m", "reason": "two"}) == 2


def test_stop_strings_leave_the_fast_path_alone(service):
    messages = asked("Say it.")
    whole = service.right_answer(messages, 12)
    stop = whole[len(whole) // 2 :][:4]
    reply = service.chat(messages, max_tokens=12, stop=[stop]).choices[0].message.content
    assert reply.startswith(whole[: whole.index(stop)])
    assert len(reply) < len(whole)
