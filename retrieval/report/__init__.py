"""A run in; its page and charts out. Ledgers of runs in; their comparison out.

Open run_report.py first: it puts the page together from results.py (the record), viewer.py (queries and
matches), embedding_map.py, charts.py and thumbnails.py. comparison.py compares what ledgers.py reads.
"""
