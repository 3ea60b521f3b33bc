"""TriangleMix inside vLLM: a plugin that vLLM finds by its entry point. Imports without vLLM.

Off unless ``VLLM_TRIANGLEMIX_ENABLED`` or ``--additional-config '{"trianglemix": {...}}'`` switches it on.
"""

from __future__ import annotations

import os


def register() -> None:
    """What the entry point ``vllm.general_plugins`` names; vLLM calls it once in each of its processes.

    Raises:
        ValueError: a variable that switches TriangleMix on has, or comes with, a bad value.
        UnsupportedEngineError: TriangleMix is on in this process, and this vLLM is not one that is known.
    """
    from tmx_compile.integrations.vllm.start import start

    start(os.environ)
