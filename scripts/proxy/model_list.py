"""What a key sees of several models: OpenAI's list, with what it may use; never paths, arguments or presets."""

import json

from backend.models import ListedModel, Models
from policy.model_names import Patterns
from policy.model_scheduler import LoadState

_OWNER = "llamacpp"  # as llama-server has it


def model_list(models: Models, patterns: Patterns) -> bytes:
    """Return the JSON of GET /v1/models for a key with these patterns (`models=`)."""
    data = [_entry(models, models.listed[name]) for name in models.names.allowed(patterns)]
    return json.dumps({"object": "list", "data": data}).encode() + b"\n"


def _entry(models: Models, listed: ListedModel) -> dict[str, object]:
    context = models.contexts.get(listed.name)
    return {
        "id": listed.name,
        "object": "model",
        "created": listed.created_at,
        "owned_by": _OWNER,
        "aliases": models.names.aliases_of(listed.name),
        "status": {"value": shown_state(models.find(listed.name).state)},
        **({} if context is None else {"context_length": context}),
    }


def shown_state(state: LoadState) -> str:
    """Return how a state is shown: loaded, loading or unloaded."""
    return LoadState.UNLOADED.value if state is LoadState.UNLOADING else state.value
