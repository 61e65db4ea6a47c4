"""Labelled folders in; the evaluation server of a competition and its leaderboard out.

Open serve.py first, then app.py.
"""
