"""health_token.py: the supervisor's credential for /health."""

import re

from core.health_token import health_token


def test_the_token_is_a_secret_of_its_own() -> None:
    token = health_token("gateway-" + "B" * 43)
    assert re.fullmatch("[0-9a-f]{64}", token)
    assert token != health_token("gateway-" + "C" * 43)
