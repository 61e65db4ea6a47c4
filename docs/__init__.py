"""The pages on the project, and what writes those of them that follow from the code."""
