"""What the mock backend says: llama-server's wording of every answer, and the words and counts that go into it.

Pure but for the clock that timings are read from: request bodies in, JSON and events out. No socket, no slot.
"""

import base64
import hashlib
import json
import math
import re
import struct
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Json = Any
Body = Mapping[str, Json]
Answerer = Callable[[Body], Json]

OPENING = "This is the mock backend: no model is loaded. Your prompt of {} tokens has the checksum {:08x}."
FILLER = "These words mean nothing … they are here to be counted, timed and relayed."
LENGTHS = ("max_completion_tokens", "max_tokens", "max_output_tokens", "n_predict")

# The wire, line by line: which answer, which part of it, the event's name if it has one, its JSON. A stream is opening
# and first delta in one chunk, a chunk a delta, the closing in one chunk, then the end. `usage` is the closing where
# stream_options ask for it, `timed` the delta where timings_per_token does. $name stands for an attribute of the
# Generation, <name> for a fragment defined here, and a line that begins with a blank continues the one before.
WIRE = """
<used>           "usage":{"completion_tokens":$made,"prompt_tokens":$prompted,"total_tokens":$total,
                 "prompt_tokens_details":{"cached_tokens":$cached}}
<named>          "created":$created,"model":$model,"system_fingerprint":"mock","id":"chatcmpl-mock$serial"
<chunk>          <named>,"object":"chat.completion.chunk"
chat opening     {"choices":[{"finish_reason":null,"index":0,"delta":{"role":"assistant","content":null}}],<chunk>}
chat delta       {"choices":[{"finish_reason":null,"index":0,"delta":{"content":$word}}],<chunk>}
chat timed       {"choices":[{"finish_reason":null,"index":0,"delta":{"content":$word}}],<chunk>,"timings":$timings}
chat closing     {"choices":[{"finish_reason":$reason,"index":0,"delta":{}}],<chunk>,"timings":$timings}
chat usage       {"choices":[{"finish_reason":$reason,"index":0,"delta":{}}],<chunk>}
chat usage       {"choices":[],<chunk>,<used>,"timings":$timings}
chat end         [DONE]
chat whole       {"choices":[{"finish_reason":$reason,"index":0,"message":{"role":"assistant","content":$text}}],
                 <named>,"object":"chat.completion",<used>,"timings":$timings}
<text>           <named>,"object":"text_completion"
text delta       {"choices":[{"text":$word,"index":0,"logprobs":null,"finish_reason":null}],<text>}
text closing     {"choices":[{"text":"","index":0,"logprobs":null,"finish_reason":$reason}],<text>,<used>,
                 "timings":$timings}
text end         [DONE]
text whole       {"choices":[{"text":$text,"index":0,"logprobs":null,"finish_reason":$reason}],<text>,<used>,
                 "timings":$timings}
<counts>         "tokens_predicted":$made,"tokens_evaluated":$prompted
<settled>        "tokens":[],"id_slot":$slot,"stop":true,"model":$model,<counts>,"generation_settings":
                 {"n_predict":$limit},"prompt":$prompt,"has_new_line":false,"truncated":false,"stop_type":$reason,
                 "stopping_word":"","tokens_cached":$total,"timings":$timings
native delta     {"index":0,"content":$word,"tokens":[$made],"stop":false,"id_slot":-1,<counts>}
native closing   {"index":0,"content":"",<settled>}
native whole     {"index":0,"content":$text,<settled>}
<message>        "id":"chatcmpl-mock$serial","type":"message","role":"assistant","model":$model
<input>          "cache_read_input_tokens":$cached,"input_tokens":$fresh
messages opening message_start {"message":{<message>,"content":[],"stop_reason":null,"stop_sequence":null,
                 "usage":{<input>,"output_tokens":0}}}
messages opening content_block_start {"index":0,"content_block":{"type":"text","text":""}}
messages delta   content_block_delta {"index":0,"delta":{"type":"text_delta","text":$word}}
messages closing content_block_stop {"index":0}
messages closing message_delta {"delta":{"stop_reason":$reason,"stop_sequence":null},"usage":{"output_tokens":$made}}
messages closing message_stop {}
messages whole   {<message>,"content":[{"type":"text","text":$text}],"stop_reason":$reason,"stop_sequence":null,
                 "usage":{<input>,"output_tokens":$made}}
<begun>          {"response":{"id":"resp_mock$serial","object":"response","status":"in_progress"}}
<of>             "item_id":"msg_mock$serial"
<item>           "id":"msg_mock$serial","role":"assistant","type":"message"
<part>           {"type":"output_text","annotations":[],"logprobs":[],"text":$text}
<said>           {"content":[<part>],<item>,"status":"completed"}
<answer>         {"created_at":$created,"completed_at":$created,"id":"resp_mock$serial","model":$model,
                 "object":"response","output":[<said>],"status":"completed","usage":{"input_tokens":$prompted,
                 "output_tokens":$made,"total_tokens":$total,"input_tokens_details":{"cached_tokens":$cached}}}
responses opening response.created <begun>
responses opening response.in_progress <begun>
responses opening response.output_item.added {"item":{"content":[],<item>,"status":"in_progress"}}
responses opening response.content_part.added {<of>,"part":{"type":"output_text","text":""}}
responses delta   response.output_text.delta {<of>,"delta":$word}
responses closing response.output_text.done {<of>,"text":$text}
responses closing response.content_part.done {<of>,"part":<part>}
responses closing response.output_item.done {"item":<said>}
responses closing response.completed {"response":<answer>,"timings":$timings}
responses whole   <answer>
<data>           [{"id":$model,"aliases":[$model],"object":"model","created":$created,"owned_by":"llamacpp"}]
/health whole    {"status":"ok"}
/v1/models whole {"models":[{"name":$model,"model":$model,"type":"model"}],"object":"list","data":<data>}
/props whole     {"default_generation_settings":{"params":{},"n_ctx":16384},"total_slots":$slots,"model_alias":$model,
                 "model_path":$model,"modalities":{"vision":false,"audio":false},"endpoint_slots":true,
                 "endpoint_props":false,"endpoint_metrics":true,"build_info":"mock","is_sleeping":false}
/lora-adapters   whole []
"""


