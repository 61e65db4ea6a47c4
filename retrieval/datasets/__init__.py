"""A folder or an archive of images in; train, test/query and test/gallery without duplicates out.

Open layouts.py first.
"""
