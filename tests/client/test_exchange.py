"""When the client asks again, by a clock that a test turns."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from owlrec.client import Answer, Call, ClientError, Failure, RetryPolicy, Send, Wait, exchange

CALL = Call("GET", "/v1/thing/7", lambda answer: answer.body.decode(), route="/v1/thing/{id}")
POLICY = RetryPolicy(attempts=4, first_wait_s=0.1, longest_wait_s=0.3, timeout_s=2, total_s=10)
GOOD = Answer(200, {}, b"seven")


def refused(status, **headers):
    body = f'{{"title":"t","status":{status},"detail":"busy","errors":[]}}'
    return Answer(status, {name.replace("_", "-"): value for name, value in headers.items()}, body.encode())


def play(outcomes, call=CALL, policy=POLICY, takes_s=0.5, draw=lambda: 1.0):
    """What the exchange did, as it is answered with `outcomes`, each after `takes_s`: (result or error, steps)."""
    now, steps, left = 0.0, [], list(outcomes)
    going, reply = exchange(call, policy, lambda: now, draw), None
    try:
        while True:
            step = going.send(reply)
            steps.append(step)
            reply = left.pop(0) if isinstance(step, Send) else None
            now += takes_s if isinstance(step, Send) else step.seconds
    except StopIteration as done:
        return done.value, steps
    except ClientError as error:
        return error, steps


def waits(steps):
    return [step.seconds for step in steps if isinstance(step, Wait)]


def test_an_answer_ends_it():
    assert play([GOOD]) == ("seven", [Send(2.0)])


@pytest.mark.parametrize("outcome", [Failure("gone"), *map(refused, (408, 429, 500, 502, 503, 504))])
def test_what_may_pass_is_asked_again_after_growing_waits(outcome):
    result, steps = play([outcome] * 3 + [GOOD])
    assert result == "seven"
    assert waits(steps) == pytest.approx([0.1, 0.2, 0.3])  # the last would be 0.4, but for `longest_wait_s`
    assert waits(play([outcome, GOOD], draw=lambda: 0.25)[1]) == pytest.approx([0.025])


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 413, 422, 501])
def test_what_stays_wrong_is_not_asked_again(status):
    error, steps = play([refused(status)])
    assert (error.status, steps) == (status, [Send(2.0)])
    assert "/v1/thing/{id}" in str(error)
    assert "busy" in str(error)


def test_attempts_end_and_the_last_refusal_is_the_error():
    error, steps = play([refused(503), Failure("gone"), refused(500), refused(503, x_owlrec_request_id="r-9")])
    assert (error.status, error.request_id) == (503, "r-9")
    assert "after 4 attempts" in str(error)
    assert "r-9" in str(error)
    assert len(waits(steps)) == 3
    error, _ = play([Failure("connection refused")] * 4)
    assert error.status is None
    assert "connection refused" in str(error)


def test_the_server_says_how_long_to_wait():
    assert waits(play([refused(503, retry_after="3"), GOOD])[1]) == [3.0]
    assert waits(play([refused(429, retry_after="0"), GOOD])[1]) == pytest.approx([0.1])
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=5), usegmt=True)
    assert 3 < waits(play([refused(503, retry_after=later), GOOD])[1])[0] <= 5
    assert waits(play([refused(503, retry_after="soon"), GOOD])[1]) == pytest.approx([0.1])


def test_nobody_waits_for_what_would_come_too_late():
    error, steps = play([refused(503, retry_after="60")])
    assert (error.status, waits(steps)) == (503, [])


def test_the_whole_call_has_its_time_and_the_last_attempt_what_is_left_of_it():
    policy = POLICY.model_copy(update={"total_s": 3.0})
    error, steps = play([Failure("slow")] * 4, policy=policy, takes_s=1.3)
    assert [step.timeout_s for step in steps if isinstance(step, Send)] == pytest.approx([2.0, 1.6, 0.1])
    assert "after 3 attempts" in str(error)


def test_a_call_that_says_how_long_it_takes_has_that_on_top():
    call = Call("POST", "/v1/rank", lambda answer: answer.body, extra_s=30.0)
    _, steps = play([Failure("slow"), GOOD], call=call, takes_s=32.0)
    assert [step.timeout_s for step in steps if isinstance(step, Send)] == pytest.approx([32.0, 7.9])


def test_a_miss_is_told_from_a_wrong_address():
    call = Call("GET", "/v1/thing/7", lambda answer: answer.body, may_miss=True)
    body = b'{"title":"t","status":404,"detail":"nothing is known","errors":[{"field":"id","message":"m"}]}'
    assert play([Answer(404, {}, body)], call)[0] is None
    for other in (refused(404), Answer(404, {}, b"<html>Not Found")):
        assert play([other], call)[0].status == 404
    assert play([Answer(404, {}, body)], CALL)[0].status == 404


def test_an_answer_of_somebody_else_is_an_error_that_says_so():
    def read(answer):
        return {}["dim"]

    error, _ = play([GOOD], Call("GET", "/x", read))
    assert "Check the address" in str(error)
    assert error.status == 200
