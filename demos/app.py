"""The page: ask about a picture, all arms side by side; also what a Hugging Face Space runs.

python demos/app.py [--tiny] [--port 7860] [--share --auth user:password]
"""

import sys

from mm_c2c.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
