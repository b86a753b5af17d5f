"""What an operator should know besides the code's tables: when to change a setting, what to do about an error.

generate.py writes it into the pages next to what the code says. Every setting, error, exit status, metric and
access-log field has its entry here; tests/test_docs.py names those that are missing.
"""

from typing import NamedTuple


class SettingAdvice(NamedTuple):
    """When to change a setting, and an environment that sets it, one NAME=value per line."""

    when: str
    example: str


class Remedy(NamedTuple):
    """What leads to an error, and what to do about it."""

    cause: str
    remedy: str


# fmt: off
# Title of a group of settings → what it is about, and its settings in the order of the page.
SETTING_GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Addresses": (
        "The addresses and ports of the gateway, the health server and llama-server.",
        ("HOST", "PORT", "PORT_HEALTH", "PORT_BACKEND", "BACKEND_HOST", "BACKEND_API_KEY", "TLS_CERT_FILE",
         "TLS_KEY_FILE", "TRUSTED_PROXIES", "CORS_ORIGINS", "UI"),
    ),
    "Model and llama-server": (
        "The model, its source, and how llama-server runs it.",
        ("MODEL_PATH", "MODEL_NAME", "MODELS_DIR", "MODEL_URL", "MODEL_SHA256", "MODEL_HF", "HF_TOKEN",
         "MODEL_FETCH_TIMEOUT", "MODEL_FETCH_MIN_RATE", "MODEL_LOAD_TIMEOUT",
         "NGL", "CTX", "PARALLEL", "THREADS", "PROMPT_CACHE", "EXTRA_ARGS", "LLAMA_BIN", "MOCK_BACKEND"),
    ),
    "Several models": (
        "Several models in one llama-server. [MODELS.md](MODELS.md) shows how.",
        ("MODELS", "MODELS_PRESET", "MODELS_MAX", "MODELS_PRELOAD", "DEFAULT_MODEL", "MODEL_ALIASES",
         "MODEL_SWITCH_AFTER", "MODELS_IDLE_UNLOAD"),
    ),
    "Keys and permissions": (
        "Which requests need a key, and what a key may do. The keys themselves are in the keys file:"
        " see [AUTHENTICATION.md](AUTHENTICATION.md).",
        ("AUTH_ENABLED", "AUTH_KEYS_FILE", "API_KEYS", "KEYS_WATCH_SECONDS", "MAX_REQUESTS_PER_MINUTE",
         "METRICS_AUTH_ENABLED",
         "ALLOW_PATHS", "ADMIN_ROUTES"),
    ),
    "Queue and waiting": (
        "How many requests run and wait, and what a waiting client receives.",
        ("MAX_CONCURRENT_REQUESTS", "MAX_QUEUE_SIZE", "QUEUE_TIMEOUT", "COLD_START_WAIT", "SSE_HEARTBEAT",
         "MAX_CHEAP_REQUESTS", "MAX_CHEAP_REQUESTS_PER_MINUTE", "MAX_CHEAP_BODY_SIZE"),
    ),
    "Timeouts": (
        "How long each part of a request may take.",
        ("REQUEST_TIMEOUT", "STREAM_IDLE_TIMEOUT", "MAX_REQUEST_DURATION", "CLIENT_HEADER_TIMEOUT",
         "CLIENT_BODY_TIMEOUT", "CLIENT_BODY_MIN_RATE", "KEEPALIVE_TIMEOUT", "BACKEND_CONNECT_TIMEOUT",
         "HEALTH_TIMEOUT"),
    ),
    "Sizes": (
        "How much one client, and all of them together, may send.",
        ("MAX_CONNECTIONS", "MAX_REQUEST_BODY_SIZE", "MAX_BUFFERED_BYTES", "MAX_JSON_DEPTH", "MAX_BATCH_SIZE",
         "MEMBER_RULES", "MAX_HEADERS", "MAX_HEADER_LINE_SIZE",
         "MAX_REQUEST_HEADER_SIZE", "MAX_REQUEST_LINE_SIZE", "MAX_RESPONSE_HEADER_SIZE"),
    ),
    "Data, logs and usage": (
        "What is written, and to which folder.",
        ("DATA_DIR", "ACCESS_LOG", "LOG_FORMAT", "LOG_LEVEL", "LOG_DIR", "LOG_NAME", "WORKER_TYPE", "INSTANCE_ID",
         "USAGE_FILE", "GPU_COST_PER_HOUR", "METRICS_BACKEND_SECONDS"),
    ),
    "Supervision": (
        "Start, restart, drain and stop.",
        ("DRAIN_TIMEOUT", "WEDGE_TIMEOUT", "MAX_RESTARTS", "IDLE_STOP_SECONDS", "ON_IDLE", "ON_IDLE_TIMEOUT",
         "DEBUG_SHELL",
         "STATE_FILE"),
    ),
}

