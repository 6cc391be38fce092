"""What Celery's pool is told to call, as a job: under which key, in which lane, from which queue."""

from typing import Any

import pytest
from celery import Celery
from celery.worker import state

import tasks.turns
from pool import MemoryBackend, Settings, install
from pool.sharding.hashing import shard_of
from pool.worker import execution
from pool.worker.execution import Call
from pool.worker.maintenance import CHAT_LANE
from pool.worker.router import KEY_HEADER
from pool.worker.task import PooledTask
from pool.worker.turns import Turns


@pytest.fixture
def extension(tmp_path) -> Any:
    app = Celery("execution", broker="memory://", backend="cache+memory://", set_as_current=False)
    settings = Settings(shards=8, node_shards=tuple(range(8)), data_dir=tmp_path)
    extension = install(app, settings, backend_class=MemoryBackend)

    @app.task(shared=False, base=PooledTask, bind=True, key="user", name="t.ordinary")
    def ordinary(self: Any, user: str) -> None:
        pass

    yield extension
    extension.close(grace=0.0)


RUN_TURN = tasks.turns.run_turn.name


def call(extension: Any, name: str, key: str | None = "c1", queue: str | None = None) -> Call:
    """A message of a task as Celery hands it to its pool."""
    headers: dict[str, Any] = {"delivery_info": {"routing_key": queue or extension.queue_for(key)}}
    if key is not None:
        headers[KEY_HEADER] = key
    return Call(lambda *_: None, (name, "id", headers, b"", "json", "utf-8"), {}, None, None)


class Request:
    """What Celery has of a message; *told*: what became of it."""

    id = "id-1"

    def __init__(self) -> None:
        self.told: list[str] = []
        state.requests[self.id] = self
        state.active_requests.add(self)

    def revoked(self) -> bool:
        return False

    def on_accepted(self, *_: Any) -> None:
        pass

    def acknowledge(self) -> None:
        self.told.append("acknowledged")

    def reject(self, *, requeue: bool) -> None:
        self.told.append("back" if requeue else "dropped")


@pytest.mark.parametrize(
    ("error", "told"), [(OSError("no room for the result"), ["back"]), (MemoryError(), ["acknowledged"]), (None, [])]
)
def test_what_celery_cannot_handle_does_not_strand_the_message(error, told, monkeypatch, caplog):
    """Its credit and its shard are free again; a failure for want of memory is stored, and not tried again."""
    monkeypatch.setattr(execution, "RETRY_PAUSE", 0.0)
    request = Request()

    def target() -> None:
        if error is not None:
            raise error

    Call(target, (), {}, lambda _: None, request.on_accepted).run()
    assert request.told == told
    assert (request in state.active_requests) == (error is None)
    assert (request.id in state.requests) == (error is None)
    assert ("its message goes back" in caplog.text) == (error is not None)
    state.task_ready(request)


def test_turns_and_closes_of_a_chat_share_a_lane_of_one(extension):
    """A close waits behind the turns that were sent before it, without a thread."""
    turn, close = (call(extension, name).job(extension) for name in (RUN_TURN, "pool.close_chat"))
    assert turn.key == close.key == f"c1\0{CHAT_LANE}"
    assert turn.limit == close.limit == 1
    assert turn.queue == close.queue == extension.queue_for("c1")


def test_each_chat_has_a_lane_of_its_own(extension):
    """Also when both come by one queue."""
    other = next(f"k{number}" for number in range(99) if shard_of(f"k{number}", 8) == shard_of("c1", 8))
    jobs = [call(extension, RUN_TURN, key).job(extension) for key in ("c1", other)]
    assert jobs[0].key != jobs[1].key
    assert jobs[0].queue == jobs[1].queue


def test_an_ordinary_task_of_the_chat_is_in_no_lane(extension):
    """As many of them run at once as of any key."""
    job = call(extension, "t.ordinary").job(extension)
    assert (job.key, job.limit) == ("c1", None)


def test_a_cancel_waits_for_nothing(extension):
    """It goes by no shard queue, so it has no key, and no lane: behind the turns it would come too late."""
    assert extension.lane_of("pool.cancel_turn") is None
    job = call(extension, "pool.cancel_turn", None, "celery").job(extension)
    assert (job.key, job.queue, job.limit) == (None, "celery", None)


def test_a_producer_that_sends_no_key_shares_the_key_of_the_queue(extension):
    """Its task is in a lane all the same."""
    queue = extension.queue_for("c1")
    assert call(extension, "t.ordinary", None, queue).job(extension).key == queue
    assert call(extension, RUN_TURN, None, queue).job(extension).key == f"{queue}\0{CHAT_LANE}"


def test_an_unknown_task_is_in_no_lane(extension):
    """It fails in the worker, as Celery has it."""
    assert call(extension, "nobody.knows").job(extension).key == "c1"


def test_the_lane_of_a_busy_chat_holds_one_place(extension):
    """Turns that wait are no threads: an ordinary task of the chat, and a cancel, run at once."""
    started: list[str] = []
    turns = Turns(4, 4, lambda job: started.append(job.key or job.queue), lambda *_: None)
    for name in (RUN_TURN, RUN_TURN, "pool.close_chat", "t.ordinary"):
        turns.ask(call(extension, name).job(extension))
    turns.ask(call(extension, "pool.cancel_turn", None, "celery").job(extension))
    assert started == [f"c1\0{CHAT_LANE}", "c1", "celery"]
    assert turns.waiting == 2
