import sys

from minireuse.evaluate.command import main

if __name__ == "__main__":
    sys.exit(main())
