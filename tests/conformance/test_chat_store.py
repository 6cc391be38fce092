"""What the store of durable chats promises, over every kind: the fake, Valkey 9, Redis 7 and a Redis Cluster."""

import json
import threading
import time
from dataclasses import replace

import pytest

from pool.errors import ConfigError, InvalidKey, NotOwner, PoolError
from pool.sharding.hashing import shard_of
from tests.support.chat_rigs import SHARDS, FakeChatRig, RealChatRig
from tests.support.lease_rigs import DebianServer, EmbeddedServer
from tests.support.services import require_service

OLD, NEW = 1_800_000_000_000_001, 1_800_000_000_000_002  # 16 digits, as epochs have: they differ in the last one only
HOSTILE = ["a}b{c", "{", "}{", "*", "a:b", "chat 1", "日本語 🧵", "\\n", '"', "%s", "'] = nil --", "x" * 256]


@pytest.fixture(scope="module", params=["fake", "valkey", "redis7", "cluster"])
def server(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "data"
    if request.param == "fake":
        yield None
        return
    if request.param == "valkey":
        server = EmbeddedServer(folder)
    else:
        require_service("redis-server", DebianServer.binary)
        server = DebianServer(folder, cluster=request.param == "cluster")
    yield server
    server.stop()


@pytest.fixture
def rig(server):
    rig = RealChatRig(server) if server else FakeChatRig()
    yield rig
    rig.close()


@pytest.fixture
def chats(rig):
    return rig.chats


@pytest.fixture
def real(rig):
    """A rig of a server."""
    return rig


IN_REDIS = pytest.mark.parametrize("server", ["valkey", "redis7", "cluster"], indirect=True, scope="module")


def shard(chat):
    return shard_of(chat, SHARDS)


def of_one_shard(count):
    """So many chats that share a shard."""
    return [chat for chat in (f"chat-{n}" for n in range(200 * count)) if shard(chat) == 7][:count]


def one(chats, chat="c"):
    (record,) = chats.records(chat)
    return record


# -- turns


def test_the_first_turn_makes_the_record(chats):
    """Open, with the turn that runs and its epoch; there is no session yet."""
    begun = chats.begin("c", "opencode", OLD, "t1")
    assert not begun.repeated
    record = begun.chat
    assert (record.chat, record.agent, record.turn, record.epoch, record.state) == ("c", "opencode", "t1", OLD, "open")
    assert record.session_id == record.worktree == record.branch == record.version == ""
    assert record.created == record.last_active or record.last_active - record.created < 0.001
    assert one(chats) == record


def test_times_are_seconds_of_the_stores_clock(rig, chats):
    """To the microsecond, and later ones are later."""
    first = chats.begin("c", "a", 0, "t1").chat
    second = chats.begin("c", "a", 0, "t2").chat
    assert second.created == first.created
    assert second.last_active > first.last_active
    if not rig.fake:
        assert abs(first.created - time.time()) < 5


def test_what_a_turn_saves_is_there_for_the_next_one(chats):
    """Session, worktree, branch and version, whatever characters they hold; saving counts as activity."""
    begun = chats.begin("c", "a", OLD, "t1").chat
    texts = {"session_id": 's/1 "\n\x00é', "worktree": "trees/ä b", "branch": "chat/c", "version": "1.2"}
    saved = chats.save(replace(begun, **texts), OLD)
    assert {name: getattr(saved, name) for name in texts} == texts
    assert saved.last_active > begun.last_active
    assert one(chats) == saved
    chats.finish("c", "a", OLD, "t1")
    following = chats.begin("c", "a", OLD, "t2").chat
    assert {name: getattr(following, name) for name in texts} == texts


def test_a_save_writes_nothing_but_the_session(chats):
    """State and times are the store's."""
    begun = chats.begin("c", "a", OLD, "t1").chat
    saved = chats.save(replace(begun, session_id="s", state="closing", created=1.0, epoch=5), OLD)
    assert (saved.state, saved.created, saved.epoch, saved.turn) == ("open", begun.created, OLD, "t1")


@pytest.mark.parametrize("turn", ["t1", "t0", ""])
def test_a_save_of_a_turn_that_does_not_run_is_refused(chats, turn):
    """Another turn has the session now; nothing changes."""
    begun = chats.begin("c", "a", OLD, "t1").chat
    chats.finish("c", "a", OLD, "t1")
    chats.begin("c", "a", OLD, "t2")
    before = one(chats)
    with pytest.raises(PoolError, match="does not run"):
        chats.save(replace(begun, turn=turn, session_id="s"), OLD)
    assert one(chats) == before


def test_a_save_without_a_running_turn_is_refused(chats):
    """Also one that names none."""
    begun = chats.begin("c", "a", OLD, "t1").chat
    chats.finish("c", "a", OLD, "t1")
    for turn in ("t1", ""):
        with pytest.raises(PoolError, match="does not run"):
            chats.save(replace(begun, turn=turn, session_id="s"), OLD)
    assert one(chats).session_id == ""


def test_a_save_does_not_bring_a_deleted_record_back(chats):
    """A close may have come in between."""
    begun = chats.begin("c", "a", OLD, "t1").chat
    chats.delete("c", "a", OLD)
    with pytest.raises(PoolError, match="does not run"):
        chats.save(replace(begun, session_id="s"), OLD)
    assert chats.records("c") == []


def test_a_second_attempt_of_a_turn_is_told(chats):
    """The first one may have reached the agent."""
    assert not chats.begin("c", "a", OLD, "t1").repeated
    assert chats.begin("c", "a", NEW, "t1").repeated
    assert not chats.begin("c", "a", NEW, "t2").repeated


def test_a_turn_that_finished_does_not_count_as_repeated(chats):
    """It left nothing behind."""
    chats.begin("c", "a", OLD, "t1")
    chats.finish("c", "a", OLD, "t1")
    assert one(chats).turn == ""
    assert not chats.begin("c", "a", OLD, "t1").repeated


def test_a_finish_is_activity(chats):
    """The idle time of a chat begins with the end of its turn."""
    begun = chats.begin("c", "a", OLD, "t1").chat
    chats.finish("c", "a", OLD, "t1")
    assert one(chats).last_active > begun.last_active


def test_a_late_finish_does_not_end_the_next_turn(chats):
    """Only its own."""
    chats.begin("c", "a", OLD, "t1")
    chats.begin("c", "a", OLD, "t2")
    chats.finish("c", "a", OLD, "t1")
    assert one(chats).turn == "t2"


def test_a_finish_does_not_bring_a_deleted_record_back(chats):
    """It is no error either: a close came first."""
    chats.begin("c", "a", OLD, "t1")
    chats.delete("c", "a", OLD)
    chats.finish("c", "a", OLD, "t1")
    assert chats.records("c") == []
    assert chats.idle(shard("c"), 0) == []


def test_agents_of_a_chat_have_records_of_their_own(chats):
    """Told by agent; a turn of one leaves the others alone."""
    chats.begin("c", "b", OLD, "t1")
    chats.begin("c", "a", OLD, "t2")
    chats.begin("d", "a", OLD, "t3")
    assert [(record.agent, record.turn) for record in chats.records("c")] == [("a", "t2"), ("b", "t1")]


def test_an_unknown_chat_has_no_records(chats):
    """And asking makes none."""
    assert chats.records("c") == []
    assert chats.idle(shard("c"), 0) == []


# -- closing


def test_closing_marks_every_record_and_returns_them(chats):
    """With what is needed to close them: session, worktree, and the turn that still runs."""
    begun = chats.begin("c", "a", OLD, "t1").chat
    chats.save(replace(begun, session_id="s"), OLD)
    chats.begin("c", "b", OLD, "t2")
    marked = chats.mark_closing("c", OLD)
    assert [(r.agent, r.state, r.session_id, r.turn) for r in marked] == [
        ("a", "closing", "s", "t1"),
        ("b", "closing", "", "t2"),
    ]
    assert chats.records("c") == marked
    assert chats.mark_closing("c", OLD) == marked


def test_closing_an_unknown_chat_returns_nothing(chats):
    """And makes nothing."""
    assert chats.mark_closing("c", OLD) == []
    assert chats.records("c") == []


def test_a_turn_on_a_closing_record_changes_nothing(chats):
    """The caller finishes the close first."""
    chats.begin("c", "a", OLD, "t1")
    (marked,) = chats.mark_closing("c", OLD)
    begun = chats.begin("c", "a", NEW, "t2")
    assert (begun.chat, begun.repeated) == (marked, False)
    assert chats.begin("c", "a", NEW, "t1").repeated
    assert chats.records("c") == [marked]


def test_a_turn_that_runs_while_its_chat_is_closed_can_still_save(chats):
    """So that the close knows the session; it stays closing."""
    begun = chats.begin("c", "a", OLD, "t1").chat
    chats.mark_closing("c", OLD)
    saved = chats.save(replace(begun, session_id="s"), OLD)
    chats.finish("c", "a", OLD, "t1")
    record = one(chats)
    assert (saved.state, record.state, record.session_id, record.turn) == ("closing", "closing", "s", "")


def test_a_deleted_record_is_gone_and_the_next_turn_starts_anew(chats):
    """Deleting can be repeated; other agents keep theirs."""
    first = chats.begin("c", "a", OLD, "t1").chat
    chats.begin("c", "b", OLD, "t2")
    chats.save(replace(first, session_id="s"), OLD)
    chats.mark_closing("c", OLD)
    chats.delete("c", "a", OLD)
    chats.delete("c", "a", OLD)
    assert [record.agent for record in chats.records("c")] == ["b"]
    again = chats.begin("c", "a", OLD, "t3").chat
    assert (again.session_id, again.state) == ("", "open")
    assert again.created > first.created


# -- the fence


def writes(chats, epoch):
    """Every method that writes under an epoch."""
    record = replace(chats.records("c")[0], session_id="stale")
    return {
        "begin": lambda: chats.begin("c", "a", epoch, "stale"),
        "begin another agent": lambda: chats.begin("c", "z", epoch, "stale"),
        "save": lambda: chats.save(record, epoch),
        "finish": lambda: chats.finish("c", "a", epoch, "t1"),
        "mark_closing": lambda: chats.mark_closing("c", epoch),
        "delete": lambda: chats.delete("c", "a", epoch),
        "delete what is not there": lambda: chats.delete("c", "z", epoch),
    }


WRITES = ["begin", "begin another agent", "save", "finish", "mark_closing", "delete", "delete what is not there"]


@pytest.mark.parametrize("write", WRITES)
def test_a_stale_owner_is_refused_after_the_new_one_wrote(rig, chats, write):
    """By the record alone: the lease table may be lost. Nothing changes, and the error says who and why."""
    chats.begin("c", "a", OLD, "t1")
    chats.begin("c", "a", NEW, "t1")
    before = chats.records("c")
    with pytest.raises(NotOwner) as refused:
        writes(chats, OLD)[write]()
    for part in ("'c'", f"shard {shard('c')} ", str(OLD), str(NEW)):
        assert part in str(refused.value)
    assert chats.records("c") == before
    assert chats.idle(shard("c"), 3600) == []


@pytest.mark.parametrize("write", WRITES)
def test_a_stale_owner_is_refused_once_the_lease_table_names_another(rig, chats, write):
    """Before the new owner has written anything."""
    chats.begin("c", "a", OLD, "t1")
    before = chats.records("c")
    rig.lease(shard("c"), NEW)
    with pytest.raises(NotOwner, match=f"'c'.* {OLD} .* {NEW} "):
        writes(chats, OLD)[write]()
    assert chats.records("c") == before


@pytest.mark.parametrize("write", WRITES)
def test_the_owner_of_the_lease_may_write(rig, chats, write):
    """Under the very epoch that the table names; a table that lags behind refuses nobody."""
    chats.begin("c", "a", OLD, "t1")
    rig.lease(shard("c"), OLD)
    writes(chats, OLD)[write]()


def test_an_owner_whose_lease_the_table_does_not_know_yet_may_write(rig, chats):
    """After a failover the table may name an earlier epoch."""
    rig.lease(shard("c"), OLD)
    assert chats.begin("c", "a", NEW, "t1").chat.epoch == NEW


def test_the_lease_of_another_shard_is_none_of_its_business(rig, chats):
    """The fence is of the chat's own shard."""
    rig.lease((shard("c") + 1) % SHARDS, NEW)
    chats.begin("c", "a", OLD, "t1")


def test_two_owners_that_take_turns_leave_what_the_new_one_wrote(chats):
    """Whatever the stale one tries in between."""
    begun = chats.begin("c", "a", OLD, "t1").chat
    mine = chats.begin("c", "a", NEW, "t1").chat
    with pytest.raises(NotOwner):
        chats.save(replace(begun, session_id="old"), OLD)
    chats.save(replace(mine, session_id="new"), NEW)
    with pytest.raises(NotOwner):
        chats.finish("c", "a", OLD, "t1")
    assert one(chats).turn == "t1"
    chats.finish("c", "a", NEW, "t1")
    with pytest.raises(NotOwner):
        chats.delete("c", "a", OLD)
    assert (one(chats).session_id, one(chats).epoch) == ("new", NEW)


@pytest.mark.parametrize(("lower", "higher"), [(9, 10), (999, 1_000_000), (2**53, 2**53 + 1), (10**17 + 1, 10**17 + 2)])
def test_epochs_are_compared_as_numbers_of_any_length(rig, chats, lower, higher):
    """Neither as words nor as floats."""
    chats.begin("c", "a", higher, "t1")
    assert one(chats).epoch == higher
    with pytest.raises(NotOwner):
        chats.finish("c", "a", lower, "t1")
    rig.lease(shard("d"), higher)
    with pytest.raises(NotOwner):
        chats.begin("d", "a", lower, "t1")
    chats.begin("d", "a", higher, "t1")


@pytest.mark.parametrize("write", WRITES)
def test_static_placement_has_no_fence(rig, chats, write):
    """Epoch 0 is always taken."""
    chats.begin("c", "a", OLD, "t1")
    rig.lease(shard("c"), NEW)
    writes(chats, 0)[write]()


def test_a_write_without_an_epoch_leaves_the_fence_of_the_record(chats):
    """The epoch of a record only grows."""
    chats.begin("c", "a", NEW, "t1")
    assert chats.begin("c", "a", 0, "t2").chat.epoch == NEW
    with pytest.raises(NotOwner):
        chats.finish("c", "a", OLD, "t2")


@pytest.mark.parametrize("write", WRITES)
def test_a_leased_store_takes_epoch_0_for_a_shard_that_is_not_held(rig, write):
    """That is what `Ownership.epoch` says then; it must not open the fence."""
    rig.chats.begin("c", "a", OLD, "t1")
    chats = rig.leased()
    before = chats.records("c")
    with pytest.raises(NotOwner, match=f"'c': shard {shard('c')} is not held"):
        writes(chats, 0)[write]()
    assert chats.records("c") == before


# -- idle chats


def test_idle_chats_come_least_recently_active_first(rig, chats):
    """Only those of the shard, and only those that were idle for long enough."""
    long, longer, fresh = of_one_shard(3)
    for chat in (long, longer, fresh):
        chats.begin(chat, "a", OLD, "t")
        chats.finish(chat, "a", OLD, "t")
    rig.age(long, 100)
    rig.age(longer, 200)
    assert chats.idle(7, 50) == [longer, long]
    assert chats.idle(7, 150) == [longer]
    assert chats.idle(7, 1000) == []
    assert chats.idle(7, 0) == [longer, long, fresh]
    assert chats.idle(8, 0) == []


@pytest.mark.parametrize("activity", ["begin", "save", "finish"])
def test_activity_takes_a_chat_out_of_the_idle_ones(rig, chats, activity):
    """Of any of its agents."""
    chats.begin("c", "a", OLD, "t1")
    begun = chats.begin("c", "b", OLD, "t2").chat
    rig.age("c", 100)
    assert chats.idle(shard("c"), 50) == ["c"]
    if activity == "begin":
        chats.begin("c", "b", OLD, "t3")
    elif activity == "save":
        chats.save(begun, OLD)
    else:
        chats.finish("c", "b", OLD, "t2")
    assert chats.idle(shard("c"), 50) == []


def test_a_chat_is_as_active_as_its_most_active_agent(rig, chats):
    """Whichever of them writes."""
    agents = [f"agent-{n}" for n in range(8)]
    for agent in agents:
        chats.begin("c", agent, OLD, "t1")
    for agent in agents:
        rig.age("c", 100)
        chats.begin("c", agent, OLD, "t2")
        chats.delete("c", "nobody", OLD)
        assert chats.idle(shard("c"), 50) == []


def test_a_chat_whose_active_agent_was_deleted_is_as_idle_as_the_rest(rig, chats):
    """Its index entry follows what is left."""
    chats.begin("c", "a", OLD, "t1")
    rig.age("c", 100)
    chats.begin("c", "b", OLD, "t2")
    assert chats.idle(shard("c"), 50) == []
    chats.delete("c", "b", OLD)
    assert chats.idle(shard("c"), 50) == ["c"]


def test_interrupted_closes_come_before_all_idle_chats(rig, chats):
    """However fresh they are, the least recently active first."""
    idle, closing, closing_longer, fresh = of_one_shard(4)
    for chat in (idle, closing, closing_longer, fresh):
        chats.begin(chat, "a", OLD, "t")
    rig.age(idle, 10_000)
    rig.age(closing_longer, 10)
    chats.mark_closing(closing, OLD)
    chats.mark_closing(closing_longer, OLD)
    assert chats.idle(7, 3600) == [closing_longer, closing, idle]


def test_a_close_stays_first_until_its_last_record_is_gone(chats):
    """Also while another agent of the chat has begun anew."""
    for agent in "ab":
        chats.begin("c", agent, OLD, "t")
    chats.mark_closing("c", OLD)
    chats.delete("c", "a", OLD)
    chats.begin("c", "a", OLD, "t2")
    chats.finish("c", "a", OLD, "t2")
    assert chats.idle(shard("c"), 3600) == ["c"]
    chats.delete("c", "b", OLD)
    assert chats.idle(shard("c"), 3600) == []
    assert chats.idle(shard("c"), 0) == ["c"]


def test_a_chat_without_records_is_not_idle(chats):
    """It is gone with its last record."""
    for agent in "ab":
        chats.begin("c", agent, OLD, "t")
    chats.delete("c", "a", OLD)
    assert chats.idle(shard("c"), 0) == ["c"]
    chats.delete("c", "b", OLD)
    assert chats.idle(shard("c"), 0) == []


def test_a_thousand_chats_are_listed_in_pieces(chats):
    """A hundred at once unless told otherwise; what is deleted makes room for the next."""
    names = [f"chat-{n}" for n in range(1000)]
    for name in names:
        chats.begin(name, "a", OLD, "t")
    seven = [name for name in names if shard(name) == 7]
    assert chats.idle(7, 0) == seven
    assert chats.idle(7, 0, limit=3) == seven[:3]
    chats.delete(seven[0], "a", OLD)
    assert chats.idle(7, 0, limit=3) == seven[1:4]
    assert sum(len(chats.idle(each, 0)) for each in range(SHARDS)) == 999
    for name in of_one_shard(120):
        chats.begin(name, "a", OLD, "t")
    assert len(chats.idle(7, 0)) == 100
    assert len(chats.idle(7, 0, limit=1000)) == 120


# -- cancelling


def test_the_running_turns_of_a_chat_are_asked_to_be_cancelled(chats):
    """All of them, and nothing that does not run."""
    chats.begin("c", "a", OLD, "t1")
    chats.begin("c", "b", OLD, "t2")
    chats.begin("c", "z", OLD, "t3")
    chats.finish("c", "z", OLD, "t3")
    chats.begin("d", "a", OLD, "t4")
    assert sorted(chats.request_cancel("c")) == ["t1", "t2"]
    assert chats.cancelled(["t1", "t2", "t3", "t4", "never"]) == {"t1", "t2"}


def test_one_agents_turn_is_asked_to_be_cancelled(chats):
    """The others go on."""
    chats.begin("c", "a", OLD, "t1")
    chats.begin("c", "b", OLD, "t2")
    assert chats.request_cancel("c", "b") == ["t2"]
    assert chats.cancelled({"t1", "t2"}) == {"t2"}


def test_nothing_is_asked_where_nothing_runs(chats):
    """An unknown chat, an unknown agent, a turn that has ended."""
    chats.begin("c", "a", OLD, "t1")
    assert chats.request_cancel("d") == []
    assert chats.request_cancel("c", "b") == []
    chats.finish("c", "a", OLD, "t1")
    assert chats.request_cancel("c") == []
    assert chats.cancelled(["t1"]) == set()
    assert chats.cancelled([]) == set()


def test_the_turn_of_a_closing_chat_can_be_cancelled(chats):
    """A close that does not want to wait."""
    chats.begin("c", "a", OLD, "t1")
    chats.mark_closing("c", OLD)
    assert chats.request_cancel("c") == ["t1"]


def test_a_cancel_needs_no_epoch_and_changes_no_record(rig, chats):
    """Any process may ask, also while the shard moves."""
    begun = chats.begin("c", "a", OLD, "t1").chat
    rig.lease(shard("c"), NEW)
    assert rig.leased().request_cancel("c") == ["t1"]
    assert one(chats) == begun


def test_a_mark_expires_after_an_hour(rig, chats):
    """It is of use to nobody then; asking again starts over."""
    chats.begin("c", "a", OLD, "t1")
    chats.request_cancel("c")
    assert 3590 < rig.mark_lives_for("t1") <= 3600
    if rig.fake:
        chats.now += 3600
        assert chats.cancelled(["t1"]) == set()


# -- hostile arguments, spoiled records


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_any_printable_id_is_just_an_id(chats, name):
    """As a chat, as an agent and as a turn; no other chat is touched."""
    bystander = chats.begin("bystander", "a", OLD, "t").chat
    begun = chats.begin(name, name, OLD, name).chat
    assert (begun.chat, begun.agent, begun.turn) == (name, name, name)
    saved = chats.save(replace(begun, session_id=name, worktree=name, branch=name), OLD)
    assert chats.records(name) == [saved]
    assert name in chats.idle(shard(name), 0)
    assert chats.request_cancel(name) == [name]
    assert chats.cancelled([name, "t"]) == {name}
    chats.finish(name, name, OLD, name)
    assert [record.chat for record in chats.mark_closing(name, OLD)] == [name]
    chats.delete(name, name, OLD)
    assert chats.records(name) == []
    assert name not in chats.idle(shard(name), 0)
    assert chats.records("bystander") == [bystander]


@pytest.mark.parametrize("bad", ["", "a\nb", "x" * 257, "\ud800", None])
def test_what_is_no_key_is_refused(chats, bad):
    """As a chat and as an agent, by every method."""
    begun = chats.begin("c", "a", OLD, "t").chat
    calls = [
        lambda: chats.begin(bad, "a", OLD, "t"),
        lambda: chats.begin("c", bad, OLD, "t"),
        lambda: chats.save(replace(begun, chat=bad), OLD),
        lambda: chats.save(replace(begun, agent=bad), OLD),
        lambda: chats.finish(bad, "a", OLD, "t"),
        lambda: chats.finish("c", bad, OLD, "t"),
        lambda: chats.mark_closing(bad, OLD),
        lambda: chats.delete(bad, "a", OLD),
        lambda: chats.delete("c", bad, OLD),
        lambda: chats.records(bad),
        lambda: chats.request_cancel(bad),
    ]
    if bad is not None:
        calls.append(lambda: chats.request_cancel("c", bad))
    for call in calls:
        with pytest.raises(InvalidKey):
            call()


def test_arguments_that_break_a_rule_are_refused(chats):
    """An empty turn, a negative epoch, a shard that is none, a limit of nothing."""
    for call in (
        lambda: chats.begin("c", "a", OLD, ""),
        lambda: chats.begin("c", "a", -1, "t"),
        lambda: chats.idle(-1, 0),
        lambda: chats.idle(SHARDS, 0),
        lambda: chats.idle(0, 0, limit=0),
    ):
        with pytest.raises(ConfigError):
            call()


def test_a_spoiled_record_is_named_and_can_be_deleted(rig, chats):
    """Whatever reads it says of which chat and agent it is."""
    begun = chats.begin("c", "a", OLD, "t1").chat
    rig.spoil("c", "a")
    for call in (
        lambda: chats.begin("c", "a", OLD, "t1"),
        lambda: chats.save(begun, OLD),
        lambda: chats.finish("c", "a", OLD, "t1"),
        lambda: chats.mark_closing("c", OLD),
        lambda: chats.records("c"),
        lambda: chats.request_cancel("c"),
        lambda: chats.request_cancel("c", "a"),
    ):
        with pytest.raises(PoolError, match=r"'c'.*'a' cannot be decoded") as raised:
            call()
        assert raised.value.args[1:] == ("c", "a")
    assert chats.idle(shard("c"), 0) == ["c"]
    chats.delete("c", "a", OLD)
    assert chats.records("c") == []
    assert chats.idle(shard("c"), 0) == []
    chats.begin("c", "a", OLD, "t2")


def test_a_spoiled_record_does_not_hold_up_the_other_agents(rig, chats):
    """Their turns go on, their turns are cancelled, their records are marked; the chat stays listed for it."""
    rig.spoil("c", "bad")
    begun = chats.begin("c", "a", OLD, "t1").chat
    chats.save(begun, OLD)
    assert chats.request_cancel("c", "a") == ["t1"]
    chats.finish("c", "a", OLD, "t1")
    chats.begin("c", "a", OLD, "t2")
    for call in (lambda: chats.request_cancel("c"), lambda: chats.mark_closing("c", OLD)):
        with pytest.raises(PoolError, match="'bad'"):
            call()
    assert chats.cancelled(["t1", "t2"]) == {"t1", "t2"}
    assert chats.begin("c", "a", OLD, "t3").chat.state == "closing"
    chats.delete("c", "a", OLD)
    assert chats.idle(shard("c"), 0) == ["c"]
    with pytest.raises(PoolError, match="'bad'"):
        chats.records("c")
    chats.delete("c", "bad", OLD)
    assert chats.idle(shard("c"), 0) == []


def test_a_stale_owner_may_not_delete_a_spoiled_record(rig, chats):
    """What the lease table says still holds."""
    rig.spoil("c", "a")
    rig.lease(shard("c"), NEW)
    with pytest.raises(NotOwner):
        chats.delete("c", "a", OLD)
    with pytest.raises(PoolError, match="cannot be decoded"):
        chats.records("c")


# -- many threads


def test_threads_share_a_store(chats):
    """Each turn of each thread is its own."""
    failures = []

    def work(number):
        try:
            for turn in range(20):
                begun = chats.begin(f"c{number}", "a", OLD, f"t{number}.{turn}")
                assert not begun.repeated
                assert chats.save(replace(begun.chat, session_id=f"s{number}"), OLD).session_id == f"s{number}"
                chats.finish(f"c{number}", "a", OLD, f"t{number}.{turn}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert all(one(chats, f"c{number}").session_id == f"s{number}" for number in range(16))


# -- what is in Redis


@IN_REDIS
def test_each_method_is_one_round_trip(real):
    """Once the server knows the scripts."""
    chats = real.chats

    def everything():
        begun = chats.begin("c", "a", OLD, "t1").chat
        chats.save(begun, OLD)
        chats.request_cancel("c")
        chats.cancelled(["t1", "t2"])
        chats.finish("c", "a", OLD, "t1")
        chats.records("c")
        chats.mark_closing("c", OLD)
        chats.idle(shard("c"), 0)
        chats.delete("c", "a", OLD)

    everything()
    with real.round_trips() as sent:
        everything()
    assert sent == [*["EVALSHA"] * 3, "MGET", *["EVALSHA"] * 5]


@IN_REDIS
def test_a_server_that_has_forgotten_the_scripts_is_told_them(real):
    """A restart, or a replica that took over."""
    real.chats.begin("c", "a", OLD, "t1")
    real.admin.script_flush()
    with real.round_trips() as sent:
        assert real.chats.begin("c", "a", OLD, "t2").chat.turn == "t2"
        real.chats.begin("c", "a", OLD, "t3")
    assert sent == ["EVALSHA", "EVAL", "EVALSHA"]


@IN_REDIS
def test_records_outlive_the_server(server, real):
    """They are written to disk as the lease table is."""
    saved = real.chats.begin("c", "a", OLD, "t1").chat
    server.restart()
    assert real.chats.records("c") == [saved]
    assert real.chats.idle(shard("c"), 0) == ["c"]


@IN_REDIS
def test_records_never_expire(real):
    """Only marks of cancelled turns do; nothing stays of a chat that was deleted."""
    real.chats.begin("c", "a", OLD, "t1")
    real.chats.request_cancel("c")
    mark, index, record = real.key("cancel:t1"), real.key(f"chats:{shard('c')}"), real.key("chat:c")
    assert real.keys() == sorted([mark, index, record])
    assert (real.admin.ttl(index), real.admin.ttl(record)) == (-1, -1)
    real.chats.mark_closing("c", OLD)
    real.chats.delete("c", "a", OLD)
    assert real.keys() == [mark]


@IN_REDIS
def test_a_command_that_the_client_repeats_is_no_second_attempt(real):
    """The connection broke after Redis had heard: that is the same call, not another one of the same turn."""
    client = real.chats.client
    execute = client.execute_command
    client.execute_command = lambda *command, **options: [execute(*command, **options) for _ in range(2)][1]
    try:
        assert not real.chats.begin("c", "a", OLD, "t1").repeated
        assert real.chats.begin("c", "a", OLD, "t1").repeated
    finally:
        del client.execute_command


@IN_REDIS
def test_fields_of_a_newer_version_are_ignored_and_kept(real):
    """An older node in a rolling update reads the record and does not lose what it does not know."""
    real.chats.begin("c", "a", OLD, "t1")
    real.store("c", "a", json.dumps({**real.stored("c", "a"), "mood": "good"}))
    chat = one(real.chats)
    assert real.chats.save(replace(chat, session_id="s"), OLD).session_id == "s"
    assert real.stored("c", "a")["mood"] == "good"


@IN_REDIS
def test_fields_that_an_older_version_did_not_write_have_their_defaults(real):
    """Down to a record of nothing."""
    real.store("c", "a", "{}")
    chat = one(real.chats)
    assert (chat.session_id, chat.epoch, chat.created, chat.state, chat.turn) == ("", 0, 0.0, "open", "")
    assert not real.chats.begin("c", "a", OLD, "t1").repeated


@pytest.mark.parametrize(
    "record",
    [
        "",
        "[]",
        "7",
        "null",
        "{",
        '{"turn": 5}',
        '{"branch": null}',
        '{"epoch": "x"}',
        '{"epoch": 1800000000000001}',
        '{"epoch": 5}',
        '{"last_active": 5}',
        '{"created": "-1"}',
        '{"state": "gone"}',
        b'{"branch": "\xff"}',
    ],
)
@IN_REDIS
def test_whatever_is_wrong_with_a_record_it_is_named(real, record):
    """No JSON, no object, a field of another type, no UTF-8."""
    real.store("c", "a", record)
    for call in (
        lambda: real.chats.records("c"),
        lambda: real.chats.begin("c", "a", OLD, "t"),
        lambda: real.chats.mark_closing("c", OLD),
        lambda: real.chats.finish("c", "b", OLD, "t") or real.chats.records("c"),
    ):
        with pytest.raises(PoolError, match=r"'c'.*'a' cannot be decoded"):
            call()
    real.chats.delete("c", "a", OLD)
    assert real.chats.records("c") == []


@IN_REDIS
def test_an_index_entry_without_records_goes_with_the_next_close(real):
    """Somebody deleted the record's key by hand."""
    real.chats.begin("c", "a", OLD, "t1")
    real.admin.delete(real.key("chat:c"))
    assert real.chats.idle(shard("c"), 0) == ["c"]
    assert real.chats.mark_closing("c", OLD) == []
    assert real.chats.idle(shard("c"), 0) == []


@IN_REDIS
def test_namespaces_are_apart(server, real):
    """Two apps on one server."""
    other = RealChatRig(server)
    try:
        real.chats.begin("c", "a", OLD, "t1")
        real.lease(shard("c"), NEW)
        assert other.chats.records("c") == []
        assert other.chats.idle(shard("c"), 0) == []
        other.chats.begin("c", "a", OLD, "t1")
    finally:
        other.close()


@IN_REDIS
def test_a_closed_store_leaves_no_connection(server):
    """Also a cluster's, whose client keeps them in pools of its own."""
    rig = RealChatRig(server)
    rig.chats.begin("c", "a", OLD, "t1")
    pools = (
        [rig.chats.client.connection_pool]
        if not server.cluster
        else [node.redis_connection.connection_pool for node in rig.chats.client.get_nodes()]
    )
    connections = [connection for pool in pools for connection in pool._available_connections]
    assert any(connection._sock for connection in connections)
    rig.close()
    assert not any(connection._sock for connection in connections)
