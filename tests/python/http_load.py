"""Clients of a completion server, thousands of them in one thread: a request over a socket of its own, and loads made of such requests.

Only the standard library, and little of the processor: the clients share the cores with the server that they measure.
"""
import asyncio
import contextlib
import json
import random
import statistics
import time
from dataclasses import dataclass, field

HOST = "127.0.0.1"
PATH = "/v1/completions"
HEAD_BYTES_MAX = 65536
# Longest answer to a single request that is waited for.
ANSWER_S_MAX = 300
# What `Retry-After` says when it is missing, and the longest that is believed.
RETRY_S_DEFAULT, RETRY_S_MAX = 1.0, 120.0
# An impatient client comes back after this long at most, whatever it was told.
IMPATIENT_S_MAX = 1.0
# Clients of a closed loop begin one after the other over this long, so that their requests do not march in step.
STAGGER_S = 1.0

WORDS = ("the of and to in is was for that on as with by at from this which or an are were it has one all new more first two time other about some "
         "into over system cluster model server node memory token queue batch weight layer cache network request answer number").split()


class Prompts:
    """Seeded prompts, none of which begins like another one, so that no cache of prefixes serves them."""

    def __init__(self, seed):
        self.draw = random.Random(seed)

    def words(self, n):
        return f"[{self.draw.randrange(10**9)}] " + " ".join(self.draw.choices(WORDS, k=n))

    def tokens(self, n):
        """Numbers of plain tokens."""
        return self.draw.choices(range(1000, 20000), k=n)


@dataclass
class Request:
    """What is asked for, encoded once for every try."""
    prompt: str | list
    n_output: int
    user: str | None = None
    key: str | None = None
    head: bytes = field(init=False, default=b"", repr=False)

    def encoded(self):
        if not self.head:
            body = {"prompt": self.prompt, "max_tokens": self.n_output, "temperature": 0, "stream": True, "ignore_eos": True,
                    "stream_options": {"include_usage": True}}
            if self.user:
                body |= {"user": self.user, "user_id": self.user}
            body = json.dumps(body).encode()
            key = f"Authorization: Bearer {self.key}\r\n" if self.key else ""
            self.head = (f"POST {PATH} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n{key}Connection: close\r\n"
                         f"Content-Length: {len(body)}\r\n\r\n").encode() + body
        return self.head


@dataclass
class Answer:
    """How one try ended; times are those of the monotonic clock."""
    start: float
    outcome: str = "unfinished"
    end: float = 0.0
    status: int = 0
    retry_after: float | None = None
    detail: str = ""
    n_tokens: int = 0
    # Of every event that brought text or a token.
    times: list = field(default_factory=list)
    text: list = field(default_factory=list)

    @property
    def is_whole(self):
        """It came with all its tokens."""
        return self.outcome == "ok"

    @property
    def is_refusal(self):
        return self.status == 429

    @property
    def ttft(self):
        return self.times[0] - self.start if self.times else None

    def wait_s(self):
        """How long a refused client is told to wait."""
        told = RETRY_S_DEFAULT if self.retry_after is None else self.retry_after
        return min(max(told, 0.0), RETRY_S_MAX)


class Exchange(asyncio.Protocol):
    """One request and its answer on one connection."""

    def __init__(self, request, answer, on_event):
        self.request, self.answer, self.on_event = request, answer, on_event
        self.done = asyncio.get_running_loop().create_future()
        self.raw, self.body = bytearray(), bytearray()
        self.chunk_left, self.is_chunked, self.body_left = None, False, None
        self.in_body = self.is_stream = self.is_done = False

    def connection_made(self, transport):
        transport.write(self.request.encoded())

    def connection_lost(self, error):
        self.finish("cut", str(error or "closed"))

    def finish(self, outcome, detail=""):
        if not self.done.done():
            self.answer.end = time.monotonic()
            self.answer.outcome, self.answer.detail = outcome, detail[:300]
            self.done.set_result(None)

    def data_received(self, data):
        now = time.monotonic()
        self.raw += data
        try:
            if not self.in_body and not self.take_head():
                return
            is_over = self.take_body()
            if self.is_stream:
                self.take_events(now)
            elif is_over:
                self.finish(str(self.answer.status), self.body.decode(errors="replace"))
        except (ValueError, KeyError, IndexError) as error:
            self.finish("malformed", repr(error))

    def take_head(self):
        head, mark, rest = bytes(self.raw).partition(b"\r\n\r\n")
        if not mark:
            if HEAD_BYTES_MAX < len(self.raw):
                raise ValueError("the head does not end")
            return False
        status, *lines = head.decode("latin-1").split("\r\n")
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.answer.status = int(status.split()[1])
        if "retry-after" in fields:
            with contextlib.suppress(ValueError):
                self.answer.retry_after = float(fields["retry-after"])
        self.is_chunked = "chunked" in fields.get("transfer-encoding", "")
        self.body_left = int(fields["content-length"]) if "content-length" in fields else None
        self.is_stream = self.answer.status == 200 and fields.get("content-type", "").startswith("text/event-stream")
        self.raw, self.in_body = bytearray(rest), True
        return True

    def take_body(self):
        """Moves what came to the body; whether that is all of it."""
        if not self.is_chunked:
            self.body += self.raw
            self.raw.clear()
            return self.body_left is not None and self.body_left <= len(self.body)
        while self.raw:
            if self.chunk_left is None:
                size, mark, rest = bytes(self.raw).partition(b"\r\n")
                if not mark:
                    return False
                self.chunk_left = int(size.split(b";")[0], 16) + 2
                self.raw = bytearray(rest)
                if self.chunk_left == 2:
                    return True
            taken = self.raw[:self.chunk_left]
            del self.raw[:self.chunk_left]
            # The line end behind a chunk is none of its bytes.
            self.body += taken[:max(0, self.chunk_left - 2)]
            self.chunk_left = self.chunk_left - len(taken) or None
        return False

    def take_events(self, now):
        *events, rest = bytes(self.body).split(b"\n\n")
        self.body = bytearray(rest)
        for event in events:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    self.take_event(line[5:].strip(), now)

    def take_event(self, data, now):
        answer = self.answer
        if data == b"[DONE]":
            self.finish("ok" if answer.n_tokens == self.request.n_output else "short", f"{answer.n_tokens} tokens of {self.request.n_output}")
            return
        event = json.loads(data)
        if "error" in event:
            self.finish("error", json.dumps(event["error"]))
            return
        if event.get("usage"):
            answer.n_tokens = event["usage"].get("completion_tokens") or answer.n_tokens
        choices = event.get("choices") or []
        if choices and (choices[0].get("text") or not choices[0].get("finish_reason")):
            answer.times.append(now)
            answer.text.append(choices[0].get("text") or "")
            if self.on_event:
                self.on_event()


