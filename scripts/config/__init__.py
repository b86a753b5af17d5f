"""The settings: their table, the text that each accepts, and how the environment becomes one frozen Config."""

from config.settings import SETTINGS

__all__ = ["SETTINGS"]
