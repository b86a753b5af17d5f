"""What keys share: the warning that one key can learn from another's prompts."""

from collections.abc import Set
from contextlib import suppress

import keyfile
from config.settings import SHARED, Config


def shared_cache_warning(config: Config, key_ids: Set[str]) -> str | None:
    """Return the warning for keys that share llama-server's prompt cache; None if none do."""
    if config.backend.prompt_cache != SHARED or not config.auth.enabled or len(key_ids) < 2:
        return None
    # A router shares what its models keep, so PROMPT_CACHE=private excludes it.
    remedy = "start one llama-server for each of them" if config.router.enabled else "set PROMPT_CACHE=private"
    return (
        f"PROMPT_CACHE=shared, and there are keys of {len(key_ids)} names: each can find out what another has asked"
        f" (docs/ISOLATION.md); {remedy} if they do not trust each other"
    )


def configured_key_ids(config: Config) -> frozenset[str]:
    """Return the names of the keys in the keys file and in API_KEYS. A file that cannot be read has none."""
    entries = config.auth.api_keys or ()
    with suppress(OSError, ValueError):
        entries = (*entries, *keyfile.parse(keyfile.read(config.auth.keys_file)).entries)
    return frozenset(entry.key_id for entry in entries)
