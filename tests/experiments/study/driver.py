"""`luthier sweep` with the stand-in for its runs, as a process that a test can kill: driver.py STUDY [ARGUMENTS]..."""

import sys
from pathlib import Path

from luthier.cli import main
from luthier.experiments.study import runner

runner.TRAIN = (sys.executable, str(Path(__file__).with_name("trainer.py")))

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
