"""How much memory the processes of an agent hold."""

from typing import Any


def resident(group: int) -> int:
    """Return the resident memory, in bytes, of a process of this machine and its descendants. Blocks: reads /proc.

    What its processes share is counted once for each.
    """
    import psutil

    def of(process: Any) -> int:
        try:
            return int(process.memory_info().rss)
        except psutil.Error:
            return 0

    try:
        first = psutil.Process(group)
        family = [first, *first.children(recursive=True)]
    except psutil.Error:
        return 0
    return sum(of(process) for process in family)
