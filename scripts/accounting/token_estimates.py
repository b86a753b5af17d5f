"""The tokens of each request that has ended: as the response reports them, or an estimate of what no report counts.

There is an estimate for the further choices of a whole response (llama-server reports the first one), for a response
that the client asked to have without its reports, and for a request whose client left while the backend worked on it.
The estimator learns how many tokens a byte has, and how fast each model is, from what is reported.
"""

from collections import defaultdict
from collections.abc import Sequence
from http import HTTPStatus
from math import ceil

from accounting.request_record import Outcome, RequestRecord
from accounting.token_counter import Count, TokenCounter, fast_tokens, read_count
from accounting.usage_reports import NO_TOKENS, Choice, Tokens, generated_bytes, parse_json
from backend.generation_watch import TEMPLATE_TOKENS
from policy.routes import INFERENCE
from policy.token_limits import ONE_ANSWER

# Until something is learned. English has a token in four bytes; other texts have more.
TOKENS_PER_BYTE = 0.3
PROMPT_TOKENS_PER_S = 500.0
TOKENS_PER_S = 20.0
# Above the most likely number of tokens: an estimate should not be below what was generated, nor a quarter above it.
MARGIN = 1.12
UNREPORTED_MARGIN = 1.25  # for a response whose client asked for no report
# llama-server notices that the client of a response that is not streamed has left only after about a second.
LINGER_S = 1.0
# Of a stream it notices that at its next token; one or two more are under way then. For each choice.
OVERRUN_TOKENS = 3
_LEAST_PER_BYTE = TOKENS_PER_BYTE / 2  # of any text, however long the words were from which the key's rate was learned
_MOST_PER_BYTE = 2  # times as many tokens as usual that a text may have
_ENDING_TOKENS = 8  # of a usual stop word, and at the end
_SLOWEST = 4  # how many times as slow as usual a stream may be
_WEIGHT = 0.1  # of the newest value in a moving average
_PRIOR_BYTES = 128  # of text like that of earlier responses, which a first choice is taken together with
_LESSON_S = 1.0  # between two times at which something is learned
_FRESH_S = 600.0  # for how long the speed of the answers to another key is used
_LESSON_TOKENS = 8  # of an answer that says how fast the backend is: the time of one token is next to nothing
_SAMPLE_S = 10.0  # between two responses whose text is measured
_SAMPLE_BYTES = 32  # of such a text at least: control tokens have none
_WORKED = (Outcome.CANCELLED, Outcome.TIMED_OUT, Outcome.TRUNCATED)


class _Average:
    """A moving average that begins with its first value. `default` holds before."""

    __slots__ = ("_default", "_value")

    def __init__(self, default: float) -> None:
        self._default = default
        self._value: float | None = None

    def add(self, value: float) -> None:
        self._value = value if self._value is None else self._value + _WEIGHT * (value - self._value)

    @property
    def value(self) -> float:
        return self._default if self._value is None else self._value


class _Speeds:
    """How fast one model generates, in tokens per second, as the answers to each key have shown.

    A key can slow its own answers down, with a grammar say. So its estimates use the speed that other keys have seen
    of late, if any have.
    """

    __slots__ = ("_learned_s", "_of_keys")

    def __init__(self) -> None:
        self._of_keys: defaultdict[str, _Average] = defaultdict(lambda: _Average(TOKENS_PER_S))
        self._learned_s: dict[str, float] = {}  # when something was added last, by key

    def add(self, key_id: str, value: float, now_s: float) -> None:
        self._of_keys[key_id].add(value)
        self._learned_s[key_id] = now_s

    @property
    def are_learned(self) -> bool:
        return bool(self._learned_s)

    def of(self, key_id: str, now_s: float) -> float:
        """Return the speed that counts for a key's estimates: the mean of the others', else its own or the last."""
        fresh = [each for each, at_s in self._learned_s.items() if each != key_id and now_s - at_s <= _FRESH_S]
        if fresh:
            return sum([self._of_keys[each].value for each in fresh]) / len(fresh)
        if not self._learned_s:
            return TOKENS_PER_S
        last = max(self._learned_s, key=self._learned_s.__getitem__)
        return self._of_keys[key_id if key_id in self._learned_s else last].value


