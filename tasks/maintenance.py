"""Looking after the pool by hand; beat does it on its own."""

from pool import cancel_turn, close_chat, close_idle_chats, sweep_shard

__all__ = ["cancel_turn", "close_chat", "close_idle_chats", "sweep_shard"]
