"""A decode rank: one slot of the expert-parallel group, its experts, and the KV of its requests."""
