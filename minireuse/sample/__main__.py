import sys

from minireuse.sample.command import main

if __name__ == "__main__":
    sys.exit(main())
