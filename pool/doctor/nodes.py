"""Nodes: whom the lease table knows, who answers, and whether every shard has an owner."""

from collections.abc import Iterator

from pool.doctor.deployment import Deployment
from pool.doctor.finding import Finding, error, info, many, ok, warning
from pool.sharding.table import Table

SHOWN = 8
"""Names or shards in one sentence, at most."""


def check_nodes(deployment: Deployment) -> Iterator[Finding]:
    """Compare the lease table, read before and after the question, with those who answer."""
    before = deployment.table()
    answering = deployment.answering()
    table = deployment.table()
    seats = table.living if table is not None else {}
    outside = answering - set(seats)
    consumed = _consumed(deployment, outside) if outside else {}
    found = [
        *_differing(deployment, table),
        *_members(table, answering),
        *_outsiders(table, outside, consumed),
        *_shards(deployment, before, table, consumed),
    ]
    yield from found
    if not found:
        yield ok(
            "nodes",
            f"{many(len(answering), 'node')} on the broker; all {deployment.settings.shards} shards have an owner.",
        )


def _consumed(deployment: Deployment, nodes: set[str]) -> dict[str, set[int]]:
    """The shards whose queues these nodes consume, for nodes that consume any."""
    router = deployment.app.warm_pool.router
    found = {}
    for node, queues in deployment.inspect("active_queues", nodes).items():
        shards = {router.shard_in(queue) for queue in queues if router.is_shard_queue(queue["name"])} - {None}
        if shards:
            found[node] = shards
    return found


def _differing(deployment: Deployment, table: Table | None) -> Iterator[Finding]:
    settings = deployment.settings
    if table is not None and table.living and table.shards not in (None, settings.shards):
        yield error(
            "shards-differ",
            f"POOL_SHARDS={settings.shards} here, but the nodes have {table.shards}.",
            "Keys go to other queues than the nodes think: sending is refused.",
            f"POOL_SHARDS={table.shards} here, or stop all nodes and change it everywhere.",
        )


def _members(table: Table | None, answering: set[str]) -> Iterator[Finding]:
    if table is None:
        return
    for seat in table.members.values():
        if not seat.lives and not table.living:
            yield warning(
                "node-dead",
                f"{seat.node} has sent no heartbeat for longer than POOL_LEASE_TTL, and no node is there to take over.",
                "The tasks of its shards wait.",
                "Start a node.",
            )
        elif seat.lives and seat.node not in answering:
            yield warning(
                "node-silent",
                f"{seat.node} holds leases, but does not answer on the broker.",
                "Its connection to the broker is lost, or its main thread hangs: the tasks of its shards wait.",
                "Look into its log; if it does not recover, restart it: the others take its shards over.",
            )
        elif seat.lives and seat.state == "draining":
            yield info(
                "node-draining",
                f"{seat.node} is draining: it hands its shards over and takes none.",
                "It works again only when told so.",
                f"celery -A worker_config control pool_undrain -d {seat.node}",
            )


def _outsiders(table: Table | None, outside: set[str], consumed: dict[str, set[int]]) -> Iterator[Finding]:
    for node in sorted(outside):
        shards = consumed.get(node, set())
        twice = {shard for shard in shards if table is not None and table.owner(shard)}
        if twice:
            yield error(
                "shard-twice",
                f"{node} consumes {_some(twice)}, which by the lease table belong to other nodes.",
                "Two nodes work for the same keys.",
                f"Stop {node}; start it without POOL_NODE_SHARDS, with the code that the others have.",
            )
        elif shards:
            yield info(
                "node-static",
                f"{node} has {many(len(shards), 'shard')} for good (POOL_NODE_SHARDS), and no lease.",
                "Nobody takes over from it: while it is down, their tasks wait.",
            )
        else:
            yield info(
                "node-foreign",
                f"{node} answers on the broker, and consumes no shard queue.",
                "It is a worker without the pool, or it is starting or stopping.",
            )


def _shards(
    deployment: Deployment, before: Table | None, table: Table | None, consumed: dict[str, set[int]]
) -> Iterator[Finding]:
    seats = table.living if table is not None else {}
    if not seats and not consumed:
        yield warning("no-nodes", "No node runs.", "Tasks wait.", "celery -A worker_config worker")
        return
    if seats and all(seat.state == "draining" for seat in seats.values()) and not consumed:
        yield warning(
            "all-draining",
            f"No node takes shards: {many(len(seats), 'node')} draining.",
            "Nobody takes their shards: once handed over, the tasks of these wait.",
            "celery -A worker_config control pool_undrain, or start a node.",
        )
    fixed = set().union(*consumed.values())
    unowned = [
        shard
        for shard in range(deployment.settings.shards)
        if shard not in fixed and not any(look is not None and look.owner(shard) for look in (before, table))
    ]
    if unowned and (table is None or table.settles_in <= 0):
        yield warning(
            "shards-unowned",
            f"Nobody owns {_some(set(unowned))}.",
            "Their tasks wait.",
            "Look again in a moment, after a start or takeover. With POOL_NODE_SHARDS: start the nodes that have them.",
        )


def _some(shards: set[int]) -> str:
    if len(shards) == 1:
        return f"shard {next(iter(shards))}"
    first = ", ".join(map(str, sorted(shards)[:SHOWN]))
    return f"{len(shards)} shards ({first}{', ...' if len(shards) > SHOWN else ''})"
