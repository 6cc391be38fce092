"""Chat with a coding agent of the hosts file, in a terminal:

python examples/chat.py CHAT AGENT

A worker with the same POOL_* variables must run. ``/agent NAME`` goes on with another agent, ``/close`` ends the chat
for good, everything else is said to the agent. Ctrl-C cancels a running turn, Ctrl-D leaves; the chat can be continued.
"""

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

import worker_config  # noqa: F401 - configures Celery for whoever sends tasks
from tasks import cancel_turn, close_chat, run_turn

with suppress(ImportError):
    import readline  # noqa: F401 - input() gets line editing and a history

LOOK = 0.05  # seconds between two looks at whether a task is done
console = Console(markup=False, highlight=False, soft_wrap=True)


def note(text: str, style: str = "dim") -> None:
    console.print(text, style=style)


def turn(chat: str, agent: str, prompt: str) -> None:
    """Have the agent work on a prompt, and show what comes of it."""
    result = run_turn.delay(chat, agent, prompt)
    while True:
        try:
            while not result.ready():
                time.sleep(LOOK)
            break
        except KeyboardInterrupt:
            if not cancel_turn(chat)["cancelled"]:  # its agent is still starting, or it waits for another turn
                result.revoke()
                note("\nnot waited for any more")
                return
            note("\ncancelling ...")
    show(result.get())


def show(answer: dict[str, Any]) -> None:
    if answer["memory_lost"]:
        note("the agent has lost its memory of this chat: it begins anew", "yellow")
    if answer["resumed"]:
        note("resumed: the agent was started anew, and remembers the chat")
    if answer["repeated"]:
        note("a node died in this turn, which ran again: the agent may have heard it twice", "yellow")
    for call in answer["tool_calls"]:
        note(f"{call['kind']}: {call['title']} ({call['status']})")
    for asked in answer["permissions"]:
        if asked["answer"] == "deny":
            note(f"not allowed: {asked['kind']}: {asked['title']}", "yellow")
    console.print(answer["text"].rstrip() or "(no answer)")
    if answer["truncated"]:
        note("... and more, which is not kept")
    if answer["stop_reason"] != "end_turn":
        note(answer["stop_reason"], "yellow")


def close(chat: str) -> None:
    ended = close_chat.delay(chat).get(timeout=120)["agents"]
    note(f"closed: {', '.join(ended) or 'nothing was open'}")
    for agent, left in ended.items():
        if left:
            note(f"{agent}: {left}")


def main(chat: str, agent: str) -> None:
    while True:
        try:
            line = input(f"{agent}> " if sys.stdin.isatty() else "").strip()
            if line == "/close":
                close(chat)
            elif line.startswith("/agent "):
                agent = line.removeprefix("/agent ").strip()
            elif line:
                turn(chat, agent, line)
        except EOFError:
            break
        except KeyboardInterrupt:  # at the prompt, as in a shell
            print()
        except Exception as error:
            note(f"{type(error).__name__}: {' '.join(str(error).split())}", "red")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/chat.py CHAT AGENT")
    main(*sys.argv[1:])
