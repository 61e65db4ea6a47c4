"""A run in; its page and charts out. Ledgers of runs in; their comparison out.

Open run_report.py first.
"""
