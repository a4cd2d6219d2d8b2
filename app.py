"""Serves the page: vanilla CLIP beside its defences, on a picture that is attacked or not.

python app.py
python app.py --backbone ViT-B-16 --device cuda
python app.py --mcp
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported

from tapt.commands.bars import download_bar
from tapt.ui.serve import build, launch, parse_args

args = parse_args() if __name__ == "__main__" else parse_args([])
demo = build(args, download_bar())

if __name__ == "__main__":
    launch(demo, args)
