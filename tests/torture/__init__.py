"""Campaigns of seeded faults, which run for as long as one likes: `python -m tests.torture.images`."""
