"""A test's orders to the stubs: files in STUB_DIR. Nothing else is imported here: some stubs live for an instant."""

import os


def order_path(name: str) -> str:
    return os.path.join(os.environ["STUB_DIR"], name)


def ordered(name: str) -> bool:
    """Return whether the test has given an order."""
    return os.path.exists(order_path(name))


def content_of(name: str) -> str:
    """Return what an order says."""
    with open(order_path(name), encoding="utf-8") as file:
        return file.read()
