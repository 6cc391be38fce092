"""``pool explain KEY``: where a key's work runs, why, and how warm it is."""

from collections.abc import Iterator
from time import localtime, strftime, time
from typing import Any

import click

from pool.cli.backends import name, state
from pool.cli.command import OK, WRONG, command, timeout_option
from pool.cli.nodes import Nodes
from pool.cli.screen import Cell, Screen, facts
from pool.cli.words import duration, many
from pool.keys import check_key
from pool.sharding.hashing import key_hash, queue_name, shard_of


@command
@click.argument("key")
@timeout_option
def explain(app: Any, screen: Screen, key: str, timeout: float) -> int:
    """Tell where a key's work runs, and why there.

    Also what its backend does, what runs on it and what ran last.

    Exits with 1 if nobody owns the key's shard, or its owner does not answer.
    """
    check_key(key)
    told = explained(Nodes(app, timeout), key)
    screen.tell(told)
    screen.show(facts(_facts(told)))
    for problem in told["problems"]:
        screen.note(problem, "bold red")
    return WRONG if told["problems"] else OK


def explained(nodes: Nodes, key: str) -> dict[str, Any]:
    """What is known of the key: from its owner, or from the lease table if that does not answer. Raises `Problem`."""
    settings = nodes.settings
    shard = shard_of(key, settings.shards)
    told: dict[str, Any] = {
        "key": key,
        "hash": f"{key_hash(key):016x}",
        "shard": shard,
        "shards_total": settings.shards,
        "queue": queue_name(shard, settings.namespace),
        "owner": None,
        "answers": False,
        "problems": [nodes.trouble] if nodes.trouble else [],
    }
    table, problems = nodes.table, told["problems"]
    seen = table.owner(shard) if table is not None else None
    if seen is not None and table is not None:
        told |= {"owner": seen.node, "epoch": table.leases[shard].epoch, "lease_ends_s": round(seen.ends_in, 3)}
        replies = nodes.ask("pool_explain", to=[seen.node], key=key)
        answer = replies.answers.get(seen.node)
    else:
        replies = nodes.ask("pool_explain", key=key)  # shards without leases: whoever says that it is his
        owners = [(node, reply) for node, reply in replies.answers.items() if reply.get("owns")]
        told["owner"], answer = owners[0] if owners else (None, None)
    if answer is not None:
        told |= {**answer, "owner": told["owner"], "answers": True}
        if not answer.get("owns"):
            problems.append(f"{told['owner']} has the lease, and does not work for the shard at this moment")
    elif told["owner"]:
        ends = duration(told["lease_ends_s"])
        problems.append(
            f"{told['owner']} does not answer: this is what the lease table says; its lease ends in {ends} unless it"
            " renews it"
        )
    else:
        problems.append(f"nobody owns shard {shard}: tasks of {key} wait in {told['queue']}")
    if table is not None and table.shards not in (None, settings.shards):
        problems.append(f"the nodes count {table.shards} shards, and POOL_SHARDS here is {settings.shards}")
    return told


def _facts(told: dict[str, Any]) -> Iterator[tuple[str, Cell | list[Cell]]]:
    yield "key", told["key"]
    yield "hash", f"{told['hash']}  (shard {told['shard']} of {told['shards_total']})"
    yield "queue", told["queue"]
    owner = told["owner"]
    if owner is None:
        yield "owner", ("nobody", "bold red")
        return
    epoch = f", epoch {told['epoch']}" if told.get("epoch") else ""
    yield "owner", f"{owner}{epoch}" if told["answers"] else (f"{owner}{epoch}, no answer", "bold red")
    if not told["answers"]:
        return
    if told.get("since"):
        yield "since", f"{_moment(told['since'])}, {duration(time() - told['since'])} ago"
    came = f", {told['how']}" if told.get("how") else ""
    yield "state", f"{told.get('state') or 'not here'}{came}"
    if told.get("why") and told["why"] != told.get("how"):
        yield "why", told["why"]
    yield "backends", [_backend(row) for row in told.get("backends", ())] or "none open"
    yield "running", [_run(run) for run in told.get("running", ())] or "nothing"
    if told.get("waiting"):
        yield "waiting", many(told["waiting"], "task")
    yield "last", [_ended(run) for run in told.get("last", ())] or "nothing that this node knows of"


def _backend(row: dict[str, Any]) -> Cell:
    text, style = state(row)
    since = duration(row["busy_s"] if row.get("busy_s") is not None else row.get("idle_s"))
    uses, age = many(row.get("uses") or 0, "use"), duration(row.get("age_s"))
    mode = f" ({row['mode']})" if row.get("mode") else ""
    return f"{name(row)}{mode}: {text} for {since or '0 s'}, {uses}, open for {age}", style


def _run(run: dict[str, Any]) -> Cell:
    return (
        f"{run['name']} for {duration(run['seconds'])}, {many(run['lines'], 'line')}  {run['task_id']}",
        "yellow",
    )


def _ended(run: dict[str, Any]) -> Cell:
    ago = duration(max(0.0, time() - run["ended"])) if run.get("ended") else "?"
    told = f"{run['state']} {run['name']} after {duration(run['seconds'])}, {ago} ago  {run['task_id']}"
    return told, "" if run["state"] == "SUCCESS" else "red"


def _moment(at: float) -> str:
    today = strftime("%Y-%m-%d") == strftime("%Y-%m-%d", localtime(at))
    return strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S", localtime(at))
