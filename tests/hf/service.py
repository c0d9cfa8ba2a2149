"""`hf-paged serve` in a thread of this process, and what its clients see. Needs the extra `serve`."""

import socket
import threading
import urllib.request
from contextlib import contextmanager

import openai
import uvicorn
from transformers import AutoTokenizer, LlamaForCausalLM

from hf_paged.cli import build_parser
from hf_paged.commands.serve import make_app

SYSTEM = {
    "role": "system",
    "content": "You answer briefly, in one sentence, and never invent what you do not know.",
}


def asked(*texts):
    """A chat of alternating turns."""
    roles = ("user", "assistant")
    return [SYSTEM, *({"role": roles[i % 2], "content": text} for i, text in enumerate(texts))]


def app_of(folder, *options):
    """The application that the command serves."""
    return make_app(build_parser().parse_args(["serve", folder, *options]))


@contextmanager
def serving(app):
    """The port of a server in a thread of this process."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive()


class Service:
    """The server as its clients see it."""

    def __init__(self, port, folder):
        self.url, self.model = f"http://127.0.0.1:{port}", folder
        self.api = self.client("key")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.stock = LlamaForCausalLM.from_pretrained(folder).eval()

    def client(self, key):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def chat(self, messages, api=None, max_tokens=8, **more):
        arguments = {"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, **more}
        return (api or self.api).chat.completions.create(**arguments)

    def right_answer(self, messages, max_tokens=8):
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return self.continued(inputs, max_tokens)

    def continued(self, inputs, max_tokens):
        out = self.stock.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        return self.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def num_tokens(self, messages):
        return len(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])

    def metric(self, name):
        """The sum over labels."""
        lines = urllib.request.urlopen(f"{self.url}/metrics").read().decode().splitlines()
        found = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"hf_paged_{name}{{")]
        assert found or name == "fallbacks_total", name
        return sum(found)

    def computed_by(self, call):
        before = self.metric("computed_tokens_total")
        answer = call()
        return answer, self.metric("computed_tokens_total") - before
