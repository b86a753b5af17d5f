"""The board's reader over parts that a test sets."""

from typing import Any

from accounting.record_batch import RecordBatch
from accounting.request_history import RequestHistory
from accounting.request_record import RequestRecord
from accounting.token_estimates import TokenEstimator
from policy.fair_queue import FairQueue
from proxy.board import BoardReader, BoardSources
from proxy.lifecycle import Lifecycle
from support.clock import Clock
from support.memory_gateway import ScriptedReadiness


class BoardParts:
    """A reader and what it reads."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.wall_s = 1_000_000.0
        self.readiness: Any = ScriptedReadiness()
        self.lifecycle = Lifecycle()
        self.queue = FairQueue(4, 0, self.clock)
        self.records: list[tuple[RequestRecord, int]] = []
        self.history = RequestHistory()
        self.flushes = 0
        sources = BoardSources(
            readiness=self.readiness,
            lifecycle=self.lifecycle,
            queue=self.queue,
            records=lambda: self.records,
            connections=lambda: 7,
            history=self.history,
            flush_accounts=self._flush,
            models=lambda: [("tiny", self.readiness.state)],
            version="1.2.3",
            clock=self.clock,
            wall_clock=lambda: self.wall_s + self.clock(),
        )
        self.reader = BoardReader(sources)

    def _flush(self) -> None:
        self.flushes += 1

    def end(self, *records: RequestRecord) -> None:
        self.history.add(RecordBatch(records, TokenEstimator()))
