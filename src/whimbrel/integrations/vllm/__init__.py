"""vLLM: an attention backend that prefills long prompts sparsely. Importing this imports no vLLM."""

from __future__ import annotations

NAME = "WHIMBREL_SPARSE"
"""What `--attention-backend` takes."""
BACKEND = "whimbrel.integrations.vllm.backend.SparseBackend"


def register() -> None:
    """Entry point of vLLM's `vllm.general_plugins`: makes the backend known. A second call changes nothing."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if NAME in AttentionBackendEnum.__members__:
        register_backend(AttentionBackendEnum[NAME], BACKEND)
    else:
        register_backend(NAME, BACKEND)
