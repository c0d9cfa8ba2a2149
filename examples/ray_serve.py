"""Two replicas of a patched model behind Ray Serve; a conversation stays with the replica that has its prefix.
python examples/ray_serve.py [model]   (needs: pip install "ray[serve]"; Ray's own prefix-aware router imports vLLM)
"""

import hashlib
import sys

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import FIFOMixin, RequestRouter
from transformers import pipeline

from hf_paged import patch_model


class EqualPrefixesMeet(FIFOMixin, RequestRouter):
    async def choose_replicas(self, candidate_replicas, pending_request=None):
        start = str(pending_request.args[0][0])  # the first message; the second choice is for when the first is full
        ranked = sorted(candidate_replicas, key=lambda r: hashlib.sha256(f"{start}{r.replica_id}".encode()).digest())
        return [[replica] for replica in ranked]


@serve.deployment(num_replicas=2, request_router_config=RequestRouterConfig(request_router_class=EqualPrefixesMeet))
class Chat:
    def __init__(self, model):
        self.pipe = patch_model(pipeline("text-generation", model=model))

    def __call__(self, chat):
        answer = self.pipe(chat, max_new_tokens=8, do_sample=False)[0]["generated_text"]
        return answer, self.pipe.model.paged.stats().reused_tokens, serve.get_replica_context().replica_tag


ray.init(include_dashboard=False, log_to_driver=False)
serve.start(http_options={"location": "NoServer"})
handle = serve.run(Chat.bind(sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"))
chats = [[{"role": "system", "content": f"You answer like number {i}."}] for i in range(12)]
for chat in [*chats, *chats]:  # two turns of each
    chat[:], reused, replica = handle.remote([*chat, {"role": "user", "content": "What do you like?"}]).result()
    print(f"{chat[0]['content']} On {replica}, {reused} tokens reused there so far")
