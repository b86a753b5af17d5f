"""What the mock reads from request bodies: prompts, their token counts, and the requested length. Pure functions."""

from collections.abc import Mapping, Sequence

from mock.templates import Json

Body = Mapping[str, Json]

# The names under which the APIs give the maximum length of an answer. The first that is present counts.
LENGTH_NAMES = ("max_completion_tokens", "max_tokens", "max_output_tokens", "n_predict")


class ApiError(Exception):
    """An error answer in the format of llama-server. The arguments are status, type and message."""


def bad_request(message: str) -> ApiError:
    return ApiError(400, "invalid_request_error", message)


def require(body: Body, name: str) -> Json:
    if body.get(name) is None:
        raise bad_request(f"'{name}' is required")
    return body[name]


def require_list(body: Body, name: str) -> list[Json]:
    if not isinstance(value := require(body, name), list):
        raise bad_request(f"Expected '{name}' to be an array")
    return value


def max_tokens(body: Body) -> int | None:
    """Return how many tokens the request allows, or None. 0 is 1, as in llama-server."""
    values = [body[name] for name in LENGTH_NAMES if isinstance(body.get(name), int) and body[name] >= 0]
    return max(1, values[0]) if values else None


# Prompts


def chat_prompt(messages: Sequence[Json], system: Json) -> str:
    """Render messages as a chatml template does."""
    messages = [{"role": "system", "content": system}, *messages] if system else messages
    parts = ((each.get("role"), text_of(each.get("content"))) for each in messages if isinstance(each, dict))
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in parts) + "<|im_start|>assistant\n"


def text_of(content: Json) -> str:
    """Return the text of a message, whose content is a text or a list of parts. Parts without a text are ignored."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content or "")


def prompt_of_chat(body: Body) -> Json:
    return chat_prompt(require_list(body, "messages"), body.get("system"))


def prompt_of_input(body: Body) -> Json:
    value = require(body, "input")
    messages = value if isinstance(value, list) else [{"role": "user", "content": value}]
    return chat_prompt(messages, body.get("instructions"))


def prompt_of_text(body: Body) -> Json:
    return require(body, "prompt")


def prompt_of_infill(body: Body) -> Json:
    return f"{require(body, 'input_prefix')}{require(body, 'input_suffix')}"


def count_tokens(prompt: Json) -> int:
    """Count one token per byte of a text and one start token, or the token ids of a list."""
    return len(prompt) if isinstance(prompt, list) else len(str(prompt).encode()) + 1
