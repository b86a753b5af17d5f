"""Fields of a form with files, however it is torn."""

import random
from email.generator import BytesGenerator
from email.mime.application import MIMEApplication
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from email.policy import HTTP
from io import BytesIO

import pytest

from http1.form_fields import FormReader, form_boundary
from http1.json_members import Member, Members, NameTable

TABLE = NameTable(("n", "model", "stream", "max_tokens"))


def part(disposition: str, value: bytes, *lines: str) -> bytes:
    head = "\r\n".join((f"Content-Disposition: form-data; {disposition}", *lines))
    return b"--X\r\n" + head.encode() + b"\r\n\r\n" + value + b"\r\n"


def read(*pieces: bytes, boundary: bytes = b"X") -> Members:
    reader = FormReader(TABLE, boundary)
    for piece in pieces:
        reader.feed(piece)
        while reader.step():
            pass
    return reader.end()


def values(members: Members) -> dict[str, object]:
    assert (members.depth, members.end) == (0, None)
    return {name: member.value for name, member in members.found.items()}


FORM = b"".join(
    (
        part('name="model"', b"tiny"),
        part('name="file"; filename="n"', b"\r\n--Y\r\n\0--X" * 999, "Content-Type: audio/wav"),
        part('name="n"; filename="n.txt"', b"9"),
        part('name="n"', b"2"),
        part("name=n", b"3", "Content-Type: text/plain"),
        part('name="stream"', b""),
        part('name="other"', b'name="model"\r\n\r\nx'),
        part('name="max_tokens"', b"1" * 3000),
        b"--X--\r\n" + part('name="model"', b"after the end"),
    )
)
WANTED = {"model": "tiny", "n": "3", "stream": "", "max_tokens": None}


def test_fields_are_found_and_files_are_not() -> None:
    assert values(read(FORM)) == WANTED
    assert read(FORM).found["n"] == Member(read(FORM).found["n"].type, "3", size_bytes=1)
    assert read(FORM).found["max_tokens"].size_bytes == 3000


def test_it_does_not_matter_how_the_form_is_torn() -> None:
    assert read(*[FORM[at : at + 1] for at in range(len(FORM))]) == read(FORM)
    rng = random.Random(1)
    for _ in range(30):
        cuts = sorted(rng.randrange(len(FORM)) for _ in range(rng.choice((1, 2, 9))))
        pieces = [FORM[start:end] for start, end in zip([0, *cuts], [*cuts, len(FORM)], strict=True)]
        assert read(*pieces) == read(FORM)


@pytest.mark.parametrize("lines", [1, 2, 40])
def test_a_part_may_have_any_number_of_head_lines(lines: int) -> None:
    """As in llama-server: a part with a long head would hide those after it."""
    more = [f"X-Line-{number}: {'x' * 8000}" for number in range(lines)]
    form = part('name="other"', b"x", *more) + part('name="n"', b"2", *more) + FORM
    assert values(read(form)) == WANTED
    form = part('name="n"', b"2", *more) + b"--X--\r\n"
    assert values(read(form)) == values(read(*[form[at : at + 1000] for at in range(0, len(form), 1000)])) == {"n": "2"}


def test_what_follows_a_head_line_that_llama_server_refuses_is_not_read() -> None:
    """It takes at most 8 KiB, and a longer line would take longer than a turn of the loop may."""
    form = part('name="n"', b"2") + part('name="stream"', b"true", "X-Line: " + "x" * (16 << 10)) + b"--X--\r\n"
    pieces = [form[at : at + 1000] for at in range(0, len(form), 1000)]
    assert values(read(form)) == values(read(*pieces)) == {"n": "2"}


def test_a_preamble_is_passed() -> None:
    assert values(read(b"hello\r\n" + FORM)) == WANTED


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"n": 4}',
        b"--X",
        b"--X\r\nname=n\r\n\r\n4\r\n--X--",
        part('name="n"', b"4"),
        b"--X\r\n" + b"a" * 9000,
        b"--X\r\n" + b"a" * 70_000,
    ],
)
def test_what_is_no_whole_field_is_not_found(body: bytes) -> None:
    assert values(read(body)) == {}


def test_many_parts_take_several_steps() -> None:
    reader = FormReader(TABLE, b"X")
    reader.feed(part('name="n"', b"1") * 1000 + b"--X--")
    steps = 1
    while reader.step():
        steps += 1
    assert steps > 50
    assert values(reader.end()) == {"n": "1"}


