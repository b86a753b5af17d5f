"""What is known of single cells: what is wrong today, and what a client decides for itself."""

Name = tuple[str, str]  # client, situation

_STRICT = "llama-server's events lack fields that the client requires: created_at and model, output_index"

# The client or llama-server is the reason. The test fails if such a cell is right: then its row must go.
EXPECTED: dict[Name, str] = {
    (
        "opencode",
        "quota",
    ): "opencode tries again after every 429, as late as Retry-After says, and shows nothing meanwhile",
    ("js-ai-sdk-responses", "stream"): _STRICT,
    ("js-ai-sdk-responses", "rate"): _STRICT,
    ("js-ai-sdk-responses", "queue-full"): _STRICT,
    ("js-ai-sdk-responses", "cold-start"): _STRICT,
    (
        "py-litellm-responses",
        "cut",
    ): "LiteLLM asks for a whole answer and only pretends to stream it: no reason fits in",
}

_EVERY_429 = "The client tries again after every 429, twice."
_FALLBACK = "It asks again without a stream if a stream has failed."
_SUMMARY = "It tries to shorten the conversation, which fails as well."

# How many requests a client sends at most, if that is its own decision.
ATTEMPTS: dict[Name, tuple[int, str]] = {
    ("codex", "wrong-key"): (6, "Codex tries again after every status except 400, five times."),
    ("js-ai-sdk-chat", "quota"): (3, _EVERY_429),
    ("js-ai-sdk-responses", "quota"): (3, _EVERY_429),
    ("opencode", "too-long"): (2, _SUMMARY),
    ("opencode", "too-long-late"): (2, _SUMMARY),
    ("claude-code", "too-long-late"): (2, _FALLBACK),
    ("codex", "too-long-late"): (2, "It begins a stream again that has failed, and is then told by the status."),
}

# The reason in a client's own words.
OWN_WORDS: dict[Name, str] = {
    ("claude-code", "wrong-key"): "Invalid API key",
    ("codex", "quota"): "Quota exceeded",
    ("codex", "too-long-late"): "ran out of room in the model's context window",
}
