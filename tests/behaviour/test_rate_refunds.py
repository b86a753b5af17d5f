"""What a refused request gives back to its key's rate."""

from support.backend import close
from support.gateway import KEY, Stack, post, scenario, until


@scenario(KEYS=f"alice:{KEY.decode()}:2\n", MAX_CONCURRENT_REQUESTS="1", QUEUE_TIMEOUT="70")
async def test_late_refusals_let_no_further_requests_in(stack: Stack) -> None:
    ticket = stack.app.queue.acquire("somebody")
    late = [await stack.client() for _ in range(2)]
    for number, client in enumerate(late):
        client.send(post())
        await until(lambda number=number: stack.app.queue.queued == number + 1)
    stack.advance(61)
    await until(lambda: stack.app.queue.queued == 2)
    early = [await stack.client() for _ in range(2)]
    for number, client in enumerate(early):
        client.send(post())
        await until(lambda number=number: stack.app.queue.queued == number + 3)
    stack.advance(9)
    for client in late:
        assert (await client.response()).code == "queue_timeout"
    ticket.release()
    for client in early:
        assert (await client.response()).status == 200
    assert (await stack.ask(post())).code == "rate_limit_exceeded"


@scenario(KEYS=f"alice:{KEY.decode()}:1\n")
async def test_a_request_that_the_backend_worked_on_counts(stack: Stack) -> None:
    stack.backend.script(close())
    assert (await stack.ask(post())).status == 502
    assert (await stack.ask(post())).code == "rate_limit_exceeded"
