"""The whole deployment as plain data: what the lease table and the nodes say of themselves, put together."""

from dataclasses import dataclass
from string import ascii_lowercase, ascii_uppercase
from typing import Any, Self

from pool.cli.nodes import Nodes, Replies
from pool.cli.words import duration, many
from pool.sharding.placement import assign
from pool.sharding.table import Table

SUMS = ("total", "busy", "idle", "connecting", "retired", "waiting", "running", "hits", "connects", "connect_failures")


@dataclass(frozen=True)
class Overview:
    """What ``pool status --json`` prints. A documented interface (`docs/cli.md`): names stay."""

    nodes: list[dict[str, Any]]
    """Each with ``node``, ``answers``, ``state``, ``shards``; and what it answers to `pool_stats`, if it does."""
    shards: dict[str, Any]
    dead: list[str]
    """Nodes that ended without a farewell, and whose messages are not back in their queues yet."""
    problems: list[str]

    @classmethod
    def of(cls, nodes: Nodes) -> Self:
        """Ask all nodes. Raises `Problem`."""
        return cls.made(nodes.table, nodes.ask("pool_stats"), nodes.settings.shards, nodes.trouble)

    @classmethod
    def made(cls, table: Table | None, replies: Replies, shards: int, trouble: str = "") -> Self:
        """Put together what was seen at one moment; *shards*: how many there are unless the table says so."""
        rows = _nodes(table, replies)
        leased = table is not None and (bool(table.living) or not replies.answers)
        held = _leased(table) if leased and table is not None else _static(rows, shards)
        dead = sorted(set(table.dead.values())) if table is not None else []
        problems = [trouble] if trouble else []
        problems += [_silence(row) for row in rows if not row["answers"]]
        if not rows:
            problems.append("no node answers")
        if held["free"]:
            problems.append(f"{many(held['free'], 'shard')} without an owner: their tasks wait")
        if held["settles_in_s"]:
            problems.append(f"the lease table was lost or set back: it settles in {duration(held['settles_in_s'])}")
        problems += [f"{node} is dead: its messages are not back in their queues yet" for node in dead]
        return cls(rows, held, dead, problems)

    @property
    def answering(self) -> int:
        """How many nodes answer."""
        return sum(1 for node in self.nodes if node["answers"])

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over the nodes that answer."""
        sums: dict[str, Any] = {name: sum(node.get(name) or 0 for node in self.nodes) for name in SUMS}
        asked = sums["hits"] + sums["connects"]
        return {**sums, "hit_rate": round(sums["hits"] / asked, 4) if asked else None}

    def told(self) -> dict[str, Any]:
        """Everything, for a program."""
        return {
            "ok": not self.problems,
            "problems": self.problems,
            "nodes": self.nodes,
            "shards": self.shards,
            "totals": self.totals,
            "dead": self.dead,
        }


def letters(nodes: list[dict[str, Any]]) -> dict[str, str]:
    """Give each node a letter for the map of shards; the 53rd and later share one."""
    alphabet = ascii_uppercase + ascii_lowercase
    return {node["node"]: alphabet[index] if index < len(alphabet) else "?" for index, node in enumerate(nodes)}


def _nodes(table: Table | None, replies: Replies) -> list[dict[str, Any]]:
    seen = {each.node: each for each in table.members.values()} if table is not None else {}
    if replies.answers and not any(each.lives for each in seen.values()):
        seen = {}  # what is left of nodes that had leases, where others have fixed shards now
    owned: dict[str, int] = {}
    for lease in table.leases.values() if table is not None else ():
        node = table.members[lease.owner].node if table is not None and lease.owner in table.members else ""
        owned[node] = owned.get(node, 0) + 1
    rows = []
    for node in sorted({*seen, *replies.answers}):
        member, stats = seen.get(node), replies.answers.get(node)
        row: dict[str, Any] = {**(stats or {"shards": owned.get(node, 0)}), "node": node, "answers": stats is not None}
        if stats is None:
            row["state"] = "no answer"
        elif stats.get("draining") or (member is not None and member.state == "draining"):
            row["state"] = "draining"
        else:
            row["state"] = "static" if stats.get("lease_age_s") is None else "ok"
        row["lease_ends_s"] = None if member is None else round(member.ends_in, 3)
        rows.append(row)
    return rows


def _leased(table: Table) -> dict[str, Any]:
    living = table.living
    total = table.shards or 0
    owners: dict[str, list[int]] = {}
    current = {}
    for shard in range(total):
        seen = table.owner(shard)
        if seen is not None:
            owners.setdefault(seen.node, []).append(shard)
            current[shard] = seen.node
    target = assign(total, [node for node, seen in living.items() if seen.state == "active"], current)
    moving = [shard for shard, node in current.items() if target.get(shard, node) != node]
    return {
        "total": total,
        "owned": len(current),
        "free": total - len(current),
        "moving": moving,
        "owners": owners,
        "settles_in_s": round(table.settles_in, 3),
    }


def _static(rows: list[dict[str, Any]], shards: int) -> dict[str, Any]:
    """Without leases each node says how many it has, and not which."""
    owned = min(shards, sum(row.get("shards") or 0 for row in rows))
    return {"total": shards, "owned": owned, "free": shards - owned, "moving": [], "owners": {}, "settles_in_s": 0.0}


def _silence(row: dict[str, Any]) -> str:
    ends = row["lease_ends_s"]
    told = f"{row['node']} does not answer"
    if ends is None:
        return told
    if ends <= 0:
        return f"{told}: its leases ended {duration(-ends)} ago"
    return f"{told}: its leases end in {duration(ends)} unless it renews them"
