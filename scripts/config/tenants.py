"""What keys share: the warning that one key can learn from another's prompts."""

from collections.abc import Set

from config.settings import SHARED, Config


def shared_cache_warning(config: Config, key_ids: Set[str]) -> str | None:
    """Return the warning for keys that share llama-server's prompt cache; None if none do, or that was asked for."""
    is_chosen = "PROMPT_CACHE" not in config.at_default  # who has set it to shared knows
    if is_chosen or config.backend.prompt_cache != SHARED or not config.auth.enabled or len(key_ids) < 2:
        return None
    # A router shares what its models keep, so PROMPT_CACHE=private excludes it.
    remedy = "start one llama-server for each of them" if config.router.enabled else "set PROMPT_CACHE=private"
    return (
        f"PROMPT_CACHE=shared, and there are keys of {len(key_ids)} names: each can find out what another has asked"
        f" (docs/ISOLATION.md); {remedy} if they do not trust each other"
    )
