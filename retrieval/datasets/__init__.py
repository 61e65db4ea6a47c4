"""A folder or an archive of images in; train, test/query and test/gallery, which share no image, out.

Open layouts.py first.
"""