class Refusal(Exception):
    """An answer in llama-server's error shape: status, type, message."""


def bad_request(message: str) -> Refusal:
    return Refusal(400, "invalid_request_error", message)


# Filling in the wire's lines


def parse_wire(text: str) -> dict[str, dict[str, list[str]]]:
    """Map answer and part to the templates of its events, fragments put in."""
    fragments: dict[str, str] = {}
    wire: dict[str, dict[str, list[str]]] = {}
    for line in re.sub(r"\n +", "", text).strip().split("\n"):
        name, rest = line.split(None, 1)
        rest = re.sub("<[a-z]+>", lambda match: fragments[match[0]], rest)
        if name.startswith("<"):
            fragments[name] = rest
        else:
            part, template = rest.split(None, 1)
            wire.setdefault(name, {}).setdefault(part, []).append(template)
    return wire


def fill(template: str, source: object) -> str:
    """Put the source's attributes, as JSON, in the place of their names."""
    return re.sub(r"\$([a-z]+)", lambda match: to_json(getattr(source, match[1])), template)


def to_json(payload: Json) -> str:
    return json.dumps(payload, ensure_ascii=False, separators=(",", ":"))


def to_events(templates: Sequence[str], source: object) -> bytes:
    return "".join(fill(to_event(template), source) for template in templates).encode()


def to_event(template: str) -> str:
    """Frame one event; one that has a name bears it as its type, too."""
    if template.startswith(("{", "[")):
        return f"data: {template}\n\n"
    name, members = template.split(" {", 1)
    return f'event: {name}\ndata: {{"type":"{name}"{members if members == "}" else "," + members}\n\n'


# Prompts


def require(body: Body, name: str) -> Json:
    if body.get(name) is None:
        raise bad_request(f"'{name}' is required")
    return body[name]


def require_list(body: Body, name: str) -> list[Json]:
    if not isinstance(given := require(body, name), list):
        raise bad_request(f"Expected '{name}' to be an array")
    return given


def chat_prompt(turns: Sequence[Json], system: Json) -> str:
    """Render messages as a chatml template does."""
    turns = [{"role": "system", "content": system}, *turns] if system else turns
    said = ((turn.get("role"), text_of(turn.get("content"))) for turn in turns if isinstance(turn, dict))
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in said) + "<|im_start|>assistant\n"


