import sys

from minireuse.search.command import main

if __name__ == "__main__":
    sys.exit(main())