def test_a_form_as_the_standard_library_writes_it() -> None:
    form = MIMEMultipart("form-data", boundary="a=b c")
    for name, text in (("model", "tiny"), ("n", "2")):
        field = MIMEText(text)
        field.add_header("Content-Disposition", "form-data", name=name)
        form.attach(field)
    file = MIMEApplication(b"RIFF" * 100)
    file.add_header("Content-Disposition", "form-data", name="file", filename="a.wav")
    form.attach(file)
    written = BytesIO()
    BytesGenerator(written, policy=HTTP).flatten(form)
    head, _, body = written.getvalue().partition(b"\r\n\r\n")
    line = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-type:"))
    boundary = form_boundary(line.partition(b": ")[2])
    assert boundary == b"a=b c"
    assert values(read(body, boundary=boundary))["model"] == "tiny"


@pytest.mark.parametrize(
    ("field", "boundary"),
    [
        (b"multipart/form-data; boundary=abc", b"abc"),
        (b'multipart/form-data; charset=utf-8; boundary="a b"', b"a b"),
        (b"multipart/form-data;boundary=abc; x=y", b"abc"),
        (b"multipart/form-data", b""),
        (b"application/json; boundary=abc", b""),
        (b"", b""),
    ],
)
def test_the_boundary_is_in_the_content_type(field: bytes, boundary: bytes) -> None:
    assert form_boundary(field) == boundary


HIDDEN = b'x--X\r\nContent-Disposition: form-data; name="model"\r\n\r\nhidden\r\n'


@pytest.mark.parametrize(
    ("body", "model"),
    [
        # What only looks like a delimiter, before the first one and after it.
        (b'--XY\r\nContent-Disposition: form-data; name="model"\r\n\r\nshown\r\n--XY\r\n\r\n' + HIDDEN, "hidden"),
        (part('name="model"', b"one") + b'--XY\r\nContent-Disposition: form-data; name="model"\r\n\r\ntwo\r\n', "one"),
        # Only a whole line's name is that of a field.
        (b'--X\r\nX-Content-Disposition: form-data; name="model"\r\n\r\nshown\r\n', None),
        (b'--X\r\nContent-Disposition: attachment; name="model"\r\n\r\nshown\r\n', None),
        (part('other="; name=model"; name=n', b"shown"), None),
        (part('Name="model"', b"shown"), None),
        (part('name="n"; name="model"', b"shown"), None),
        (part('name="n"', b"x", 'Content-Disposition: form-data; name="model"'), "x"),
        (b'--X\r\ncontent-DISPOSITION:Form-Data;  "name" = "model"\r\n\r\nx\r\n', "x"),
        (part("name=model; name*=UTF-8''n", b"x"), "x"),
        # A file has a name; an empty one is none.
        (part('name="model"; filename=""', b"x"), "x"),
        (part('name="model"; filename="a;b"', b"x"), None),
        (part("name=\"model\"; filename*=UTF-8''a", b"x"), None),
        (part('name="model"; filename="a"', b"x", 'Content-Disposition: form-data; name="model"'), None),
        (b"--X\r\n\r\nno head\r\n" + part('name="model"', b"x"), "x"),
    ],
)
def test_a_field_is_what_llama_server_takes_for_one(body: bytes, model: str | None) -> None:
    body += b"--X--\r\n"
    assert values(read(body)).get("model") == model
    assert read(*[body[at : at + 1] for at in range(len(body))]) == read(body)


@pytest.mark.parametrize(
    "field",
    [
        b"multipart/form-data; boundary=a; boundary=b",
        b"multipart/form-data; boundary =a; boundary=b",
        b'multipart/form-data; x="; boundary=a"; boundary=b; boundary=c',
        b"multipart/form-data; xboundary =a; boundary=b",
        b"multipart/form-data; boundary=a, text/plain",
        b"multipart/form-data; boundary=" + b"a" * 71,
        b"multipart/form-data x; boundary=a",
    ],
)
def test_a_boundary_that_could_be_another_one_is_none(field: bytes) -> None:
    assert form_boundary(field) == b""


def test_a_parameter_before_the_boundary_may_be_quoted() -> None:
    assert form_boundary(b'multipart/form-data; x="; boundary=a"; boundary=b') == b"b"


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_long_value_is_not_kept_but_its_place_is_known(size: int) -> None:
    value = b"(" * 2000
    body = b"--X\r\n" + b'Content-Disposition: form-data; name="model"\r\n\r\n' + value + b"\r\n--X--\r\n"
    member = read(*[body[at : at + size] for at in range(0, len(body), size)]).found["model"]
    assert member.value is None
    assert member.start is not None
    assert body[member.start : member.start + member.size_bytes] == value
