"""request_services.py: nothing is handed to requests that none of them uses."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from proxy import request_services
from proxy.request_services import RequestServices, RequestTimeouts

ROOM = Path(request_services.__file__).parent
USERS = "".join(path.read_text() for path in ROOM.glob("*.py") if path.name not in ("request_services.py", "app.py"))


@pytest.mark.parametrize("name", [field.name for field in fields(RequestServices)])
def test_each_service_is_used(name: str) -> None:
    assert re.search(rf"services\.{name}\b", USERS), f"RequestServices.{name} is used by no request: delete it."


@pytest.mark.parametrize("name", [field.name for field in fields(RequestTimeouts)])
def test_each_timeout_is_used(name: str) -> None:
    assert re.search(rf"timeouts\.{name}\b", USERS), f"RequestTimeouts.{name} limits nothing: delete it."
