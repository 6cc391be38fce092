"""What people enqueue."""

from tasks.builds import run_build
from tasks.maintenance import cancel_turn, close_chat, close_idle_chats, sweep_shard
from tasks.turns import run_turn

__all__ = ["cancel_turn", "close_chat", "close_idle_chats", "run_build", "run_turn", "sweep_shard"]
