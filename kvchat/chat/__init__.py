"""Conversations: tokenizers, templates, sessions and their library. Knows no torch."""
