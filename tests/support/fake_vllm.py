"""A stand-in for vLLM, copied to a folder `vllm` of its own: answers at once, and notes what it is asked.

FAKE_JOURNAL is a file that gets a JSON line for each request; FAKE_FAULT is what goes wrong.
"""

import asyncio
import hashlib
import json
import os
import sys
import types

FAULT = os.environ.get("FAKE_FAULT")
PLUGINS = os.environ["VLLM_PLUGINS"]
BLOCKS, BLOCK_SIZE = 101, 16


class SamplingParams(types.SimpleNamespace):
    pass


class TokensPrompt(dict):
    pass


class AsyncEngineArgs(types.SimpleNamespace):
    pass


class AsyncLLM:
    @classmethod
    def from_engine_args(cls, arguments, stat_loggers):
        llm = cls()
        llm.vtc = arguments.hf_overrides.get("vtc")
        if FAULT == "start" and llm.vtc:
            raise ValueError("planted: no such model")
        (factory,) = stat_loggers
        llm.logger = factory(None, 0)
        cache = types.SimpleNamespace(num_gpu_blocks=BLOCKS, block_size=BLOCK_SIZE)
        llm.vllm_config = types.SimpleNamespace(cache_config=cache)
        llm.flying = 0
        return llm

    async def generate(self, prompt, sampling, request_id):
        self.flying += 1
        image = hashlib.sha256(prompt["multi_modal_data"]["image"].tobytes()).hexdigest()
        line = {"vtc": self.vtc, "plugins": PLUGINS, "image": image, "flying": self.flying, "id": request_id}
        with open(os.environ["FAKE_JOURNAL"], "a") as file:
            file.write(json.dumps(line | vars(sampling)) + "\n")
        if FAULT == "dies" and self.vtc and self.flying == 4:
            os._exit(3)
        kept = self.vtc["keep"] if self.vtc and FAULT != "keeps all" else 576
        cached = 16 if FAULT == "caches" else 0
        for made in range(1, sampling.max_tokens + 1):
            await asyncio.sleep(0.001)
            usage = self.flying * (1 if self.vtc else 4) / (BLOCKS - 1)
            if FAULT != "no statistics":
                self.logger.record(
                    types.SimpleNamespace(kv_cache_usage=usage), types.SimpleNamespace(num_preempted_reqs=0)
                )
            yield types.SimpleNamespace(
                outputs=[types.SimpleNamespace(token_ids=[7] * made)],
                prompt_token_ids=[0] * (len(prompt["prompt_token_ids"]) - 1 + kept),
                num_cached_tokens=cached,
            )
        self.flying -= 1

    def shutdown(self):
        with open(os.environ["FAKE_JOURNAL"], "a") as file:
            file.write(json.dumps({"shutdown": self.vtc}) + "\n")


__version__ = "0.0"
for name, holder in {"engine.arg_utils": AsyncEngineArgs, "v1.engine.async_llm": AsyncLLM}.items():
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        sys.modules[".".join(["vllm", *parts[:count]])] = types.ModuleType(parts[count - 1])
    setattr(sys.modules[f"vllm.{name}"], holder.__name__, holder)
