"""What people enqueue."""

from tasks.builds import run_build
from tasks.maintenance import close_chat, close_idle_chats, sweep_shard

__all__ = ["close_chat", "close_idle_chats", "run_build", "sweep_shard"]
