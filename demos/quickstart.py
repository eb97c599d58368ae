"""A frozen SmolLM2 answers about a picture that only the source has seen.

python demos/quickstart.py [picture] [--tiny]

`--tiny` takes a target of random weights: no download, and what it says means nothing.
"""

import argparse
import sys
from pathlib import Path

from mm_c2c.cli import main

PICTURE = Path(__file__).parent / "scene.webp"
QUESTIONS = ("Where is the dog?", "What is on the right?", "How many things are there?")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("picture", nargs="?", default=PICTURE)
    parser.add_argument("--tiny", action="store_true", help="a target of random weights")
    args = parser.parse_args()
    for question in QUESTIONS:
        print(f"\n{question}")
        words = ["ask", "--image", str(args.picture), question, *["--tiny"] * args.tiny]
        if status := main(words):
            sys.exit(status)
