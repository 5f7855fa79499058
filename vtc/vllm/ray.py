"""VTC in Ray Serve LLM: a server class whose replicas register VTC's models.

    LLMConfig(..., server_cls="vtc.vllm.ray:LLMServer")

A replica reads the prompts. On GPUs it gets vLLM's config from a task of Ray, in another process, and so it never calls
what loads vLLM's plug-ins; the task, the engine and its workers do. With Ray's own class, a replica makes prompts
without VTC, and the first image ends the engine: its workers, which have VTC, refuse the image.
"""

from __future__ import annotations

import os

from vtc.vllm import register

try:
    from ray.serve.llm import deployment
except ImportError as error:
    raise ImportError(
        f"vtc.vllm.ray needs Ray Serve LLM, which cannot be imported: {error}; install 'ray[llm]', and then a "
        "version of 'vllm' that both work with"
    ) from error


class LLMServer(deployment.LLMServer):
    """Ray's server of one model. Registers VTC's models before the engine starts."""

    async def start(self) -> None:
        _require_plugin()
        register()
        await super().start()


def _require_plugin() -> None:
    """Raise ValueError if vLLM's own processes, which this one starts, would not load VTC."""
    from vllm.plugins import DEFAULT_PLUGINS_GROUP, load_plugins_by_group

    found = load_plugins_by_group(DEFAULT_PLUGINS_GROUP)
    if "vtc" not in found:
        raise ValueError(
            f"vLLM's workers would not have VTC: vLLM loads the plug-ins {sorted(found)} here, and must load 'vtc'; "
            "install vtc-cls with pip on each node, and leave VLLM_PLUGINS unset or add vtc to it (it is "
            f"{os.environ.get('VLLM_PLUGINS')!r})"
        )
