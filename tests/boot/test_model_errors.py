"""What is wrong with a model's first bytes, and which part of its URL may be logged."""

import pytest

from boot.model_errors import magic_complaint, redact


@pytest.mark.parametrize(
    ("head", "complaint"),
    [
        (b"GGUF\x03", None),
        (b"", "is empty"),
        (b"GGU", "is not a GGUF file (its first four bytes are not GGUF)"),
        (b"\n <!DOCTYPE html>", "is a web page, not a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not the model itself (fetch it with "
         "git lfs pull)"),
    ],
)  # fmt: skip
def test_a_file_is_recognised_by_its_first_bytes(head: bytes, complaint: str | None) -> None:
    assert magic_complaint(head) == complaint


def test_a_redacted_url_has_no_secrets() -> None:
    assert redact("https://me:pw@x.example/a/m.gguf?sig=1#f") == "https://x.example/a/m.gguf"
