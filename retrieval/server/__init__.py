"""Labelled folders in; the evaluation server of a competition and its leaderboard out.

Open endpoint.py first: it answers the POST of a submission. The others: answer_key.py, scoring.py (parse,
judge, score), rules.py, database.py, app.py (the pages), serve.py (start it).
"""
