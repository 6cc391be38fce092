"""An account of builds that the build host keeps by itself: who worked for which key, and who else did at that moment.

Each build is the shell script `COMMAND`. It appends a line when it starts and one when it ends, and holds a lock for
as long as a process of it lives. A build that starts first takes its own lock and then tries those of its key: so of two
builds that overlap, the later one says so, also if the other was killed and could not say when it ended.
"""

import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

COMMAND = r"""
mine="$LEDGER/locks/$LEDGER_KEY~$LEDGER_WORKER~$LEDGER_BUILD"
exec 9>"$mine"
flock 9
beside=-
for other in "$LEDGER/locks/$LEDGER_KEY~"*; do
  [ "$other" = "$mine" ] || flock -n -s "$other" true || beside="$beside ${other##*/}"
done
read -r _ _ _ _ group _ <"/proc/$$/stat"
head="$LEDGER_BUILD $LEDGER_KEY $LEDGER_EPOCH $LEDGER_TASK $LEDGER_WORKER $LEDGER_SECONDS"
printf 'start %s %s %s %s\n' "$(date +%s%N)" "$head" "$group" "$beside" >>"$LEDGER/lines"
[ "$LEDGER_SECONDS" = 0 ] || sleep "$LEDGER_SECONDS"
printf 'end %s %s\n' "$(date +%s%N)" "$LEDGER_BUILD" >>"$LEDGER/lines"
rm -f "$mine"
"""
"""For ``/bin/sh``; its ``LEDGER...`` variables are those of `environment`."""


def environment(folder: str, key: str, epoch: int, task: str, node: str, pid: int, seconds: float) -> dict[str, str]:
    """What `COMMAND` is told by the task that runs it."""
    return {
        "LEDGER": folder,
        "LEDGER_KEY": key,
        "LEDGER_EPOCH": str(epoch),
        "LEDGER_TASK": task,
        "LEDGER_WORKER": f"{node}:{pid}",
        "LEDGER_BUILD": secrets.token_hex(6),
        "LEDGER_SECONDS": f"{seconds:g}",
    }


@dataclass(frozen=True)
class Build:
    """One run of the command. Times are the host's, in nanoseconds."""

    id: str
    key: str
    epoch: int
    task: str
    worker: str
    """Node and process id."""
    seconds: float
    """How long it was meant to take."""
    group: int
    """Process group at the host."""
    began: int
    ended: int | None = None
    """None: it was killed, or still runs."""
    beside: tuple[tuple[str, str], ...] = ()
    """Worker and id of each build of the key that ran when this one started."""

    @property
    def node(self) -> str:
        return self.worker.rpartition(":")[0]


class Overlap(NamedTuple):
    """Two worker processes that worked for one key at once."""

    build: Build
    other: str
    """The other worker."""


@dataclass
class Account:
    """What `check` has found; everything but ``duplicates`` and ``killed`` must be empty, always."""

    lost: list[str] = field(default_factory=list)
    """Tasks that were sent and have not run to the end."""
    overlaps: list[Overlap] = field(default_factory=list)
    backwards: list[tuple[Build, Build]] = field(default_factory=list)
    """A build under an epoch below that of an earlier one of its key, or under the same one on another node."""
    unowned: list[Build] = field(default_factory=list)
    """Builds whose worker did not own the key."""
    crowded: list[Build] = field(default_factory=list)
    """Builds that were one too many for their key."""
    strangers: list[str] = field(default_factory=list)
    """Tasks that nobody has sent."""
    duplicates: dict[str, int] = field(default_factory=dict)
    """Tasks that have run to the end more than once, and how often."""
    killed: list[Build] = field(default_factory=list)

    @property
    def wrong(self) -> dict[str, list[object]]:
        """Everything that breaks a promise."""
        parts = ("lost", "overlaps", "backwards", "unowned", "crowded", "strangers")
        return {name: found for name in parts if (found := getattr(self, name))}


class Ledger:
    """The folder at the host. *folder* is made, for any account to write to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for made in (folder, folder / "locks"):
            made.mkdir()
            made.chmod(0o777)
        (folder / "lines").touch()
        (folder / "lines").chmod(0o666)

    def builds(self) -> list[Build]:
        """All builds up to now, in the order of their start lines."""
        return read((self.folder / "lines").read_text())

    def ended(self) -> set[str]:
        """Tasks that have run to the end."""
        return {build.task for build in self.builds() if build.ended is not None}


def read(text: str) -> list[Build]:
    """Return the builds that the lines tell of. Raises ValueError for a line that no build has written."""
    started: dict[str, list[str]] = {}
    ends: dict[str, int] = {}
    for line in text.splitlines():
        kind, *words = line.split()
        if kind == "start" and len(words) >= 9:
            started[words[1]] = words
        elif kind == "end" and len(words) == 2:
            ends[words[1]] = int(words[0])
        else:
            raise ValueError(f"not a line of the ledger: {line!r}")
    return [_build(words, ends.get(name)) for name, words in started.items()]


def _build(words: list[str], ended: int | None) -> Build:
    began, name, key, epoch, task, worker, seconds, group, _mark, *others = words
    beside = tuple((other.split("~")[1], other.split("~")[2]) for other in others)
    return Build(name, key, int(epoch), task, worker, float(seconds), int(group), int(began), ended, beside)


def check(builds: Iterable[Build], sent: Iterable[str], key_concurrency: int, doubtful: Iterable[str] = ()) -> Account:
    """Hold the builds against what was promised. *doubtful*: tasks of which it is unknown whether they were sent."""
    builds = list(builds)
    expected = set(sent)
    finished = Counter(build.task for build in builds if build.ended is not None)
    account = Account(
        lost=sorted(expected - finished.keys()),
        unowned=[build for build in builds if not build.epoch],
        strangers=sorted({build.task for build in builds} - expected - set(doubtful)),
        duplicates={task: count for task, count in finished.items() if count > 1},
        killed=[build for build in builds if build.ended is None],
    )
    by_key: Mapping[str, list[Build]] = defaultdict(list)
    for build in builds:
        by_key[build.key].append(build)
    for of_key in by_key.values():
        account.overlaps += _overlaps(of_key)
        account.backwards += _backwards(of_key)
        account.crowded += [build for build in of_key if _with_it(build, of_key) > key_concurrency]
    return account


def _overlaps(builds: list[Build]) -> list[Overlap]:
    """As the starting builds saw it, and as the times of those that ended say."""
    found = {(build.id, other): Overlap(build, other) for build in builds for other in _others(build, builds)}
    return list(found.values())


def _others(build: Build, builds: list[Build]) -> set[str]:
    seen = {worker for worker, _id in build.beside}
    timed = {other.worker for other in builds if other.ended and other.began < build.began < other.ended}
    return (seen | timed) - {build.worker}


def _with_it(build: Build, builds: list[Build]) -> int:
    """How many builds ran right after this one had started. Locks are held a little longer than a task's turn."""
    known = {other.id: other for other in builds}
    seen = [known[other] for _worker, other in build.beside if other in known]
    return 1 + sum(1 for other in seen if other.began <= build.began and (other.ended or build.began) >= build.began)


def _backwards(builds: list[Build]) -> list[tuple[Build, Build]]:
    found = []
    highest = builds[0]
    for build in builds[1:]:
        elsewhere = build.node != highest.node
        if (build.epoch < highest.epoch and build.worker != highest.worker) or (
            build.epoch == highest.epoch and elsewhere
        ):
            found.append((highest, build))
        if build.epoch > highest.epoch:
            highest = build
    return found