SETTINGS: dict[str, SettingAdvice] = {
    "HOST": SettingAdvice(
        "Set it to 127.0.0.1 if a proxy on the same machine is the only client, and to `::` for IPv6.",
        "HOST=127.0.0.1"),
    "PORT": SettingAdvice("Change it if the port is taken, or to 443 if the gateway serves TLS itself.", "PORT=8443"),
    "PORT_HEALTH": SettingAdvice("Change it if the port is taken, or if the platform probes another one.",
                                 "PORT_HEALTH=9001"),
    "PORT_BACKEND": SettingAdvice("Change it if another process of the machine uses the port.", "PORT_BACKEND=18080"),
    "BACKEND_HOST": SettingAdvice(
        "Set a Unix socket on a machine with other users: one of them can take a port.",
        "BACKEND_HOST=/var/lib/llama-gateway/backend.sock"),
    "BACKEND_API_KEY": SettingAdvice(
        "Set it only if another program, such as the benchmark, must reach llama-server directly.",
        "BACKEND_API_KEY=gateway-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"),
    "PROMPT_CACHE": SettingAdvice(
        "Set it to `private` if keys do not trust each other. [ISOLATION.md](ISOLATION.md) has what that costs.",
        "PROMPT_CACHE=private"),
    "TLS_CERT_FILE": SettingAdvice(
        "Set it if nothing in front of the gateway ends TLS: without it keys and prompts are sent unencrypted.",
        "TLS_CERT_FILE=/etc/llama-gateway/fullchain.pem\nTLS_KEY_FILE=/etc/llama-gateway/privkey.pem"),
    "TLS_KEY_FILE": SettingAdvice(
        "Set it together with TLS_CERT_FILE. The service's user must be able to read it.",
        "TLS_CERT_FILE=/etc/llama-gateway/fullchain.pem\nTLS_KEY_FILE=/etc/llama-gateway/privkey.pem"),
    "TRUSTED_PROXIES": SettingAdvice(
        "Set it to the address of the load balancer or reverse proxy in front: logs and `from=` then see the client.",
        "TRUSTED_PROXIES=10.0.0.5"),
    "CORS_ORIGINS": SettingAdvice(
        "List the origins of your own web pages if they call the gateway from the browser. Give each visitor a key of"
        " their own, or put a server between: a key in a page is public.", "CORS_ORIGINS=https://app.example"),
    "UI": SettingAdvice(
        "Turn it off if only programs call the gateway: / is then one line of text, there is no board, and /props is an"
        " operator's. See [UI.md](UI.md).", "UI=off"),
    "MODEL_PATH": SettingAdvice("Set it if the model is already on the machine.", "MODEL_PATH=/models/my-model.gguf"),
    "MODEL_NAME": SettingAdvice(
        "Set it if all models are in one folder and only the name changes; with MODEL_URL it names the download.",
        "MODELS_DIR=/models\nMODEL_NAME=my-model.gguf"),
    "MODELS_DIR": SettingAdvice("Set it to the volume that has room for the models.", "MODELS_DIR=/mnt/models"),
    "MODEL_URL": SettingAdvice(
        "Set it on machines that begin empty. The download is resumed after a cut; the file stays on the volume.",
        "MODEL_URL=https://models.example/my-model.gguf"),
    "MODEL_SHA256": SettingAdvice(
        "Set it always with MODEL_URL: a damaged or exchanged file is then refused before it is loaded.",
        "MODEL_URL=https://models.example/my-model.gguf\n"
        "MODEL_SHA256=e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
    "MODEL_HF": SettingAdvice(
        "Set it to let llama-server download the model from Hugging Face itself. `HF_TOKEN` is passed on.",
        "MODEL_HF=ggml-org/gemma-3-1b-it-GGUF:Q4_K_M"),
    "HF_TOKEN": SettingAdvice(
        "Set it for gated or private models of Hugging Face. Prefer `HF_TOKEN_FILE`, which no list of processes shows.",
        "HF_TOKEN=hf_0123456789abcdef"),
    "MODEL_FETCH_TIMEOUT": SettingAdvice(
        "Lower it if the platform should try another machine soon; raise it for networks that fail for longer.",
        "MODEL_FETCH_TIMEOUT=1800"),
    "MODEL_FETCH_MIN_RATE": SettingAdvice(
        "Lower it on a link that is slower than that for long; raise it if a new connection is often faster.",
        "MODEL_FETCH_MIN_RATE=1MiB"),
    "MODEL_LOAD_TIMEOUT": SettingAdvice(
        "Set it if a load that hangs must end the container, so that the platform starts another one.",
        "MODEL_LOAD_TIMEOUT=1800"),
    "NGL": SettingAdvice(
        "Lower it if the model does not fit the GPU's memory; 0 uses the CPU only. See [SIZING.md](SIZING.md).",
        "NGL=20"),
    "CTX": SettingAdvice(
        "Raise it for long prompts, lower it if the GPU's memory is too small. With PARALLEL it is divided"
        " among the slots, without it they share it: see [SIZING.md](SIZING.md).",
        "CTX=32768"),
    "PARALLEL": SettingAdvice(
        "Set it to the number of answers that are to be generated at the same time. Each slot has CTX/PARALLEL tokens."
        " Without it long requests can end each other: see [SIZING.md](SIZING.md).",
        "PARALLEL=4"),
    "THREADS": SettingAdvice(
        "Set it to less than the number of cores if llama-server runs on the CPU: the gateway needs some time too.",
        "THREADS=6"),
    "EXTRA_ARGS": SettingAdvice(
        "Set it for every other option of llama-server, such as a LoRA adapter, embeddings or a chat template.",
        "EXTRA_ARGS=--embeddings --pooling mean"),
    "LLAMA_BIN": SettingAdvice("Set it if llama-server is not on the PATH.", "LLAMA_BIN=/opt/llama.cpp/llama-server"),
    "MOCK_BACKEND": SettingAdvice(
        "Set it to true to try keys, clients and probes without a model. Answers are made up.", "MOCK_BACKEND=true"),
    "MODELS": SettingAdvice(
        "Set it to `router` to serve a chat and an embedding model, or more models than fit the GPU at once.",
        "MODELS=router\nMODELS_DIR=/mnt/models"),
    "MODELS_PRESET": SettingAdvice(
        "Set it if models need arguments of their own, such as `embeddings` or a context size.",
        "MODELS=router\nMODELS_PRESET=/mnt/models/models.ini"),
    "MODELS_MAX": SettingAdvice(
        "Raise it to the number of models that fit the GPU's memory together: there are no swaps among them.",
        "MODELS=router\nMODELS_MAX=2"),
    "MODELS_PRELOAD": SettingAdvice(
        "Name the models that must answer as soon as the service is ready; others wait for their first request.",
        "MODELS=router\nMODELS_MAX=2\nMODELS_PRELOAD=chat,embed"),
    "DEFAULT_MODEL": SettingAdvice(
        "Set it if clients do not name a model, which llama-server with one model does not ask for.",
        "MODELS=router\nDEFAULT_MODEL=chat"),
    "MODEL_ALIASES": SettingAdvice(
        "Set it for clients that ask for a model of another vendor, and to exchange a model behind one name.",
        "MODELS=router\nMODEL_ALIASES=gpt-4o=qwen3-8b,text-embedding-3-small=embed"),
    "MODEL_SWITCH_AFTER": SettingAdvice(
        "Raise it if loading a model takes long, so that more requests are served between two swaps.",
        "MODELS=router\nMODEL_SWITCH_AFTER=120"),
    "MODELS_IDLE_UNLOAD": SettingAdvice(
        "Set it if other programs need the GPU's memory in the meantime; the next request waits for a load.",
        "MODELS=router\nMODELS_IDLE_UNLOAD=900"),
    "AUTH_ENABLED": SettingAdvice(
        "Set it to false only if something else checks every request, or if only you can reach the address.",
        "AUTH_ENABLED=false"),
    "AUTH_KEYS_FILE": SettingAdvice("Set it if the keys come from a mounted secret.",
                                    "AUTH_KEYS_FILE=/etc/llama-keys/api_keys.txt"),
    "API_KEYS": SettingAdvice(
        "Set it on machines that begin empty, such as RunPod's and Vast.ai's: it hands in the first keys."
        " `key_mgmt.py hash --line --name NAME` makes a line from a key.",
        "API_KEYS=alice:sha256$9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08:120"),
    "KEYS_WATCH_SECONDS": SettingAdvice("Set it to 0 if a deployment tool sends SIGHUP after each change.",
                                        "KEYS_WATCH_SECONDS=0"),
    "MAX_REQUESTS_PER_MINUTE": SettingAdvice(
        "Raise it if agents send many short requests; a key's own limit goes first.", "MAX_REQUESTS_PER_MINUTE=600"),
    "METRICS_AUTH_ENABLED": SettingAdvice(
        "Set it to true if strangers reach the port, and must see nothing; to false if only trusted machines do, and"
        " the scraper has no key.",
        "METRICS_AUTH_ENABLED=true"),
    "ALLOW_PATHS": SettingAdvice(
        "Add a route of a newer llama-server that the gateway does not know yet. Its requests take as many slots as"
        " any member that counts on a known route asks for (`n`, or the longest list of `prompt`, `input`, `content`,"
        " `documents` or `texts`), and `parallel=` bounds them. A key's `max_tokens` is not applied.",
        "ALLOW_PATHS=/v1/new-route"),
    "ADMIN_ROUTES": SettingAdvice(
        "Set it to true if operators change adapters or models while the server runs.", "ADMIN_ROUTES=true"),
    "MAX_CONCURRENT_REQUESTS": SettingAdvice(
        "Lower it to keep slots free, for example for another program that uses llama-server directly.",
        "MAX_CONCURRENT_REQUESTS=2"),
    "MAX_QUEUE_SIZE": SettingAdvice(
        "Lower it if clients should get 503 soon and try another worker; raise it for batch jobs. If the queue is full,"
        " the newest request of the key that has the most waiting ones gets the 503, so no key can fill the queue for"
        " the others.",
        "MAX_QUEUE_SIZE=20"),
    "QUEUE_TIMEOUT": SettingAdvice(
        "Set it if an answer that begins late is of no use. Times like this are looked at every 0.25 s.",
        "QUEUE_TIMEOUT=60"),
    "COLD_START_WAIT": SettingAdvice(
        "Set it to 0 if clients must get 503 at once while the model loads; raise it for slow volumes.",
        "COLD_START_WAIT=600"),
    "SSE_HEARTBEAT": SettingAdvice(
        "Lower it if a proxy on the way closes connections that are silent for less than 15 s.", "SSE_HEARTBEAT=5"),
    "MAX_CHEAP_REQUESTS": SettingAdvice(
        "Raise it on a machine with many cores, if clients count tokens before each request.", "MAX_CHEAP_REQUESTS=4"),
    "MAX_CHEAP_REQUESTS_PER_MINUTE": SettingAdvice(
        "Raise it if agents of one key count tokens more often.", "MAX_CHEAP_REQUESTS_PER_MINUTE=2000"),
    "MAX_CHEAP_BODY_SIZE": SettingAdvice(
        "Raise it if longer texts are tokenized in one request.", "MAX_CHEAP_BODY_SIZE=16MiB"),
    "REQUEST_TIMEOUT": SettingAdvice(
        "Raise it if clients that do not stream ask for long answers; lower it below the platform's own limit.",
        "REQUEST_TIMEOUT=1800"),
    "STREAM_IDLE_TIMEOUT": SettingAdvice(
        "Lower it to notice a llama-server that hangs in the middle of an answer sooner.", "STREAM_IDLE_TIMEOUT=60"),
    "MAX_REQUEST_DURATION": SettingAdvice(
        "Set it if no client may hold a slot longer, whatever it asks for.", "MAX_REQUEST_DURATION=900"),
    "CLIENT_HEADER_TIMEOUT": SettingAdvice("Lower it under an attack by slow connections.", "CLIENT_HEADER_TIMEOUT=10"),
    "CLIENT_BODY_TIMEOUT": SettingAdvice("Raise it for clients on links that stall for long.",
        "CLIENT_BODY_TIMEOUT=60"),
    "CLIENT_BODY_MIN_RATE": SettingAdvice("Raise it under an attack by slow uploads.", "CLIENT_BODY_MIN_RATE=10KiB"),
    "KEEPALIVE_TIMEOUT": SettingAdvice(
        "Keep it above the idle time of the load balancer in front, so that the balancer closes first.",
        "KEEPALIVE_TIMEOUT=620"),
    "BACKEND_CONNECT_TIMEOUT": SettingAdvice("Raise it on a machine that swaps.", "BACKEND_CONNECT_TIMEOUT=30"),
    "HEALTH_TIMEOUT": SettingAdvice("Raise it if an overloaded CPU makes healthy probes fail.", "HEALTH_TIMEOUT=5"),
    "MAX_CONNECTIONS": SettingAdvice(
        "Raise it, together with the open-file limit, if many clients keep connections open.", "MAX_CONNECTIONS=4096"),
    "MAX_REQUEST_BODY_SIZE": SettingAdvice(
        "Raise it for large images or audio; llama-server itself takes up to 100 MB.", "MAX_REQUEST_BODY_SIZE=64MiB"),
    "MAX_BUFFERED_BYTES": SettingAdvice(
        "Lower it on a machine with little memory, raise it for many large bodies at once.",
        "MAX_BUFFERED_BYTES=128MiB"),
    "MAX_JSON_DEPTH": SettingAdvice("Raise it if clients send deeply nested tools or schemas.", "MAX_JSON_DEPTH=200"),
    "MAX_BATCH_SIZE": SettingAdvice(
        "Lower it if keys are given to people who are not trusted, raise it if an index is built with larger batches.",
        "MAX_BATCH_SIZE=256"),
    "MEMBER_RULES": SettingAdvice(
        "Set it to allow a member that your clients need, or to bound one more strictly. A body that does not name the"
        " member is not limited: to limit all answers, give the keys `max_tokens=`.",
        "MEMBER_RULES=media_urls=images.example,n_probs=20"),
    "MAX_HEADERS": SettingAdvice("Raise it if a chain of proxies adds many header lines.", "MAX_HEADERS=128"),
    "MAX_HEADER_LINE_SIZE": SettingAdvice(
        "Lower it if you like; llama-server refuses longer lines than the default.", "MAX_HEADER_LINE_SIZE=4096"),
    "MAX_REQUEST_HEADER_SIZE": SettingAdvice("Lower it if memory is scarce and connections are many.",
                                             "MAX_REQUEST_HEADER_SIZE=32KiB"),
    "MAX_REQUEST_LINE_SIZE": SettingAdvice("Raise it if clients send long queries.", "MAX_REQUEST_LINE_SIZE=16KiB"),
    "MAX_RESPONSE_HEADER_SIZE": SettingAdvice("There is hardly a reason to change it.",
        "MAX_RESPONSE_HEADER_SIZE=128KiB"),
    "DATA_DIR": SettingAdvice("Set it if the volume is mounted elsewhere.", "DATA_DIR=/mnt/llama"),
    "ACCESS_LOG": SettingAdvice(
        "Set it to /dev/stdout to collect it with the container's log, or to nothing to turn it off.",
        "ACCESS_LOG=/dev/stdout"),
    "LOG_FORMAT": SettingAdvice("Set it to json if a collector reads the logs.", "LOG_FORMAT=json"),
    "LOG_LEVEL": SettingAdvice("Set it to debug to find the reason of a failure, to warning to have less.",
                               "LOG_LEVEL=debug"),
    "LOG_DIR": SettingAdvice("Set it if boot logs belong on another volume than the data.", "LOG_DIR=/var/log/llama"),
    "LOG_NAME": SettingAdvice("Set it if several workers share one volume.", "LOG_NAME=chat"),
    "WORKER_TYPE": SettingAdvice("Set it if workers of several kinds share one volume.", "WORKER_TYPE=gpu-24gb"),
    "INSTANCE_ID": SettingAdvice("Set it if the host name says nothing, as in many containers.",
        "INSTANCE_ID=worker-1"),
    "USAGE_FILE": SettingAdvice("Set it to nothing on a machine without a disk to keep.", "USAGE_FILE="),
    "GPU_COST_PER_HOUR": SettingAdvice("Set it to what you pay, in any currency, to see costs per key.",
                                       "GPU_COST_PER_HOUR=0.69"),
    "METRICS_BACKEND_SECONDS": SettingAdvice(
        "Set it to Prometheus' scrape interval to have llama-server's own metrics on the same page.",
        "METRICS_BACKEND_SECONDS=15"),
    "DRAIN_TIMEOUT": SettingAdvice(
        "Raise it, together with the platform's grace period, if answers take longer.", "DRAIN_TIMEOUT=120"),
    "WEDGE_TIMEOUT": SettingAdvice(
        "Raise it if prompts take minutes before the first token, as on a CPU.", "WEDGE_TIMEOUT=600"),
    "MAX_RESTARTS": SettingAdvice(
        "Set it to 0 if the platform restarts containers faster or better.", "MAX_RESTARTS=0"),
    "IDLE_STOP_SECONDS": SettingAdvice(
        "Set it on machines that are billed by the hour and are not stopped by the platform.",
        "IDLE_STOP_SECONDS=1800"),
    "ON_IDLE": SettingAdvice(
        "Set it to the command that stops the machine, if the end of the container does not. It runs again each time"
        " that `IDLE_STOP_SECONDS` more have passed without inference, whether it succeeded or not.",
        "IDLE_STOP_SECONDS=1800\nON_IDLE=/usr/local/bin/stop-this-machine"),
    "ON_IDLE_TIMEOUT": SettingAdvice(
        "Raise it if the command of ON_IDLE takes longer: it is ended after this time.",
        "ON_IDLE_TIMEOUT=900"),
    "DEBUG_SHELL": SettingAdvice("Set it to true, with `docker run -it`, to look into a container that does not start.",
                                 "DEBUG_SHELL=true"),
    "STATE_FILE": SettingAdvice(
        "Set it only if you run `gateway.py` and `health_server.py` without the supervisor.",
        "STATE_FILE=/run/llama/state.json"),
}

# The code of an error → its usual cause, and what to do.
ERRORS: dict[str, Remedy] = {
    "bad_request": Remedy(
        "The bytes are not one unambiguous HTTP/1.1 request, or the body is not what the route takes.",
        "Read the message: it names the rule. A browser's or SDK's request never fails so; a proxy on the way may have"
        " changed it, or TLS was spoken to a plain port."),
    "too_many_choices": Remedy(
        "The request asks for more choices (`n`, `n_cmpl`, a list of prompts) than the key's `parallel` allows.",
        "Ask for fewer choices, or raise it: `key_mgmt.py set --name NAME --parallel N`."),
    "batch_too_large": Remedy(
        "The request has more prompts times choices, texts to embed or documents to rank than `MAX_BATCH_SIZE`.",
        "Send them in several requests, or raise it; llama-server takes some kilobytes of memory for each."),
    "too_many_tokens_asked": Remedy(
        "The request asks for more tokens (`max_tokens`, `n_predict` …) than the key's `max_tokens` allows.",
        "Ask for fewer or for none, or raise it: `key_mgmt.py set --name NAME --max-tokens N`."),
    "member_not_allowed": Remedy(
        "The body has a member that reaches beyond the request, or more of it than is allowed; the message names it.",
        "Leave it out. If all keys are trusted, allow it with `MEMBER_RULES` ([ISOLATION.md](ISOLATION.md))."),
    "body_too_deep": Remedy(
        "The body's lists and objects are nested more deeply than `MAX_JSON_DEPTH`.",
        "Flatten it, or raise `MAX_JSON_DEPTH`; llama-server's stack bounds what is possible."),
    "caller_paused": Remedy(
        "llama-server died several times within minutes, most often while it worked on requests of this key.",
        "Find out what the key sends: the log says whose requests were at work, and how llama-server ended. After"
        " Retry-After (a minute to eight) the key is served again."),
    "request_held_back": Remedy(
        "llama-server died while it worked on the same body on the same route: once if it was alone, or twice.",
        "Do not repeat it. Report the body to llama.cpp; a restart of the gateway forgets it."),
    "invalid_api_key": Remedy(
        "No key, an unknown or expired key, two different keys, or the keys file could not be read.",
        "Compare the key with `key_mgmt.py list`. `Authorization: Bearer KEY` and `x-api-key: KEY` both work. The log"
        " says at the start how many keys are in force; `start.sh --check`, run as the service's user, says what is"
        " wrong with their file."),
    "route_not_allowed": Remedy(
        "The route needs an operator's key, changes llama-server without `ADMIN_ROUTES=true`, or is blocked for all.",
        "Use a key with `role=operator` (`key_mgmt.py set --name NAME --role operator`). Blocked routes stay blocked."),
    "key_suspended": Remedy("The key's rate limit is 0.",
        "`key_mgmt.py set --name NAME --rate-limit default` lifts it."),
    "route_not_found": Remedy(
        "The path is not one that the gateway relays. Most often the base URL has a `/v1` too many or too few.",
        "OpenAI's clients need a base URL that ends in `/v1`, Anthropic's one without it. A new route of"
        " llama-server can"
        " be added with `ALLOW_PATHS`."),
    "method_not_allowed": Remedy("The path exists, but not with this method.",
        "The answer's `Allow` lists the methods."),
    "request_timeout": Remedy(
        "The client sent its head or body too slowly: `CLIENT_HEADER_TIMEOUT`, `CLIENT_BODY_TIMEOUT`,"
        " `CLIENT_BODY_MIN_RATE`.",
        "The client's link is slow, or it declared more bytes than it sent. Raise that limit."),
    "coding_not_supported": Remedy(
        "A body with a `Content-Encoding`, such as gzip: what it asks for could not be bounded.",
        "Send the body as it is."),
    "form_not_supported": Remedy(
        "A `Content-Type: multipart/…` on a route other than `/v1/audio/transcriptions` and `/audio/transcriptions`,"
        " or one in which the boundary of the form is missing or stands twice.",
        "Send the body as JSON; on these routes as a form with one boundary."
    ),
    "length_required": Remedy("A POST without `Content-Length` and without a chunked body.", "Send the body's length."),
    "payload_too_large": Remedy("The body exceeds `MAX_REQUEST_BODY_SIZE`.",
                                "Send smaller images, or raise the setting."),
    "uri_too_long": Remedy("The request line exceeds `MAX_REQUEST_LINE_SIZE`.", "Send the data in the body."),
    "expectation_failed": Remedy("`Expect` has another value than `100-continue`.", "Remove the field."),
    "rate_limit_exceeded": Remedy(
        "The key has sent as many requests within 60 s as its limit allows.",
        "Wait `Retry-After` seconds; SDKs do. `key_mgmt.py set --name NAME --rate-limit N` raises the limit."),
    "token_quota_exceeded": Remedy(
        "The key's `tokens_per_day` or `tokens_per_month` are used up; SDKs do not repeat the request.",
        "Wait `Retry-After` seconds, or raise it: `key_mgmt.py set --name NAME --tokens-per-day N`, or"
        " `--tokens-per-month N`. `GET /usage` with the key says what is left."),
    "token_rate_exceeded": Remedy(
        "The prompt and `max_tokens` of the request do not fit into the key's `tokens_per_minute` now.",
        "Wait `Retry-After` seconds; SDKs do. A smaller `max_tokens` reserves less. `key_mgmt.py set --name NAME"
        " --tokens-per-minute N` raises the limit."),
    "header_fields_too_large": Remedy(
        "The head exceeds `MAX_REQUEST_HEADER_SIZE`, `MAX_HEADER_LINE_SIZE` or `MAX_HEADERS`.",
        "Large cookies are the usual reason: use a host name of its own for the gateway."),
    "internal_error": Remedy("A bug of the gateway.", "The log has the traceback at the request's id: report it."),
    "reload_failed": Remedy(
        "The keys file is missing, unreadable, not UTF-8, incomplete, or has no valid line.",
        "`key_mgmt.py check` reports every complaint. Until then the last good keys are in force."),
    "backend_unavailable": Remedy(
        "llama-server died during the request, or refused the connection.",
        "The supervisor restarts it. The log has a sentence with the reason, the boot log its last lines."),
    "backend_malformed": Remedy("What listens at the backend's address does not send valid HTTP.",
                                "Check `BACKEND_HOST` and `PORT_BACKEND`."),
    "model_required": Remedy(
        "There are several models, the request names none, and `DEFAULT_MODEL` is not set.",
        "Send `model` in the body; the message lists the names. Or set `DEFAULT_MODEL`."),
    "model_not_found": Remedy(
        "llama-server has no model of this name, and `MODEL_ALIASES` has no alias. Or a form or a query has an alias.",
        "Use a name from the message or from `GET /v1/models`, or add an alias."),
    "key_not_found": Remedy(
        "`GET /usage?key=` names a key that is not in force and has no use on record.",
        "Look the name up with `key_mgmt.py list`."),
    "model_not_allowed": Remedy(
        "The key's `models=` does not match the model.",
        "Use one from the message, or change it: `key_mgmt.py set --name NAME --models 'chat-*,embed'`."),
    "model_load_failed": Remedy(
        "llama-server could not load the model, or not within `COLD_START_WAIT`. Other models are not affected.",
        "Read the message and llama-server's log: mostly there is too little memory, or the file is damaged. The next"
        " attempt comes with the next request after Retry-After; the pause doubles with each failure."),
    "queue_full": Remedy(
        "`MAX_QUEUE_SIZE` requests wait already, and with this one no key has more of them. A request that waits gets"
        " it, too, if its key has the most waiting ones and another key's request comes.",
        "Add slots (`PARALLEL`) or workers, or raise `MAX_QUEUE_SIZE` if clients may wait longer."),
    "queue_timeout": Remedy("No slot became free within `QUEUE_TIMEOUT`.", "As for `queue_full`."),
    "loading": Remedy(
        "The model was not loaded within `COLD_START_WAIT`, or llama-server restarts.",
        "`GET /health` shows the state. Raise `COLD_START_WAIT`, or let the platform wait for `/ready`."),
    "draining": Remedy("The worker is being stopped.", "Repeat the request: another worker or the next start answers."),
    "too_many_connections": Remedy(
        "`MAX_CONNECTIONS` connections are open, and none of them is idle.",
        "Look for a client that opens a connection per request and never closes it; raise the setting."),
    "too_many_viewers": Remedy(
        "The board is open in too many places: 64 in all, of which 8 are kept for operators, and 8 of one other key.",
        "Close some of them. A board closes its stream by itself while its page is hidden."),
    "memory_full": Remedy(
        "Bodies and heads that are held reach `MAX_BUFFERED_BYTES`.",
        "Raise it if the machine has memory to spare, or lower `MAX_REQUEST_BODY_SIZE`."),
    "backend_timeout": Remedy(
        "The answer did not begin within `REQUEST_TIMEOUT`, or was silent for `STREAM_IDLE_TIMEOUT`.",
        "Let the client stream. Otherwise raise `REQUEST_TIMEOUT` above the longest generation."),
    "http_version_not_supported": Remedy("The request is not HTTP/1.1 or HTTP/1.0.",
                                         "HTTP/2 needs a proxy in front that speaks HTTP/1.1 to the gateway."),
}

# An exit status of start.sh and supervisor.py → its reason in short, and what to do.
EXIT_STATUSES: dict[int, Remedy] = {
    0: Remedy("It was asked to stop: SIGTERM, SIGINT, `POST /drain`, or `IDLE_STOP_SECONDS` without `ON_IDLE`.",
              "Nothing is wrong. A platform that restarts on failure only leaves it stopped."),
    1: Remedy("A bug: Python ends so after an error that nothing has handled.",
              "Report it with the log; `tools/collect.sh` gathers what is needed. A status above 128 is a signal's:"
              " 137 is SIGKILL, most often for lack of memory."),
    2: Remedy("The settings are wrong, there is no llama-server, or it does not know an argument.",
              "The log has one line per wrong setting, all at once. `scripts/start.sh --check` shows the same"
              " without a start. Another start ends in the same way."),
    3: Remedy("There is no model: none is set, the file is missing or not GGUF, or llama-server cannot load it.",
              "The log names the file or the URL, and the reason. If llama-server alone finds out that a file is"
              " damaged, it is started `MAX_RESTARTS` times before. Another start ends in the same way."),
    4: Remedy("llama-server crashed more than `MAX_RESTARTS` times, for lack of memory for example.",
              "The log quotes llama-server's reason; the causes are listed below. Its own output is in the boot log,"
              " `latest` in the folder of `LOG_DIR`."),
    5: Remedy("The gateway or the health server could not be started or ended unexpectedly.",
              "Most often `PORT` or `PORT_HEALTH` is taken: the log says which."),
    6: Remedy("The model could not be fetched or read within `MODEL_FETCH_TIMEOUT`: the hub or the volume is away.",
              "Start again once it is there; the part that has arrived is kept and resumed."),
}

# A metric → what to use it for, as PromQL if that helps.
METRICS: dict[str, str] = {
    "gateway_requests_total": "Error rate: `sum(rate(gateway_requests_total{code=~\"5..\"}[5m]))`.",
    "gateway_request_duration_seconds": "Its rate of `_count` is the number of requests per second.",
    "gateway_queue_wait_seconds":
        "Whether more slots are needed: `histogram_quantile(0.95, rate(gateway_queue_wait_seconds_bucket[5m]))`.",
    "gateway_time_to_first_byte_seconds":
        "Queue and start, but for a stream not the prompt:"
        " `histogram_quantile(0.95, rate(gateway_time_to_first_byte_seconds_bucket[5m]))`.",
    "gateway_inter_event_gap_seconds": "Whether streams stutter.",
    "gateway_tokens_total": "Throughput: `sum by (type) (rate(gateway_tokens_total[5m]))`.",
    "gateway_prompt_tokens_per_second": "Whether long prompts are the load.",
    "gateway_generation_tokens_per_second": "Speed of one answer, by llama-server's own timings.",
    "gateway_cached_prompt_tokens": "Whether llama-server's prompt cache helps.",
    "gateway_slot_handovers_total": "Many: more keys are active than there are slots, and prompts are read anew.",
    "gateway_queue_rejections_total": "More than zero: `MAX_QUEUE_SIZE` was reached.",
    "gateway_cancelled_total": "Many in the phase `queued`: clients give up before their turn.",
    "gateway_bytes_sent_total": "Network traffic of answers.",
    "gateway_unauthorized_total": "A sudden rise: a wrong key in a deployment, or guessing.",
    "gateway_rate_limited_total": "A rise: a client ignores `Retry-After`, or its limit is too low.",
    "gateway_model_loads_total":
        "Many: the models in use do not fit at once; raise `MODELS_MAX` or `MODEL_SWITCH_AFTER`. Alert on"
        " `increase(gateway_model_loads_total{result=\"failed\"}[15m]) > 0`.",
    "gateway_model_load_seconds": "What each swap costs; `MODEL_SWITCH_AFTER` should be several times as long.",
    "gateway_model_loaded": "Which models are loaded now. Only callers with a key see the names of models.",
    "gateway_keys_reload_total": "Alert on `increase(gateway_keys_reload_total{result=\"failed\"}[15m]) > 0`.",
    "gateway_requests_active": "How many clients are served now.",
    "gateway_queue_depth": "Scale on it: see [SCALING.md](SCALING.md).",
    "gateway_slots_active": "Saturation: compare it with the number of slots.",
    "gateway_queue_slots": "The work that waits: divided by the slots, it is the number of turns.",
    "gateway_certificate_expiry_timestamp_seconds":
        "Days left: `(gateway_certificate_expiry_timestamp_seconds - time()) / 86400`.",
    "gateway_connections": "Compare it with `MAX_CONNECTIONS`.",
    "gateway_backend_up": "Alert on 0 for longer than a load takes.",
    "gateway_uptime_seconds": "A fall to zero is a restart.",
    "gateway_access_log_dropped_total": "More than zero: the disk of the access log is full or too slow.",
    "gateway_key_requests_total": "Which key sends the requests. Only operators see it.",
    "gateway_key_tokens_total": "Which key uses the GPU. Only operators see it.",
}

# A field of the access log → how to read it.
FIELDS: dict[str, str] = {
    "ts": "Subtract `total_ms` to get the moment in which the head had arrived.",
    "id": "Search for it in the log, at the client, and in the load balancer's log.",
    "key": "`-` also stands for every request if `AUTH_ENABLED=false`.",
    "peer": "Behind a proxy it is the proxy's address, unless `TRUSTED_PROXIES` names the proxy.",
    "method": "In the text form it is part of `request_line`.",
    "request_line": "In the JSON form `method` and `route` take its place.",
    "route": "The same as the label `route` of `gateway_requests_total`.",
    "status": "499 is never sent: the client had left before there was a status.",
    "backend_status": "If it differs from `status`, the gateway decided; if it is the same, llama-server did.",
    "outcome": "`done`: a complete answer. `truncated`: llama-server broke off, or `DRAIN_TIMEOUT` ended it."
               " `cancelled`: the client left. `refused`: the gateway's own error. `timed_out`: a time limit ended it.",
    "stage": "The last stage that the request reached.",
    "bytes_in": "A large number and a long `first_byte_ms` without `queue_ms`: the upload took the time.",
    "bytes_out": "0 if nothing could be sent.",
    "queue_ms": "The wait for a slot, including the wait for a model that was loading. High: all slots were busy.",
    "first_byte_ms": "Minus `queue_ms` it is the upload and llama-server's start; without streaming also prompt"
                     " and generation."
                     " Heartbeats do not count.",
    "total_ms": "Minus `first_byte_ms` it is prompt and generation of a stream, at the speed at which the"
                " client read it.",
    "prompt_tokens": "High, with few `cached_tokens`: reading the prompt took time.",
    "cached_tokens": "Near `prompt_tokens`: the prompt was read from the cache, so the wait had another reason.",
    "completion_tokens": "Times the milliseconds per token of this model, it is the time of generation.",
    "estimated_tokens": "Not 0: the client left early, hid the report, or got several choices in a whole answer.",
    "model": "The model's own name, also if the client used an alias or none. `-`: refused before it was known.",
}
# fmt: on
