"""kvchat: many chats in one paged KV pool. The public surface is the command line (see cli)."""

__version__ = "0.1.0"

__all__ = ["__version__"]
