"""Images → embeddings → ranking → score: one room a step."""

from importlib.util import find_spec

for needed in ("pydantic_settings", "dotenv", "requests", "tqdm"):  # get_images sees to its own
    if find_spec(needed) is None:
        hint = "run `make demo` once and `source .venv/bin/activate`, or `pip install -r requirements.txt`"
        raise SystemExit(f"error: No module named {needed!r}: {hint}")
