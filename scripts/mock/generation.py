"""A generated answer: its words and its timings. The only input besides the request is the clock."""

import time
import zlib
from dataclasses import dataclass, field

from mock.request_bodies import count_tokens
from mock.templates import Json

OPENING = "This is the mock backend: no model is loaded. Your prompt of {} tokens has the checksum {:08x}."
FILLER = "These words mean nothing … they are here to be counted, timed and relayed."


@dataclass
class Generation:
    """One answer while it is generated. The text depends only on the prompt. Times are monotonic seconds."""

    prompt: Json
    model: str
    serial: int
    max_tokens: int
    finish_reason: str
    cached_tokens: int = 0
    slot: int = 0
    words: list[str] = field(default_factory=list)
    started_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0

    def __post_init__(self) -> None:
        self.created = int(time.time())
        self.prompt_tokens = count_tokens(self.prompt)
        self.cached_tokens = max(0, min(self.cached_tokens, self.prompt_tokens - 1))
        self._opening = OPENING.format(self.prompt_tokens, zlib.crc32(str(self.prompt).encode())).split()
        self._filler = FILLER.split()

    def next_word(self) -> None:
        """Generate the next word, which is one token."""
        past = len(self.words) - len(self._opening)
        word = self._opening[past] if past < 0 else self._filler[past % len(self._filler)]
        self.words.append(f" {word}" if self.words else word)
        self.last_s = time.monotonic()
        self.first_s = self.first_s or self.last_s

    @property
    def word(self) -> str:
        return self.words[-1]

    @property
    def text(self) -> str:
        return "".join(self.words)

    @property
    def completion_tokens(self) -> int:
        return len(self.words)

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def uncached_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens

    @property
    def timings(self) -> dict[str, float]:
        """Timings as llama-server computes them: the first token belongs to the time of the prompt."""
        prompt_ms, predicted_ms = self.prompt_s * 1000, (self.last_s - self.first_s) * 1000
        return {
            "cache_n": self.cached_tokens,
            **timings_of("prompt", self.uncached_tokens, self.uncached_tokens, round(prompt_ms, 3)),
            **timings_of("predicted", self.completion_tokens, self.completion_tokens - 1, round(predicted_ms, 3)),
        }

    @property
    def prompt_s(self) -> float:
        return self.first_s - self.started_s


def timings_of(phase: str, tokens: int, steps: int, elapsed_ms: float) -> dict[str, float]:
    return {
        f"{phase}_n": tokens,
        f"{phase}_ms": elapsed_ms,
        f"{phase}_per_token_ms": elapsed_ms / max(1, steps),
        f"{phase}_per_second": steps * 1000 / elapsed_ms if elapsed_ms else 0.0,
    }
