"""A frozen SmolLM2 answers about a picture that only the source has seen.

python demos/quickstart.py [picture]
"""

import sys
from pathlib import Path

from mm_c2c.cli import main

PICTURE = Path(__file__).parent / "scene.webp"
QUESTIONS = ("Where is the dog?", "What is on the right?", "How many things are there?")

if __name__ == "__main__":
    picture = sys.argv[1] if len(sys.argv) > 1 else str(PICTURE)
    for question in QUESTIONS:
        print(f"\n{question}")
        status = main(["ask", "--image", picture, question])
        if status:
            sys.exit(status)
