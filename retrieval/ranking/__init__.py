"""Embeddings of queries and gallery in; the nearest gallery images of each query out.

Open exact.py first.
"""
