"""A model name in; its network with the transform and the weights it was trained with out.

Open backbone.py first; zoo.py is the table of the names, timm_names.py makes a row of timm's.
"""
