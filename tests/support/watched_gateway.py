"""The gateway as a process that can be looked into: `gateway.py` with one signal more.

Settings come from the environment. The first line on stdout tells the port; each SIGUSR1 brings another line: what the
gateway holds just then. Run as a module, with scripts/ and tests/ on PYTHONPATH. No part of the product.
"""

import asyncio
import json
import logging
import os
import re
import signal
import sys

import gateway
import logs
import turns
from backend_wire import BackendWire
from config import Config, load_config
from parts import Parts
from turns import Outbox


def held(parts: Parts) -> dict[str, int]:
    """Count everything that somebody has to give back."""
    wires = list(parts.deadlines)
    backend = sum(isinstance(wire, BackendWire) for wire in wires)
    return {
        "slots": parts.gate.active,
        "waiters": parts.gate.queued,
        "exchanges": len(parts.clients),
        "client connections": len(wires) - backend,
        "backend connections": backend,
        "tasks": len(asyncio.all_tasks()),
        "held octets": parts.buffered_bytes,
        "relays": parts.relaying,
        "public-only connections": len(parts.public_only),
    }


def tell(news: object) -> None:
    print(json.dumps(news), flush=True)


class WatchedParts(Parts):
    """The gateway's parts; they tell what they hold when asked by SIGUSR1."""

    def __init__(self, config: Config, *, outbox: Outbox) -> None:
        super().__init__(config, outbox=outbox)
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._tell)

    def _tell(self) -> None:
        tell({"ready": self.readiness.ready, "held": held(self)})


class Announcer(logging.Handler):
    """Tells the port, which the gateway only logs."""

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.search(r"listens on .* port (\d+)", record.getMessage()):
            tell({"port": int(found[1])})


def main() -> int:
    settings = load_config(os.environ)
    logs.setup("gateway", settings.log.level, settings.log.format, sys.stderr)
    logging.getLogger("gateway").addHandler(Announcer())
    gateway.Parts = WatchedParts  # type: ignore[assignment, misc]
    outbox = Outbox()
    return turns.run(gateway.serve(settings, outbox), turns.new_loop(outbox))


if __name__ == "__main__":
    sys.exit(main())
