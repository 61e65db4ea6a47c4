"""A labelled folder in; a fine-tuned network whose embeddings retrieve better out.

Open training.py first: it runs the epochs. steps.py takes a step, losses.py holds `supcon_loss`, and
variants.py lists the losses.
"""
