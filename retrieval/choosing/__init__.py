"""A labelled folder, queries, a gallery and some minutes in; the recipe that evidence favours out.

Open search.py first: it tries recipes (recipes.py) on labelled images laid out as on the day (days.py), and
takes a step only where it pays (evidence.py). choose.py is its script.
"""
