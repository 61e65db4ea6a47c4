"""A ranking in; a checked submission.json, its POST to the server and the outcome out.

Open submission_file.py first.
"""
