"""The gateway as a process that can be looked into: `gateway.py` with one signal more.

Settings come from the environment. The first line on stdout tells the port; each SIGUSR1 brings another line: what the
gateway holds just then. Run as a module, with scripts/ and tests/ on PYTHONPATH. No part of the product.
"""

import asyncio
import json
import os
import signal
import sys

import logs
from config import load_config
from gateway import Gateway
from parts import Parts
from wire import BackendWire


def held(parts: Parts) -> dict[str, int]:
    """Count everything that somebody has to give back."""
    wires = list(parts.deadlines)
    backend = sum(isinstance(wire, BackendWire) for wire in wires)
    return {
        "slots": parts.gate.active,
        "waiters": parts.gate.queued,
        "exchanges": len(parts.exchanges),
        "client connections": len(wires) - backend,
        "backend connections": backend,
        "tasks": len(asyncio.all_tasks()),
        "held octets": parts.buffered_bytes,
        "relays": parts.relaying,
        "public-only connections": len(parts.public_only),
    }


def tell(news: object) -> None:
    print(json.dumps(news), flush=True)


async def serve() -> None:
    settings = load_config(os.environ)
    logs.setup("gateway", settings.log.level, settings.log.format, sys.stderr)
    parts = Parts(settings)
    gateway = Gateway(parts)
    parts.reload()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, gateway.drain)
    loop.add_signal_handler(signal.SIGUSR1, lambda: tell({"ready": parts.readiness.ready, "held": held(parts)}))
    tell({"port": await gateway.start()})
    await gateway.run_until_ended()
    await gateway.close()


if __name__ == "__main__":
    asyncio.run(serve())
