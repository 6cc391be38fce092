"""Messages that dead nodes had taken from a Redis broker and nobody has put back (`pool.worker.claims`)."""

from collections.abc import Iterator

from redis.exceptions import RedisError

from pool.doctor.checks import Unreachable
from pool.doctor.deployment import Deployment
from pool.doctor.finding import Finding, info, many, ok, said, warning
from pool.errors import ConfigError
from pool.sharding.table import Table
from pool.worker.claims import claimants
from pool.worker.takeover import RedisTakeover, takeover_for


def check_messages(deployment: Deployment) -> Iterator[Finding]:
    """Look at everybody who is registered as holding messages."""
    try:
        takeover = takeover_for(deployment.app, deployment.settings)
    except ConfigError as problem:
        raise Unreachable(f"Nodes would not start: {said(problem)}") from problem
    if not isinstance(takeover, RedisTakeover):
        return  # RabbitMQ delivers them again by itself
    with deployment.broker():  # says it in time if it does not answer
        pass
    answering = deployment.answering()
    namespace = deployment.settings.namespace
    try:
        client = takeover._redis()
        holders = {name: int(client.hlen(f"{namespace}.claims.{name}")) for name in claimants(client, namespace)}
        stock = int(client.hlen("unacked"))
    except (RedisError, OSError) as problem:
        raise Unreachable(f"The broker does not tell who has taken messages: {said(problem)}") from problem
    table = deployment.table()  # after: a node registers only once it has joined
    found = []
    for name, held in sorted(holders.items()):
        if held and not _lives(name, table, answering):
            found.append(_report(deployment, takeover, table, name, held))
    yield from found
    if stock and not answering:
        yield info(
            "messages-unacked",
            f"Taken by workers without the pool and not acknowledged: {many(stock, 'message')} (hash 'unacked').",
            "Delivered again when visibility_timeout has passed and such a worker runs.",
        )
    if not found:
        yield ok("messages", f"No dead node holds messages; {len(holders)} live ones may.")


def _lives(claimant: str, table: Table | None, answering: set[str]) -> bool:
    if claimant.partition("/")[0] in answering:  # it puts back what a former life of its has left
        return True
    seat = table.members.get(claimant) if table is not None else None
    return seat is not None and seat.lives


def _report(deployment: Deployment, takeover: RedisTakeover, table: Table | None, name: str, held: int) -> Finding:
    node, _, life = name.partition("/")
    what = f"{node} had taken {many(held, 'message')}, is not there any more, and nobody has put them back."
    why = "Their tasks wait."
    if not life:
        return warning(
            "messages-left",
            what,
            f"{why} Its shards are its own for good, and so are they.",
            f"celery -A worker_config worker -n {node}: a node of this name puts them back.",
        )
    seat = table.members.get(name) if table is not None else None
    # By the rule of the nodes themselves: who is no member any more is dead; one TTL more, for our own clock's sake.
    known = table is not None and table.shards is not None and table.settles_in <= 0
    sure = known and (seat is None or -seat.ends_in > deployment.settings.lease_ttl)
    if not (deployment.fix and sure):
        return warning("messages-left", what, why, "Start a node: it puts them back; or run doctor with --fix.")
    moved = takeover.restore(name)
    return warning(
        "messages-left", what, why, f"Back at the front of the queues: {many(moved, 'message')}.", fixed=True
    )
