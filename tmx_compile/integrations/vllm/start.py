"""Switching it on: what is asked is settled where an engine is configured, before anything of it is started.

What the other processes of the engine need travels in vLLM's own configuration, which they get in any case; that there
is something to do at all, in an environment variable, which they inherit.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from tmx_compile.integrations.vllm import hooks
from tmx_compile.integrations.vllm.counts import log
from tmx_compile.integrations.vllm.settings import KEY, read
from tmx_compile.integrations.vllm.wrap import wrap

WORKERS = "VLLM_TRIANGLEMIX_WORKERS"
"""Set for the processes that an engine with TriangleMix starts. By vLLM's prefix, Ray hands it on too."""


def start(environ: MutableMapping[str, str]) -> None:
    """Look at every engine's configuration from here on; in a process of an engine that has it on, set up at once."""
    # A bad variable is an error now, before a model is looked for.
    asked = read(environ, {})
    if not hasattr(EngineArgs, "create_engine_config"):
        # A vLLM of another time, which is no matter until somebody asks for something.
        if asked is not None:
            hooks.check(vllm.__version__, current_platform.device_type)
        return
    if environ.get(WORKERS):
        install()

    def configured(plain: Any) -> Any:
        def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            config = plain(self, *args, **kwargs)
            settle(config, environ)
            return config

        return create_engine_config

    wrap(EngineArgs, "create_engine_config", configured)


def settle(config: Any, environ: MutableMapping[str, str]) -> None:
    """Check what is asked for one engine, and write it into its configuration (a ``VllmConfig``).

    Raises:
        ValueError: a bad value, or an engine with which TriangleMix cannot be right.
        UnsupportedEngineError: this vLLM is not one that is known.
    """
    environ.pop(WORKERS, None)
    asked = read(environ, config.additional_config)
    if asked is None:
        return
    hooks.check(vllm.__version__, current_platform.device_type)
    settings, warnings = asked.resolve(config.model_config.get_total_num_hidden_layers())
    for warning in warnings:
        log.warning("TriangleMix: %s", warning)
    if settings is None:
        return
    refuse(config)
    # A new mapping: the one that is there may be the user's own.
    config.additional_config = {**config.additional_config, KEY: settings.to_dict()}
    environ[WORKERS] = "1"
    install()


def refuse(config: Any) -> None:
    """Raise ``ValueError`` for engines whose prefix caches would not be capped or cross an engine's border.

    The message names the setting.
    """
    if not isinstance(config.additional_config, dict):
        raise ValueError(f"additional_config must be a mapping for TriangleMix, got {config.additional_config!r}")
    transfer = config.kv_transfer_config
    if transfer is not None and transfer.kv_connector is not None:
        raise ValueError(
            f"kv_transfer_config.kv_connector={transfer.kv_connector!r} shares keys and values with engines that may "
            "have other triangle layers; TriangleMix supports no connector"
        )
    from vllm.v1.core.sched.scheduler import Scheduler

    scheduler = config.scheduler_config.get_scheduler_cls()
    if not issubclass(scheduler, Scheduler):
        raise ValueError(
            f"scheduler_cls={scheduler.__qualname__} does not derive from vLLM's Scheduler, in which TriangleMix keeps "
            "hits of the prefix cache off a prompt's last rows"
        )


def install() -> None:
    """Put the plugin's functions and its attention backend in place, in this process; a second call does nothing.

    Raises:
        UnsupportedEngineError: this vLLM is not one that is known.
    """
    hooks.check(vllm.__version__, current_platform.device_type)
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from tmx_compile.integrations.vllm import lengths, metrics, prefix

    prefix.install()
    metrics.install()
    lengths.install(current_platform.device_type)
    if current_platform.is_cpu():
        # The platform takes no other backend, but asks the registry where this one is.
        register_backend(AttentionBackendEnum.CPU_ATTN, "tmx_compile.integrations.vllm.cpu.TriangleBackend")
    else:
        register_backend(AttentionBackendEnum.FLASH_ATTN, "tmx_compile.integrations.vllm.cuda.TriangleBackend")
