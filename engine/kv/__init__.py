"""Pages of KV memory: who holds them, which prompts share them, how many there are."""