async def ask(port, request, limit_s=ANSWER_S_MAX, answers=None, on_event=None):
    """One try. The answer is added to `answers` at once, so that one which never ends is known too."""
    answer = Answer(time.monotonic())
    if answers is not None:
        answers.append(answer)
    transport = None
    try:
        async with asyncio.timeout(limit_s):
            transport, exchange = await asyncio.get_running_loop().create_connection(lambda: Exchange(request, answer, on_event), HOST, port)
            await exchange.done
    except TimeoutError:
        answer.outcome = "late"
    except OSError as error:
        answer.outcome, answer.detail = "unreachable", str(error)
    finally:
        answer.end = answer.end or time.monotonic()
        if transport:
            transport.abort()
    return answer


@dataclass
class Pursuit:
    """A request that was sent again until it was answered or given up."""
    start: float
    n_tries: int = 0
    last: Answer | None = None

    @property
    def ttft(self):
        """From the first try on."""
        return self.last.times[0] - self.start if self.last and self.last.times else None


async def pursue(port, request, tries_max, wait_s_max=RETRY_S_MAX, answers=None, on_event=None):
    """Sends the same request again after as long as each refusal says; `wait_s_max` makes the client an impatient one."""
    pursuit = Pursuit(time.monotonic())
    while True:
        pursuit.n_tries += 1
        pursuit.last = await ask(port, request, answers=answers, on_event=on_event)
        if not pursuit.last.is_refusal or tries_max <= pursuit.n_tries:
            return pursuit
        await asyncio.sleep(min(pursuit.last.wait_s(), wait_s_max))


async def end_tasks(tasks):
    """Cancels tasks and waits for their ends; their failures are not lost."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            raise result


@contextlib.asynccontextmanager
async def closed_loop(port, n_clients, make_request):
    """While inside, clients ask again as soon as they are answered, refused ones after at most a second; yields the growing list of answers."""
    answers = []

    async def client(i):
        await asyncio.sleep(STAGGER_S * i / n_clients)
        while True:
            answer = await ask(port, make_request(), answers=answers)
            if not answer.is_whole:
                await asyncio.sleep(min(answer.wait_s(), IMPATIENT_S_MAX) if answer.is_refusal else IMPATIENT_S_MAX)

    tasks = [asyncio.create_task(client(i)) for i in range(n_clients)]
    try:
        yield answers
    finally:
        await end_tasks(tasks)


def arrivals(rate, seconds, seed):
    """Moments of a Poisson process, from its start on."""
    draw, at, found = random.Random(seed), 0.0, []
    while (at := at + draw.expovariate(rate)) < seconds:
        found.append(at)
    return found


async def open_loop(moments, make_task, drain_s):
    """Starts a task at each moment, whether or not the server keeps up; what is not done `drain_s` after the last one is cut. Returns the start
    and the tasks."""
    start, tasks = time.monotonic(), []
    try:
        for moment in moments:
            await asyncio.sleep(max(0.0, start + moment - time.monotonic()))
            tasks.append(asyncio.create_task(make_task()))
        if tasks:
            await asyncio.wait(tasks, timeout=drain_s)
    finally:
        await end_tasks([task for task in tasks if not task.done()])
    return start, tasks


class Lag:
    """How late the clients' own clock is, which every time that they measure may be wrong by."""
    EVERY_S = 0.02

    async def __aenter__(self):
        self.late = []
        self.task = asyncio.create_task(self.watch())
        return self

    async def watch(self):
        while True:
            start = time.monotonic()
            await asyncio.sleep(self.EVERY_S)
            self.late.append(time.monotonic() - start - self.EVERY_S)

    async def __aexit__(self, *_):
        await end_tasks([self.task])

    def p99(self):
        return percentile(self.late, 99) or 0.0


def percentile(values, p):
    """Between neighbours by their distance; none of no values."""
    if not values:
        return None
    values = sorted(values)
    place = (len(values) - 1) * p / 100
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def rate(ends, start, end):
    """Events a second in a stretch of time, as the slope of the line through their count: bursts at the edges weigh little."""
    ends = sorted(t for t in ends if start <= t < end)
    return statistics.linear_regression(ends, range(len(ends))).slope if 2 < len(ends) else 0.0


def gaps(times, start, end):
    """Seconds between neighbours of which the later one is within the stretch."""
    return [b - a for a, b in zip(times, times[1:]) if start <= b < end]
