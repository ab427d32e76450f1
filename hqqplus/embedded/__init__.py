"""The embedded default: a small language model and a corpus that every machine already has.

`corpus` builds documents from the interpreter's own documentation; `pretrain` is the script that trained the
committed model on them; `model/` holds its weights, tokenizer and card.
"""

from pathlib import Path

MODEL_NAME = "embedded:pydoc"
DATA_NAME = "embedded:pydoc"
MODEL_DIR = Path(__file__).parent / "model"
