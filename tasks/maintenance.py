"""Looking after the pool by hand; beat does it on its own."""

from pool import close_chat, close_idle_chats, sweep_shard

__all__ = ["close_chat", "close_idle_chats", "sweep_shard"]
