"""Answers with `choices`, which chats and completions have in common."""