class _Pace:
    """How fast one model is, in tokens per second."""

    __slots__ = ("generating", "reading")

    def __init__(self) -> None:
        self.reading = _Average(PROMPT_TOKENS_PER_S)
        self.generating = _Speeds()


class TokenEstimator:
    """Counts the tokens of requests, and estimates those that no report counts."""

    def __init__(self) -> None:
        # No key changes what another is charged: tokens per byte of the generated text by key, and of the prompt per
        # byte of the request's body by key and route.
        self._text: defaultdict[str, _Average] = defaultdict(lambda: _Average(TOKENS_PER_BYTE))
        self._prompt: dict[tuple[str, str], _Average] = {}
        self._paces: defaultdict[str, _Pace] = defaultdict(_Pace)  # by model
        self._next_lesson_s = self._next_sample_s = 0.0

    def tokens_of(self, record: RequestRecord) -> Tokens | None:
        """Return the tokens of a request that has ended; None if it used none, as far as is known."""
        source = record.usage_source
        has_one_answer = record.asked is ONE_ANSWER or record.asked.answers == 1
        if type(source) is bytes and has_one_answer and source[:1] == b"{":
            tokens = fast_tokens(source)
            if tokens is not None:
                return tokens
        if source is None and not record.is_unfinished:
            return self._of_failed(record)
        count = read_count(record.prepared.route.label, source, record.asked.prompts)
        if record.prepared.route.kind is not INFERENCE or (record.is_unfinished and record.outcome not in _WORKED):
            return None if count is None or not count.is_reported else count.tokens
        if count is None and not record.is_unfinished:
            return None
        return self._complete(record, count or Count(NO_TOKENS, False, False, 0))

    # --- Learning ---

    def learn(self, records: Sequence[RequestRecord], tokens: Sequence[Tokens | None]) -> None:
        """Learn from the last request of each key and route, from time to time."""
        if records[-1].ended_s < self._next_lesson_s:
            return
        last = {
            (record.key_id, record.prepared.route.label): (record, each)
            for record, each in zip(records, tokens, strict=True)
        }
        for key_and_route, (record, each) in last.items():
            if each is not None and not each.estimated:
                self._learn_from(key_and_route, record, each)
                self._next_lesson_s = records[-1].ended_s + _LESSON_S

    def _learn_from(self, key_and_route: tuple[str, str], record: RequestRecord, tokens: Tokens) -> None:
        if record.bytes_in and tokens.prompt:
            average = self._prompt.setdefault(key_and_route, _Average(TOKENS_PER_BYTE))
            average.add(tokens.prompt / record.bytes_in)
        pace = self._paces[record.model]
        if tokens.prompt_ms > 0 and tokens.prompt > tokens.cached:
            pace.reading.add((tokens.prompt - tokens.cached) * 1000 / tokens.prompt_ms)
        if tokens.predicted_ms > 0 and tokens.completion >= _LESSON_TOKENS:
            pace.generating.add(record.key_id, tokens.completion * 1000 / tokens.predicted_ms, record.ended_s)
        if type(record.usage_source) is bytes and record.ended_s >= self._next_sample_s and tokens.completion:
            self._next_sample_s = record.ended_s + _SAMPLE_S
            text_bytes = generated_bytes(parse_json(record.usage_source))
            if text_bytes >= _SAMPLE_BYTES:
                self._text[record.key_id].add(min(tokens.completion / text_bytes, 1.0))

    # --- Estimates ---

    def prompt_tokens(self, key_id: str, label: str, body_bytes: int) -> int:
        """Estimate the tokens of the prompt in a request's body."""
        average = self._prompt.get((key_id, label))
        return ceil(body_bytes * (TOKENS_PER_BYTE if average is None else average.value))

    def _complete(self, record: RequestRecord, count: Count) -> Tokens:
        """Return the reported tokens of a request with an estimate of the others."""
        tokens, seen = count.tokens, record.left.generated
        if seen is not None and seen.is_exact:
            return tokens._replace(prompt=seen.prompt or 0, completion=seen.tokens or 0, estimated=0)
        prompt = self._prompt_of(record, count)
        completion, estimated = self._completion_of(record, count, prompt)
        estimated += max(prompt - tokens.prompt, 0)
        return tokens._replace(prompt=prompt, completion=completion, estimated=estimated)

    def _prompt_of(self, record: RequestRecord, count: Count) -> int:
        """Return the tokens of the prompts. The report of a whole response to several prompts has the first one's."""
        if count.has_prompt and not (record.asked.prompts > 1 and len(count.choices) > 1):
            return count.tokens.prompt
        seen, shown = record.left.generated, record.left.shown
        if seen is not None and seen.prompt is not None:
            return seen.prompt
        by_body = self._prompt_by_body(record)
        if shown is not None and shown.prompt is not None:
            prompts = record.asked.prompts
            # A slot that shows more than the body can have is another's.
            most = record.bytes_in + TEMPLATE_TOKENS * prompts
            by_body = min(shown.prompt.nearest(by_body // prompts) * prompts, most)
        return max(count.tokens.prompt, by_body)

    def _prompt_by_body(self, record: RequestRecord) -> int:
        """Estimate the tokens of the prompts by the size of the body."""
        by_body = self.prompt_tokens(record.key_id, record.prepared.route.label, record.bytes_in)
        # Bodies may have had more than a prompt, so that the key's tokens per byte say little.
        by_body = max(by_body, ceil(record.asked.prompt_bytes * TOKENS_PER_BYTE))
        left = record.left
        if left.shown is not None and left.shown.most_total is not None:
            by_body = min(by_body, left.shown.most_total)
        seen = left.generated or left.shown
        if seen is not None and seen.most_prompt is not None:
            by_body = min(by_body, seen.most_prompt * record.asked.prompts)
        return by_body if left.prompt_limit is None else min(by_body, left.prompt_limit)

    def _completion_of(self, record: RequestRecord, count: Count, prompt: int) -> tuple[int, int]:
        """Return the generated tokens, and how many of them are an estimate."""
        if not record.prepared.route.generates:
            return count.tokens.completion, 0
        source = record.usage_source
        if isinstance(source, TokenCounter) and source.is_stream and self._has_counted(record, source, count):
            if not record.is_unfinished and not count.reports:
                generated = self._of_unreported(
                    record, count.tokens.completion, prompt, may_be_all=not source.has_failed
                )
                return generated, generated
            tokens, estimated = self._of_stream(record, count, source.relayed_tokens)
            was_left = record.is_unfinished and record.outcome is not Outcome.TRUNCATED
            may_have_more = was_left and count.reports < record.asked.answers
            more = self._unsent(record, tokens, prompt) if may_have_more else 0
            return tokens + more, estimated + more
        if record.is_unfinished:
            generated = self._of_unsent(record, prompt)
            return generated, generated
        if count.has_completion:
            return self._of_choices(record, count)
        per_byte = max(self._text_of(record).value, _LEAST_PER_BYTE)
        likely = ceil(count.text_bytes * per_byte * UNREPORTED_MARGIN)
        generated = self._of_unreported(record, count.listed or likely, prompt)
        return generated, generated

    def _of_failed(self, record: RequestRecord) -> Tokens | None:
        """Estimate by the time what was generated for an answer that ended as an error of llama-server's own."""
        if record.backend_status != HTTPStatus.INTERNAL_SERVER_ERROR or not record.prepared.route.generates:
            return None
        generated = self._by_time(record, 0)
        return Tokens(0, 0, generated, estimated=generated)

    def _of_unsent(self, record: RequestRecord, prompt: int) -> int:
        """Estimate what was generated for a client that got nothing of it."""
        seen, shown = record.left.generated, record.left.shown
        if seen is not None and seen.tokens is not None:
            return seen.tokens
        if shown is not None and shown.has_all_in_events:
            generated = OVERRUN_TOKENS * record.asked.answers
            return _as_shown(record, min(generated, limit_of(record) or generated), 0, prompt)
        return _as_shown(record, self._by_time(record, prompt), 0, prompt)

    def _of_unreported(self, record: RequestRecord, shown: int, prompt: int, *, may_be_all: bool = True) -> int:
        """Estimate what was generated for a response whose client asked for no report of it.

        It is what the response shows, but at least half of what the time makes likely: a grammar can make each token
        one letter, or half a character, which makes no event and is in no list. If no speed has been learned, it is all
        that the request allows, if it `may_be_all`.
        """
        limit = limit_of(record)
        if may_be_all and limit is not None and not self._has_speed(record):
            return limit
        by_time = self._by_time(record, prompt)
        generated = max(shown, by_time // 2) if shown else by_time
        return min(generated, limit or generated)

    @staticmethod
    def _has_counted(record: RequestRecord, source: TokenCounter, count: Count) -> bool:
        """Whether a stream has had more than the events with which its answers begin."""
        return source.relayed_tokens > 0 or count.reports > 0 or source.events > record.asked.answers

    @staticmethod
    def _of_stream(record: RequestRecord, count: Count, relayed: int) -> tuple[int, int]:
        """Return the tokens of a stream. Choices that have no report yet are counted by their events."""
        reported, estimated = count.tokens.completion, count.tokens.estimated
        is_whole = not record.is_unfinished and count.reports >= record.asked.answers
        if is_whole or relayed <= reported:
            return reported, estimated
        return relayed, relayed - (reported - estimated)

    def _unsent(self, record: RequestRecord, sent: int, prompt: int) -> int:
        """Estimate what the backend generated of a stream that was given up, besides what it has sent.

        A stream begins before its prompt is read.
        """
        left, answers = record.left, record.asked.answers
        generated = sent + OVERRUN_TOKENS * answers
        span_s = max(record.ended_s, left.worked_until_s) - record.first_byte_s - self._reading_s(record, prompt)
        by_time = ceil(span_s * self._speed_of(record)) * answers
        has_all_in_events = left.shown is not None and left.shown.has_all_in_events
        if left.is_behind:
            may_be_all = None if self._has_speed(record) else limit_of(record)
            generated = max(generated, may_be_all or by_time)
        elif self._has_speed(record) and not has_all_in_events:  # it may have generated what makes no event
            generated = max(generated, by_time // _SLOWEST)
        generated = _as_shown(record, generated, sent, prompt)
        return max(min(generated, limit_of(record) or generated) - sent, 0)

    def _by_time(self, record: RequestRecord, prompt: int) -> int:
        """Estimate what the backend generated for a client that has left, or reported to no one, by the time."""
        left, seen = record.left, record.left.generated
        span_s = max(record.ended_s, left.worked_until_s) - record.left_queue_s
        at_once = record.asked.answers if seen is None else seen.at_once
        if record.is_unfinished:
            linger_s = 0.0 if left.worked_until_s else LINGER_S
            span_s = max(span_s + linger_s - self._reading_s(record, prompt), 0.0)
        speed = self._speed_of(record)
        generated = ceil(span_s * speed) * at_once
        if seen is not None and seen.most is not None:
            # What it has had since the last look, at which others may have kept it from any.
            more = ceil(LINGER_S * speed) if seen.most else OVERRUN_TOKENS
            generated = min(generated, (seen.most + more) * at_once)
        return min(generated, limit_of(record) or generated)

    def _reading_s(self, record: RequestRecord, prompt: int) -> float:
        """Return for how long the backend is likely to read the prompts, which it does at once."""
        return prompt / record.asked.prompts / self._paces[record.model].reading.value

    def _text_of(self, record: RequestRecord) -> _Average:
        """Return how many tokens a byte of the text has that is generated for the request's key."""
        return self._text[record.key_id]

    def _has_speed(self, record: RequestRecord) -> bool:
        return self._paces[record.model].generating.are_learned

    def _speed_of(self, record: RequestRecord) -> float:
        """Return how fast the model of a request generates."""
        return self._paces[record.model].generating.of(record.key_id, record.ended_s)

    def _of_choices(self, record: RequestRecord, count: Count) -> tuple[int, int]:
        """Return the tokens of the first choice, which is reported, and of the others, by their text."""
        completion, estimated = count.tokens.completion, 0
        if len(count.choices) > 1 and record.asked.answers > 1:
            first, *others = count.choices
            prior = self._text_of(record).value
            hidden = _hidden_in(count, prior) if record.asked.has_stop else 0
            rate = (completion + prior * _PRIOR_BYTES) / (first.text_bytes + _PRIOR_BYTES)
            # A limit that ended the first choice ends all choices after as many tokens, if they share its prompt.
            limits = (record.asked.max_tokens, completion * record.asked.prompts)
            shared = completion if first.limited and completion in limits else 0
            # What the first choice's list leaves out is in no list: tokens that end within a character.
            list_rate = completion / first.tokens if 0 < first.tokens < completion - 1 and not hidden else 1.0
            for choice in others:
                number, is_exact = _tokens_of_choice(choice, rate, list_rate, shared, record.asked.max_tokens)
                if hidden and not choice.limited:
                    number, is_exact = min(number + hidden, record.asked.max_tokens or number + hidden), False
                completion += number
                estimated += 0 if is_exact else number
        return completion, estimated


def _hidden_in(count: Count, per_byte: float) -> int:
    """Return how many tokens of the first choice neither its text nor its list shows: those of a stop word.

    Each choice that has ended with one has about as many.
    """
    first, reported = count.choices[0], count.tokens.completion
    if count.listed:
        shown = count.listed // len(count.choices)
    else:
        shown = first.tokens or ceil(_MOST_PER_BYTE * per_byte * first.text_bytes) + _ENDING_TOKENS
    return max(reported - shown, 0)


def _tokens_of_choice(
    choice: Choice, rate: float, list_rate: float, shared: int, max_tokens: int | None
) -> tuple[int, bool]:
    """Return the tokens of a choice without a report, and whether that is exact.

    `rate` is in tokens per byte of text, `list_rate` in tokens per listed one. `shared` is the limit that ends each
    choice, 0 if it is not known.
    """
    if choice.limited and shared:
        return shared, True
    if choice.tokens and list_rate == 1:
        return choice.tokens, True
    by_text = ceil(choice.text_bytes * rate * MARGIN) + 1  # and the token that ended it
    likely = ceil(choice.tokens * list_rate * MARGIN) or by_text
    return min(likely, shared or likely, max_tokens or likely), False


def _as_shown(record: RequestRecord, tokens: int, sent: int, prompt: int) -> int:
    """Return an estimate of what was generated of a stream that was left, within what its slot has shown.

    `sent` are the tokens that have come as events, and `prompt` are those of the prompts.
    """
    shown, answers = record.left.shown, record.asked.answers
    if shown is None:
        return tokens
    if shown.most is not None:
        tokens = int(min(tokens, (shown.most + OVERRUN_TOKENS) * answers))
    if shown.most_total is not None:
        tokens = min(tokens, max(shown.most_total - prompt, sent + OVERRUN_TOKENS))
    return tokens if shown.generated is None or answers > 1 else shown.generated.nearest(tokens)


def limit_of(record: RequestRecord) -> int | None:
    """Return how many tokens the request may have generated at most, if it said so."""
    asked = record.asked
    return None if asked.max_tokens is None else asked.max_tokens * asked.answers