def text_of(content: Json) -> str:
    """Flatten a message's content: a text, or parts of which those with a text count."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content or "")


def prompt_of_chat(body: Body) -> Json:
    return chat_prompt(require_list(body, "messages"), body.get("system"))


def prompt_of_input(body: Body) -> Json:
    given = require(body, "input")
    turns = given if isinstance(given, list) else [{"role": "user", "content": given}]
    return chat_prompt(turns, body.get("instructions"))


def prompt_of_text(body: Body) -> Json:
    return require(body, "prompt")


def prompt_of_infill(body: Body) -> Json:
    return f"{require(body, 'input_prefix')}{require(body, 'input_suffix')}"


def count_tokens(prompt: Json) -> int:
    """Count a text's bytes and the start token; a list of token ids as it is."""
    return len(prompt) if isinstance(prompt, list) else len(str(prompt).encode()) + 1


# The words that answer them


def asked_length(body: Body) -> int | None:
    """Tell how many tokens the request allows, or None; none at all is one, as with llama-server."""
    asked = [body[name] for name in LENGTHS if isinstance(body.get(name), int) and body[name] >= 0]
    return max(1, asked[0]) if asked else None


@dataclass
class Generation:
    """One answer as it grows; times are monotonic seconds. What it makes is a matter of the prompt alone."""

    prompt: Json
    model: str
    serial: int
    limit: int
    reason: str
    cached: int = 0
    slot: int = 0
    words: list[str] = field(default_factory=list)
    started_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0

    def __post_init__(self) -> None:
        self.created = int(time.time())
        self.prompted = count_tokens(self.prompt)
        self.cached = max(0, min(self.cached, self.prompted - 1))
        self._opening = OPENING.format(self.prompted, zlib.crc32(str(self.prompt).encode())).split()
        self._filler = FILLER.split()

    def next_word(self) -> None:
        """Say the next word; its token is made at this moment."""
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
    def made(self) -> int:
        return len(self.words)

    @property
    def total(self) -> int:
        return self.made + self.prompted

    @property
    def fresh(self) -> int:
        return self.prompted - self.cached

    @property
    def timings(self) -> dict[str, float]:
        """Reckon as llama-server does: the first token belongs to the prompt's time."""
        prompt_ms, predicted_ms = self.prompt_s * 1000, (self.last_s - self.first_s) * 1000
        return {
            "cache_n": self.cached,
            **timings_of("prompt", self.fresh, self.fresh, round(prompt_ms, 3)),
            **timings_of("predicted", self.made, self.made - 1, round(predicted_ms, 3)),
        }

    @property
    def prompt_s(self) -> float:
        return self.first_s - self.started_s


def timings_of(phase: str, tokens: int, steps: int, spent_ms: float) -> dict[str, float]:
    return {
        f"{phase}_n": tokens,
        f"{phase}_ms": spent_ms,
        f"{phase}_per_token_ms": spent_ms / max(1, steps),
        f"{phase}_per_second": steps * 1000 / spent_ms if spent_ms else 0.0,
    }


# Answers that take no generation


def tokenize(body: Body) -> Json:
    return {"tokens": list(str(body.get("content", "")).encode())}


def detokenize(body: Body) -> Json:
    tokens = require_list({"tokens": [], **body}, "tokens")
    octets = [token for token in tokens if isinstance(token, int) and 0 <= token < 256]
    return {"content": bytes(octets).decode("utf-8", "replace")}


def apply_template(body: Body) -> Json:
    return {"prompt": prompt_of_chat(body)}


def embed_as_before(body: Body) -> Json:
    """Answer /embedding, which predates OpenAI's shape."""
    return [{"index": 0, "embedding": [vector_of(require(body, "content"))]}]


def refusing(status: int, kind: str, message: str) -> Answerer:
    """Make the answer of a route that a llama-server without further flags refuses."""

    def refuse(_body: Body) -> Json:
        raise Refusal(status, kind, message)

    return refuse


def counting(prompt_of: Callable[[Body], Json], **more: str) -> Answerer:
    """Make the answer to a route that counts what prompt_of renders."""
    return lambda body: {"input_tokens": count_tokens(prompt_of(body)), **more}


