"""Images and a backbone in; their unit vectors out, from torch, ONNX Runtime or the cache of earlier runs.

Open embed.py first.
"""
