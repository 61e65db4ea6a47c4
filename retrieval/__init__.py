"""Images → embeddings → ranking → score: one room a step."""
