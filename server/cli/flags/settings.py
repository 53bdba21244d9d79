"""Flags to the settings of the engine and of the server."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from headstart.engine.config import EngineConfig
from headstart.server.cli.flags.access import access_keys
from headstart.server.cli.flags.adapters import adapters
from headstart.server.cli.flags.limits import limits, server_limits
from headstart.server.cli.flags.runahead import runahead_secret
from headstart.server.settings import ServerSettings


def engine_config(args: argparse.Namespace, folder: Path) -> EngineConfig:
    """The engine's share of the flags."""
    return EngineConfig(
        model_path=str(folder),
        backend=args.backend,
        isa=args.isa,
        weights=args.weights,
        kv_format=args.kv_format,
        kv_memory=getattr(args, "kv_memory", None),
        max_model_len=getattr(args, "max_model_len", None),
        max_batched_tokens=args.max_batched_tokens,
        max_running=args.max_running,
        threads=getattr(args, "threads", None),
        prefix_caching=not args.no_prefix_caching,
        relay=args.relay,
        relay_check=args.relay_check,
        async_scheduling=args.async_scheduling,
        scheduling_policy=args.scheduling_policy,
        adapters=adapters(args),
        max_adapters=getattr(args, "max_loras", 32),
        tensor_parallel=getattr(args, "tensor_parallel", 1),
        runahead=getattr(args, "runahead", 1) or 1,
        runahead_hosts=getattr(args, "runahead_hosts", []),
        runahead_secret=runahead_secret(args),
        runahead_min=getattr(args, "runahead_min", None),
        runahead_cuts=getattr(args, "runahead_cuts", "auto"),
        runahead_transport=getattr(args, "runahead_transport", "auto"),
        runahead_timeout=getattr(args, "runahead_timeout", 5.0),
        stuck_after=args.engine_stuck_after,
        cache_dir=str(args.cache_dir),
        log_level=getattr(args, "log_level", "warning"),
    )


def server_settings(args: argparse.Namespace) -> ServerSettings:
    """The server's share of the flags."""
    return replace(
        answer_settings(args),
        **server_limits(args),
        lora_dir=getattr(args, "lora_dir", None),
        body_timeout=args.body_timeout,
        request_timeout=getattr(args, "request_timeout", None),
        ping_interval=args.ping_interval,
        keys=access_keys(args),
        shared_cache=args.shared_cache,
        allowed_hosts=(args.host, *getattr(args, "allowed_hosts", ())),
        allowed_origins=tuple(getattr(args, "allowed_origins", ())),
        access_log_format=args.access_log_format,
        unknown_fields=args.unknown_fields,
    )


def answer_settings(args: argparse.Namespace) -> ServerSettings:
    """What decides answers, however requests come in: limits, masks, formats."""
    return ServerSettings(
        **limits(args),
        segment_mask=getattr(args, "segment_mask", None),
        pooling=getattr(args, "pooling", None),
        tool_call_parser=args.tool_call_parser,
        reasoning_parser=args.reasoning_parser,
    )
