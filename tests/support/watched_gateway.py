"""The gateway as a process that reports its state.

Settings come from the environment. The first line on stdout contains the port. Each SIGUSR1 prints another line: what
the gateway holds now. Run it as a module, with scripts/ and tests/ on PYTHONPATH. It is not part of the product.
"""

import asyncio
import json
import logging
import os
import re
import signal
import sys

import gateway
from config.loader import load_config
from config.settings import Config
from core import logs
from proxy.app import App
from transport import write_batching
from transport.write_batching import WriteBatcher


def held(app: App) -> dict[str, int]:
    """Count everything that must be released."""
    return {
        "slots": app.queue.active,
        "waiters": app.queue.queued,
        "requests": sum(session.request is not None for session in app.sessions),
        "client connections": len(app.sessions),
        "backend connections": len(app.pool),
        "tasks": len(asyncio.all_tasks()),
        "held bytes": app.memory.held_bytes,
        "relays": app.sessions.backend_slots,
        "public-only connections": sum(session.public_only for session in app.sessions),
    }


def report(value: object) -> None:
    print(json.dumps(value), flush=True)


class WatchedApp(App):
    """The gateway's app. It reports what it holds at each SIGUSR1."""

    def __init__(self, config: Config, *, batcher: WriteBatcher) -> None:
        super().__init__(config, batcher=batcher)
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._report)

    def _report(self) -> None:
        report({"ready": self.readiness.ready, "held": held(self)})


class Announcer(logging.Handler):
    """Reports the port, which the gateway only logs."""

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.search(r"listens on .* port (\d+)", record.getMessage()):
            report({"port": int(found[1])})


def main() -> int:
    settings = load_config(os.environ)
    logs.setup("gateway", settings.log.level, settings.log.format, sys.stderr)
    logging.getLogger("gateway").addHandler(Announcer())
    gateway.App = WatchedApp  # type: ignore[assignment, misc]
    batcher = WriteBatcher()
    return write_batching.run(gateway.serve(settings, batcher), write_batching.new_loop(batcher))


if __name__ == "__main__":
    sys.exit(main())
