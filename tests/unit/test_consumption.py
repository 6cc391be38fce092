"""What becomes of messages in hand when the connection comes and goes."""

from types import SimpleNamespace

import pytest
import redis
from celery import Celery
from kombu.exceptions import OperationalError

from pool import Settings
from pool.worker.consumption import Consumption
from pool.worker.takeover import RedisTakeover
from pool.worker.turns import Job, Turns


@pytest.mark.parametrize(("channel", "left"), [(SimpleNamespace(give_back=None), 1), (SimpleNamespace(), 0)])
def test_a_connection_that_is_lost_again_before_it_was_attached_changes_nothing(channel, left):
    """On Redis what waits stays ours, on RabbitMQ it is delivered again: either way that was seen to the first time."""
    consumption = Consumption(SimpleNamespace(queues=[]))
    consumption.turns = turns = Turns(1, 10, lambda _: None, lambda *_: None)
    consumption._consumer = SimpleNamespace(task_consumer=SimpleNamespace(channel=channel))
    for _ in range(2):  # one runs, one waits
        turns.ask(Job("key", "queue", object()))
    consumption.detach()
    assert turns.waiting == left
    turns.ask(Job("key", "queue", object()))
    consumption.detach()
    assert turns.waiting == left + 1


def test_a_broker_that_is_away_is_told_as_redis_py_does():
    """Also at the first contact, which kombu makes."""

    def refuse():
        raise OperationalError("Error 111 connecting")

    takeover = RedisTakeover(SimpleNamespace(connection_for_write=refuse, conf=Celery().conf), Settings())
    with pytest.raises(redis.ConnectionError, match="111"):
        takeover.claimants()
