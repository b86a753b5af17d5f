"""Python source as a tree, for the tests that hold the rules of the house."""

import ast
import threading

# Up to Python 3.11.7 and 3.12.1, two threads that parse at once confuse the depth that they share, and one gets a
# SystemError (gh-106905).
_PARSING = threading.Lock()


def parse(text: str) -> ast.Module:
    """Parse a module. Refuses syntax that the oldest supported interpreter lacks."""
    with _PARSING:
        return ast.parse(text, feature_version=(3, 10))
