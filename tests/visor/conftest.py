"""Puts this folder on the import path, so that tests share `tiny_models`; one thread, as models are tiny."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
