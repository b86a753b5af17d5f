"""Which model a request means: its own name, an alias, or the default; and whether the caller's key may use it."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache

from core.errors import MODEL_NOT_ALLOWED, MODEL_NOT_FOUND, MODEL_REQUIRED, GatewayError

_MOST_LISTED = 20  # names in an error

Patterns = tuple[str, ...] | None


@lru_cache(maxsize=1024)
def may_use(patterns: Patterns, name: str) -> bool:
    """Whether a key with these patterns (`models=`) may use a model; None: any."""
    return patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)


class ModelNames:
    """The names of the backend's models, of which nothing is known before the first `update`."""

    def __init__(self, aliases: Mapping[str, str], default: str | None) -> None:
        """`aliases` are the operator's. `default` is for requests that name none; it may be an alias."""
        self._own_aliases = aliases
        self._default = default
        self._names: tuple[str, ...] = ()
        self._aliases: Mapping[str, str] = aliases

    def update(self, models: Mapping[str, Iterable[str]]) -> None:
        """The backend has these models, each with aliases of its own. The operator's precede them."""
        self._names = tuple(models)
        backends = {alias: name for name, aliases in models.items() for alias in aliases}
        self._aliases = {**backends, **{name: name for name in models}, **self._own_aliases}

    def resolve(self, name: str | None, patterns: Patterns) -> str:
        """Return the model that a request of a key means; `name` is None if the request names none.

        Raises MODEL_REQUIRED, MODEL_NOT_FOUND or MODEL_NOT_ALLOWED.
        """
        found = self._find(name, patterns)
        if not may_use(patterns, found):
            raise GatewayError(MODEL_NOT_ALLOWED, self._message(MODEL_NOT_ALLOWED.message, patterns))
        return found

    def allowed(self, patterns: Patterns) -> list[str]:
        """Return the models that a key may use."""
        return [name for name in self._names if may_use(patterns, name)]

    def is_own_alias(self, name: str) -> bool:
        """Whether a name is an alias of the operator's, which the backend does not know."""
        return name in self._own_aliases

    def aliases_of(self, name: str) -> list[str]:
        return sorted(alias for alias, own in self._aliases.items() if own == name != alias)

    def _find(self, name: str | None, patterns: Patterns) -> str:
        if not name:
            if self._default is None and len(self._names) == 1:
                return self._names[0]
            name = self._default
        if not name:
            raise GatewayError(MODEL_REQUIRED, self._message(MODEL_REQUIRED.message, patterns))
        found = self._aliases.get(name, name)
        if found not in self._names:
            raise GatewayError(MODEL_NOT_FOUND, self._message(MODEL_NOT_FOUND.message, patterns))
        return found

    def _message(self, problem: str, patterns: Patterns) -> str:
        """Add the names that the key may use. The name that the client sent is not repeated."""
        names = self.allowed(patterns)
        listed = ", ".join(names[:_MOST_LISTED]) or "no model"
        more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
        return f"{problem} This API key may use: {listed}{more}."
