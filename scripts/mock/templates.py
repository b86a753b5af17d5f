"""The answers of llama-server as templates, and how they are filled in.

Pure functions: JSON and server-sent events from the attributes of an object.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

Json = Any

# One template per line: the answer, the part of it, the name of the event if it has one, and its JSON.
#   opening   sent in one chunk together with the first delta
#   delta     one chunk per token; `timed` takes its place if the request sets timings_per_token
#   closing   sent in one chunk; `usage` takes its place if stream_options ask for it
#   end       the last event
#   whole     the answer without a stream
# $name is an attribute of the Generation. <name> is a fragment, defined by a line that begins with it. A line that
# begins with a space continues the previous line.
TEMPLATES = """
<usage>          "usage":{"completion_tokens":$completion_tokens,"prompt_tokens":$prompt_tokens,
                 "total_tokens":$total_tokens,"prompt_tokens_details":{"cached_tokens":$cached_tokens}}
<common>         "created":$created,"model":$model,"system_fingerprint":"mock","id":"chatcmpl-mock$serial"
<chunk>          <common>,"object":"chat.completion.chunk"
chat opening     {"choices":[{"finish_reason":null,"index":0,"delta":{"role":"assistant","content":null}}],<chunk>}
chat delta       {"choices":[{"finish_reason":null,"index":0,"delta":{"content":$word}}],<chunk>}
chat timed       {"choices":[{"finish_reason":null,"index":0,"delta":{"content":$word}}],<chunk>,"timings":$timings}
chat closing     {"choices":[{"finish_reason":$finish_reason,"index":0,"delta":{}}],<chunk>,"timings":$timings}
chat usage       {"choices":[{"finish_reason":$finish_reason,"index":0,"delta":{}}],<chunk>}
chat usage       {"choices":[],<chunk>,<usage>,"timings":$timings}
chat end         [DONE]
chat whole       {"choices":[{"finish_reason":$finish_reason,"index":0,"message":{"role":"assistant","content":$text}}],
                 <common>,"object":"chat.completion",<usage>,"timings":$timings}
<text>           <common>,"object":"text_completion"
text delta       {"choices":[{"text":$word,"index":0,"logprobs":null,"finish_reason":null}],<text>}
text closing     {"choices":[{"text":"","index":0,"logprobs":null,"finish_reason":$finish_reason}],<text>,<usage>,
                 "timings":$timings}
text end         [DONE]
text whole       {"choices":[{"text":$text,"index":0,"logprobs":null,"finish_reason":$finish_reason}],<text>,<usage>,
                 "timings":$timings}
<counts>         "tokens_predicted":$completion_tokens,"tokens_evaluated":$prompt_tokens
<final>          "tokens":[],"id_slot":$slot,"stop":true,"model":$model,<counts>,"generation_settings":
                 {"n_predict":$max_tokens},"prompt":$prompt,"has_new_line":false,"truncated":false,
                 "stop_type":$finish_reason,"stopping_word":"","tokens_cached":$total_tokens,"timings":$timings
native delta     {"index":0,"content":$word,"tokens":[$completion_tokens],"stop":false,"id_slot":-1,<counts>}
native closing   {"index":0,"content":"",<final>}
native whole     {"index":0,"content":$text,<final>}
<message>        "id":"chatcmpl-mock$serial","type":"message","role":"assistant","model":$model
<input>          "cache_read_input_tokens":$cached_tokens,"input_tokens":$uncached_tokens
messages opening message_start {"message":{<message>,"content":[],"stop_reason":null,"stop_sequence":null,
                 "usage":{<input>,"output_tokens":0}}}
messages opening content_block_start {"index":0,"content_block":{"type":"text","text":""}}
messages delta   content_block_delta {"index":0,"delta":{"type":"text_delta","text":$word}}
messages closing content_block_stop {"index":0}
messages closing message_delta {"delta":{"stop_reason":$finish_reason,"stop_sequence":null},
                 "usage":{"output_tokens":$completion_tokens}}
messages closing message_stop {}
messages whole   {<message>,"content":[{"type":"text","text":$text}],"stop_reason":$finish_reason,"stop_sequence":null,
                 "usage":{<input>,"output_tokens":$completion_tokens}}
<created>        {"response":{"id":"resp_mock$serial","object":"response","status":"in_progress"}}
<itemid>         "item_id":"msg_mock$serial"
<item>           "id":"msg_mock$serial","role":"assistant","type":"message"
<part>           {"type":"output_text","annotations":[],"logprobs":[],"text":$text}
<output>         {"content":[<part>],<item>,"status":"completed"}
<answer>         {"created_at":$created,"completed_at":$created,"id":"resp_mock$serial","model":$model,
                 "object":"response","output":[<output>],"status":"completed","usage":{"input_tokens":$prompt_tokens,
                 "output_tokens":$completion_tokens,"total_tokens":$total_tokens,
                 "input_tokens_details":{"cached_tokens":$cached_tokens}}}
responses opening response.created <created>
responses opening response.in_progress <created>
responses opening response.output_item.added {"item":{"content":[],<item>,"status":"in_progress"}}
responses opening response.content_part.added {<itemid>,"part":{"type":"output_text","text":""}}
responses delta   response.output_text.delta {<itemid>,"delta":$word}
responses closing response.output_text.done {<itemid>,"text":$text}
responses closing response.content_part.done {<itemid>,"part":<part>}
responses closing response.output_item.done {"item":<output>}
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

Templates = dict[str, dict[str, list[str]]]


def parse_templates(text: str) -> Templates:
    """Map answer and part to the templates of the part's events, with the fragments inserted."""
    fragments: dict[str, str] = {}
    templates: Templates = {}
    for line in re.sub(r"\n +", "", text).strip().split("\n"):
        name, rest = line.split(None, 1)
        rest = re.sub("<[a-z]+>", lambda match: fragments[match[0]], rest)
        if name.startswith("<"):
            fragments[name] = rest
        else:
            part, template = rest.split(None, 1)
            templates.setdefault(name, {}).setdefault(part, []).append(template)
    return templates


def fill(template: str, source: object) -> str:
    """Replace each $name by the attribute of source with that name, as JSON."""
    return re.sub(r"\$([a-z_]+)", lambda match: to_json(getattr(source, match[1])), template)


def to_json(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def to_events(templates: Sequence[str], source: object) -> bytes:
    return "".join(fill(to_event(template), source) for template in templates).encode()


def to_event(template: str) -> str:
    """Make a server-sent event. If it has a name, the name is also the `type` in its JSON."""
    if template.startswith(("{", "[")):
        return f"data: {template}\n\n"
    name, members = template.split(" {", 1)
    return f'event: {name}\ndata: {{"type":"{name}"{members if members == "}" else "," + members}\n\n'