def embed(body: Body) -> Json:
    given = require(body, "input")
    inputs = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    rows = enumerate(map(vector_of, inputs))
    data: list[dict[str, Json]] = [{"embedding": row, "index": index, "object": "embedding"} for index, row in rows]
    if body.get("encoding_format") == "base64":
        for each in data:
            packed = struct.pack("<64f", *each["embedding"])
            each.update(embedding=base64.b64encode(packed).decode(), encoding_format="base64")
    return {"model": "mock", "object": "list", "usage": usage_of(inputs), "data": data}


def rerank(body: Body) -> Json:
    """Score by digest, and name the best document first."""
    query, documents = require(body, "query"), require_list(body, "documents")
    pairs = [f"{query}{document}" for document in documents]
    rows = [{"index": index, "relevance_score": vector_of(pair)[0]} for index, pair in enumerate(pairs)]
    rows.sort(key=lambda row: row["relevance_score"], reverse=True)
    wanted = body["top_n"] if isinstance(body.get("top_n"), int) else len(rows)
    return {"model": "mock", "object": "list", "usage": usage_of(pairs), "results": rows[:wanted]}


def vector_of(text: Json) -> list[float]:
    """Make a vector of unit length and 64 dimensions out of a text's digest."""
    digest = [octet - 127.5 for octet in hashlib.sha512(str(text).encode()).digest()]
    return [value / math.hypot(*digest) for value in digest]


def usage_of(inputs: Sequence[Json]) -> Json:
    tokens = sum(map(count_tokens, inputs))
    return {"prompt_tokens": tokens, "total_tokens": tokens}


# Routes: GENERATING word by word, COMPUTING an answer on a slot, CHEAP without one, PAGES for GET


@dataclass(frozen=True)
class Route:
    """Which wording it answers in, what its prompt is, and what it calls an end of its own and one by the limit."""

    answer: str
    prompt_of: Callable[[Body], Json]
    finished: str = "stop"
    cut: str = "length"


CHAT = Route("chat", prompt_of_chat)
NATIVE = Route("native", prompt_of_text, "eos", "limit")
RESPONSES = Route("responses", prompt_of_input)
GENERATING = {
    "/v1/chat/completions": CHAT,
    "/chat/completions": CHAT,
    "/v1/completions": Route("text", prompt_of_text),
    "/completions": NATIVE,
    "/completion": NATIVE,
    "/infill": Route("native", prompt_of_infill, "eos", "limit"),
    "/v1/messages": Route("messages", prompt_of_chat, "end_turn", "max_tokens"),
    "/v1/responses": RESPONSES,
    "/responses": RESPONSES,
}
COMPUTING: dict[str, Answerer] = {
    "/v1/embeddings": embed,
    "/embeddings": embed,
    "/embedding": embed_as_before,
    "/v1/rerank": rerank,
    "/rerank": rerank,
    "/v1/reranking": rerank,
    "/reranking": rerank,
}
COUNT_CHAT = counting(prompt_of_chat, object="response.input_tokens")
COUNT_INPUT = counting(prompt_of_input, object="response.input_tokens")
CHEAP: dict[str, Answerer] = {
    "/tokenize": tokenize,
    "/detokenize": detokenize,
    "/apply-template": apply_template,
    "/v1/chat/completions/input_tokens": COUNT_CHAT,
    "/chat/completions/input_tokens": COUNT_CHAT,
    "/v1/responses/input_tokens": COUNT_INPUT,
    "/responses/input_tokens": COUNT_INPUT,
    "/v1/messages/count_tokens": counting(prompt_of_chat),
    "/v1/chat/completions/control": refusing(400, "invalid_request_error", "missing completion id"),
    "/props": refusing(501, "not_supported_error", "Start it with `--props`"),
    "/slots/0": refusing(501, "not_supported_error", "Start it with `--slot-save-path`"),
    "/lora-adapters": lambda body: {"success": True},
}
PAGES = {
    "/health": "/health",
    "/v1/health": "/health",
    "/v1/models": "/v1/models",
    "/models": "/v1/models",
    "/props": "/props",
    "/lora-adapters": "/lora-adapters",
}
PUBLIC = ("/health", "/v1/health")
