"""Turns: a prompt for the coding agent that remembers the chat."""

import os
from dataclasses import asdict
from typing import Any

from celery import shared_task

from pool import CHAT_LANE, ConfigError, InvalidKey, PooledTask, TurnFailed, check_prompt


@shared_task(
    base=PooledTask,
    bind=True,
    key="chat_id",
    lane=CHAT_LANE,
    retry_exhausted=True,
    progress=True,
    throws=(TurnFailed, ConfigError, InvalidKey),
)
def run_turn(
    self: PooledTask, chat_id: str, agent: str, prompt: str, *, timeout: float | None = None
) -> dict[str, Any]:
    """Have *agent*, as the hosts file names it, work on *prompt* in the chat. One turn of a chat at a time, in order.

    *timeout*: seconds, then the turn is cancelled. Returns ``text``, ``stop_reason`` (``end_turn``, ...),
    ``tool_calls``, ``permissions`` (what was asked for, and the policy's answer), ``usage`` (None: the agent does not
    say), ``truncated``; ``warm`` (the agent ran and had the session), ``resumed`` (an old session was brought back),
    ``memory_lost`` (there was one, and it could not be: the agent has forgotten the chat), ``repeated`` (this task ran
    before, on a node that died: the agent may have heard the prompt twice); ``worktree``, ``branch``, ``session_id``,
    ``key``, ``agent``, ``node`` and ``pid`` of the worker process.

    Fails with `TurnFailed` (the agent refused, died or talked nonsense), `TurnTimeout`, `ConfigError` (no such agent,
    an empty prompt). While the agent's host is unavailable, or all places for agents are taken, it is retried.
    """
    check_prompt(prompt)  # before an agent is started for it
    with self.chat(agent) as chat:
        turn = chat.prompt(prompt, timeout=timeout)
        session = chat.session
        return {
            **asdict(turn),
            "warm": chat.warm,
            "resumed": session.resumed,
            "memory_lost": session.memory_lost,
            "repeated": chat.repeated,
            "session_id": session.session_id,
            "worktree": session.worktree,
            "branch": session.branch,
            "key": chat_id,
            "agent": agent,
            "node": self.request.hostname,
            "pid": os.getpid(),
        }
